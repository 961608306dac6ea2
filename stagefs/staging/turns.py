"""Taking turns by priority: so many may work at a time, of those who wait the highest goes next.

Who works is never interrupted.  Trio thread.
"""

import contextlib
import heapq
import itertools
from collections.abc import AsyncIterator

import trio


class Turns:
    """Of equal priority, who came first goes first."""

    def __init__(self, at_once: int) -> None:
        self._free = at_once
        self._waiting: list[tuple[int, int, trio.Event]] = []
        self._numbers = itertools.count()

    @contextlib.asynccontextmanager
    async def turn(self, priority: int) -> AsyncIterator[None]:
        await self._begin(priority)
        try:
            yield
        finally:
            self._next()

    async def _begin(self, priority: int) -> None:
        if self._free:
            self._free -= 1
            return
        called = trio.Event()
        mine = (-priority, next(self._numbers), called)
        heapq.heappush(self._waiting, mine)
        try:
            await called.wait()
        except trio.Cancelled:
            if called.is_set():
                self._next()
            else:
                self._waiting.remove(mine)
                heapq.heapify(self._waiting)
            raise

    def _next(self) -> None:
        if self._waiting:
            heapq.heappop(self._waiting)[2].set()
        else:
            self._free += 1
