"""StagingArea: everything the control API can ask of one mount.

Puts the operations on names, on the cache and the import side by side behind ``control.Area``
and adds what concerns the whole.  No policy of its own.  Trio thread.
"""

import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

from stagefs import __version__
from stagefs.cache.store import Cache
from stagefs.config import Settings
from stagefs.errors import CacheFailed, StageFSError
from stagefs.measures import Measures
from stagefs.model import Inode
from stagefs.namespace.store import Namespace
from stagefs.objects.objects import Objects
from stagefs.remote.registry import Remotes
from stagefs.staging import queue_values, remote_values, replica_values, values
from stagefs.staging.bound_uploads import BoundUploads
from stagefs.staging.cached import CacheOperations
from stagefs.staging.commit import Commits
from stagefs.staging.explaining import Explaining
from stagefs.staging.importing import run_import
from stagefs.staging.link_leases import LinkLeases
from stagefs.staging.metrics import render
from stagefs.staging.names import NameOperations
from stagefs.staging.queue_operations import QueueOperations
from stagefs.staging.real_directories import RealDirectories
from stagefs.staging.replicas import ReplicaOperations
from stagefs.staging.sandbox_building import Building
from stagefs.staging.sandbox_leases import SandboxLeases
from stagefs.staging.sandbox_reads import SandboxRecords
from stagefs.staging.sandboxes import SandboxOperations
from stagefs.staging.stageout import StageOut
from stagefs.staging.tree import Invalidations, Tree, parse_place
from stagefs.staging.values import ProgressCallback
from stagefs.vfs.bindings import Bindings
from stagefs.vfs.changes import Changes
from stagefs.vfs.learning import Learning
from stagefs.vfs.workspace import Workspace

