import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio
from trio.testing import MockClock

from stagefs.errors import (
    AccessDenied,
    DeadlineExceeded,
    ObjectChanged,
    ObjectMissing,
    RemoteAway,
    RemoteUnavailable,
    StageFSError,
)
from stagefs.model import MIB, ObjectInfo, Span, WholeObject
from stagefs.remote.base import Sink
from stagefs.remote.memory import MemoryRemote
from stagefs.remote.retry import RetryingRemote
from stagefs.remote.settings import RemoteSettings
from tests.support.sinks import FileSink

SETTINGS = RemoteSettings(attempts=4, backoff_s=1.0, backoff_s_max=10.0, attempts_deadline_s=60.0)


class Item(msgspec.Struct, frozen=True):
    url: str
    validator: str | None = None


def unavailable(retry_after_s: float | None = None) -> StageFSError:
    return RemoteUnavailable("The server is away.", retry_after_s=retry_after_s)


@pytest.fixture
async def memory() -> MemoryRemote:
    return MemoryRemote()


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[FileSink]:
    with FileSink(tmp_path / "sink", 0) as made:
        yield made


def retrying(memory: MemoryRemote, settings: RemoteSettings = SETTINGS) -> RetryingRemote:
    return RetryingRemote(memory, settings, jitter=lambda: 1.0)


@pytest.mark.parametrize("error", [unavailable(), DeadlineExceeded("No answer.")], ids=["a", "d"])
async def test_passing_errors_are_repeated(
    memory: MemoryRemote, error: StageFSError, autojump_clock: MockClock
) -> None:
    url = memory.store("/x", b"content")
    memory.failures = [error, error, error]
    begun = trio.current_time()
    assert (await retrying(memory).stat(url)).size_bytes == 7
    assert len(memory.requests) == 4
    assert trio.current_time() - begun == 1 + 2 + 4


async def test_attempts_are_bounded(memory: MemoryRemote, autojump_clock: MockClock) -> None:
    url = memory.store("/x", b"content")
    memory.failures = [unavailable() for _ in range(10)]
    with pytest.raises(RemoteUnavailable):
        await retrying(memory).stat(url)
    assert len(memory.requests) == 4


async def test_pauses_are_bounded(memory: MemoryRemote, autojump_clock: MockClock) -> None:
    url = memory.store("/x", b"content")
    memory.failures = [unavailable() for _ in range(6)]
    many = msgspec.structs.replace(SETTINGS, attempts=7)
    begun = trio.current_time()
    await retrying(memory, many).stat(url)
    assert trio.current_time() - begun == 1 + 2 + 4 + 8 + 10 + 10


async def test_time_is_bounded(memory: MemoryRemote, autojump_clock: MockClock) -> None:
    url = memory.store("/x", b"content")
    memory.failures = [unavailable() for _ in range(10)]
    hasty = msgspec.structs.replace(SETTINGS, attempts=10, attempts_deadline_s=5.0)
    begun = trio.current_time()
    with pytest.raises(RemoteUnavailable):
        await retrying(memory, hasty).stat(url)
    assert trio.current_time() - begun == 1 + 2


async def test_a_server_that_is_away_is_waited_for(
    memory: MemoryRemote, autojump_clock: MockClock
) -> None:
    url = memory.store("/x", b"content")
    memory.failures = [RemoteAway("Restarted.") for _ in range(10)]
    begun = trio.current_time()
    assert (await retrying(memory).stat(url)).size_bytes == 7
    assert trio.current_time() - begun == 1 + 9 * 2


async def test_a_server_that_stays_away_is_waited_for_no_longer(
    memory: MemoryRemote, autojump_clock: MockClock
) -> None:
    url = memory.store("/x", b"content")
    memory.failures = [RemoteAway("Gone.") for _ in range(100)]
    begun = trio.current_time()
    with pytest.raises(RemoteAway):
        await retrying(memory).stat(url)
    assert SETTINGS.restart_s - 2 <= trio.current_time() - begun <= SETTINGS.restart_s


async def test_removals_do_not_wait_for_a_server_that_is_away(
    memory: MemoryRemote, autojump_clock: MockClock
) -> None:
    url = memory.store("/x", b"content")
    memory.failures = [RemoteAway("Gone.") for _ in range(100)]
    with pytest.raises(RemoteAway):
        await retrying(memory).delete(url)
    assert len(memory.requests) == SETTINGS.attempts


async def test_jitter_shortens_pauses(memory: MemoryRemote, autojump_clock: MockClock) -> None:
    url = memory.store("/x", b"content")
    memory.failures = [unavailable()]
    begun = trio.current_time()
    await RetryingRemote(memory, SETTINGS, jitter=lambda: 0.0).stat(url)
    assert trio.current_time() - begun == 0.5


async def test_the_servers_wish_is_honoured(
    memory: MemoryRemote, autojump_clock: MockClock
) -> None:
    url = memory.store("/x", b"content")
    memory.failures = [unavailable(retry_after_s=30.0)]
    begun = trio.current_time()
    await retrying(memory).stat(url)
    assert trio.current_time() - begun == 30


