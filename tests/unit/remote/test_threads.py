import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from stagefs.errors import CacheFailed, DeadlineExceeded
from stagefs.model import MIB, Span
from stagefs.remote.threads import Call, SinkCall
from tests.support.sinks import FileSink

HANG_S = 20.0


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[FileSink]:
    with FileSink(tmp_path / "sink", 0) as made:
        yield made


@pytest.fixture
async def limiter() -> trio.CapacityLimiter:
    return trio.CapacityLimiter(1)


@pytest.fixture
def stall() -> Iterator[threading.Event]:
    """What a stalled client waits for; set at the end, so that no thread outlives its test."""
    event = threading.Event()
    yield event
    event.set()


async def run_sink_call(
    work: Callable[[SinkCall[str]], str],
    sink: FileSink,
    limiter: trio.CapacityLimiter,
    length: int = 4 * MIB,
) -> str:
    call = SinkCall(
        work,
        url="memory://s/x",
        span=Span(100, length),
        sink=sink,
        answer_timeout_s=HANG_S,
        progress_timeout_s=0.2,
    )
    return await call.run(limiter)


async def test_result_and_error_come_through(limiter: trio.CapacityLimiter) -> None:
    assert await Call(lambda _: 7, url="u", answer_timeout_s=HANG_S).run(limiter) == 7

    def fail(call: Call[int]) -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await Call(fail, url="u", answer_timeout_s=HANG_S).run(limiter)
    assert limiter.borrowed_tokens == 0


async def test_no_answer_in_time(limiter: trio.CapacityLimiter, stall: threading.Event) -> None:
    call = Call(lambda _: stall.wait(HANG_S), url="memory://s/x", answer_timeout_s=0.1)
    with pytest.raises(DeadlineExceeded, match="memory://s/x gave no answer"):
        await call.run(limiter)


async def test_no_progress_in_time(
    limiter: trio.CapacityLimiter, sink: FileSink, stall: threading.Event
) -> None:
    def work(call: SinkCall[str]) -> str:
        call.answered()
        call.write(b"x" * 1000)
        stall.wait(HANG_S)
        return "done"

    with pytest.raises(DeadlineExceeded, match="sent no byte"):
        await run_sink_call(work, sink, limiter)
    assert sink.landed_spans == [Span(100, 1000)]


async def test_a_thread_left_behind_keeps_its_place(
    limiter: trio.CapacityLimiter, stall: threading.Event
) -> None:
    call = Call(lambda _: stall.wait(HANG_S), url="u", answer_timeout_s=0.05)
    with pytest.raises(DeadlineExceeded):
        await call.run(limiter)
    assert limiter.borrowed_tokens == 1
    stall.set()
    with trio.fail_after(HANG_S):
        assert await Call(lambda _: 7, url="u", answer_timeout_s=HANG_S).run(limiter) == 7


async def test_a_thread_left_behind_cannot_write(
    limiter: trio.CapacityLimiter, sink: FileSink, stall: threading.Event
) -> None:
    tried = threading.Event()

    def work(call: SinkCall[str]) -> str:
        call.write(bytes(MIB))
        stall.wait(HANG_S)
        try:
            call.write(b"x" * MIB)
        finally:
            tried.set()
        return "done"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_sink_call, work, sink, limiter)
        await sink.first_landed.wait()
        nursery.cancel_scope.cancel()
    before = sink.content()
    stall.set()
    assert tried.wait(HANG_S)
    assert sink.content() == before
    assert sink.landed_bytes == MIB


async def test_waking_ends_the_thread_at_once(limiter: trio.CapacityLimiter) -> None:
    woken = threading.Event()

    def wake() -> bool:
        woken.set()
        return True

    def work(call: Call[bool]) -> bool:
        call.interruptible(wake)
        return woken.wait(HANG_S)

    with trio.move_on_after(0.05):
        await Call(work, url="u", answer_timeout_s=HANG_S).run(limiter)
    assert woken.is_set()
    assert limiter.borrowed_tokens == 0, "the thread still works"


