"""Background work pauses in proportion while others want the processors."""

import os

from stagefs.namespace.giving_way import PAUSE_FACTOR, PAUSE_S_MAX, GivingWay, runnable_tasks

PROCESSORS = len(os.sched_getaffinity(0))


class Clock:
    """Time passes when somebody works or sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.pauses: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now_s += seconds


def giving_way(clock: Clock, runnable: int) -> GivingWay:
    return GivingWay(runnable=lambda: runnable, sleep=clock.sleep, now=lambda: clock.now_s)


def test_no_pause_while_there_are_processors_for_all() -> None:
    clock = Clock()
    way = giving_way(clock, PROCESSORS)
    clock.now_s += 0.01
    way.pause()
    assert clock.pauses == []


def test_a_pause_is_as_long_as_the_work_before_it_asks_for() -> None:
    clock = Clock()
    way = giving_way(clock, PROCESSORS + 1)
    for worked_s in (1 / 64, 1 / 32):
        clock.now_s += worked_s
        way.pause()
    assert clock.pauses == [PAUSE_FACTOR / 64, PAUSE_FACTOR / 32]


def test_a_pause_has_a_bound() -> None:
    clock = Clock()
    way = giving_way(clock, PROCESSORS + 1)
    clock.now_s += 1000.0
    way.pause()
    assert clock.pauses == [PAUSE_S_MAX]


def test_the_system_tells_of_this_task_at_least() -> None:
    assert runnable_tasks() >= 1
