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
    FileSubject,
    HttpSubject,
    MemorySubject,
    S3Subject,
    SshSubject,
    Subject,
    new_place,
)
from tests.support.nginx import Nginx, running_nginx
from tests.support.rgw import Rgw, available, running_rgw
from tests.support.sshd import Sshd, running_sshd

SUBJECTS = ("memory", "file", "http", "http_html", "s3", "ssh", "paramiko")
MakeSubject: TypeAlias = Callable[[], Subject]


@pytest.fixture(params=SUBJECTS)
async def subject(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    make: MakeSubject = request.getfixturevalue(f"{request.param}_subject")
    made = make()
    yield made
    await made.remote.aclose()


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
