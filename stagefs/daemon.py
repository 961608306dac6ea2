"""The daemon of a mount: the core, and the kernel's side of it.

Started by the supervisor (``python -m stagefs.daemon``), which hands over the device and
everything else that must outlive a daemon.  Holds no policy of its own.
"""

import argparse
import functools
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import trio

from stagefs import __version__, stacks
from stagefs.config import Settings, settings_from
from stagefs.core import LOG_NAME, Core, Resources, begin_log, opened, prepare_limits
from stagefs.errors import StageFSError
from stagefs.fuse import session
from stagefs.fuse.attrs import Encoder
from stagefs.fuse.open_writers import OpenWriters
from stagefs.fuse.operations_log import SharedMemory
from stagefs.fuse.ops import StageFSOperations
from stagefs.fuse.soon import Soon
from stagefs.model import Inode
from stagefs.vfs.vfs import FileSystemSize, Vfs
from stagefs.vfs.virtual import VirtualFiles

log = logging.getLogger("stagefs.daemon")

INVALIDATIONS_MAX = 100_000
SETTLE_TIMEOUT_S = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        handoff = session.Handoff.accept(arguments.supervised)
    except StageFSError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    if not handoff.stand_by():
        return 0
    try:
        settings = settings_from(arguments.set)
        stacks.prepare()
        os.umask(0o077)  # whatever is made in the state directory is the user's alone
        begin_log(arguments.state, settings)
        prepare_limits()
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


async def _run(arguments: argparse.Namespace, settings: Settings, handoff: session.Handoff) -> None:
    async with opened(arguments.state, settings) as resources:
        daemon = Daemon(
            resources,
            state=arguments.state,
            mountpoint=arguments.mountpoint,
            settings=settings,
            handoff=handoff,
        )
        await daemon.run()


class Daemon:
    """Everything that lives as long as this process."""

    def __init__(
        self,
        resources: Resources,
        *,
        state: Path,
        mountpoint: str,
        settings: Settings,
        handoff: session.Handoff,
    ) -> None:
        self._state = state
        self._settings = settings
        self._resources = resources
        self._handoff = handoff
        news, self._news = trio.open_memory_channel[session.Invalidation](INVALIDATIONS_MAX)
        self._soon = Soon()
        memory = SharedMemory(handoff.memory, call_soon=self._soon)
        self._core = core = Core(
            resources,
            state=state,
            settings=settings,
            mountpoint=mountpoint,
            invalidations=Invalidations(news),
            pending=memory.pending,
            writers=OpenWriters(memory.words, call_soon=self._soon),
            is_new_mount=not memory.generation,
        )
        vfs = Vfs(
            namespace=core.namespace,
            objects=core.objects,
            bindings=core.bindings,
            virtual=self._virtual_files(),
            workspace=core.workspace,
            copying=core.copying,
            recording=core.recording,
            learning=core.learning,
            settings=settings.namespace,
        )
        self._operations = StageFSOperations(
            handoff,
            vfs=vfs,
            changes=core.changes,
            encoder=Encoder(
                uid=core.owner.uid,
                gid=core.owner.gid,
                hidden_links=core.area.hidden_links,
            ),
            memory=memory,
            size=self._size,
            measures=core.measures,
        )

    def _virtual_files(self) -> VirtualFiles:
        return VirtualFiles(
            texts={
                "status": lambda: _pretty(self._core.area.status_now()),
                "config": lambda: _pretty(self._settings),
                "transfers": lambda: _pretty(self._core.objects.transfers()),
            },
            links={"control": str(self._state / "control.sock")},
        )

    def _size(self) -> FileSystemSize:
        disk = os.statvfs(self._state)
        return FileSystemSize(
            disk.f_blocks * disk.f_frsize,
            disk.f_bavail * disk.f_frsize,
            self._core.namespace.statistics().nodes,
        )

    async def run(self) -> None:
        """Serve until the mount ends or SIGTERM comes."""
        stop = trio.Event()
        async with self._core.running() as nursery:
            nursery.start_soon(self._soon.run)
            nursery.start_soon(_stop_on_signal, stop)
            nursery.start_soon(stacks.dump_tasks_on_signal)
            async with trio.open_nursery() as serving:
                await serving.start(
                    functools.partial(
                        session.serve,
                        self._operations,
                        handoff=self._handoff,
                        invalidations=self._news,
                        stop=stop,
                    )
                )
                log.info("StageFS %s serves, process %d", __version__, os.getpid())
                self._handoff.tell_ready(self._ready())
        log.info("ended")

    def _ready(self) -> dict[str, object]:
        cache = self._resources.cache
        return {
            "state": str(self._state),
            "cache": str(self._resources.cache_directory) if cache is not None else None,
            "capacity_bytes": cache.capacity_bytes if cache is not None else 0,
            "log": str(self._state / LOG_NAME),
            "pid": os.getpid(),
        }


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


async def _stop_on_signal(stop: trio.Event) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for number in signals:
            log.info("%s received", signal.Signals(number).name)
            stop.set()


def _pretty(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


if __name__ == "__main__":
    sys.exit(main())