log = logging.getLogger(__name__)

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
        changes: Changes,
        workspace: Workspace,
        learning: Learning,
        stage_out: StageOut,
        settings: Settings,
        mountpoint: str,
        state_directory: Path,
        log_path: Path,
        measures: Measures,
        write_down: Callable[[], None] = lambda: None,
        commit_reached: Callable[[str], None] = lambda _step: None,
    ) -> None:
        """``write_down`` makes the namespace know what sandboxes were seen to read;
        ``commit_reached`` is told each durable step of a commit."""
        self._namespace = namespace
        self._objects = objects
        self._cache = cache
        self._settings = settings
        self._mountpoint = mountpoint
        self._state_directory = state_directory
        self._log_path = log_path
        self._measures = measures
        self._remotes = remotes
        self._started_ns = time.time_ns()
        self._invalidations = invalidations
        self.hidden_links: dict[Inode, int] = {}
        self._tree = Tree(
            namespace, objects, bindings, self.hidden_links, live=workspace.local.live
        )
        self._names = NameOperations(
            namespace=namespace,
            objects=objects,
            remotes=remotes,
            tree=self._tree,
            invalidations=invalidations,
            changes=changes,
            workspace=workspace,
            settings=settings.namespace,
        )
        self._replicas = ReplicaOperations(
            namespace=namespace,
            objects=objects,
            remotes=remotes,
            tree=self._tree,
            settings=settings.read,
        )
        self._stage_out = stage_out
        self._bound_uploads = BoundUploads(
            namespace=namespace,
            local=workspace.local,
            stage_out=stage_out,
            settle_s=settings.stage_out.settle_s,
        )
        self._queue = QueueOperations(stage_out, self._bound_uploads)
        leases = SandboxLeases(cache)
        building = Building(
            namespace=namespace,
            names=self._names,
            tree=self._tree,
            settings=settings.namespace,
            mountpoint=mountpoint,
        )
        self._link_leases = LinkLeases(
            namespace=namespace,
            new_links=changes.new_links,
            building=building,
            leases=leases,
        )
        self._sandboxes = SandboxOperations(
            namespace=namespace,
            names=self._names,
            tree=self._tree,
            building=building,
            leases=leases,
            learning=learning,
            hidden_links=self.hidden_links,
            settings=settings.workspace,
        )
        self._real = RealDirectories(
            namespace=namespace,
            tree=self._tree,
            names=self._names,
            objects=objects,
            workspace=workspace,
        )
        self._records = SandboxRecords(namespace, cache, write_down=write_down)
        self._commits = Commits(
            namespace=namespace,
            tree=self._tree,
            names=self._names,
            sandboxes=self._sandboxes,
            building=building,
            leases=leases,
            learning=learning,
            workspace=workspace,
            stage_out=stage_out,
            reached=commit_reached,
        )
        self._explaining = Explaining(objects=objects, cache=cache)
        self._cached = CacheOperations(
            settings=settings.cache,
            cache=cache,
            directory=cache_directory,
            namespace=namespace,
            objects=objects,
            remotes=remotes,
            tree=self._tree,
        )

    async def begin(self, *, is_new_mount: bool) -> None:
        """Once, while the queue runs and before anything is asked: end what earlier daemons began,
        and forget what was an earlier mount's only."""
        await self._commits.settle()
        await self._bound_uploads.begin()
        if is_new_mount:
            await self._sandboxes.begin_mount()
        await self._sandboxes.watch_again()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """What goes on by itself, while the queue runs."""
        async with self._bound_uploads.running(), trio.open_nursery() as nursery:
            nursery.start_soon(self._link_leases.keep)
            yield
            nursery.cancel_scope.cancel()

    async def drain(self) -> None:
        """At the end of a mount: upload what goes in a few seconds."""
        try:
            await self._bound_uploads.hand_over(hurry=True)
        except StageFSError as error:
            log.error("what is due to writable bindings stays for the next mount: %s", error)
        await self._stage_out.drain()

    async def keep_house(self) -> None:
        await self._sandboxes.keep_house()

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
            queue=self._queue.totals(),
        )

    async def status(self, _request: values.Empty) -> values.Status:
        return self.status_now()

    async def metrics(self) -> str:
        return render(
            self.status_now(),
            measures=self._measures,
            fetch_errors=self._objects.errors.by_site,
            retries=self._remotes.retries.count,
            slow_transfers={one.url: one.slow_transfers for one in self._remotes.statuses()},
            queue_age_s=await self._queue.oldest_age_s(),
        )

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

    async def why(self, request: values.ExplainName, _progress: ProgressCallback) -> values.Why:
        place = parse_place(request.path)
        node = await self._tree.node(place)
        return await self._explaining.why(str(place), node, ask=request.ask)

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

    # Replicas

    async def replica_add(
        self, request: replica_values.AddReplica, _progress: ProgressCallback
    ) -> replica_values.ReplicaList:
        return await self._replicas.add(request)

    async def replica_list(self, request: values.OnePath) -> replica_values.ReplicaList:
        return await self._replicas.listed(request)

    async def replica_remove(
        self, request: replica_values.RemoveReplica
    ) -> replica_values.ReplicaList:
        return await self._replicas.remove(request)

    # Sandboxes

    async def sandbox_create(
        self, request: values.CreateSandbox, progress: ProgressCallback
    ) -> values.Sandbox:
        return await self._settled(self._sandboxes.create(request, progress))

    async def sandbox_create_many(
        self, request: values.CreateSandboxes, progress: ProgressCallback
    ) -> values.Sandboxes:
        return await self._settled(self._sandboxes.create_many(request, progress))

    async def sandbox_list(self, request: values.ListSandboxes) -> values.SandboxPage:
        return await self._sandboxes.listed(request)

    async def sandbox_show(
        self, request: values.ShowSandbox, _progress: ProgressCallback
    ) -> values.SandboxDetails:
        found = await self._sandboxes.find(request.name)
        shown = await self._sandboxes.show(found)
        reads = await self._records.of(found, hashes=request.hashes)
        return msgspec.structs.replace(shown, reads=reads)

    async def sandbox_commit(
        self, request: values.CommitSandbox, progress: ProgressCallback
    ) -> values.CommitRecord:
        return await self._settled(self._commits.commit(request, progress))

    async def sandbox_materialize(
        self, request: values.SandboxDirectory, progress: ProgressCallback
    ) -> values.Copied:
        found = await self._sandboxes.find(request.name)
        return await self._real.materialize(found, Path(request.directory), progress)

    async def sandbox_absorb(
        self, request: values.SandboxDirectory, progress: ProgressCallback
    ) -> values.Copied:
        found = await self._sandboxes.find(request.name)
        self._sandboxes.refuse_committing(found)
        outputs = found.kept.manifest.outputs
        directory = Path(request.directory)
        return await self._settled(self._real.absorb(found, outputs, directory, progress))

    async def sandbox_fail(self, request: values.FailSandbox) -> values.Sandbox:
        return await self._sandboxes.fail(request)

    async def sandbox_remove(
        self, request: values.OneSandbox, _progress: ProgressCallback
    ) -> values.Removed:
        return await self._settled(self._sandboxes.remove(request))

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

    async def cache_cleanup(
        self, request: values.Cleanup, progress: ProgressCallback
    ) -> values.CacheUsage:
        return await self._cached.cleanup(request, progress)

    async def cache_capacity(
        self, request: values.Capacity, progress: ProgressCallback
    ) -> values.CacheUsage:
        return await self._cached.capacity(request, progress)

    async def remote_list(self, request: values.Empty) -> remote_values.RemoteList:
        del request
        return remote_values.RemoteList(self._remotes.statuses())

    async def remote_access(self, request: remote_values.SetAccess) -> values.Empty:
        self._remotes.set_access(request.url, request.access)
        return values.Empty()

    # The stage-out queue

    async def queue_list(self, request: queue_values.ListUploads) -> queue_values.UploadPage:
        return await self._queue.list_uploads(request)

    async def queue_retry(self, request: queue_values.RetryUploads) -> queue_values.UploadsChanged:
        return await self._queue.retry(request)

    async def queue_cancel(
        self, request: queue_values.CancelUploads
    ) -> queue_values.UploadsChanged:
        return await self._queue.cancel(request)

    async def queue_flush(
        self, request: queue_values.Flush, progress: ProgressCallback
    ) -> queue_values.Flushed:
        return await self._queue.flush(request, progress)
