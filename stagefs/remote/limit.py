"""Taking turns: a remote that lets only so many operations at one host run at a time.

A wrapper with the interface of ``base.Remote``.  Fetches, puts, batches, and lookups each have
places of their own, so that a stat never queues behind stalled transfers and a task's read
never behind uploads.  Waiting for a
place has no time limit here: the caller's deadline holds.  Lives in the trio thread.
"""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence

import trio

from stagefs.model import Checksum, ListedEntry, ObjectInfo, Span
from stagefs.remote.base import BatchItem, Remote, Results, Sink
from stagefs.remote.settings import RemoteSettings

# A batch already fills a connection, or several.
BATCHES = 4


class LimitedRemote:
    """``remote``, with a limited number of places."""

    def __init__(self, remote: Remote, settings: RemoteSettings) -> None:
        self._remote = remote
        self._transfers = trio.Semaphore(settings.concurrency)
        self._puts = trio.Semaphore(settings.concurrency)
        self._batches = trio.Semaphore(BATCHES)
        self._lookups = trio.Semaphore(settings.lookups)
        self._under_way = 0

    @property
    def idle(self) -> bool:
        """Whether no operation runs or waits."""
        return not self._under_way

    async def stat(self, url: str) -> ObjectInfo:
        with self._counted():
            async with self._lookups:
                return await self._remote.stat(url)

    async def list(self, url: str) -> AsyncIterator[Sequence[ListedEntry]]:
        with self._counted():
            pages = self._remote.list(url)
            while True:
                # A place is held per page: a consumer may take its time between two.
                async with self._lookups:
                    page = await anext(pages, None)
                if page is None:
                    return
                yield page

    async def fetch(self, url: str, span: Span, *, sink: Sink, validator: str | None) -> ObjectInfo:
        with self._counted():
            async with self._transfers:
                return await self._remote.fetch(url, span, sink=sink, validator=validator)

    async def fetch_batch(self, items: Sequence[BatchItem]) -> Results:
        with self._counted():
            async with self._batches:
                return await self._remote.fetch_batch(items)

    async def put(
        self,
        url: str,
        *,
        source: int,
        size_bytes: int,
        overwrite: bool,
        checksum: Checksum | None,
        mode: int | None,
        progress: Callable[[int], None],
    ) -> ObjectInfo:
        with self._counted():
            async with self._puts:
                return await self._remote.put(
                    url,
                    source=source,
                    size_bytes=size_bytes,
                    overwrite=overwrite,
                    checksum=checksum,
                    mode=mode,
                    progress=progress,
                )

    async def delete(self, url: str) -> None:
        with self._counted():
            async with self._puts:
                await self._remote.delete(url)

    async def aclose(self) -> None:
        await self._remote.aclose()

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
