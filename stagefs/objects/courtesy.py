"""Courtesy: fetches that nobody waits for leave the processor to those who read.

On a small machine a fetch at full speed takes every core, and tasks that read what is cached
already get a seventh of what they get alone (measured, docs/BENCHMARKS.md).  So a fetch whose
object no task has open (``stagefs warm``, ``stage-in --wait``) pauses between two pieces while
the event loop is busy with the reads of others.  It never pauses for long, so it never stops,
and its remote sees a slow client and not a silent one.

``served`` is counted on the event loop; pauses are made in the fetch's own thread.
"""

import threading

# A mebibyte in so long is what all such fetches together get while somebody reads.
PAUSE_S = 0.01


class Courtesy:
    """``served``: reads that were answered from the page cache."""

    __slots__ = ("_never", "_turn", "served")

    def __init__(self) -> None:
        self.served = 0
        self._never = threading.Event()
        self._turn = threading.Lock()

    def pause(self, served_before: int) -> int:
        """Let readers go first, if there were any since ``served`` was ``served_before``.

        One fetch pauses after another, each for a moment, however many there are.  Returns
        ``served``, for the next time.
        """
        if self.served != served_before:
            with self._turn:
                self._never.wait(PAUSE_S)
        return self.served


COURTESY = Courtesy()
