"""A daemon with a small file system, to try the supervisor and the session without StageFS's own.

Run by file name, as any user.  The root directory shows:

big       the bytes of --big
again     the same bytes under another inode
stalled   a file of 1 GiB of which no byte ever comes
crash     a file whose first read kills the daemon
names/    directories whose names live in SQLite; mkdir, rmdir, rename work there,
          exactly once, by operation numbers as DESIGN describes
names/wait  a name whose lookup the first daemon never answers, while it tells the kernel to
          forget another name of that directory: its thread is stuck in the kernel then
"""

import argparse
import errno
import hashlib
import os
import signal
import sqlite3
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pyfuse3
import trio

from stagefs.errors import StageFSError
from stagefs.fuse.operations_log import NameBefore, OperationNumber, SharedMemory
from stagefs.fuse.session import DeviceOperations, ForgetName, Handoff, Invalidation, serve
from stagefs.model import Inode

Change = Callable[[], int]
ROOT, BIG, AGAIN, STALLED, CRASH, NAMES = 1, 2, 3, 4, 5, 6
FIXED = {b"big": BIG, b"again": AGAIN, b"stalled": STALLED, b"crash": CRASH, b"names": NAMES}
FIRST_FREE = 100
SCHEMA = """
CREATE TABLE IF NOT EXISTS names
    (parent INTEGER, name BLOB, inode INTEGER, PRIMARY KEY (parent, name));
CREATE TABLE IF NOT EXISTS applied (operation INTEGER PRIMARY KEY, inode INTEGER);
"""


class TinyOperations(DeviceOperations):
    def __init__(
        self,
        handoff: Handoff,
        memory: SharedMemory,
        big: Path,
        state: Path,
        news: trio.MemorySendChannel[Invalidation],
    ) -> None:
        super().__init__(handoff)
        self._memory = memory
        self._news = news
        self._big = os.open(big, os.O_RDONLY)
        self._size = big.stat().st_size
        self._rows = sqlite3.connect(state / "names.sqlite", isolation_level=None)
        self._rows.execute("PRAGMA journal_mode=WAL")
        self._rows.execute("PRAGMA synchronous=NORMAL")
        self._rows.executescript(SCHEMA)

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        found = pyfuse3.EntryAttributes()
        found.st_ino = inode
        found.attr_timeout = found.entry_timeout = 0 if inode >= FIRST_FREE else 3600
        found.st_uid, found.st_gid = os.getuid(), os.getgid()
        if inode in (ROOT, NAMES) or inode >= FIRST_FREE:
            found.st_mode = stat.S_IFDIR | 0o755
        else:
            found.st_mode = stat.S_IFREG | 0o644
            found.st_size = self._size if inode in (BIG, AGAIN) else 1 << 30
        return found

    def _inode(self, parent: int, name: bytes) -> int:
        found = self._rows.execute(
            "SELECT inode FROM names WHERE parent = ? AND name = ?", (parent, name)
        ).fetchone()
        if found is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return int(found[0])

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        self._memory.count_answer()
        if parent_inode == ROOT and name in FIXED:
            return self._attributes(FIXED[name])
        if name == b"wait" and self._memory.generation == 0:
            self._news.send_nowait(ForgetName(Inode(NAMES), b"another"))
            await trio.sleep_forever()
        if self._memory.notes.expects_walks:
            repeated = self._memory.notes.repeated_lookup(ctx.pid, Inode(parent_inode), name)
            inode = self._applied(repeated[0]) if repeated else None
            if repeated and inode is not None:
                if not repeated[1]:
                    raise pyfuse3.FUSEError(errno.ENOENT)
                return self._attributes(inode)
        return self._attributes(self._inode(parent_inode, name))

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        self._memory.count_answer()
        return self._attributes(inode)

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(inode), keep_cache=True)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        if fh == STALLED:
            await trio.sleep_forever()
        if fh == CRASH:
            os.kill(os.getpid(), signal.SIGKILL)
        # Some requests are always in work when the daemon is killed.
        await trio.sleep(0.002)
        self._memory.count_answer()
        return os.pread(self._big, size, off)

    async def release(self, fh: int) -> None:
        return None

    async def forget(self, inode_list: object) -> None:
        return None

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        return pyfuse3.StatvfsData()

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        def change() -> int:
            # Never a number that was used before: the kernel may still know the old directory.
            row = self._rows.execute("SELECT max(inode) FROM applied").fetchone()
            inode = max(int(row[0] or 0) + 1, FIRST_FREE)
            try:
                self._rows.execute(
                    "INSERT INTO names VALUES (?, ?, ?)", (parent_inode, name, inode)
                )
            except sqlite3.IntegrityError:
                raise pyfuse3.FUSEError(errno.EEXIST) from None
            return inode

        names = [NameBefore(Inode(parent_inode), name, present=False)]
        return self._attributes(
            self._once(ctx.pid, f"mkdir {parent_inode} {name!r}", names, change)
        )

    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        def change() -> int:
            inode = self._inode(parent_inode, name)
            self._rows.execute(
                "DELETE FROM names WHERE parent = ? AND name = ?", (parent_inode, name)
            )
            return inode

        names = [NameBefore(Inode(parent_inode), name, present=True)]
        self._once(ctx.pid, f"rmdir {parent_inode} {name!r}", names, change)

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        def change() -> int:
            inode = self._inode(parent_inode_old, name_old)
            self._rows.execute(
                "UPDATE OR REPLACE names SET parent = ?, name = ? WHERE parent = ? AND name = ?",
                (parent_inode_new, name_new, parent_inode_old, name_old),
            )
            return inode

        what = f"rename {parent_inode_old} {name_old!r} {parent_inode_new} {name_new!r}"
        names = [
            NameBefore(Inode(parent_inode_old), name_old, present=True),
            NameBefore(Inode(parent_inode_new), name_new, present=False),
        ]
        self._once(ctx.pid, what, names, change)

    def _applied(self, number: OperationNumber) -> int | None:
        row = self._rows.execute(
            "SELECT inode FROM applied WHERE operation = ?", (number,)
        ).fetchone()
        return None if row is None else int(row[0])

    def _once(self, thread: int, what: str, names: list[NameBefore], change: Change) -> int:
        self._memory.count_answer()
        notes = self._memory.notes
        digest = hashlib.blake2b(what.encode(), digest_size=16).digest()
        before = notes.resent(thread, digest)
        if before is not None:
            inode = self._applied(before)
            if inode is not None:
                notes.finish(thread)
                return inode
        number = notes.begin(thread, digest, names)
        try:
            return self._transaction(number, change)
        finally:
            notes.finish(thread)

    def _transaction(self, number: OperationNumber, change: Change) -> int:
        self._rows.execute("BEGIN IMMEDIATE")
        try:
            inode = change()
            self._rows.execute("INSERT INTO applied VALUES (?, ?)", (number, inode))
        except pyfuse3.FUSEError:
            self._rows.execute("ROLLBACK")
            raise
        self._rows.execute("COMMIT")
        return inode


