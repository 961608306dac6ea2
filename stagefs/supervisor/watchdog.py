"""Whether the daemon answers: one cheap request on the mount, every few seconds.

The request (statfs) needs no remote and is answered from no cache of the kernel.  It is made in
a child, because nobody can be called back from it while it waits.

A daemon counts as wedged when all of this holds for the whole patience: the request has no
answer; no other request was answered; and, where the kernel tells, requests wait on this
connection.  The last one keeps a daemon alive whose mountpoint lies in a directory of a file
server that hangs: there the request does not even reach it.

Time in which this process did not run does not count: who wakes a suspended machine or thaws a
control group must not lose a daemon that had no chance to answer.
"""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from stagefs.supervisor.children import Errand

# The loop that calls looks about once a second; a longer gap means that it was not running.
GAP_MAX_S = 2.0
log = logging.getLogger("stagefs.supervisor")


class Watchdog:
    """``heard``: it has answered since ``begin``.

    ``period_s``: from an answer to the next request.  ``patience_s`` 0: never look."""

    def __init__(
        self,
        ask: Callable[[], None],
        *,
        answered: Callable[[], int],
        connection: int,
        period_s: float,
        patience_s: float,
    ) -> None:
        self._ask = ask
        self._answered = answered
        self._waiting = Path(f"/sys/fs/fuse/connections/{connection}/waiting")
        self._period_s = period_s
        self._patience_s = patience_s
        self._errand: Errand | None = None
        self.begin()

    def begin(self) -> None:
        """A daemon has just become ready: what was asked of the one before is of no interest."""
        self.end()
        self.heard = False
        self._looked_at_s = time.monotonic()
        self._answered_then = self._answered()

    def end(self) -> None:
        """Forget what is under way; the patience begins anew."""
        self._quiet_s = 0.0
        if self._errand is not None:
            self._errand.leave()
            self._errand = None

    def is_wedged(self) -> bool:
        """To be asked at least once a second."""
        if not self._patience_s:
            return False
        now = time.monotonic()
        self._quiet_s += min(now - self._looked_at_s, GAP_MAX_S)
        self._looked_at_s = now
        if self._errand is None:
            if self._quiet_s >= self._period_s:
                self._quiet_s = 0.0
                self._answered_then = self._answered()
                self._errand = Errand(self._ask)
            return False
        if (code := self._errand.answer()) is not None:
            self._errand = None
            self._quiet_s = 0.0
            self._note(code)
        elif self._answered() != self._answered_then or self._nobody_waits():
            self._answered_then = self._answered()
            self._quiet_s = 0.0
        return self._quiet_s >= self._patience_s

    def _note(self, code: int) -> None:
        if code:
            log.warning("the mount could not be asked: %s", os.strerror(code))
        elif not self.heard:
            log.info("the mount answers")
            self.heard = True

    def _nobody_waits(self) -> bool:
        """False as well when nobody can say: the control file system may not be mounted."""
        try:
            return int(self._waiting.read_text(encoding="ascii")) == 0
        except OSError:
            return False
