"""How one remote fares, and what follows from that: three decisions on plain values.

* The circuit.  When CIRCUIT_FAILURES attempts in a row have failed for a reason that may pass, the
  first of them at least CIRCUIT_SPAN_S ago, the remote counts as down: whoever asks is told so
  at once.  After a pause one attempt is let through; if it fails the pause doubles, if it
  succeeds the remote is well again.  An answer that refuses (missing, forbidden) is a success: the
  server lives.  Nor is it down in the first AWAY_SPAN_S of being away (RemoteAway).
* Damping.  When the server says that it is asked too much (429, 503), nobody asks it before
  the time it wished for, else before a back-off with jitter, and only half as many at a time as
  before.  Each success lets in a little more.
* Slowness.  From RATES_MIN transfers on, one that takes longer than the slowest hundredth of the
  past took for as many bytes, and longer than SLOW_FLOOR_S, counts as stalled.

Lives in the trio thread; times come from the caller.  No I/O.
"""

import collections
import math
import random
from collections.abc import Callable

import msgspec

from stagefs.errors import DeadlineExceeded, RemoteAway, RemoteUnavailable, StageFSError

CIRCUIT_FAILURES = 6
CIRCUIT_SPAN_S = 5.0
AWAY_SPAN_S = 60.0
PAUSE_S, PAUSE_S_MAX = 2.0, 60.0
BUSY_PAUSE_S, BUSY_PAUSE_S_MAX = 0.5, 30.0
RATES_MIN, RATES_MAX = 50, 500
# Smaller transfers tell of latency, not of rates.
RATED_BYTES_MIN = 256 << 10
SLOW_FLOOR_S = 5.0
SLOW_SHARE = 0.01


class RemoteStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """One remote as an administrator sees it.  ``state``: well, failing (the last attempt did),
    busy (it wants to be asked less) or down.  ``rate_bytes_per_s``: the median of late
    transfers.  ``errors``: attempts that failed for a reason that may pass; ``reason``: of the
    last one."""

    url: str
    state: str
    attempts: int = 0
    errors: int = 0
    slow_transfers: int = 0
    fetched_bytes: int = 0
    rate_bytes_per_s: float | None = None
    allowed: int | None = None
    again_in_s: float = 0.0
    reason: str | None = None
    reason_age_s: float | None = None


