"""GivingWay: a process that works in the background pauses while others want its processors.

Niceness alone does not do it: beside an import on two cores a reading task and the daemon shared
the other core, and the reads had 0.6 of their speed (measured, docs/BENCHMARKS.md), because the
scheduler takes a processor with a nice task on it for a busy one.

The system tells how many tasks want to run in ``/proc/loadavg`` (proc(5)).  One thread.
"""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

LOAD = Path("/proc/loadavg")
# A pause is so long as the work before it, times this.
PAUSE_FACTOR = 2.0
PAUSE_S_MAX = 0.2


def runnable_tasks() -> int:
    """How many tasks of the machine run or wait for a processor, this one among them; 0 where the
    system does not tell."""
    try:
        return int(LOAD.read_text().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return 0


class GivingWay:
    def __init__(
        self,
        *,
        runnable: Callable[[], int] = runnable_tasks,
        sleep: Callable[[float], object] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runnable = runnable
        self._sleep = sleep or threading.Event().wait
        self._now = now
        self._processors = len(os.sched_getaffinity(0))
        self._since = now()

    def pause(self) -> None:
        """Between two pieces of work: wait a moment if somebody would have to."""
        if self._runnable() > self._processors:
            worked_s = self._now() - self._since
            self._sleep(min(worked_s * PAUSE_FACTOR, PAUSE_S_MAX))
        self._since = self._now()
