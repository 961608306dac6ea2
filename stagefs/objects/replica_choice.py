"""Which of an object's replicas is asked next: a decision on plain values.

The nearest first: of two affinities (``datacenter/machine``) the one that shares more leading
parts with this node's own.  Among equals the fastest, by what was measured here; one of which
little is known, or nothing lately, is asked for a small piece, and none for more than it has
brought until now: many a server is fast for its first mebibytes only.  A server that failed is
asked last; after a pause, twice as long each time, one question that nobody waits for finds out
whether it is well again.  Trio thread; times come from the caller.  No I/O.
"""

import collections
from collections.abc import Sequence

import msgspec
import trio

from stagefs.errors import DeadlineExceeded, RemoteUnavailable, StageFSError
from stagefs.model import MIB

DEMOTED_S, DEMOTED_S_MAX = 10.0, 300.0
# An object that one replica misses or refuses says nothing of others of that server.
OBJECT_DEMOTED_S = 60.0
# The first sample of a server pays for its connection, and counts only until there are others.
SAMPLES_MIN, SAMPLES_MAX = 2, 4
SAMPLE_KEPT_S = 60.0
SAMPLE_BYTES = MIB
# With another replica at hand, one that has sent nothing for so long is left.
STALLED_S = 6.0


def parts(affinity: str) -> list[str]:
    """``dc/machine`` in parts; blanks and empty parts count for nothing."""
    return [part for part in (word.strip() for word in affinity.split("/")) if part]


def closeness(affinity: str, own: str) -> int:
    """How many leading parts two affinities share."""
    shared = 0
    for part, own_part in zip(parts(affinity), parts(own), strict=False):
        if part != own_part:
            break
        shared += 1
    return shared


class Standing:
    """How one server fares as a source, for all objects that have a replica there."""

    __slots__ = (
        "_pause_s",
        "_sample_count",
        "_sampled_at",
        "_samples",
        "active",
        "demoted_until",
        "is_probed",
        "landed_bytes",
        "sampling",
        "scopes",
    )  # fmt: skip

    def __init__(self) -> None:
        # Bytes, and how long they took.
        self._samples: collections.deque[tuple[int, float]] = collections.deque(maxlen=SAMPLES_MAX)
        self._sample_count = 0
        self._sampled_at = 0.0
        self._pause_s = 0.0
        # From when on it may be asked whether it is well again; 0: it is.
        self.demoted_until = 0.0
        self.is_probed = False
        # Of all fetches there: together they are what the server gives.
        self.landed_bytes = 0
        self.active = 0
        self.sampling = 0
        # Of the fetches that are given up when the server is silent.
        self.scopes: set[trio.CancelScope] = set()

    @property
    def rate_bytes_per_s(self) -> float | None:
        if not self._samples:
            return None
        return sum(count for count, _ in self._samples) / sum(took for _, took in self._samples)

    def wants_sample(self, now_s: float) -> bool:
        is_old = now_s - self._sampled_at > SAMPLE_KEPT_S
        return not self.sampling and (self._sample_count < SAMPLES_MIN or is_old)

    def landed(self, count: int, now_s: float) -> None:
        self.landed_bytes += count
        for scope in self.scopes:
            scope.deadline = now_s + STALLED_S

    def transferred(self, count: int, taken_s: float, now_s: float) -> None:
        """``count`` came from the server while one fetch took so long; that fetch went well."""
        self._pause_s, self.demoted_until = 0.0, 0.0
        if count >= SAMPLE_BYTES // 2:
            if self._sample_count == 1:
                self._samples.clear()
            self._samples.append((count, max(taken_s, 1e-6)))
            self._sample_count += 1
            self._sampled_at = now_s

    def wants_probe(self, now_s: float) -> bool:
        return 0 < self.demoted_until <= now_s and not self.is_probed

    def answered(self) -> None:
        """It lives.  How long it was away is forgotten when it has brought something."""
        self.demoted_until = 0.0

    def failed(self, now_s: float) -> None:
        # Of many failures of one moment only the first says something new.
        if now_s >= self.demoted_until:
            self._pause_s = min(max(self._pause_s * 2, DEMOTED_S), DEMOTED_S_MAX)
            self.demoted_until = now_s + self._pause_s


class Source:
    """One replica of one object.  ``excluded``: why it is never asked for this version again."""

    __slots__ = ("affinity", "closeness", "demoted_until", "excluded", "is_first", "standing",
                 "url", "validator", "whole_only")  # fmt: skip

    def __init__(
        self,
        url: str,
        standing: Standing,
        *,
        affinity: str,
        own: str,
        validator: str | None,
        is_first: bool,
    ) -> None:
        """``own``: this node's affinity.  ``is_first``: it is the object's own URL."""
        self.url = url
        self.standing = standing
        self.affinity = affinity
        self.closeness = closeness(affinity, own)
        self.validator = validator
        self.is_first = is_first
        self.excluded: str | None = None
        self.demoted_until = 0.0
        self.whole_only = False

    def is_demoted(self, now_s: float) -> bool:
        return self.standing.demoted_until > 0 or self.demoted_until > now_s

    def demoted_for_s(self, now_s: float) -> float:
        return max(0.0, self.demoted_until - now_s, self.standing.demoted_until - now_s)

    def failed(self, error: StageFSError, now_s: float) -> None:
        if isinstance(error, RemoteUnavailable | DeadlineExceeded):
            self.standing.failed(now_s)
        else:
            self.demoted_until = now_s + OBJECT_DEMOTED_S


class Choice(msgspec.Struct, frozen=True):
    """``bytes_max``: ask it for no more than that; None: for all.  ``is_sample``: to see how fast
    it is."""

    source: Source
    bytes_max: int | None = None
    is_sample: bool = False


def choose(sources: Sequence[Source], now_s: float) -> Choice:
    """The one to ask, of at least one."""
    well = [source for source in sources if not source.is_demoted(now_s)]
    if not well:
        return Choice(min(sources, key=lambda source: source.demoted_for_s(now_s)))
    nearest = max(source.closeness for source in well)
    equals = [source for source in well if source.closeness == nearest]
    if len(equals) == 1:
        return Choice(equals[0])
    unknown = [source for source in equals if source.standing.wants_sample(now_s)]
    if unknown:
        return Choice(min(unknown, key=_active), SAMPLE_BYTES, is_sample=True)
    known = [source for source in equals if source.standing.rate_bytes_per_s is not None]
    if not known:
        return Choice(min(equals, key=_active), SAMPLE_BYTES)
    best = max(known, key=_rate)
    return Choice(best, max(SAMPLE_BYTES, best.standing.landed_bytes))


def _active(source: Source) -> int:
    return source.standing.active


def _rate(source: Source) -> float:
    return source.standing.rate_bytes_per_s or 0.0
