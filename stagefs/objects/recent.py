"""The last error of each object, for its attribute and for ``status``: bounded, in memory."""

import collections
import time

import msgspec

from stagefs.errors import StageFSError


class RecentError(msgspec.Struct, frozen=True):
    """``at`` is seconds since the epoch."""

    at: float
    errno: int
    sentence: str


class RecentErrors:
    """Oldest forgotten first."""

    def __init__(self, *, kept_max: int = 4096) -> None:
        self._kept_max = kept_max
        self._by_key: collections.OrderedDict[str, RecentError] = collections.OrderedDict()

    def note(self, key: str, error: StageFSError) -> None:
        self._by_key[key] = RecentError(time.time(), error.errno, str(error))
        self._by_key.move_to_end(key)
        if len(self._by_key) > self._kept_max:
            self._by_key.popitem(last=False)

    def get(self, key: str) -> RecentError | None:
        return self._by_key.get(key)

    def latest(self, count: int) -> list[RecentError]:
        return list(self._by_key.values())[-count:]
