"""Whether the disk takes writes at once.

A write into the page cache takes microseconds until the kernel makes writers wait for the
disk: then tens of milliseconds, in which the event loop would serve nobody.  So after a slow
one, writes go to worker threads for a while.  Trio thread only.
"""

import time
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import trio

_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")

SLOW_S = 0.02
REST_S = 1.0
THREADS_MAX = 16
SYNCING_THREADS_MAX = 4


class Pace:
    """``threads_until`` is a time of ``time.monotonic``: before it, writes go to threads."""

    __slots__ = ("_limiter", "_slow_s", "_syncing", "threaded_writes", "threads_until")

    def __init__(self, slow_s: float = SLOW_S) -> None:
        self._slow_s = slow_s
        # Apart, because nobody who reads shall wait for those who sync, and neither shall fetches.
        self._limiter = trio.CapacityLimiter(THREADS_MAX)
        self._syncing = trio.CapacityLimiter(SYNCING_THREADS_MAX)
        self.threads_until = 0.0
        self.threaded_writes = 0

    def took(self, begun: float) -> None:
        """A write that began at ``begun`` is over."""
        now = time.monotonic()
        if now - begun >= self._slow_s:
            self.threads_until = now + REST_S

    async def thread(self, function: Callable[[*_Ts], _T], *args: *_Ts) -> _T:
        return await trio.to_thread.run_sync(function, *args, limiter=self._limiter)

    async def sync(self, function: Callable[[*_Ts], _T], *args: *_Ts) -> _T:
        return await trio.to_thread.run_sync(function, *args, limiter=self._syncing)

    async def write(self, function: Callable[[*_Ts], _T], *args: *_Ts) -> _T:
        """Inline, or in a thread while the disk is slow."""
        begun = time.monotonic()
        if begun >= self.threads_until:
            result = function(*args)
            self.took(begun)
            return result
        self.threaded_writes += 1
        return await self.thread(self._timed, function, *args)

    def _timed(self, function: Callable[[*_Ts], _T], *args: *_Ts) -> _T:
        """In a thread: a write that is still slow keeps the next ones there."""
        begun = time.monotonic()
        result = function(*args)
        self.took(begun)
        return result