class Health:
    """``places``: how many attempts may run at a time when all is well."""

    def __init__(self, places: int, *, jitter: Callable[[], float] = random.random) -> None:
        self._places = places
        self._jitter = jitter
        self._failures = 0
        self._failing_since_s = 0.0
        self._away_since_s: float | None = None
        self._pause_s = 0.0
        self._down_until_s: float | None = None
        self._trying = False
        self._allowed = float(places)
        self._busy_pause_s = 0.0
        self._busy_until_s = -math.inf
        self._rates: collections.deque[float] = collections.deque(maxlen=RATES_MAX)
        self._reason: str | None = None
        self._reason_at_s = 0.0
        self.attempts = 0
        self.errors = 0
        self.slow_transfers = 0
        self.fetched_bytes = 0

    # Before an attempt.

    def down_for_s(self, now_s: float) -> float:
        """How long nobody may ask; 0 when one may.  While one attempt finds out whether the remote
        is well again, for the others the pause lasts."""
        if self._down_until_s is None:
            return 0.0
        if self._trying:
            return self._pause_s
        return max(0.0, self._down_until_s - now_s)

    def busy_for_s(self, now_s: float) -> float:
        return max(0.0, self._busy_until_s - now_s)

    @property
    def allowed(self) -> int:
        """Attempts at a time."""
        return max(1, int(self._allowed))

    @property
    def reason(self) -> str:
        return self._reason or "it does not answer"

    def begun(self) -> None:
        self.attempts += 1
        if self._down_until_s is not None:
            self._trying = True

    # After it.

    def succeeded(self) -> None:
        self._failures = 0
        self._away_since_s = None
        self._down_until_s, self._trying, self._pause_s = None, False, 0.0
        self._busy_pause_s = 0.0
        self._allowed = min(self._places, self._allowed + 1 / self._allowed)

    def given_up(self) -> None:
        """Nobody waited for its outcome."""
        self._trying = False

    def failed(self, error: StageFSError, now_s: float, *, at_once: int) -> None:
        """``at_once``: how many attempts were under way."""
        if not isinstance(error, RemoteUnavailable | DeadlineExceeded):
            self.succeeded()
            return
        self.errors += 1
        self._reason, self._reason_at_s = str(error), now_s
        if isinstance(error, RemoteUnavailable) and error.busy:
            # It lives, so it is not down.
            self._failures, self._down_until_s, self._trying = 0, None, False
            self._damp(error.retry_after_s, now_s, at_once)
            return
        if isinstance(error, RemoteAway) and self._down_until_s is None:
            self._away_since_s = now_s if self._away_since_s is None else self._away_since_s
            if now_s - self._away_since_s < AWAY_SPAN_S:
                # Who waits for its return would be turned away by an open circuit.
                self._failures, self._failing_since_s = 1, now_s
                return
        if not self._failures:
            self._failing_since_s = now_s
        self._failures += 1
        enough = (
            self._failures >= CIRCUIT_FAILURES and now_s - self._failing_since_s >= CIRCUIT_SPAN_S
        )
        if self._trying or (enough and self._down_until_s is None):
            self._trying = False
            self._pause_s = min(max(self._pause_s * 2, PAUSE_S), PAUSE_S_MAX)
            self._down_until_s = now_s + self._pause_s * (0.5 + self._jitter() / 2)

    def _damp(self, wish_s: float | None, now_s: float, at_once: int) -> None:
        # Of many refusals of one moment only the first says something new.
        if now_s >= self._busy_until_s:
            self._allowed = max(1.0, min(self._allowed, at_once) / 2)
            self._busy_pause_s = min(max(self._busy_pause_s * 2, BUSY_PAUSE_S), BUSY_PAUSE_S_MAX)
        pause_s = self._busy_pause_s * (0.5 + self._jitter() / 2) if wish_s is None else wish_s
        self._busy_until_s = max(self._busy_until_s, now_s + pause_s)

    # Transfers.

    def transferred(self, count: int, taken_s: float) -> None:
        self.fetched_bytes += count
        if count >= RATED_BYTES_MIN:
            self._rates.append(count / max(taken_s, 1e-6))

    def patience_s(self, count: int) -> float:
        """How long a transfer of so many bytes may take before it counts as stalled."""
        if len(self._rates) < RATES_MIN:
            return math.inf
        slowest = sorted(self._rates)[int(len(self._rates) * SLOW_SHARE)]
        return max(SLOW_FLOOR_S, max(count, RATED_BYTES_MIN) / slowest)

    def was_slow(self, url: str, now_s: float) -> None:
        self.slow_transfers += 1
        self._reason = f"The transfer of {url} was slower than the slowest hundredth of the past."
        self._reason_at_s = now_s

    def status(self, url: str, now_s: float) -> RemoteStatus:
        rates = sorted(self._rates)
        damped = self.allowed < self._places or self.busy_for_s(now_s) > 0
        if self._down_until_s is not None:
            state = "down"
        elif self._failures:
            state = "failing"
        else:
            state = "busy" if damped else "well"
        return RemoteStatus(
            url=url,
            state=state,
            attempts=self.attempts,
            errors=self.errors,
            slow_transfers=self.slow_transfers,
            fetched_bytes=self.fetched_bytes,
            rate_bytes_per_s=rates[len(rates) // 2] if rates else None,
            allowed=self.allowed if damped else None,
            again_in_s=max(self.down_for_s(now_s), self.busy_for_s(now_s)),
            reason=self._reason,
            reason_age_s=None if self._reason is None else now_s - self._reason_at_s,
        )