async def run(handoff: Handoff, arguments: argparse.Namespace) -> None:
    token = trio.lowlevel.current_trio_token()
    memory = SharedMemory(handoff.memory, call_soon=token.run_sync_soon)
    send, receive = trio.open_memory_channel[Invalidation](10)
    operations = TinyOperations(handoff, memory, arguments.big, arguments.state, send)
    stop = trio.Event()
    async with trio.open_nursery() as nursery, send:
        nursery.start_soon(stop_at_sigterm, stop)
        nursery.start_soon(tell_ready, operations, handoff, memory)
        await serve(
            operations,
            handoff=handoff,
            invalidations=receive,
            stop=stop,
            stop_grace_s=0.2,
        )
        nursery.cancel_scope.cancel()


async def tell_ready(operations: TinyOperations, handoff: Handoff, memory: SharedMemory) -> None:
    await operations.entered.wait()
    handoff.tell_ready({"generation": memory.generation})


async def stop_at_sigterm(stop: trio.Event) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as received:
        async for _ in received:
            stop.set()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mountpoint", required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--big", type=Path, required=True)
    parser.add_argument("--refuse", help="say this instead of getting ready")
    parser.add_argument("--refuse-again", help="the same, but not in the first life")
    parser.add_argument("--silent-end", action="store_true")
    parser.add_argument("--supervised", required=True)
    arguments = parser.parse_args()
    handoff = Handoff.accept(arguments.supervised)
    first = not (arguments.state / "lived").exists()
    (arguments.state / "lived").touch()
    refusal = arguments.refuse if first else (arguments.refuse or arguments.refuse_again)
    if refusal:
        handoff.tell_error(refusal, exit_code=7)
        return 7
    if arguments.silent_end:
        return 9
    try:
        trio.run(run, handoff, arguments)
    except StageFSError as exc:
        handoff.tell_error(str(exc), exit_code=exc.exit_code)
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
