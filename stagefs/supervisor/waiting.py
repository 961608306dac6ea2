"""Waiting for signals, descriptors and the clock at once.

Signals write into a pipe, so that one that comes just before the wait is not missed.
"""

import os
import select
import signal

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Waiting:
    """Takes over the signals of this process; there is one."""

    def __init__(self) -> None:
        self.stop_reason: str | None = None
        self._wake, wake = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        for number in STOPPING:
            signal.signal(number, self._note_stop)
        signal.signal(signal.SIGCHLD, _note_nothing)

    def _note_stop(self, number: int, _frame: object) -> None:
        self.stop_reason = f"{signal.Signals(number).name} received"

    def once(self, *watched: int, timeout_s: float) -> set[int]:
        """Until a signal, a descriptor with something to say, or the clock.  Returns which of the
        watched have something to say."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for fd in watched:
            poll.register(fd, select.POLLIN)
        ready = dict(poll.poll(timeout_s * 1000))
        if self._wake in ready:
            os.read(self._wake, 4096)
        return set(ready)


def _note_nothing(_number: int, _frame: object) -> None:
    """SIGCHLD only has to end the wait."""