async def test_a_wish_beyond_the_deadline_fails_at_once(
    memory: MemoryRemote, autojump_clock: MockClock
) -> None:
    url = memory.store("/x", b"content")
    memory.failures = [unavailable(retry_after_s=3600.0)]
    begun = trio.current_time()
    with pytest.raises(RemoteUnavailable) as caught:
        await retrying(memory).stat(url)
    assert caught.value.retry_after_s == 3600
    assert trio.current_time() == begun


@pytest.mark.parametrize("error", [ObjectMissing("x"), AccessDenied("x"), ObjectChanged("x")])
async def test_lasting_errors_are_not_repeated(memory: MemoryRemote, error: StageFSError) -> None:
    url = memory.store("/x", b"content")
    memory.failures = [error]
    with pytest.raises(type(error)):
        await retrying(memory).stat(url)
    assert len(memory.requests) == 1


async def test_listing_is_repeated(memory: MemoryRemote, autojump_clock: MockClock) -> None:
    memory.store("/d/x", b"content")
    memory.failures = [unavailable()]
    pages = [page async for page in retrying(memory).list(memory.url("/d"))]
    assert [entry.name for page in pages for entry in page] == ["x"]


async def test_fetch_goes_on_behind_the_last_byte(
    memory: MemoryRemote, sink: FileSink, autojump_clock: MockClock
) -> None:
    data = os.urandom(4 * MIB)
    url = memory.store("/x", data)
    info = await memory.stat(url)
    memory.failures = [unavailable()]
    memory.cut_after_bytes = MIB + 5
    await retrying(memory).fetch(url, Span(10, 3 * MIB), sink=sink, validator=info.validator)
    assert sink.content()[10:] == data[10 : 3 * MIB + 10]
    assert [request.span for request in memory.requests if request.kind == "fetch"] == [
        Span(10, 3 * MIB),
        Span(10 + MIB + 5, 2 * MIB - 5),
    ]


async def test_resumed_fetch_is_of_the_version_it_began_with(
    memory: MemoryRemote, sink: FileSink, autojump_clock: MockClock
) -> None:
    url = memory.store("/x", bytes(4 * MIB))
    memory.cut_after_bytes = MIB

    remote = retrying(memory)
    memory.failures = [unavailable()]
    async with trio.open_nursery() as nursery:

        async def replace() -> None:
            await sink.first_landed.wait()
            memory.store("/x", b"\1" * 4 * MIB)

        nursery.start_soon(replace)
        with pytest.raises(ObjectChanged):
            await remote.fetch(url, Span(0, 4 * MIB), sink=sink, validator=None)
    assert not sink.content().strip(b"\0\xa5"), "bytes of the new version landed"


async def test_fetch_of_an_unknown_version_is_not_resumed(
    sink: FileSink, autojump_clock: MockClock
) -> None:
    """A driver that broke before it could tell the version cannot be continued."""

    class Silent(MemoryRemote):
        async def fetch(
            self, url: str, span: Span, *, sink: Sink, validator: str | None
        ) -> ObjectInfo:
            os.pwrite(sink.fd, b"x", 0)
            sink.landed(Span(span.start, 1))
            raise unavailable()

    remote = retrying(Silent())
    with pytest.raises(ObjectChanged, match="cannot go on"):
        await remote.fetch("memory://store/x", Span(0, 10), sink=sink, validator=None)


async def test_batch_repeats_only_what_failed(
    memory: MemoryRemote, autojump_clock: MockClock
) -> None:
    urls = [memory.store(f"/x{number}", b"content") for number in range(4)]
    memory.failures = [unavailable()]
    memory.forbid("/x2", AccessDenied("no"))
    results = await retrying(memory).fetch_batch([Item(url) for url in urls])
    assert [type(result) for result in results] == [
        WholeObject,
        WholeObject,
        AccessDenied,
        WholeObject,
    ]
    assert [request.url for request in memory.requests] == [*urls, urls[0]]


async def test_batch_tells_each_item_its_last_error(
    memory: MemoryRemote, autojump_clock: MockClock
) -> None:
    urls = [memory.store(f"/x{number}", b"content") for number in range(2)]
    memory.forbid("/x1", unavailable())
    results = await retrying(memory).fetch_batch([Item(url) for url in urls])
    assert [type(result) for result in results] == [WholeObject, RemoteUnavailable]
    assert len(memory.requests) == 2 + 3


async def test_a_batch_that_fails_as_a_whole(autojump_clock: MockClock) -> None:
    class Away(MemoryRemote):
        async def fetch_batch(self, items: object) -> list[WholeObject | StageFSError]:
            raise unavailable()

    results = await retrying(Away()).fetch_batch([Item("memory://s/1"), Item("memory://s/2")])
    assert [type(result) for result in results] == [RemoteUnavailable, RemoteUnavailable]