async def test_a_thread_that_cannot_be_woken_is_not_waited_for(
    limiter: trio.CapacityLimiter, stall: threading.Event
) -> None:
    asked = threading.Event()

    def work(call: Call[bool]) -> bool:
        def wake() -> bool:
            asked.set()
            return False

        call.interruptible(wake)
        return stall.wait(HANG_S)

    with trio.fail_after(HANG_S / 2), trio.move_on_after(0.05):
        await Call(work, url="u", answer_timeout_s=HANG_S).run(limiter)
    assert asked.is_set()


async def test_a_sink_that_is_closed_already(
    limiter: trio.CapacityLimiter, sink: FileSink, tmp_path: Path
) -> None:
    with FileSink(tmp_path / "closed", 0) as closed:
        pass
    with pytest.raises(CacheFailed):
        await run_sink_call(lambda _: "done", closed, limiter)
    assert limiter.borrowed_tokens == 0


async def test_cancelled_while_it_waits_for_a_thread(
    limiter: trio.CapacityLimiter, stall: threading.Event
) -> None:
    started = threading.Event()
    async with trio.open_nursery() as nursery:
        first = Call(lambda _: stall.wait(HANG_S), url="u", answer_timeout_s=HANG_S)
        nursery.start_soon(first.run, limiter)
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0.05):
            second = Call(lambda _: started.set(), url="u", answer_timeout_s=HANG_S)
            await second.run(limiter)
        stall.set()
    assert not started.is_set()
    assert limiter.borrowed_tokens == 0


async def test_every_mebibyte_lands(limiter: trio.CapacityLimiter, sink: FileSink) -> None:
    data = os.urandom(4 * MIB)

    def work(call: SinkCall[str]) -> str:
        for start in range(0, len(data), 100_000):
            call.write(data[start : start + 100_000])
        return "done"

    assert await run_sink_call(work, sink, limiter) == "done"
    assert sink.landed_bytes == len(data)
    assert sink.content()[100:] == data


async def test_what_is_beyond_the_span_is_not_written(
    limiter: trio.CapacityLimiter, sink: FileSink
) -> None:
    def work(call: SinkCall[str]) -> str:
        call.write(b"x" * 50)
        assert call.missing_bytes == 10
        call.write(b"y" * 50)
        assert call.missing_bytes == 0
        return "done"

    await run_sink_call(work, sink, limiter, length=60)
    assert sink.content()[100:] == b"x" * 50 + b"y" * 10


async def test_a_sink_that_refuses_ends_the_transfer(
    limiter: trio.CapacityLimiter, tmp_path: Path
) -> None:
    stopped = threading.Event()

    class Refusing(FileSink):
        def landed(self, span: Span) -> None:
            raise CacheFailed("no")

    def work(call: SinkCall[str]) -> str:
        try:
            for _ in range(100_000):
                call.write(b"x")
        finally:
            stopped.set()
        return "done"

    with Refusing(tmp_path / "refusing", 0) as sink, pytest.raises(CacheFailed):
        await run_sink_call(work, sink, limiter)
    assert stopped.wait(HANG_S)


async def test_a_full_disk_is_the_caches_failure(
    limiter: trio.CapacityLimiter, sink: FileSink
) -> None:
    def work(call: SinkCall[str]) -> str:
        def full(fd: int, offset: int) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        call.move(full)
        return "done"

    with pytest.raises(CacheFailed, match="No space left"):
        await run_sink_call(work, sink, limiter)


async def test_the_owner_may_close_the_sink_at_once(
    limiter: trio.CapacityLimiter, tmp_path: Path, stall: threading.Event
) -> None:
    """A thread that is left behind holds a descriptor of its own."""

    def work(call: SinkCall[str]) -> str:
        call.write(bytes(MIB))
        stall.wait(HANG_S)
        return "done"

    with FileSink(tmp_path / "first", 0) as sink:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_sink_call, work, sink, limiter)
            await sink.first_landed.wait()
            nursery.cancel_scope.cancel()
        number = sink.fd
    with FileSink(tmp_path / "second", 0) as other:
        assert other.fd == number
        stall.set()
        with trio.fail_after(HANG_S):
            await Call(lambda _: 7, url="u", answer_timeout_s=HANG_S).run(limiter)
        assert other.content() == b""
