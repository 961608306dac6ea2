"""Core: everything that a staging area is made of but the kernel's side, built once and started in
order.

The daemon of a mount adds FUSE to it (``daemon``); where FUSE is forbidden it serves without
(``no_fuse``).  Holds no policy of its own.
"""

import contextlib
import ctypes
import functools
import gc
import logging
import logging.handlers
import os
import resource
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import trio

from stagefs.cache.kept_capacity import kept_capacity
from stagefs.cache.store import Cache
from stagefs.config import Settings, environment
from stagefs.control.api import SOCKET_NAME
from stagefs.control.server import serve as serve_control
from stagefs.errors import CacheFailed, StageFSError
from stagefs.measures import Measures
from stagefs.model import Inode, OnWrite
from stagefs.namespace.node import Node
from stagefs.namespace.store import Namespace
from stagefs.objects.inline import inline_read_flags
from stagefs.objects.objects import Objects
from stagefs.outputs.local import LocalFiles
from stagefs.outputs.queue import Queue
from stagefs.outputs.queue_directory import owner_name
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.registry import Remotes
from stagefs.remote.settings import from_config
from stagefs.staging.area import StagingArea
from stagefs.staging.stageout import StageOut
from stagefs.staging.tree import Invalidations
from stagefs.state_directory import cache_limits, make_private_directory, refuse_network
from stagefs.vfs.attributes import Attributes
from stagefs.vfs.bindings import Bindings
from stagefs.vfs.changes import Changes, Owner
from stagefs.vfs.copying import Copying, Pending
from stagefs.vfs.learning import Learning
from stagefs.vfs.recording import Recording
from stagefs.vfs.sandbox_roots import SandboxRoots
from stagefs.vfs.workspace import Workspace, Writers

log = logging.getLogger("stagefs.core")

