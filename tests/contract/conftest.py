"""The remotes that the contract suite runs on, each with a real server where it needs one.

A remote joins with a fixture ``<name>_subject``, which returns a function that makes the
Subject (drivers are made inside trio), and its name in SUBJECTS.
"""

import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from tests.contract.subjects import FileSubject, HttpSubject, MemorySubject, Subject
from tests.support.nginx import Nginx, running_nginx

SUBJECTS = ("memory", "file", "http", "http_html")
MakeSubject: TypeAlias = Callable[[], Subject]

_places = (f"place{number}" for number in itertools.count())


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
    return lambda: HttpSubject(nginx, next(_places))


@pytest.fixture
def http_html_subject(nginx: Nginx) -> MakeSubject:
    """As most servers show directories: a page of links."""
    return lambda: HttpSubject(nginx, next(_places), location="html")
