"""When an upload that failed is tried again, and which hosts are given a rest.

Three kinds of failures: final ones, which the same attempt would meet again (somebody has to
decide); those that pass by themselves, which are tried for ever; and all others, which are tried
a few times.  A host at which two attempts in a row found nobody is asked by one upload at a time
after a pause, so that a thousand outputs for a host that is gone take no places from the
others.  Decisions only: no I/O, no clock of its own.  Trio thread.
"""

import enum
import random
from collections.abc import Callable

import msgspec

from stagefs.config import StageOutSettings
from stagefs.errors import (
    AccessDenied,
    CredentialsExpired,
    IsADirectory,
    NameExists,
    NoSpace,
    NotADirectory,
    NotFound,
    NotPermitted,
    NotSupported,
    ReadOnly,
    SetupError,
    StageFSError,
)

# Somebody who waits for the queue has less time than the queue.
URGENT_PAUSE_S_MAX = 5.0
HOST_PAUSE_S_MAX = 60.0
HOST_FAILURES_MIN = 2
_FINAL = (
    AccessDenied,
    IsADirectory,
    NameExists,
    NotADirectory,
    NotFound,
    NotPermitted,
    NotSupported,
    ReadOnly,
    SetupError,
)


class Kind(enum.Enum):
    FINAL = "final"
    LIMITED = "limited"
    PASSING = "passing"


def kind_of(error: StageFSError) -> Kind:
    if isinstance(error, CredentialsExpired):
        # Somebody renews them, as for all that runs longer than they last.
        return Kind.PASSING
    if isinstance(error, _FINAL):
        return Kind.FINAL
    # A full disk at the server is somebody's work to mend, like a server that is down.
    return Kind.PASSING if error.transient or isinstance(error, NoSpace) else Kind.LIMITED


class _Host(msgspec.Struct):
    failures: int = 0
    until: float = 0.0


class Patience:
    def __init__(
        self, settings: StageOutSettings, *, jitter: Callable[[], float] = random.random
    ) -> None:
        self._settings = settings
        self._jitter = jitter
        self._hosts: dict[str, _Host] = {}

    def pause_s(self, error: StageFSError, failures: int, *, urgent: bool) -> float | None:
        """How long to wait after so many failures in a row; None: it is over."""
        kind = kind_of(error)
        if kind is Kind.FINAL or (kind is Kind.LIMITED and failures >= self._settings.attempts):
            return None
        return self._grown_s(failures, URGENT_PAUSE_S_MAX if urgent else float("inf"))

    def _grown_s(self, failures: int, limit_s: float) -> float:
        longest_s = min(self._settings.backoff_s_max, limit_s)
        # The exponent is bounded, because failures are not.
        pause_s = min(self._settings.backoff_s * 2.0 ** min(failures - 1, 32), longest_s)
        return pause_s * (0.5 + self._jitter() / 2)

    # Hosts

    def failed_at(self, host: str, error: StageFSError, now: float, *, urgent: bool) -> None:
        if not error.transient:
            self.worked_at(host)  # it did answer
            return
        known = self._hosts.setdefault(host, _Host())
        if now < known.until:
            return  # one of several that had begun before
        known.failures += 1
        if known.failures >= HOST_FAILURES_MIN:
            limit_s = URGENT_PAUSE_S_MAX if urgent else HOST_PAUSE_S_MAX
            known.until = now + self._grown_s(known.failures - 1, limit_s)

    def worked_at(self, host: str) -> None:
        self._hosts.pop(host, None)

    def held(self, now: float, busy: set[str]) -> dict[str, float]:
        """The hosts that take no upload now -> when they do.  A doubtful one whose pause is over
        takes one: none when it is ``busy`` already (for ever: its end is an event)."""
        held = {}
        for name, host in self._hosts.items():
            if host.failures < HOST_FAILURES_MIN:
                continue
            if now < host.until:
                held[name] = host.until
            elif name in busy:
                held[name] = float("inf")
        return held

    def doubtful(self, host: str) -> bool:
        known = self._hosts.get(host)
        return known is not None and known.failures >= HOST_FAILURES_MIN

    def forget_hosts(self) -> None:
        """Ask everybody again now."""
        self._hosts.clear()
