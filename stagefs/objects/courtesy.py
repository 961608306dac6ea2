"""Courtesy: fetches that nobody waits for, and large writes, leave the processor to readers.

On a small machine a fetch at full speed takes every core, and tasks that read what is cached
already get a seventh of what they get alone (measured, docs/BENCHMARKS.md).  So a fetch whose
object no task has open (``stagefs warm``, ``stage-in --wait``) pauses between two pieces while
the event loop is busy with the reads of others.  It never pauses for long, so it never stops,
and its remote sees a slow client and not a silent one.

A write of a MiB into the page cache takes the event loop as long as several reads, and who
writes without end has his next one ready when his last was answered: readers then get half of
the loop's time.  So a large write waits a moment while reads are served to somebody else; to the
writer himself, who copies, it would be time lost.

``served`` is counted on the event loop; pauses of fetches are made in their own threads.
"""

import threading

import trio

# A mebibyte in so long is what all such fetches together get while somebody reads.
PAUSE_S = 0.01
# From this size on a write takes longer than a read costs.
LARGE_WRITE_BYTES = 128 << 10
# Still 300 MiB/s for who writes, in writes of a MiB.
WRITE_PAUSE_S = 0.003


class Courtesy:
    """``served``: reads that were answered from the page cache; ``reader``: the thread that opened
    the handle of the last one."""

    __slots__ = ("_never", "_served_at_write", "_turn", "reader", "served")

    def __init__(self) -> None:
        self.served = 0
        self.reader = 0
        self._served_at_write = 0
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

    def comes_before(self, size: int, writer: int) -> bool:
        """Whether a write of ``size`` bytes through a handle that thread ``writer`` opened has to
        wait (``wait_to_write``), because reads were served since the last such write."""
        return (
            size >= LARGE_WRITE_BYTES
            and self.served != self._served_at_write
            and self.reader != writer
        )

    async def wait_to_write(self) -> None:
        """Trio thread."""
        await trio.sleep(WRITE_PAUSE_S)
        self._served_at_write = self.served


COURTESY = Courtesy()
