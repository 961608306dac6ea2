"""The daemon: builds every object once, starts them in order, and ends them in reverse.

Started by the supervisor (``python -m stagefs.daemon``), which hands over the device and
everything else that must outlive a daemon.  Holds no policy of its own.
"""

import argparse
import contextlib
import ctypes
import functools
import gc
import logging
import logging.handlers
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import trio

from stagefs import __version__
from stagefs.cache.store import Cache
from stagefs.config import Settings, environment, settings_from
from stagefs.control.server import serve as serve_control
from stagefs.errors import CacheFailed, StageFSError
from stagefs.fuse import session
from stagefs.fuse.attrs import Encoder
from stagefs.fuse.operations_log import SharedMemory
from stagefs.fuse.ops import StageFSOperations
from stagefs.model import Inode
from stagefs.namespace.node import Node
from stagefs.namespace.store import Namespace
from stagefs.objects.inline import inline_read_flags
from stagefs.objects.objects import Objects
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.registry import Remotes
from stagefs.remote.settings import from_config
from stagefs.staging.area import StagingArea
from stagefs.state_directory import cache_limits, make_private_directory, refuse_network
from stagefs.vfs.attributes import Attributes
from stagefs.vfs.bindings import Bindings
from stagefs.vfs.vfs import FileSystemSize, Vfs
from stagefs.vfs.virtual import VirtualFiles

log = logging.getLogger("stagefs.daemon")

LOG_NAME = "stagefs.log"
HOUSEKEEPING_S = 5.0
# What an earlier mount left is forgotten in rounds; a start does not wait for all of millions.
UNLINKED_ROUNDS_MAX = 50
# A Python thread that computes may keep the event loop waiting this long (measured: with the
# default of 5 ms another busy thread takes 98 % of the read throughput).
SWITCH_INTERVAL_S = 50e-6
OPEN_FILES_MAX = 1 << 20
INVALIDATIONS_MAX = 100_000
MALLOC_MMAP_BYTES = 32 << 20
MALLOC_KEPT_BYTES = 64 << 20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
SETTLE_TIMEOUT_S = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        handoff = session.Handoff.accept(arguments.supervised)
    except StageFSError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    try:
        settings = settings_from(arguments.set)
        os.umask(0o077)  # whatever is made in the state directory is the user's alone
        _begin_log(arguments.state, settings)
        _prepare_limits()
        trio.run(_run, arguments, settings, handoff)
    except StageFSError as error:
        log.error("%s", error)
        handoff.tell_error(str(error), exit_code=error.exit_code)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stagefs.daemon", allow_abbrev=False)
    parser.add_argument("--mountpoint", required=True)
    parser.add_argument("--state", required=True, type=Path)
    # All that is not a default: a file that is edited later cannot keep a daemon from coming back.
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--supervised", required=True, help="what the supervisor hands over")
    return parser


