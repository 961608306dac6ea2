"""The pyfuse3 operations: decode, make one call to Vfs, encode.  No policy, no SQL, no paths.

pyfuse3 ends the mount on any exception that is not a FUSEError, so ``_answers`` maps every
StageFSError to its errno and turns what nobody expected into a logged, counted EIO.

Name-changing operations are noted in shared memory before they run and carry their number
into the namespace's transaction, so that the kernel may send them again to the next daemon
(DESIGN section 5b).
"""

import errno
import functools
import logging
import os
import stat
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3
import xxhash

from stagefs.errors import NotFound, StageFSError
from stagefs.fuse.attrs import Encoder
from stagefs.fuse.operations_log import NameBefore, SharedMemory
from stagefs.fuse.session import DeviceOperations, Handoff
from stagefs.model import Handle, Inode
from stagefs.namespace.node import Node, NodeKind
from stagefs.vfs.vfs import FileSystemSize, Vfs

log = logging.getLogger(__name__)

BLOCK_BYTES = 4096
NAME_BYTES_MAX = 255
# One page of a listing; what one kernel request does not take is kept for the next.
LISTED_AT_ONCE = 512
# Answers of symlink(2) that became virtual links have this inode; nothing ever asks for it.
THROWAWAY_INODE = (1 << 40) - 65
FILES_MAX = 1 << 40
# readdir cookies 1 and 2 are `.` and `..`.
_FIRST_COOKIE = 2

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _answers(
    method: Callable[Concatenate["StageFSOperations", _P], Coroutine[Any, Any, _T]],
) -> Callable[Concatenate["StageFSOperations", _P], Coroutine[Any, Any, _T]]:
    @functools.wraps(method)
    async def answered(self: "StageFSOperations", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return await method(self, *args, **kwargs)
        except StageFSError as error:
            if error.log_level >= logging.WARNING:
                log.log(error.log_level, "%s: %s", method.__name__, error)
            raise pyfuse3.FUSEError(error.errno) from error
        except pyfuse3.FUSEError:
            raise
        except Exception as error:
            self.unexpected += 1
            log.exception("%s failed unexpectedly", method.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from error

    return answered


def _changes_names(
    method: Callable[Concatenate["StageFSOperations", _P], Coroutine[Any, Any, _T]],
) -> Callable[Concatenate["StageFSOperations", _P], Coroutine[Any, Any, _T]]:
    """Drops the operation's note once it is answered.  The last argument is the context."""

    @functools.wraps(method)
    async def finished(self: "StageFSOperations", /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return await method(self, *args, **kwargs)
        finally:
            self.finish_operation(args[-1])

    return finished


class StageFSOperations(DeviceOperations):
    """``unexpected`` counts answers of EIO that were defects of ours."""

    def __init__(
        self,
        handoff: Handoff,
        *,
        vfs: Vfs,
        encoder: Encoder,
        memory: SharedMemory,
        size: Callable[[], FileSystemSize],
    ) -> None:
        super().__init__(handoff)
        self._vfs = vfs
        self._open_objects = vfs.open_objects
        self._encode = encoder.attributes
        self._notes = memory.notes
        self._count_answer = memory.count_answer
        self._size = size
        self._listings: dict[int, Listing] = {}
        self.unexpected = 0

    # Names

    @_answers
    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        parent = Inode(parent_inode)
        self._count_answer()
        if self._notes.expects_walks and (before := self._before_repetition(parent, name, ctx)):
            return before
        try:
            node = await self._vfs.lookup(parent, os.fsdecode(name))
        except NotFound:
            return _absent(self._vfs.absence_timeout_s(parent))
        return self._encode(node, self._vfs.name_timeout_s(parent))

    def _before_repetition(
        self, parent: Inode, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes | None:
        """A thread walks again to repeat an operation that took effect: as it was before."""
        repeated = self._notes.repeated_lookup(ctx.pid, parent, name)
        made = self._vfs.applied(repeated[0]) if repeated else None
        if repeated is None or made is None:
            return None
        if not repeated[1]:
            raise pyfuse3.FUSEError(errno.ENOENT)
        entry = self._encode(made)
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    async def forget(self, inode_list: object) -> None:
        """Lookup counts mean nothing here: inodes live in the namespace."""

    @_answers
    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._encode(self._vfs.node(Inode(inode)))

    @_answers
    async def readlink(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileNameT:
        return pyfuse3.FileNameT(os.fsencode(self._vfs.readlink(Inode(inode))))

    @_answers
    async def opendir(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileHandleT:
        await self._vfs.opendir(Inode(inode))
        return pyfuse3.FileHandleT(inode)

    @_answers
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

    @_answers
    async def releasedir(self, fh: pyfuse3.FileHandleT) -> None:
        self._listings.pop(fh, None)

    # Reading

    @_answers
    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        self._count_answer()
        handle = await self._vfs.open(Inode(inode), flags)
        virtual = handle not in self._open_objects
        return pyfuse3.FileInfo(
            fh=pyfuse3.FileHandleT(handle), keep_cache=not virtual, direct_io=virtual
        )

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """The hot path: what is verified and in the page cache is answered without waiting."""
        opened = self._open_objects.get(fh)
        if opened is not None:
            data = opened.read_now(off, size)
            if data is not None:
                return data  # type: ignore[return-value]  # any buffer will do
        return await self._read(fh, off, size)

    @_answers
    async def _read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        return await self._vfs.read(Handle(fh), off, size)  # type: ignore[return-value]

    @_answers
    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        self._vfs.release(Handle(fh))

    # Changing names

    def finish_operation(self, ctx: object) -> None:
        assert isinstance(ctx, pyfuse3.RequestContext)
        self._notes.finish(ctx.pid)

    def _operation(
        self, ctx: pyfuse3.RequestContext, *what: object, before: Sequence[NameBefore]
    ) -> tuple[int, Node | None]:
        """(number, result): the result is there when an earlier daemon carried this request out."""
        digest = xxhash.xxh3_128_digest(repr(what).encode("utf-8", "surrogateescape"))
        self._count_answer()
        earlier = self._notes.resent(ctx.pid, digest)
        made = self._vfs.applied(earlier) if earlier is not None else None
        number = self._notes.begin(ctx.pid, digest, before) if earlier is None else earlier
        return number, made

    @_answers
    @_changes_names
    async def mkdir(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        parent, text = Inode(parent_inode), os.fsdecode(name)
        number, made = self._operation(
            ctx, "mkdir", parent, text, before=[NameBefore(parent, name, present=False)]
        )
        node = made or self._vfs.make_directory(parent, text, mode & ~ctx.umask, number)
        return self._encode(node)

    @_answers
    @_changes_names
    async def symlink(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        target: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        parent, text = Inode(parent_inode), os.fsdecode(name)
        number, made = self._operation(
            ctx, "symlink", parent, text, target, before=[NameBefore(parent, name, present=False)]
        )
        if made is None:
            made = await self._vfs.symlink(parent, text, os.fsdecode(target), number)
        if made is not None and made.kind is NodeKind.SYMLINK:
            return self._encode(made)
        return self._throwaway_symlink(parent, text, target)

    def _throwaway_symlink(
        self, parent: Inode, name: str, target: bytes
    ) -> pyfuse3.EntryAttributes:
        """symlink(2) fails with EIO unless its answer is a symlink, so it gets one that nobody
        will see: without timeouts the next lookup finds the file."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(THROWAWAY_INODE)
        entry.st_mode = pyfuse3.ModeT(stat.S_IFLNK | 0o777)
        entry.st_nlink = 1
        entry.st_size = len(target)
        entry.entry_timeout = 0
        entry.attr_timeout = 0
        return entry

    @_answers
    @_changes_names
    async def link(
        self,
        inode: pyfuse3.InodeT,
        new_parent_inode: pyfuse3.InodeT,
        new_name: pyfuse3.FileNameT,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        parent, text = Inode(new_parent_inode), os.fsdecode(new_name)
        number, made = self._operation(
            ctx, "link", inode, parent, text, before=[NameBefore(parent, new_name, present=False)]
        )
        node = made or self._vfs.link(Inode(inode), parent, text, number)
        return self._encode(node, self._vfs.name_timeout_s(parent))

    @_answers
    @_changes_names
    async def rename(
        self,
        parent_inode_old: pyfuse3.InodeT,
        name_old: pyfuse3.FileNameT,
        parent_inode_new: pyfuse3.InodeT,
        name_new: pyfuse3.FileNameT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        old, new = Inode(parent_inode_old), Inode(parent_inode_new)
        old_name, new_name = os.fsdecode(name_old), os.fsdecode(name_new)
        number, made = self._operation(
            *(ctx, "rename", old, old_name, new, new_name, flags),
            before=[
                NameBefore(old, name_old, present=True),
                NameBefore(new, name_new, present=False),
            ],
        )
        if made is None:
            self._vfs.rename(old, old_name, new, new_name, flags, number)

    @_answers
    @_changes_names
    async def unlink(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        parent, text = Inode(parent_inode), os.fsdecode(name)
        number, made = self._operation(
            ctx, "unlink", parent, text, before=[NameBefore(parent, name, present=True)]
        )
        if made is None:
            self._vfs.unlink(parent, text, number)

    @_answers
    @_changes_names
    async def rmdir(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        parent, text = Inode(parent_inode), os.fsdecode(name)
        number, made = self._operation(
            ctx, "rmdir", parent, text, before=[NameBefore(parent, name, present=True)]
        )
        if made is None:
            self._vfs.rmdir(parent, text, number)

    @_answers
    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        node = self._vfs.set_attributes(
            Inode(inode),
            mode=attr.st_mode if fields.update_mode else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
            owner=(
                attr.st_uid if fields.update_uid else None,
                attr.st_gid if fields.update_gid else None,
            ),
            size_bytes=attr.st_size if fields.update_size else None,
        )
        return self._encode(node)

    @_answers
    async def create(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        raise self._vfs.refuse_content(Inode(parent_inode), os.fsdecode(name))

    @_answers
    async def mknod(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        rdev: int,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        raise self._vfs.refuse_content(Inode(parent_inode), os.fsdecode(name))

    # The file system, and extended attributes

    @_answers
    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        size = self._size()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = BLOCK_BYTES
        data.f_blocks = size.capacity_bytes // BLOCK_BYTES
        data.f_bfree = data.f_bavail = size.free_bytes // BLOCK_BYTES
        data.f_files = size.files
        data.f_ffree = data.f_favail = FILES_MAX - size.files
        data.f_namemax = NAME_BYTES_MAX
        return data

    @_answers
    async def getxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext
    ) -> bytes:
        return self._vfs.xattr(Inode(inode), os.fsdecode(name))

    @_answers
    async def listxattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> list[pyfuse3.XAttrNameT]:
        names = self._vfs.xattr_names(Inode(inode))
        return [pyfuse3.XAttrNameT(os.fsencode(name)) for name in names]

    @_answers
    async def setxattr(
        self,
        inode: pyfuse3.InodeT,
        name: pyfuse3.XAttrNameT,
        value: bytes,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        raise pyfuse3.FUSEError(errno.EROFS)

    @_answers
    async def removexattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        raise pyfuse3.FUSEError(errno.EROFS)


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
