"""A staging area without a mount, for nodes where FUSE is forbidden: the control API alone.

Started by ``stagefs run --no-fuse`` (``python -m stagefs.no_fuse``) and shared by all such
commands of one state directory: each holds a shared lock on STATE/users.lock, and when nobody
does any more this ends.  It says on standard output, with one line of JSON, that it answers or
why it does not.
"""

import argparse
import fcntl
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import trio

from stagefs.config import Settings, settings_from
from stagefs.core import Core, begin_log, opened, prepare_limits
from stagefs.errors import StageFSError
from stagefs.model import Handle, Inode

log = logging.getLogger("stagefs.no_fuse")

USERS_LOCK = "users.lock"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="stagefs.no_fuse", allow_abbrev=False)
    parser.add_argument("--state", required=True, type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args(argv)
    try:
        settings = settings_from(arguments.set)
        os.umask(0o077)  # whatever is made in the state directory is the user's alone
        begin_log(arguments.state, settings)
        prepare_limits()
        trio.run(_run, arguments.state, settings)
    except StageFSError as error:
        log.error("%s", error)
        _tell(error=str(error), exit_code=error.exit_code)
        return error.exit_code
    return 0


def _tell(**said: object) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


async def _run(state: Path, settings: Settings) -> None:
    async with opened(state, settings) as resources:
        core = Core(
            resources,
            state=state,
            settings=settings,
            # No path of this machine leads into it.
            mountpoint=str(state / "nothing-is-mounted"),
            invalidations=NoKernel(),
            pending=NobodyWrites(),
            writers=NoWriters(),
            is_new_mount=True,
        )
        async with core.running() as nursery:
            nursery.start_soon(_end_on_signal, nursery.cancel_scope)
            log.info("serves without a mount, process %d", os.getpid())
            _tell(ready=True)
            await trio.to_thread.run_sync(_nobody_left, state, abandon_on_cancel=True)
    log.info("ended")


def _nobody_left(state: Path) -> None:
    """Blocks until nobody holds the lock; it is kept until this process has ended."""
    fd = os.open(state / USERS_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)


async def _end_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _number in signals:
            scope.cancel()


class NoKernel:
    """Nobody has names in a cache."""

    def entry(self, parent: Inode, name: str) -> None:
        """Nobody to tell."""

    def inode(self, inode: Inode) -> None:
        """Nobody to tell."""

    async def settled(self) -> None:
        """Nobody to wait for."""


class NoWriters:
    """Nobody has files open."""

    def add(self, handle: Handle, thread: int) -> None:
        """Nobody opens files."""

    def close(self, handle: Handle) -> None:
        """Nobody opens files."""

    def closed(self) -> list[Handle]:
        return []

    def remove(self, handle: Handle) -> None:
        """Nobody opens files."""

    def count(self, inode: Inode) -> int:
        return 0

    def __contains__(self, handle: Handle) -> bool:
        return False


class NobodyWrites:
    """No thread of anybody asks for names."""

    def __bool__(self) -> bool:
        return False

    def put_copy_up(self, thread: int, inode: Inode) -> bool:
        return False

    def sent_back(self, thread: int) -> Inode | None:
        return None

    def wants_copy_up(self, thread: int, inode: Inode) -> bool:
        return False

    def drop(self, thread: int) -> None:
        """Nothing is kept."""

    def put_record(self, thread: int, inode: Inode) -> bool:
        return False

    def wants_record(self, thread: int, inode: Inode) -> bool:
        return False

    def asked_name(self, thread: int) -> bool:
        return False

    def grant(self, thread: int, inode: Inode, sandbox: Inode) -> None:
        """Nothing is kept."""

    def granted(self, thread: int, inode: Inode) -> Inode | None:
        return None


if __name__ == "__main__":
    sys.exit(main())
