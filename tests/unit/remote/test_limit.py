import msgspec
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from stagefs.model import Span
from stagefs.remote.limit import LimitedRemote
from stagefs.remote.memory import MemoryRemote
from stagefs.remote.settings import RemoteSettings


class NoSink:
    fd = -1
    shift = 0

    def landed(self, span: Span) -> None:
        raise AssertionError("nothing can land here")


class Item(msgspec.Struct, frozen=True):
    url: str
    validator: str | None = None


@pytest.fixture
async def memory() -> MemoryRemote:
    return MemoryRemote()


def arrived(memory: MemoryRemote, kind: str) -> int:
    return sum(request.kind == kind for request in memory.requests)


async def test_transfers_lookups_and_batches_have_places_of_their_own(
    memory: MemoryRemote,
) -> None:
    url = memory.store("/d/x", b"")
    remote = LimitedRemote(memory, RemoteSettings(concurrency=2, lookups=3))
    memory.gate = trio.Event()

    async def fetch() -> None:
        await remote.fetch(url, Span(0, 0), sink=NoSink(), validator=None)

    async def batch() -> None:
        await remote.fetch_batch([Item(url)])

    async def listing() -> None:
        assert [len(page) async for page in remote.list(memory.url("/d"))] == [1]

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(fetch)
        await wait_all_tasks_blocked()
        assert arrived(memory, "fetch") == 2
        for _ in range(10):
            nursery.start_soon(remote.stat, url)
            nursery.start_soon(listing)
        await wait_all_tasks_blocked()
        assert arrived(memory, "stat") + arrived(memory, "list") == 3
        for _ in range(10):
            nursery.start_soon(batch)
        await wait_all_tasks_blocked()
        assert arrived(memory, "whole") == 4
        assert not remote.idle
        memory.gate.set()
    assert arrived(memory, "fetch") == 10
    assert remote.idle


async def test_cancelled_waiters_give_their_place_back(memory: MemoryRemote) -> None:
    url = memory.store("/x", b"")
    remote = LimitedRemote(memory, RemoteSettings(lookups=1))
    memory.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(remote.stat, url)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert remote.idle
    memory.gate.set()
    assert (await remote.stat(url)).size_bytes == 0


async def test_a_slow_reader_of_a_listing_holds_no_place(memory: MemoryRemote) -> None:
    url = memory.store("/d/x", b"")
    remote = LimitedRemote(memory, RemoteSettings(lookups=1))
    async for _ in remote.list(memory.url("/d")):
        with trio.fail_after(5):
            await remote.stat(url)
