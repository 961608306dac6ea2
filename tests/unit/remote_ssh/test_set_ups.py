"""What users have in their ssh configuration and expect to work: jump hosts, masters, ciphers."""

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stagefs.config import SshSettings
from stagefs.errors import RemoteError
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.ssh import SshRemote
from tests.support.sshd import Sshd, running_sshd
from tests.support.waiting import wait_until
from tests.unit.remote_ssh.test_faults import children, engine_pid, is_running

Make = Callable[..., SshRemote]


@pytest.fixture
def verbose_server(directory: Path) -> Iterator[Sshd]:
    root = directory / "sshd"
    root.mkdir()
    with running_sshd(root, options="LogLevel DEBUG1") as running:
        yield running


def with_config(server: Sshd, path: Path, first: str) -> RemoteSettings:
    path.write_text(first + server.ssh_config.read_text())
    return RemoteSettings(ssh=SshSettings(config=str(path)))


@contextlib.contextmanager
def master_connection(config: Path, path: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = ["ssh", "-F", str(config), "-M", "-N", "staged"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as master:
        try:
            wait_until(path.exists, "the master connection")
            yield master
        finally:
            master.terminate()


async def test_a_jump_host(own_server: Sshd, directory: Path) -> None:
    first = f"Host behind\n  HostName 127.0.0.1\n  Port {own_server.port}\n  ProxyJump staged\n"
    settings = with_config(own_server, directory / "config", first)
    remote = SshRemote("ssh://behind", settings, CredentialStore(None))
    assert (await remote.stat("ssh://behind/etc/passwd")).size_bytes > 0
    assert own_server.log().count("Accepted publickey") == 2
    pids = [engine_pid(), *children(engine_pid())]
    jumps = [jump for pid in pids[1:] for jump in children(pid)]
    assert jumps, "no ssh to the jump host was running"
    await remote.aclose()
    for pid in (*pids, *jumps):
        wait_until(lambda pid=pid: not is_running(pid), "the client ends")  # type: ignore[misc]


async def test_a_jump_host_that_is_silent(own_server: Sshd, directory: Path) -> None:
    first = f"Host behind\n  HostName 127.0.0.1\n  Port {own_server.port}\n  ProxyJump staged\n"
    settings = with_config(own_server, directory / "config", first)
    remote = SshRemote("ssh://behind", settings, CredentialStore(None))
    await remote.stat("ssh://behind/etc/passwd")
    jumps = [jump for pid in children(engine_pid()) for jump in children(pid)]
    own_server.freeze()
    await remote.aclose()
    for pid in jumps:
        wait_until(lambda pid=pid: not is_running(pid), "the client ends")  # type: ignore[misc]


async def test_an_open_master_connection_is_used_and_left_alone(
    own_server: Sshd, directory: Path
) -> None:
    """As users do where each login asks for a second factor."""
    path = directory / "control"
    settings = with_config(own_server, directory / "config", f"ControlPath {path}\n")
    with master_connection(directory / "config", path) as master:
        remote = SshRemote("ssh://staged", settings, CredentialStore(None))
        assert (await remote.stat("ssh://staged/etc/passwd")).size_bytes > 0
        await remote.aclose()
        assert own_server.log().count("Accepted publickey") == 1
        assert master.poll() is None


async def test_no_master_connection_is_left_behind(own_server: Sshd, directory: Path) -> None:
    path = directory / "control"
    first = f"ControlPath {path}\nControlMaster auto\nControlPersist yes\n"
    settings = with_config(own_server, directory / "config", first)
    remote = SshRemote("ssh://staged", settings, CredentialStore(None))
    await remote.stat("ssh://staged/etc/passwd")
    assert not path.exists()
    await remote.aclose()


async def test_ciphers(verbose_server: Sshd, remote_to: Make) -> None:
    remote = remote_to(verbose_server, ciphers="aes192-ctr")
    await remote.stat(f"{verbose_server.url}/etc/passwd")
    assert "cipher: aes192-ctr" in verbose_server.log()
    remote = remote_to(verbose_server, ciphers="rot13")
    with pytest.raises(RemoteError, match="ssh configuration"):
        await remote.stat(f"{verbose_server.url}/etc/passwd")
