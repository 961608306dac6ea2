"""Fetches that nobody waits for, and large writes, leave the processor to those who read."""

import threading

import trio
import trio.testing

from stagefs.objects.courtesy import LARGE_WRITE_BYTES, PAUSE_S, WRITE_PAUSE_S, Courtesy

READER, WRITER = 11, 12


def test_nobody_reads_nobody_waits() -> None:
    courtesy = Courtesy()
    assert courtesy.pause(0) == 0


def test_a_pause_tells_what_was_served_until_its_end() -> None:
    courtesy = Courtesy()
    courtesy.served = 5
    assert courtesy.pause(0) == 5
    assert courtesy.pause(5) == 5


def test_many_fetches_pause_one_after_another_and_all_end() -> None:
    courtesy = Courtesy()
    courtesy.served = 1
    ended: list[int] = []
    threads = [threading.Thread(target=lambda: ended.append(courtesy.pause(0))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100 * 8 * PAUSE_S)
    assert ended == [1] * 8


def test_large_writes_come_after_reads_of_somebody_else() -> None:
    courtesy = Courtesy()
    assert not courtesy.comes_before(LARGE_WRITE_BYTES, WRITER), "nobody reads"
    courtesy.served, courtesy.reader = 1, READER
    assert courtesy.comes_before(LARGE_WRITE_BYTES, WRITER)
    assert not courtesy.comes_before(LARGE_WRITE_BYTES - 1, WRITER), "a small one"
    assert not courtesy.comes_before(LARGE_WRITE_BYTES, READER), "who copies reads for himself"


async def test_a_write_waits_once_for_reads_that_were_served(
    autojump_clock: trio.testing.MockClock,
) -> None:
    courtesy = Courtesy()
    courtesy.served, courtesy.reader = 1, READER
    begun = trio.current_time()
    await courtesy.wait_to_write()
    assert trio.current_time() - begun == WRITE_PAUSE_S
    assert not courtesy.comes_before(LARGE_WRITE_BYTES, WRITER), "none since then"
    courtesy.served += 1
    assert courtesy.comes_before(LARGE_WRITE_BYTES, WRITER)
