"""The last error of each object, for its attribute and for ``status``: bounded, in memory."""

import collections
import errno
import time

import msgspec

from stagefs.errors import StageFSError


class RecentError(msgspec.Struct, frozen=True):
    """``at`` is seconds since the epoch."""

    at: float
    errno: int
    sentence: str


# Beyond so many pairs of site and errno the rest is counted together, as site "other".
_SITES_MAX = 256


class RecentErrors:
    """Oldest forgotten first.  ``by_site`` counts failed fetches for ever: (scheme://host, name of
    the errno)."""

    def __init__(self, *, kept_max: int = 4096) -> None:
        self._kept_max = kept_max
        self._by_key: collections.OrderedDict[str, RecentError] = collections.OrderedDict()
        self.by_site: collections.Counter[tuple[str, str]] = collections.Counter()

    def count(self, url: str, error: StageFSError) -> None:
        """A fetch of ``url`` failed."""
        name = errno.errorcode.get(error.errno, str(error.errno))
        scheme, _, rest = url.partition("://")
        site = f"{scheme}://{rest.partition('/')[0]}"
        if (site, name) not in self.by_site and len(self.by_site) >= _SITES_MAX:
            site = "other"
        self.by_site[site, name] += 1

    def note(self, key: str, error: StageFSError) -> None:
        self._by_key[key] = RecentError(time.time(), error.errno, str(error))
        self._by_key.move_to_end(key)
        if len(self._by_key) > self._kept_max:
            self._by_key.popitem(last=False)

    def get(self, key: str) -> RecentError | None:
        return self._by_key.get(key)

    def latest(self, count: int) -> list[RecentError]:
        return list(self._by_key.values())[-count:]
