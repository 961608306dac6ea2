"""The pyfuse3 operations that change nothing: decode, make one call to Vfs, encode.

No policy, no SQL, no paths.  ``read`` is the hot path: what can be answered without waiting
is, from the event loop.
"""

import errno
import os
from collections.abc import Callable, Sequence

import pyfuse3

from stagefs.errors import NotFound
from stagefs.fuse.answers import answers
from stagefs.fuse.attrs import Encoder
from stagefs.fuse.operations_log import W_ANSWERED, SharedMemory
from stagefs.fuse.session import DeviceOperations, Handoff
from stagefs.measures import Measures
from stagefs.model import Handle, Inode
from stagefs.namespace.node import Node
from stagefs.vfs.changes import Changes
from stagefs.vfs.vfs import LONG_TIMEOUT_S, FileSystemSize, Vfs
from stagefs.vfs.workspace import Caller

BLOCK_BYTES = 4096
NAME_BYTES_MAX = 255
# One page of a listing; what one kernel request does not take is kept for the next.
LISTED_AT_ONCE = 512
FILES_MAX = 1 << 40
# readdir cookies 1 and 2 are `.` and `..`.
_FIRST_COOKIE = 2


class ReadOperations(DeviceOperations):
    """``unexpected`` counts answers of EIO that were defects of ours."""

    def __init__(
        self,
        handoff: Handoff,
        *,
        vfs: Vfs,
        changes: Changes,
        encoder: Encoder,
        memory: SharedMemory,
        size: Callable[[], FileSystemSize],
        measures: Measures,
    ) -> None:
        super().__init__(handoff)
        self._vfs = vfs
        self._changes = changes
        self._open_files = vfs.open_files
        self._encoded = encoder.attributes
        self._notes = memory.notes
        self._count_answer = memory.count_answer
        self._words = memory.words
        self._size = size
        self._listings: dict[int, Listing] = {}
        self.unexpected = 0
        self.measures = measures

    def count_served(self) -> None:
        """Whatever does not go the hot path counts, so each daemon that serves anything does: an
        open file of an earlier one is always read and written the other way first."""
        self._words[W_ANSWERED] += 1

    def _encode(
        self, node: Node, entry_timeout_s: float = LONG_TIMEOUT_S
    ) -> pyfuse3.EntryAttributes:
        if not node.content:
            return self._encoded(node, entry_timeout_s)
        live, blocks = self._vfs.live(node)
        entry = self._encoded(live, entry_timeout_s)
        entry.st_blocks = blocks
        if node.successor:
            # Listed under a name that still leads to the old version: to be looked up.
            entry.entry_timeout = entry.attr_timeout = 0
        return entry

    # Names

    @answers
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        parent = Inode(parent_inode)
        self._count_answer()
        if self._notes.expects_walks and (before := self._before_repetition(parent, name, ctx)):
            return before
        try:
            node = await self._vfs.lookup(parent, os.fsdecode(name), ctx.pid)
        except NotFound:
            return _absent(self._vfs.absence_timeout_s(parent))
        return self._encode(node, self._vfs.name_timeout_s(parent))

    def _before_repetition(
        self, parent: Inode, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes | None:
        """A thread walks again to repeat an operation that took effect: as it was before."""
        repeated = self._notes.repeated_lookup(ctx.pid, parent, name)
        made = self._changes.applied(repeated[0]) if repeated else None
        if repeated is None or made is None:
            return None
        if not repeated[1]:
            raise pyfuse3.FUSEError(errno.ENOENT)
        entry = self._encode(made)
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    async def forget(self, inode_list: Sequence[tuple[pyfuse3.InodeT, int]]) -> None:
        """Lookup counts mean nothing here: inodes live in the namespace."""
        for inode, _count in inode_list:
            self._vfs.forgotten(Inode(inode))

    @answers
    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._encode(self._vfs.node(Inode(inode)))

    @answers
    async def readlink(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileNameT:
        return pyfuse3.FileNameT(os.fsencode(self._vfs.readlink(Inode(inode))))

    @answers
    async def opendir(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileHandleT:
        await self._vfs.opendir(Inode(inode))
        return pyfuse3.FileHandleT(inode)

    @answers
    async def readdir(
        self, fh: pyfuse3.FileHandleT, start_id: int, token: pyfuse3.ReaddirToken
    ) -> None:
        inode = Inode(fh)
        encode, reply = self._encode, pyfuse3.readdir_reply
        timeout_s = self._vfs.name_timeout_s(inode)
        if start_id < 1 and not reply(token, b".", encode(self._vfs.node(inode)), 1):
            return
        if start_id < _FIRST_COOKIE and not reply(
            token, b"..", encode(self._vfs.parent(inode)), _FIRST_COOKIE
        ):
            return
        after = max(start_id - _FIRST_COOKIE, 0)
        while True:
            entries, begin = self._listed(inode, after)
            if begin >= len(entries):
                return
            for position in range(begin, len(entries)):
                cookie, name, node = entries[position]
                if not reply(
                    token, os.fsencode(name), encode(node, timeout_s), cookie + _FIRST_COOKIE
                ):
                    return
                after = cookie

    def _listed(self, inode: Inode, after: int) -> tuple[list[tuple[int, str, Node]], int]:
        """(entries, position of the first after ``after``), from the page last read when nothing
        changed since: the kernel asks for some twenty names at a time."""
        listing = self._listings.get(inode)
        changes = self._vfs.changes
        if listing is not None and listing.changes == changes:
            position = listing.positions.get(after)
            if position is not None and (position < len(listing.entries) or listing.last):
                return listing.entries, position
        entries = self._vfs.page(inode, after, LISTED_AT_ONCE)
        if len(self._listings) >= 64:
            self._listings.clear()
        self._listings[inode] = Listing(entries, after, changes)
        return entries, 0

    @answers
    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        self._listings.pop(fh, None)

    # Reading

    @answers
    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        self._count_answer()
        handle = await self._vfs.open(Inode(inode), flags, Caller(ctx.pid, root=ctx.uid == 0))
        virtual = handle not in self._open_files
        return pyfuse3.FileInfo(
            fh=pyfuse3.FileHandleT(handle), keep_cache=not virtual, direct_io=virtual
        )

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """The hot path: what is verified and in the page cache is answered without waiting."""
        opened = self._open_files.get(fh)
        if opened is not None:
            data = opened.read_now(off, size)
            if data is not None:
                measures = self.measures
                measures.ready_reads += 1
                measures.ready_bytes += len(data)
                return data  # type: ignore[return-value]  # any buffer will do
        return await self._read(fh, off, size)

    @answers
    async def _read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        data = await self._vfs.read(Handle(fh), off, size)
        self.measures.waited_bytes += len(data)
        return data  # type: ignore[return-value]

    @answers
    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        self._vfs.release(Handle(fh))

    # The file system, and extended attributes

    @answers
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        size = self._size()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = BLOCK_BYTES
        data.f_blocks = size.total_bytes // BLOCK_BYTES
        data.f_bfree = data.f_bavail = size.free_bytes // BLOCK_BYTES
        data.f_files = size.files
        data.f_ffree = data.f_favail = FILES_MAX - size.files
        data.f_namemax = NAME_BYTES_MAX
        return data

    @answers
    async def listxattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> list[pyfuse3.XAttrNameT]:
        names = self._changes.xattr_names(Inode(inode))
        return [pyfuse3.XAttrNameT(name) for name in names]


def _absent(timeout_s: float) -> pyfuse3.EntryAttributes:
    """The answer that there is no such name, which the kernel may keep.  Without a time to keep
    it, it is the same as ENOENT, which costs less."""
    if not timeout_s:
        raise pyfuse3.FUSEError(errno.ENOENT)
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = pyfuse3.InodeT(0)
    entry.entry_timeout = timeout_s
    return entry


class Listing:
    """A page of a directory that the kernel is reading.  ``positions`` leads from the cookie a
    request continues after to the next entry; ``last`` says that nothing comes after the page."""

    __slots__ = ("changes", "entries", "last", "positions")

    def __init__(self, entries: list[tuple[int, str, Node]], after: int, changes: int) -> None:
        self.entries = entries
        self.changes = changes
        self.last = len(entries) < LISTED_AT_ONCE
        self.positions = {after: 0}
        for position, (cookie, _name, _node) in enumerate(entries, start=1):
            self.positions[cookie] = position
