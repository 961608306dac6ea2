"""The wrappers that fail fast and do not press a remote, around one that does as it is told."""

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from stagefs.errors import (
    ObjectMissing,
    RemoteDown,
    RemoteUnavailable,
    StageFSError,
)
from stagefs.model import MIB, Span
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.guard import GuardedRemote, MeasuredRemote
from stagefs.remote.health import CIRCUIT_FAILURES, CIRCUIT_SPAN_S, RATES_MIN, Health
from stagefs.remote.memory import MemoryRemote
from stagefs.remote.registry import Remotes
from stagefs.remote.settings import RemoteSettings
from tests.support.sinks import FileSink


class Guarded:
    """A remote in its two wrappers."""

    def __init__(self, places: int = 16) -> None:
        self.memory = MemoryRemote()
        self.health = Health(places, jitter=lambda: 1.0)
        measured = MeasuredRemote(self.memory, self.health)
        self.remote = GuardedRemote(measured, self.health, RemoteSettings())
        self.url = self.memory.store("/x", bytes(4 * MIB))


@pytest.fixture
async def guarded() -> Guarded:
    return Guarded()


async def fail(guarded: Guarded, error: StageFSError) -> None:
    guarded.memory.failures.append(error)
    with pytest.raises(type(error)):
        await guarded.remote.stat(guarded.url)


async def test_a_remote_that_is_down_is_not_asked(
    guarded: Guarded, autojump_clock: MockClock
) -> None:
    for _ in range(CIRCUIT_FAILURES):
        await fail(guarded, RemoteUnavailable("the cable is cut."))
        await trio.sleep(CIRCUIT_SPAN_S / 4)
    asked = len(guarded.memory.requests)
    for operation in (
        lambda: guarded.remote.stat(guarded.url),
        lambda: anext(guarded.remote.list(guarded.url)),
        lambda: guarded.remote.delete(guarded.url),
    ):
        with pytest.raises(RemoteDown, match="The last reason: the cable is cut") as caught:
            await operation()
        assert guarded.url in str(caught.value)
    assert len(guarded.memory.requests) == asked, "it was asked although it is down"
    await trio.sleep(60)
    assert (await guarded.remote.stat(guarded.url)).size_bytes == 4 * MIB
    assert guarded.health.status("x", trio.current_time()).state == "well"


async def test_nobody_asks_before_the_time_a_busy_server_wished(
    guarded: Guarded, autojump_clock: MockClock
) -> None:
    await fail(guarded, RemoteUnavailable("busy.", busy=True, retry_after_s=30.0))
    begun_s = trio.current_time()
    await guarded.remote.stat(guarded.url)
    assert trio.current_time() - begun_s == pytest.approx(30.0)
    await fail(guarded, RemoteUnavailable("busy.", busy=True, retry_after_s=3000.0))
    begun_s = trio.current_time()
    with pytest.raises(RemoteUnavailable, match="as its server wishes"):
        await guarded.remote.stat(guarded.url)
    assert trio.current_time() == begun_s, "waited for what is beyond patience"


async def test_fewer_ask_a_busy_server_at_a_time(autojump_clock: MockClock) -> None:
    guarded = Guarded(places=8)
    await fail(guarded, RemoteUnavailable("busy.", busy=True, retry_after_s=0.0))
    guarded.memory.requests.clear()
    guarded.memory.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(guarded.remote.stat, guarded.url)
        await wait_all_tasks_blocked(0.01)
        assert len(guarded.memory.requests) == 1
        guarded.memory.gate.set()
    assert len(guarded.memory.requests) == 8


async def test_what_waited_for_room_learns_that_the_remote_went_down(
    guarded: Guarded, autojump_clock: MockClock
) -> None:
    guarded.health.failed(RemoteUnavailable("busy.", busy=True, retry_after_s=0.0), 0.0, at_once=1)
    guarded.memory.gate = trio.Event()
    outcomes: list[type[BaseException] | None] = []

    async def ask() -> None:
        try:
            await guarded.remote.stat(guarded.url)
        except StageFSError as error:
            outcomes.append(type(error))

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(ask)
        await wait_all_tasks_blocked(0.01)
        for number in range(CIRCUIT_FAILURES):
            guarded.health.failed(
                RemoteUnavailable("away."), number * CIRCUIT_SPAN_S + 1, at_once=1
            )
        guarded.memory.failures.append(RemoteUnavailable("away."))
        guarded.memory.gate.set()
    assert sorted(str(outcome) for outcome in outcomes) == sorted(
        str(outcome) for outcome in (RemoteUnavailable, RemoteDown, RemoteDown)
    )


async def test_a_transfer_slower_than_the_past_is_begun_anew_once(
    guarded: Guarded, tmp_path: Path, autojump_clock: MockClock
) -> None:
    for _ in range(RATES_MIN):
        guarded.health.transferred(MIB, 0.01)
    stall, memory = trio.Event(), guarded.memory
    memory.gate = stall
    async with trio.open_nursery() as nursery:

        async def unstall() -> None:
            # The second attempt has begun: it has as long as it needs.
            await trio.sleep(1000)
            assert [one.kind for one in memory.requests] == ["fetch", "fetch"]
            stall.set()

        nursery.start_soon(unstall)
        with FileSink(tmp_path / "sink", 4 * MIB) as sink:
            await guarded.remote.fetch(
                guarded.url, Span(0, 4 * MIB), sink=sink, validator="revision:1"
            )
            assert sink.content() == bytes(4 * MIB)
            assert sink.landed_bytes == 4 * MIB
    status = guarded.health.status("x", trio.current_time())
    assert status.slow_transfers == 1
    assert "slower than the slowest hundredth" in (status.reason or "")


async def test_one_error_of_a_batch_counts_once(guarded: Guarded) -> None:
    class Item:
        url = guarded.url
        validator = None

    guarded.memory.failures += [RemoteUnavailable("away."), RemoteUnavailable("away.")]
    await guarded.remote.fetch_batch([Item(), Item()])
    assert (guarded.health.attempts, guarded.health.errors) == (1, 1)
    assert await guarded.remote.fetch_batch([]) == []


async def test_the_registry_tells_how_each_remote_fares() -> None:
    memory = MemoryRemote("memory://a")
    remotes = Remotes(
        RemoteSettings(attempts=1),
        CredentialStore(None),
        drivers={"memory": lambda *_: memory},
    )
    with pytest.raises(ObjectMissing):
        await remotes.for_url("memory://a/x").stat("memory://a/x")
    memory.failures.append(RemoteUnavailable("the cable is cut."))
    with pytest.raises(RemoteUnavailable):
        await remotes.for_url("memory://b/x").stat("memory://b/x")
    well, failing = remotes.statuses()
    assert (well.url, well.state, well.attempts, well.errors) == ("memory://a", "well", 1, 0)
    assert (failing.state, failing.errors, failing.reason) == ("failing", 1, "the cable is cut.")
    await remotes.aclose()
