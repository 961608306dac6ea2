"""Keeping the cache within its capacity: one eviction at a time, before a fetch begins.

Concurrency: the choice of what to drop is made in the trio thread, where chunk states change;
the disk work happens in a worker thread.
"""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from stagefs.cache.store import Cache
from stagefs.errors import CacheFailed
from stagefs.model import MIB

log = logging.getLogger(__name__)

# Of a small cache, read-ahead may take this share: else it would evict what it just brought.
AHEAD_SHARE = 4
AHEAD_BYTES_MIN = 4 * MIB
# What is reserved on the disk counts as used before it has come, so a cache that is nearly full
# reserves nothing.
AMPLE_BYTES = 1024 * MIB


class Room:
    """``release_idle`` lets go of open entries that nobody uses, so that they can be evicted."""

    def __init__(self, cache: Cache | None, release_idle: Callable[[], None]) -> None:
        self._cache = cache
        self._release_idle = release_idle
        self._lock = trio.Lock()
        self._promised_bytes = 0

    def ahead_bytes_max(self, wanted_bytes: int) -> int:
        """How much may be on its way ahead of readers, if it were for the settings."""
        if self._cache is None:
            return wanted_bytes
        share = max(self._cache.capacity_bytes // AHEAD_SHARE, AHEAD_BYTES_MIN)
        return min(wanted_bytes, share)

    @property
    def is_ample(self) -> bool:
        cache = self._cache
        return cache is not None and cache.headroom_bytes - self._promised_bytes >= AMPLE_BYTES

    @asynccontextmanager
    async def for_bytes(self, length_bytes: int) -> AsyncIterator[None]:
        """Entered when ``length_bytes`` more fit, beside what others were promised, or when
        nothing more can be dropped."""
        cache = self._cache
        self._promised_bytes += length_bytes
        try:
            if cache is not None and not self._fits(cache):
                await self._make(cache)
            yield
        finally:
            self._promised_bytes -= length_bytes

    async def _make(self, cache: Cache) -> None:
        async with self._lock:
            while not self._fits(cache):
                self._release_idle()
                plan = cache.plan_room(self._promised_bytes)
                if plan is None:
                    return
                try:
                    freed = await trio.to_thread.run_sync(cache.carry_out, plan)
                except CacheFailed as error:
                    log.warning("making room in the cache: %s", error)
                    return
                if not freed:
                    return

    def _fits(self, cache: Cache) -> bool:
        return cache.headroom_bytes >= self._promised_bytes and not cache.over_capacity()
