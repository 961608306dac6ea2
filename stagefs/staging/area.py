"""StagingArea: everything the control API can ask of one mount.

Puts the operations on names, on the cache and the import side by side behind ``control.Area``
and adds what concerns the whole.  No policy of its own.  Trio thread.
"""

import os
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

import msgspec

from stagefs import __version__
from stagefs.cache.store import Cache
from stagefs.config import Settings
from stagefs.errors import CacheFailed
from stagefs.namespace.store import Namespace
from stagefs.objects.objects import Objects
from stagefs.remote.registry import Remotes
from stagefs.staging import values
from stagefs.staging.cached import CacheOperations
from stagefs.staging.importing import run_import
from stagefs.staging.names import NameOperations
from stagefs.staging.tree import Invalidations, Tree, parse_place
from stagefs.staging.values import ProgressCallback
from stagefs.vfs.bindings import Bindings

DATABASE_NAME = "namespace.sqlite"

_Answer = TypeVar("_Answer")


class StagingArea:
    """Implements ``stagefs.control.api.Area``."""

    def __init__(
        self,
        *,
        namespace: Namespace,
        objects: Objects,
        bindings: Bindings,
        cache: Cache | None,
        cache_directory: Path,
        remotes: Remotes,
        invalidations: Invalidations,
        settings: Settings,
        mountpoint: str,
        state_directory: Path,
        log_path: Path,
    ) -> None:
        self._namespace = namespace
        self._objects = objects
        self._cache = cache
        self._settings = settings
        self._mountpoint = mountpoint
        self._state_directory = state_directory
        self._log_path = log_path
        self._started_ns = time.time_ns()
        self._invalidations = invalidations
        self._tree = Tree(namespace, objects, bindings)
        self._names = NameOperations(
            namespace=namespace,
            objects=objects,
            remotes=remotes,
            tree=self._tree,
            invalidations=invalidations,
            settings=settings.namespace,
        )
        self._cached = CacheOperations(
            cache=cache,
            directory=cache_directory,
            namespace=namespace,
            objects=objects,
            remotes=remotes,
            tree=self._tree,
        )

    # Seeing

    def status_now(self) -> values.Status:
        counters = self._objects.counters.snapshot()
        cache = None
        if self._cache is not None:
            counters |= msgspec.structs.asdict(self._cache.counters())
            try:
                cache = self._cached.usage_now()
            except CacheFailed:
                cache = None
        return values.Status(
            version=__version__,
            pid=os.getpid(),
            mountpoint=self._mountpoint,
            state_directory=str(self._state_directory),
            log=str(self._log_path),
            started_ns=self._started_ns,
            names=self._namespace.statistics().nodes,
            cache=cache,
            counters=counters,
            waiting_reads=self._objects.waiting_reads(),
            open_objects=self._objects.open_objects(),
            transfers=[
                values.TransferStatus(
                    url=transfer.url,
                    start=transfer.start,
                    length=transfer.length,
                    landed=transfer.landed,
                    age_s=transfer.age_s,
                )
                for transfer in self._objects.transfers()
            ],
        )

    async def status(self, _request: values.Empty) -> values.Status:
        return self.status_now()

    # Names

    async def _settled(self, change: Awaitable[_Answer]) -> _Answer:
        """Who gets the answer of a change sees the change in the mount, too."""
        answer = await change
        await self._invalidations.settled()
        return answer

    async def stage_in(
        self, request: values.StageIn, progress: ProgressCallback
    ) -> values.StagedIn:
        return await self._settled(self._names.stage_in(request, progress))

    async def bind(self, request: values.Bind) -> values.NameStat:
        return await self._settled(self._names.bind(request))

    async def import_catalog(
        self, request: values.ImportCatalog, progress: ProgressCallback
    ) -> values.Imported:
        prefix = parse_place(request.prefix)
        try:
            return await run_import(
                self._state_directory / DATABASE_NAME,
                request.path,
                "/".join(prefix.parts),
                replace=request.replace,
                file_mode=self._settings.namespace.default_file_mode,
                progress=progress,
            )
        finally:
            await self._imported(prefix.parts)

    async def _imported(self, parts: tuple[str, ...]) -> None:
        """Another process changed names below: forget them, and let the kernel forget them too
        (to invalidate a directory's name drops all the names below it that nobody uses now)."""
        self._namespace.refresh()
        if parts:
            above = self._namespace.resolve("/".join(parts[:-1]))
            self._invalidations.entry(above.inode, parts[-1])
            self._invalidations.inode(above.inode)
            await self._invalidations.settled()

    async def list_names(self, request: values.ListNames) -> values.NamePage:
        return await self._names.list_names(request)

    async def stat(self, request: values.OnePath) -> values.NameStat:
        return await self._names.stat(request)

    async def remove(
        self, request: values.RemoveName, _progress: ProgressCallback
    ) -> values.Removed:
        return await self._settled(self._names.remove(request))

    async def move(self, request: values.MoveName) -> values.NameStat:
        return await self._settled(self._names.move(request))

    # Sandboxes

    async def sandbox_create(
        self, request: values.CreateSandbox, progress: ProgressCallback
    ) -> values.Sandbox:
        return await self._settled(self._names.sandbox_create(request, progress))

    async def sandbox_list(self, _request: values.Empty) -> values.Sandboxes:
        return await self._names.sandbox_list()

    async def sandbox_remove(
        self, request: values.OneSandbox, _progress: ProgressCallback
    ) -> values.Removed:
        return await self._settled(self._names.sandbox_remove(request))

    # The cache

    async def cache_list(self, request: values.ListEntries) -> values.EntryPage:
        return await self._cached.list_entries(request)

    async def cache_show(self, request: values.ShowEntry) -> values.CacheEntry:
        return await self._cached.show(request)

    async def cache_usage(self, _request: values.Empty) -> values.CacheUsage:
        return await self._cached.usage()

    async def cache_verify(
        self, request: values.Verify, progress: ProgressCallback
    ) -> values.Verified:
        return await self._cached.verify(request, progress)

    async def cache_evict(
        self, request: values.Evict, progress: ProgressCallback
    ) -> values.Evicted:
        return await self._cached.evict(request, progress)

    async def cache_pin(self, request: values.Pin, _progress: ProgressCallback) -> values.Pinned:
        return await self._cached.pin(request)

    async def cache_warm(self, request: values.Warm, progress: ProgressCallback) -> values.Warmed:
        return await self._cached.warm(request, progress)

    async def cache_capacity(
        self, request: values.Capacity, progress: ProgressCallback
    ) -> values.CacheUsage:
        return await self._cached.capacity(request, progress)
