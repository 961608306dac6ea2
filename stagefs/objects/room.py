"""Keeping the cache within its capacity: one eviction at a time, before a fetch begins.

Concurrency: the choice of what to drop is made in the trio thread, where chunk states change;
the disk work happens in a worker thread.
"""

import logging
from collections.abc import Callable

import trio

from stagefs.cache.store import Cache
from stagefs.errors import CacheFailed

log = logging.getLogger(__name__)


class Room:
    """``release_idle`` lets go of open entries that nobody uses, so that they can be evicted."""

    def __init__(self, cache: Cache | None, release_idle: Callable[[], None]) -> None:
        self._cache = cache
        self._release_idle = release_idle
        self._lock = trio.Lock()

    async def make(self, length_bytes: int) -> None:
        """Return when ``length_bytes`` more fit, or when nothing more can be dropped."""
        cache = self._cache
        if cache is None or self._fits(cache, length_bytes):
            return
        async with self._lock:
            while not self._fits(cache, length_bytes):
                self._release_idle()
                plan = cache.plan_room(length_bytes)
                if plan is None:
                    return
                try:
                    freed = await trio.to_thread.run_sync(cache.carry_out, plan)
                except CacheFailed as error:
                    log.warning("making room in the cache: %s", error)
                    return
                if not freed:
                    return

    @staticmethod
    def _fits(cache: Cache, length_bytes: int) -> bool:
        return cache.headroom_bytes >= length_bytes and not cache.over_capacity()
