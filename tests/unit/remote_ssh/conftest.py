"""One server for the folder (two when root runs it: an ordinary user's as well)."""

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from stagefs.config import SshSettings
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.ssh import SshRemote
from tests.support import sshd as support
from tests.support.sshd import Login, Sshd

LOGINS = [Login.mine().name, *(["nobody"] if os.geteuid() == 0 else [])]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory below which a server of any user can read."""
    path = Path(tempfile.mkdtemp(prefix="stagefs-ssh-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def _servers() -> Iterator[dict[str, Sshd]]:
    if not support.available():
        pytest.skip("needs ssh and sshd")
    servers: dict[str, Sshd] = {}
    yield servers
    for server in servers.values():
        server.stop()
        shutil.rmtree(server.root)


@pytest.fixture(params=LOGINS)
def server(request: pytest.FixtureRequest, _servers: dict[str, Sshd]) -> Sshd:
    """Shared between tests: they leave it as it was."""
    return _server_of(request.param, _servers)


def _server_of(name: str, servers: dict[str, Sshd]) -> Sshd:
    if name not in servers:
        root = Path(tempfile.mkdtemp(prefix="stagefs-sshd-"))
        root.chmod(0o755)
        servers[name] = Sshd(root, Login.of(name))
    return servers[name]


@pytest.fixture
def my_server(_servers: dict[str, Sshd]) -> Sshd:
    """As ``server``, for tests that have nothing to say about logins."""
    return _server_of(LOGINS[0], _servers)


@pytest.fixture(params=["openssh", "paramiko"])
def client(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def own_server(directory: Path) -> Iterator[Sshd]:
    """A server that a test may maltreat.  It counts what it is asked for."""
    root = directory / "sshd"
    root.mkdir()
    with support.running_sshd(root, counted=True) as running:
        yield running


def settings_for(server: Sshd, *, limit_s: float = 20.0, **ssh: object) -> RemoteSettings:
    merged: dict[str, object] = {"config": str(server.ssh_config), **ssh}
    return RemoteSettings(
        connect_timeout_s=limit_s,
        answer_timeout_s=limit_s,
        progress_timeout_s=limit_s,
        ssh=SshSettings(**merged),  # type: ignore[arg-type]
    )


@pytest.fixture
async def remote_to() -> AsyncIterator[Callable[..., SshRemote]]:
    made: list[SshRemote] = []

    def make(server: Sshd, *, limit_s: float = 20.0, **ssh: object) -> SshRemote:
        settings = settings_for(server, limit_s=limit_s, **ssh)
        made.append(SshRemote(server.url, settings, CredentialStore(None)))
        return made[-1]

    yield make
    for remote in made:
        await remote.aclose()
