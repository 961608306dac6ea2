"""The next daemon, started before it is needed.

Most of what a new daemon needs until it answers is the time to import its modules, on a machine
that is busy with tasks.  So a second one does that beforehand, and then waits for INIT
(``stagefs/fuse/session.py``) until the one that serves has died.  It has opened nothing but what
it was handed: state and cache belong to one daemon at a time.
"""

import logging
import signal
from collections.abc import Callable

from stagefs.supervisor.daemons import Daemon

log = logging.getLogger("stagefs.supervisor")

FAILURES_MAX = 3
END_TIMEOUT_S = 5.0


class Standby:
    def __init__(self, start: Callable[[], Daemon], *, after_s: float) -> None:
        """``after_s``: how long a daemon must have served before the next is made; 0: never."""
        self._start = start
        self._after_s = after_s
        self._waiting: Daemon | None = None
        self._failures = 0

    def tend(self, serving: Daemon) -> None:
        """Have one when it is time; called now and then."""
        if self._waiting is not None and self._waiting.exit_status() is not None:
            log.warning("daemon %d ended while it stood by", self._waiting.pid)
            self._failures += 1
            self.end()
        if self._waiting is None and 0 < self._after_s <= serving.lived_s:
            if self._failures >= FAILURES_MAX:
                return
            try:
                self._waiting = self._start()
            except OSError as exc:
                log.warning("no daemon can stand by: %s", exc)
                self._failures += 1
                return
            log.info("daemon %d stands by", self._waiting.pid)

    def take(self) -> Daemon | None:
        """It is needed now.  None: there is none."""
        waiting, self._waiting = self._waiting, None
        if waiting is None or waiting.exit_status() is None:
            return waiting
        waiting.close()
        return None

    def end(self) -> None:
        """It is not needed, or the mount goes to somebody else."""
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        if waiting.exit_status() is None:
            waiting.send(signal.SIGKILL)
            waiting.wait(END_TIMEOUT_S)
        waiting.close()