def _begin_log(state: Path, settings: Settings) -> None:
    handler = logging.handlers.RotatingFileHandler(
        state / LOG_NAME, maxBytes=settings.state.log_bytes_max, backupCount=3, delay=True
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    # Libraries write whole requests, secrets included, below WARNING.
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("stagefs").setLevel(settings.log.level.upper())
    logging.captureWarnings(capture=True)


def _prepare_limits() -> None:
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    _keep_freed_memory()
    # Everything made so far stays: no collection needs to look at it again.
    gc.freeze()
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES_MAX)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _keep_freed_memory() -> None:
    """Fetching allocates and frees a buffer for each mebibyte.  glibc gives such buffers back to
    the kernel, and the page faults of getting them again were a tenth of all CPU time of a
    cold read over S3 (measured).  Another C library does without this."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, MALLOC_MMAP_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, MALLOC_KEPT_BYTES)


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
    cache.capacity_bytes = limits.capacity_bytes
    return cache


async def _run(arguments: argparse.Namespace, settings: Settings, handoff: session.Handoff) -> None:
    state: Path = arguments.state
    named = settings.cache.directory
    cache_directory = Path(named) if named is not None else state / "cache"
    refuse_network(cache_directory, what="cache")
    make_private_directory(cache_directory, uid=os.geteuid())
    async with contextlib.AsyncExitStack() as stack:
        namespace = Namespace.open(state / "namespace.sqlite")
        stack.callback(namespace.close)
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
        daemon = Daemon(
            arguments=arguments,
            settings=settings,
            namespace=namespace,
            cache=cache,
            cache_directory=cache_directory,
            remotes=remotes,
            handoff=handoff,
        )
        await daemon.run()


class Daemon:
    """Everything that lives as long as this process."""

    def __init__(
        self,
        *,
        arguments: argparse.Namespace,
        settings: Settings,
        namespace: Namespace,
        cache: Cache | None,
        cache_directory: Path,
        remotes: Remotes,
        handoff: session.Handoff,
    ) -> None:
        self._state: Path = arguments.state
        self._settings = settings
        self._namespace = namespace
        self._cache = cache
        self._cache_directory = cache_directory
        self._handoff = handoff
        self._started_ns = time.time_ns()
        news, self._news = trio.open_memory_channel[session.Invalidation](INVALIDATIONS_MAX)
        self._invalidations = Invalidations(news)
        self._stop = trio.Event()
        self._objects = Objects(
            namespace=namespace,
            cache=cache,
            inline_flags=inline_read_flags(cache_directory),
            remote_for=remotes.for_url,
            settings=settings.read,
        )
        self._bindings = Bindings(
            namespace=namespace,
            objects=self._objects,
            remote_for=remotes.for_url,
            read=settings.read,
            settings=settings.namespace,
            names_changed=self._names_changed,
        )
        self._area = StagingArea(
            namespace=namespace,
            objects=self._objects,
            bindings=self._bindings,
            cache=cache,
            cache_directory=cache_directory,
            remotes=remotes,
            invalidations=self._invalidations,
            settings=settings,
            mountpoint=arguments.mountpoint,
            state_directory=self._state,
            log_path=self._state / LOG_NAME,
        )
        owner = (os.geteuid(), os.getegid())
        self._vfs = Vfs(
            namespace=namespace,
            objects=self._objects,
            bindings=self._bindings,
            attributes=Attributes(self._objects, self._pins),
            virtual=self._virtual_files(),
            settings=settings.namespace,
            owner=owner,
            public=remotes.public,
        )
        self._memory = SharedMemory(
            handoff.memory, call_soon=trio.lowlevel.current_trio_token().run_sync_soon
        )
        self._operations = StageFSOperations(
            handoff,
            vfs=self._vfs,
            encoder=Encoder(uid=owner[0], gid=owner[1]),
            memory=self._memory,
            size=self._size,
        )

    def _virtual_files(self) -> VirtualFiles:
        return VirtualFiles(
            texts={
                "status": lambda: _pretty(self._area.status_now()),
                "config": lambda: _pretty(self._settings),
                "transfers": lambda: _pretty(self._objects.transfers()),
            },
            links={"control": str(self._state / "control.sock")},
        )

    def _names_changed(self, names: Sequence[tuple[Inode, str]]) -> None:
        for parent, name in names:
            self._invalidations.entry(parent, name)

    def _pins(self, node: Node) -> list[str]:
        if self._cache is None or node.object_id is None:
            return []
        return [lease.owner for lease in self._cache.leases_of(node.object_id.key)]

    def _size(self) -> FileSystemSize:
        capacity = self._cache.capacity_bytes if self._cache is not None else 0
        used = self._cache.used_bytes if self._cache is not None else 0
        return FileSystemSize(capacity, max(capacity - used, 0), self._namespace.statistics().nodes)

    async def run(self) -> None:
        """Serve until the mount ends or SIGTERM comes."""
        async with (
            self._objects.running(),
            self._bindings.running(),
            trio.open_nursery() as nursery,
        ):
            await nursery.start(serve_control_at, self._area, self._state)
            nursery.start_soon(self._keep_house)
            nursery.start_soon(self._find_lost_entries)
            self._forget_unlinked()
            nursery.start_soon(_stop_on_signal, self._stop)
            nursery.start_soon(self._serve_kernel, nursery.cancel_scope)
        log.info("ended")

    async def _serve_kernel(self, scope: trio.CancelScope) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(
                functools.partial(
                    session.serve,
                    self._operations,
                    handoff=self._handoff,
                    invalidations=self._news,
                    stop=self._stop,
                )
            )
            log.info("StageFS %s serves, process %d", __version__, os.getpid())
            self._handoff.tell_ready(self._ready())
        scope.cancel()

    def _ready(self) -> dict[str, object]:
        cache = self._cache
        return {
            "state": str(self._state),
            "cache": str(self._cache_directory) if cache is not None else None,
            "capacity_bytes": cache.capacity_bytes if cache is not None else 0,
            "log": str(self._state / LOG_NAME),
            "pid": os.getpid(),
        }

    async def _keep_house(self) -> None:
        """What may be lost by a crash is written now and then, off the event loop."""
        while True:
            await trio.sleep(HOUSEKEEPING_S)
            if self._cache is not None:
                await _quietly(self._cache.flush_index)
            while self._namespace.purge():
                await trio.lowlevel.checkpoint()
            await _quietly(self._namespace.checkpoint)

    async def _find_lost_entries(self) -> None:
        """A cache whose index was lost is whole again once each file was looked at."""
        cache = self._cache
        if cache is not None and not cache.index_complete:
            log.warning("the cache's index is missing: finding its entries again")
            await _quietly(cache.rebuild_index)

    def _forget_unlinked(self) -> None:
        """Files without a name stay for those who have them open: until the next mount."""
        if self._memory.generation:
            return
        for _ in range(UNLINKED_ROUNDS_MAX):
            if not self._namespace.drop_unlinked():
                return


class Invalidations:
    """Sends what the kernel shall forget; never waits, because an answer must not depend on it.

    What does not fit is dropped with a line in the log: the name is then believed until the
    kernel's own timeout.
    """

    def __init__(self, news: trio.MemorySendChannel[session.Invalidation]) -> None:
        self._news = news

    def entry(self, parent: Inode, name: str) -> None:
        self._send(session.ForgetName(parent, os.fsencode(name)))

    def inode(self, inode: Inode) -> None:
        self._send(session.ForgetAttributes(inode))

    async def settled(self) -> None:
        """Return when the kernel has forgotten what it was told to so far, so that whoever gets
        an answer of the API now sees its effect in the mount.  A kernel that is busy with the
        same directory is not waited for longer than SETTLE_TIMEOUT_S."""
        event = trio.Event()
        self._send(session.Settled(event))
        with trio.move_on_after(SETTLE_TIMEOUT_S):
            await event.wait()

    def _send(self, value: session.Invalidation) -> None:
        try:
            self._news.send_nowait(value)
        except trio.WouldBlock:
            log.warning("too much to forget at once: %s is left to its timeout", value)


async def serve_control_at(
    area: StagingArea,
    state: Path,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    await serve_control(area, state / "control.sock", users={os.geteuid()}, task_status=task_status)


async def _quietly(work: Callable[[], object]) -> None:
    try:
        await trio.to_thread.run_sync(work)
    except StageFSError as error:
        log.log(error.log_level, "%s", error)


async def _stop_on_signal(stop: trio.Event) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("%s received", signal.Signals(number).name)
            stop.set()


def _pretty(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


if __name__ == "__main__":
    sys.exit(main())
