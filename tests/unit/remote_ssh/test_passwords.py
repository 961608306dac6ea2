"""Logins with a password, which only paramiko can use; and that nobody gets to see it."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from stagefs.config import SshSettings
from stagefs.errors import AccessDenied, RemoteError
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.ssh import SshRemote
from tests.unit.remote_ssh import password_server
from tests.unit.remote_ssh.password_server import PASSWORD, USER
from tests.unit.remote_ssh.test_faults import engine_pid

SHOWN = (PASSWORD, quote(PASSWORD, safe=""))


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "config").write_text(
        f"UserKnownHostsFile {tmp_path}/known\nIdentitiesOnly yes\nIdentityFile /nowhere\n"
    )
    with password_server.running(tmp_path / "known") as port:
        yield port


def remote_for(
    tmp_path: Path, port: int, password: str, client: str = "auto"
) -> tuple[SshRemote, str]:
    """A remote as the registry makes it, and the public URL of a file."""
    (tmp_path / "file").write_bytes(b"12345")
    credentials = CredentialStore(None)
    given = f"ssh://{USER}:{quote(password, safe='')}@127.0.0.1:{port}{tmp_path}/file"
    public = credentials.public(given)
    ssh = SshSettings(config=str(tmp_path / "config"), client=client)  # type: ignore[arg-type]
    host_url = f"ssh://{USER}@127.0.0.1:{port}"
    return SshRemote(host_url, RemoteSettings(ssh=ssh), credentials), public


def seen_by_others(pid: int) -> str:
    return "".join(
        os.fsdecode(Path(f"/proc/{pid}/{name}").read_bytes()) for name in ("cmdline", "environ")
    )


async def test_a_password_logs_in_and_is_seen_nowhere(
    tmp_path: Path, port: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    remote, url = remote_for(tmp_path, port, PASSWORD)
    assert (await remote.stat(url)).size_bytes == 5
    places = [
        url,
        caplog.text,
        seen_by_others(engine_pid()),
    ]
    assert not [place for place in places for secret in SHOWN if secret in place]
    await remote.aclose()


async def test_a_wrong_password(tmp_path: Path, port: int) -> None:
    remote, url = remote_for(tmp_path, port, "wrong secret")
    with pytest.raises(AccessDenied, match="refused the login") as caught:
        await remote.stat(url)
    assert "wrong secret" not in str(caught.value)
    await remote.aclose()


async def test_the_ssh_program_cannot_use_a_password(tmp_path: Path, port: int) -> None:
    remote, url = remote_for(tmp_path, port, PASSWORD, client="openssh")
    with pytest.raises(RemoteError, match="cannot use"):
        await remote.stat(url)
    await remote.aclose()


async def test_without_an_ssh_program(tmp_path: Path, port: int) -> None:
    """Nothing is known of the login then, but paramiko is what tries it."""
    config = tmp_path / "config"
    ssh = SshSettings(config=str(config), program=str(tmp_path / "no-ssh-here"))
    remote = SshRemote(f"ssh://127.0.0.1:{port}", RemoteSettings(ssh=ssh), CredentialStore(None))
    with pytest.raises(AccessDenied, match="no key or password"):
        await remote.stat(f"ssh://127.0.0.1:{port}/x")
    await remote.aclose()


@pytest.mark.parametrize("option", ["ProxyJump other", "Port many"])
async def test_configurations_that_paramiko_cannot_follow(tmp_path: Path, option: str) -> None:
    config = tmp_path / "config"
    config.write_text(f"{option}\n")
    ssh = SshSettings(config=str(config), client="paramiko")
    remote = SshRemote("ssh://127.0.0.1", RemoteSettings(ssh=ssh), CredentialStore(None))
    with pytest.raises(RemoteError, match="ssh configuration"):
        await remote.stat("ssh://127.0.0.1/x")
    await remote.aclose()