LOG_NAME = "stagefs.log"
OUTPUTS_NAME = "outputs"
SCRATCH_NAME = "scratch"
HOUSEKEEPING_S = 5.0
# What an earlier mount left is forgotten in rounds; a start does not wait for all of millions.
UNLINKED_ROUNDS_MAX = 50
# A Python thread that computes may keep the event loop waiting this long (measured: with the
# default of 5 ms another busy thread takes 98 % of the read throughput).
SWITCH_INTERVAL_S = 50e-6
OPEN_FILES_MAX = 1 << 20
MALLOC_MMAP_BYTES = 32 << 20
MALLOC_KEPT_BYTES = 64 << 20
# Of the buffers into which requests are read, which have room for a write of a MiB each.
MALLOC_BEGUN_BYTES = 24 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def begin_log(state: Path, settings: Settings) -> None:
    handler = logging.handlers.RotatingFileHandler(
        state / LOG_NAME, maxBytes=settings.state.log_bytes_max, backupCount=3, delay=True
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    # Libraries write whole requests, secrets included, below WARNING.
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("stagefs").setLevel(settings.log.level.upper())
    logging.captureWarnings(capture=True)


def prepare_limits() -> None:
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    _prepare_memory()
    # Everything made so far stays: no collection needs to look at it again.
    gc.freeze()
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES_MAX)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _prepare_memory() -> None:
    """Fetching allocates and frees a buffer for each mebibyte.  glibc gives such buffers back to
    the kernel, and the page faults of getting them again were a tenth of all CPU time of a
    cold read over S3 (measured).

    Some memory is touched before the first request is read into it: the kernel answers a request
    with EIO when its reader is killed while pages for it are brought in (fuse_dev_do_read; measured
    with writes of a MiB: in 554 of 1,000 kills, and in none when the buffer had been touched), and
    a task would see that.  Another C library does without all this."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return
    libc.mallopt(_M_MMAP_THRESHOLD, MALLOC_MMAP_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, MALLOC_KEPT_BYTES)
    libc.malloc.restype = ctypes.c_void_p
    memory = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(MALLOC_BEGUN_BYTES)))
    if memory:
        ctypes.memset(memory, 0, MALLOC_BEGUN_BYTES)
        libc.free(memory)


class Resources:
    """What is opened first and closed last: the files that a state directory consists of, and the
    remotes."""

    def __init__(
        self,
        *,
        namespace: Namespace,
        queue: Queue,
        cache: Cache | None,
        cache_directory: Path,
        remotes: Remotes,
    ) -> None:
        self.namespace = namespace
        self.queue = queue
        self.cache = cache
        self.cache_directory = cache_directory
        self.remotes = remotes


@contextlib.asynccontextmanager
async def opened(state: Path, settings: Settings) -> AsyncIterator[Resources]:
    """Raises StageFSError: StateInUse among them, when another process has the state or cache."""
    named = settings.cache.directory
    cache_directory = Path(named) if named is not None else state / "cache"
    refuse_network(cache_directory, what="cache")
    make_private_directory(cache_directory, uid=os.geteuid())
    async with contextlib.AsyncExitStack() as stack:
        namespace = Namespace.open(state / "namespace.sqlite")
        stack.callback(namespace.close)
        queue = _open_queue(state, settings)
        stack.callback(queue.close)
        cache = _open_cache(cache_directory, settings)
        if cache is not None:
            stack.callback(cache.close)
        credentials = CredentialStore(state / "credentials.json")
        home = environment().get("HOME")
        remote_settings = from_config(
            settings.remote, environment=environment(), home=Path(home) if home else None
        )
        remotes = Remotes(remote_settings, credentials)
        stack.push_async_callback(remotes.aclose)
        yield Resources(
            namespace=namespace,
            queue=queue,
            cache=cache,
            cache_directory=cache_directory,
            remotes=remotes,
        )


def _open_cache(directory: Path, settings: Settings) -> Cache | None:
    """None when the disk cannot take a cache: reading goes on without one, and says so."""
    limits = cache_limits(settings.cache, directory)
    try:
        cache = Cache.open(
            directory,
            capacity_bytes=limits.capacity_bytes,
            chunk_bytes=settings.cache.chunk_bytes,
            free_floor_bytes=limits.free_floor_bytes,
            high_mark=settings.cache.high_watermark,
            low_mark=settings.cache.low_watermark,
        )
    except CacheFailed as error:
        log.error("running without a cache: %s", error)
        return None
    # A share of the free space: what is cached already counts as free, or a full cache would
    # shrink at each start.
    limits = cache_limits(settings.cache, directory, cached_bytes=cache.used_bytes)
    kept_bytes = kept_capacity(directory, configured=settings.cache.capacity_bytes)
    cache.capacity_bytes = limits.capacity_bytes if kept_bytes is None else kept_bytes
    return cache


def _open_queue(state: Path, settings: Settings) -> Queue:
    """Of this state directory, or adopted with the outputs directory that is named."""
    named = settings.state.outputs
    return Queue.open(
        Path(named) if named is not None else state / OUTPUTS_NAME,
        owner=owner_name(state),
        origin=f"{socket.gethostname()}:{state}",
    )


class Core:
    """Every layer below the adapters, each object once."""

    def __init__(
        self,
        resources: Resources,
        *,
        state: Path,
        settings: Settings,
        mountpoint: str,
        invalidations: Invalidations,
        pending: Pending,
        writers: Writers,
        is_new_mount: bool,
    ) -> None:
        """``is_new_mount``: no earlier daemon's handles can lead to anything."""
        self.namespace = namespace = resources.namespace
        self.cache = cache = resources.cache
        self._state = state
        self._is_new_mount = is_new_mount
        self._invalidations = invalidations
        self.measures = Measures()
        self.objects = Objects(
            namespace=namespace,
            cache=cache,
            inline_flags=inline_read_flags(resources.cache_directory),
            remote_for=resources.remotes.for_url,
            settings=settings.read,
            once_for=resources.remotes.once_for_url,
        )
        self.bindings = Bindings(
            namespace=namespace,
            objects=self.objects,
            remote_for=resources.remotes.for_url,
            read=settings.read,
            settings=settings.namespace,
            names_changed=self._names_changed,
        )
        self.stage_out = StageOut(
            resources.queue, remote_for=resources.remotes.for_url, settings=settings.stage_out
        )
        self.local = LocalFiles(
            state / SCRATCH_NAME, read_base=self._read_base, base_shrunk=self._base_shrunk
        )
        self.workspace = Workspace(
            namespace=namespace,
            objects=self.objects,
            local=self.local,
            writers=writers,
            kept_up_to=0 if is_new_mount else namespace.last_inode(),
        )
        self.copying = Copying(
            namespace=namespace,
            pending=pending,
            default=OnWrite(settings.workspace.on_write),
            live=self.local.live,
            links_changed=invalidations.inode,
            name_changed=invalidations.entry,
        )
        self.recording = Recording(namespace, pending, live=self.local.live)
        self.learning = Learning(
            namespace=namespace,
            objects=self.objects,
            ahead_bytes_max=settings.read.learned_ahead_bytes_max,
            directory=state,
        )
        self.owner = Owner(os.geteuid(), os.getegid())
        self.changes = Changes(
            namespace=namespace,
            objects=self.objects,
            attributes=Attributes(self.objects, self._pins, namespace.uploads_of),
            workspace=self.workspace,
            copying=self.copying,
            roots=SandboxRoots(namespace, settings.workspace),
            learning=self.learning,
            settings=settings.namespace,
            owner=self.owner,
            public=resources.remotes.public,
        )
        self.area = StagingArea(
            namespace=namespace,
            objects=self.objects,
            bindings=self.bindings,
            cache=cache,
            cache_directory=resources.cache_directory,
            remotes=resources.remotes,
            invalidations=invalidations,
            changes=self.changes,
            workspace=self.workspace,
            learning=self.learning,
            stage_out=self.stage_out,
            settings=settings,
            mountpoint=mountpoint,
            state_directory=state,
            log_path=state / LOG_NAME,
            write_down=self.recording.write_down,
            measures=self.measures,
        )

    def _names_changed(self, names: Sequence[tuple[Inode, str]]) -> None:
        for parent, name in names:
            self._invalidations.entry(parent, name)

    def _pins(self, node: Node) -> list[str]:
        if self.cache is None or node.object_id is None:
            return []
        return [lease.owner for lease in self.cache.leases_of(node.object_id.key)]

    async def _read_base(self, node: Node, offset: int, size: int) -> memoryview | bytes:
        return await self.workspace.read_base(node, offset, size)

    def _base_shrunk(self, inode: Inode, base_bytes: int) -> None:
        self.namespace.set_attributes(inode, base_bytes=base_bytes)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[trio.Nursery]:
        """Everything runs and the control socket answers.  The nursery is for what comes on top; it
        is cancelled at the end."""
        async with (
            self.objects.running(),
            self.learning.running(),
            self.bindings.running(),
            self.stage_out.running(),
            self.workspace.running(),
            trio.open_nursery() as nursery,
        ):
            await self.area.begin(is_new_mount=self._is_new_mount)
            nursery.start_soon(self._upload_from_bindings)
            serve = functools.partial(
                serve_control, self.area, self._state / SOCKET_NAME, users={os.geteuid()}
            )
            await nursery.start(serve)
            nursery.start_soon(self._keep_house)
            nursery.start_soon(self._find_lost_entries)
            if self._is_new_mount:
                self._forget_unlinked()
            yield nursery
            await self.area.drain()
            nursery.cancel_scope.cancel()

    async def _keep_house(self) -> None:
        """What may be lost by a crash is written now and then, off the event loop."""
        while True:
            await trio.sleep(HOUSEKEEPING_S)
            try:
                await self._keep_house_once()
            except StageFSError as error:  # a full disk, most likely: the next round tries again
                log.log(error.log_level, "keeping house: %s", error)

    async def _keep_house_once(self) -> None:
        if self.cache is not None:
            await quietly(self.cache.flush_index)
        while self.namespace.purge():
            await trio.lowlevel.checkpoint()
        self.workspace.names_went()
        self.recording.write_down()
        await self.learning.write_down()
        await self.area.keep_house()
        await quietly(self.namespace.checkpoint)

    async def _upload_from_bindings(self) -> None:
        async with self.area.running():
            await trio.sleep_forever()

    async def _find_lost_entries(self) -> None:
        """A cache whose index was lost is whole again once each file was looked at."""
        cache = self.cache
        if cache is not None and not cache.index_complete:
            log.warning("the cache's index is missing: finding its entries again")
            await quietly(cache.rebuild_index)

    def _forget_unlinked(self) -> None:
        """Files without a name stay for those who have them open: until the next mount."""
        for _ in range(UNLINKED_ROUNDS_MAX):
            if not self.namespace.drop_unlinked():
                break
        self.local.sweep(self.namespace.content_inodes())


async def quietly(work: Callable[[], object]) -> None:
    try:
        await trio.to_thread.run_sync(work)
    except StageFSError as error:
        log.log(error.log_level, "%s", error)
