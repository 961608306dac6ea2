"""Fetches that nobody waits for leave the processor to those who read."""

import threading

from stagefs.objects.courtesy import PAUSE_S, Courtesy


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
