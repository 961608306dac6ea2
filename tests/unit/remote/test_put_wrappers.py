"""``put`` through the wrappers and the registry, and which URLs can be written to."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from stagefs.errors import InvalidUrl, NameExists, NotSupported, RemoteUnavailable
from stagefs.model import MIB
from stagefs.remote.base import Remote
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.limit import LimitedRemote
from stagefs.remote.memory import MemoryRemote
from stagefs.remote.registry import Remotes
from stagefs.remote.retry import RetryingRemote
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.url import check_writable, name_to_write
from tests.support.source_file import SourceFile, source_file

SETTINGS = RemoteSettings(attempts=4, backoff_s=1.0, attempts_deadline_s=60.0, concurrency=1)


@pytest.fixture
async def memory() -> MemoryRemote:
    return MemoryRemote()


@pytest.fixture
def source(tmp_path: Path) -> Iterator[SourceFile]:
    with source_file(tmp_path / "source", bytes(4 * MIB)) as made:
        yield made


def unavailable() -> RemoteUnavailable:
    return RemoteUnavailable("The server is away.")


async def put(remote: Remote, source: SourceFile, url: str = "memory://store/x") -> None:
    await remote.put(
        url,
        source=source.fd,
        size_bytes=source.size_bytes,
        overwrite=False,
        checksum=None,
        mode=None,
        progress=source.progress,
    )


async def test_passing_errors_are_repeated_from_the_start(
    memory: MemoryRemote, source: SourceFile, autojump_clock: MockClock
) -> None:
    memory.failures = [unavailable(), unavailable()]
    memory.cut_after_bytes = 2 * MIB
    await put(RetryingRemote(memory, SETTINGS), source)
    assert memory.content("/x") == bytes(4 * MIB)
    half = [MIB, 2 * MIB]
    assert source.told == [*half, *half, *half, 3 * MIB, 4 * MIB]


async def test_lasting_errors_are_not_repeated(memory: MemoryRemote, source: SourceFile) -> None:
    memory.store("/x", b"other")
    with pytest.raises(NameExists):
        await put(RetryingRemote(memory, SETTINGS), source)
    assert len(memory.requests) == 1


async def test_puts_have_places_of_their_own(memory: MemoryRemote, source: SourceFile) -> None:
    limited = LimitedRemote(memory, SETTINGS)
    memory.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(put, limited, source, "memory://store/1")
        nursery.start_soon(put, limited, source, "memory://store/2")
        await trio.testing.wait_all_tasks_blocked()
        assert len(memory.requests) == 1, "two puts at a time"
        assert not limited.idle
        memory.gate.set()
    assert sorted(memory.paths()) == ["/1", "/2"]
    assert limited.idle


async def test_removing_through_the_wrappers(
    memory: MemoryRemote, autojump_clock: MockClock
) -> None:
    memory.store("/x", b"content")
    memory.failures = [unavailable(), unavailable()]
    limited = LimitedRemote(memory, SETTINGS)
    await RetryingRemote(limited, SETTINGS).delete("memory://store/x")
    assert memory.paths() == []
    assert [request.kind for request in memory.requests] == ["delete"] * 3
    assert limited.idle


async def test_through_the_registry(memory: MemoryRemote, source: SourceFile) -> None:
    remotes = Remotes(
        SETTINGS, CredentialStore(None), drivers={"memory": lambda *_arguments: memory}
    )
    await put(remotes.for_url("memory://store/x"), source)
    assert memory.content("/x") == bytes(4 * MIB)
    await remotes.aclose()


@pytest.mark.parametrize(
    "url",
    [
        "file:///d/x",
        "ssh://h/x",
        "sftp://u@h:22/x",
        "s3://bucket/x",
        "s3://bucket/d/",
        "ssh://h/",
        "gs://bucket/x",
        "az://container/x",
        "webdav://h/x",
        "webdavs://u@h/x",
        "command://tape/x",
    ],
)
def test_urls_that_can_be_written_to(url: str) -> None:
    check_writable(url)


def test_urls_that_cannot_be_written_to() -> None:
    for url in (
        "http://h/x",
        "https://u:secret@h/x?token=secret",
        "staging:///x",
        "irods://h/x",
        "fsspec+ftp://h/x",
    ):
        with pytest.raises(NotSupported) as caught:
            check_writable(url)
        assert "secret" not in str(caught.value)
    for url in ("/tmp/x", "gopher://h/x"):
        with pytest.raises(InvalidUrl):
            check_writable(url)


def test_names_to_write() -> None:
    assert name_to_write("file:///d/a%20b") == "a b"
    assert name_to_write("s3://bucket/a%20b") == "a%20b"
    for url in ("file:///", "file:///d/", "s3://bucket", "s3://bucket/", "ssh://h"):
        with pytest.raises(InvalidUrl):
            name_to_write(url)
