"""The remotes that the contract suite runs on, each with a real server where it needs one.

A remote joins with a fixture ``<name>_subject``, which returns a function that makes the
Subject (drivers are made inside trio), and its name in SUBJECTS.
"""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from tests.contract.subjects import (
    BUCKET,
    AzSubject,
    CommandSubject,
    FileSubject,
    FtpSubject,
    HttpSubject,
    MemorySubject,
    S3Subject,
    SshSubject,
    Subject,
    WebDavSubject,
    new_place,
)
from tests.support.azurite import Azurite, program, running_azurite
from tests.support.ftp_server import Ftp, running_ftp
from tests.support.nginx import Nginx, running_nginx
from tests.support.programs import written_programs
from tests.support.rgw import Rgw, available, running_rgw
from tests.support.sshd import Sshd, running_sshd
from tests.support.webdav import WebDav, running_webdav

SUBJECTS = (
    "memory",
    "file",
    "http",
    "http_html",
    "s3",
    "ssh",
    "paramiko",
    "webdav",
    "az",
    "command",
    "ftp",
)
MakeSubject: TypeAlias = Callable[[], Subject]


@pytest.fixture(params=SUBJECTS)
async def subject(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    make: MakeSubject = request.getfixturevalue(f"{request.param}_subject")
    made = make()
    yield made
    await made.remote.aclose()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Azurite comes from neither Debian nor PyPI: where it is not, az:// is not claimed to be
    tried, and pytest counts its tests as deselected."""
    if program() is not None:
        return
    left_out = [item for item in items if _needs_azurite(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def _needs_azurite(item: pytest.Item) -> bool:
    names = set(getattr(item, "fixturenames", ()))
    callspec = getattr(item, "callspec", None)
    chosen = {} if callspec is None else callspec.params
    return "azurite" in names or any(str(value).startswith("az") for value in chosen.values())


@pytest.fixture(scope="session")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with running_nginx(tmp_path_factory.mktemp("nginx")) as server:
        yield server


@pytest.fixture(scope="session")
def rgw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rgw]:
    if not available():
        pytest.skip("Ceph's gateway is not installed: apt-get install radosgw ceph-mon ceph-osd")
    with running_rgw(tmp_path_factory.mktemp("rgw")) as server:
        server.make_bucket(BUCKET)
        yield server


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with running_sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture(scope="session")
def webdav(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDav]:
    with running_webdav(tmp_path_factory.mktemp("webdav")) as server:
        yield server


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Azurite]:
    with running_azurite(tmp_path_factory.mktemp("azurite")) as server:
        server.make_container(BUCKET)
        yield server


@pytest.fixture(scope="session")
def ftp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ftp]:
    with running_ftp(tmp_path_factory.mktemp("ftp")) as server:
        yield server


@pytest.fixture
def memory_subject() -> MakeSubject:
    return MemorySubject


@pytest.fixture
def file_subject(tmp_path: Path) -> MakeSubject:
    top = tmp_path / "objects"
    top.mkdir()
    return lambda: FileSubject(top)


@pytest.fixture
def http_subject(nginx: Nginx) -> MakeSubject:
    return lambda: HttpSubject(nginx, new_place())


@pytest.fixture
def http_html_subject(nginx: Nginx) -> MakeSubject:
    """As most servers show directories: a page of links."""
    return lambda: HttpSubject(nginx, new_place(), location="html")


@pytest.fixture
def s3_subject(rgw: Rgw) -> MakeSubject:
    return lambda: S3Subject(rgw, BUCKET, new_place())


@pytest.fixture
def ssh_subject(sshd: Sshd, tmp_path: Path) -> MakeSubject:
    top = tmp_path / "objects"
    top.mkdir()
    return lambda: SshSubject(sshd, top)


@pytest.fixture
def paramiko_subject(sshd: Sshd, tmp_path: Path) -> MakeSubject:
    top = tmp_path / "objects"
    top.mkdir()
    return lambda: SshSubject(sshd, top, client="paramiko")


@pytest.fixture
def webdav_subject(webdav: WebDav) -> MakeSubject:
    return lambda: WebDavSubject(webdav, new_place())


@pytest.fixture
def az_subject(azurite: Azurite) -> MakeSubject:
    return lambda: AzSubject(azurite, BUCKET, new_place())


@pytest.fixture
def command_subject(tmp_path: Path) -> MakeSubject:
    top = tmp_path / "objects"
    top.mkdir()
    programs = written_programs(tmp_path, "mover")
    return lambda: CommandSubject(programs, top)


@pytest.fixture
def ftp_subject(ftp: Ftp) -> MakeSubject:
    return lambda: FtpSubject(ftp, new_place())
