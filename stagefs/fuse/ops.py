"""The pyfuse3 operations that change something: decode, make one call, encode.

Name-changing operations are noted in shared memory before they run and carry their number
into the namespace's transaction, so that the kernel may send them again to the next daemon
(DESIGN section 5b).  Writing, truncating and setting attributes may simply run twice.
"""

import errno
import functools
import os
import stat
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import pyfuse3

from stagefs.errors import StageFSError
from stagefs.fuse.answers import answers
from stagefs.fuse.operations_log import NameBefore, request_digest
from stagefs.fuse.reading import ReadOperations
from stagefs.model import Handle, Inode
from stagefs.namespace.node import Node, NodeKind, RenameFlags
from stagefs.vfs.changes import NewAttributes, Owner
from stagefs.vfs.workspace import Caller, OpenLocal, Place

# Answers of symlink(2) that became virtual links have this inode; nothing ever asks for it.
THROWAWAY_INODE = (1 << 40) - 65

_P = ParamSpec("_P")
_T = TypeVar("_T")


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


class StageFSOperations(ReadOperations):
    # Changing names

    def finish_operation(self, ctx: object) -> None:
        assert isinstance(ctx, pyfuse3.RequestContext)
        self._notes.finish(ctx.pid)

    def _operation(
        self, ctx: pyfuse3.RequestContext, *what: object, before: Sequence[NameBefore]
    ) -> tuple[int, Node | None]:
        """(number, result): the result is there when an earlier daemon carried this request out."""
        digest = request_digest(*what)
        self._count_answer()
        earlier = self._notes.resent(ctx.pid, digest)
        made = self._changes.applied(earlier) if earlier is not None else None
        number = self._notes.begin(ctx.pid, digest, before) if earlier is None else earlier
        return number, made

    @answers
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
        node = made or self._changes.make_directory(
            parent, text, mode & ~ctx.umask, owner=Owner(ctx.uid, ctx.gid), operation=number
        )
        return self._encode(node)

    @answers
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
            made = await self._changes.symlink(
                *(parent, text, os.fsdecode(target)),
                owner=Owner(ctx.uid, ctx.gid),
                operation=number,
            )
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

    @answers
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
        node = made or self._changes.link(Inode(inode), parent, text, number)
        return self._encode(node, self._vfs.name_timeout_s(parent))

    @answers
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
                NameBefore(new, name_new, present=bool(flags & RenameFlags.EXCHANGE)),
            ],
        )
        if made is None:
            self._changes.rename(old, old_name, new, new_name, flags, number)

    @answers
    @_changes_names
    async def unlink(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        parent, text = Inode(parent_inode), os.fsdecode(name)
        number, made = self._operation(
            ctx, "unlink", parent, text, before=[NameBefore(parent, name, present=True)]
        )
        if made is None:
            self._changes.unlink(parent, text, number)

    @answers
    @_changes_names
    async def rmdir(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        parent, text = Inode(parent_inode), os.fsdecode(name)
        number, made = self._operation(
            ctx, "rmdir", parent, text, before=[NameBefore(parent, name, present=True)]
        )
        if made is None:
            self._changes.rmdir(parent, text, number)

    @answers
    @_changes_names
    async def mknod(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        rdev: int,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        parent, text = Inode(parent_inode), os.fsdecode(name)
        number, made = self._operation(
            ctx, "mknod", parent, text, before=[NameBefore(parent, name, present=False)]
        )
        node = made or self._changes.make_node(
            *(parent, text, mode & ~ctx.umask, rdev),
            owner=Owner(ctx.uid, ctx.gid),
            operation=number,
        )
        return self._encode(node)

    @answers
    @_changes_names
    async def create(
        self,
        parent_inode: pyfuse3.InodeT,
        name: pyfuse3.FileNameT,
        mode: pyfuse3.ModeT,
        flags: pyfuse3.FlagT,
        ctx: pyfuse3.RequestContext,
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        parent, text = Inode(parent_inode), os.fsdecode(name)
        number, made = self._operation(
            ctx, "create", parent, text, before=[NameBefore(parent, name, present=False)]
        )
        node = made or self._changes.create(
            parent, text, mode & ~ctx.umask, owner=Owner(ctx.uid, ctx.gid), operation=number
        )
        handle = self._vfs.open_new(
            node,
            Place(parent, text),
            flags,
            Caller(ctx.pid, root=ctx.uid == 0),
            is_new=made is None,
        )
        answer = pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(handle), keep_cache=True)
        return answer, self._encode(node)

    # Content and attributes

    async def write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        """What needs neither the base of a copy nor another change is written at once."""
        opened = self._open_files.get(fh)
        if isinstance(opened, OpenLocal):
            try:
                done = opened.write_now(off, buf)
            except StageFSError:
                done = None  # said, and mended if it can be, by the slow path
            if done is not None:
                self.measures.ready_writes += 1
                self.measures.written_bytes += done
                return done
        return await self._write(fh, off, buf)

    @answers
    async def _write(self, fh: pyfuse3.FileHandleT, off: int, buf: bytes) -> int:
        done = await self._vfs.write(Handle(fh), off, buf)
        self.measures.written_bytes += done
        return done

    async def flush(self, fh: pyfuse3.FileHandleT) -> None:
        """Everything was written when its write was answered.  The kernel, told that there is no
        such request, never sends another one: that is a fifth of what it asks for a small file."""
        raise pyfuse3.FUSEError(errno.ENOSYS)

    @answers
    async def fsync(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        await self._vfs.sync(Handle(fh), data_only=datasync)

    @answers
    async def fsyncdir(self, fh: pyfuse3.FileHandleT, datasync: bool) -> None:
        await self._vfs.sync_names()

    @answers
    async def setattr(
        self,
        inode: pyfuse3.InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: pyfuse3.FileHandleT | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        node = await self._changes.set_attributes(
            Inode(inode),
            NewAttributes(
                mode=attr.st_mode if fields.update_mode else None,
                uid=attr.st_uid if fields.update_uid else None,
                gid=attr.st_gid if fields.update_gid else None,
                atime_ns=attr.st_atime_ns if fields.update_atime else None,
                mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
                size_bytes=attr.st_size if fields.update_size else None,
            ),
            Caller(ctx.pid, root=ctx.uid == 0),
        )
        return self._encode(node)

    @answers
    async def getxattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext
    ) -> bytes:
        """pyfuse3 asks this first when an attribute must not be there yet (XATTR_CREATE); when the
        one that is there was made by this very request, it is told of none."""
        if self._notes.expects_repetitions:
            made = self._notes.left_behind(ctx.pid, _attribute_made(inode, name))
            if made is not None and self._changes.applied(made) is not None:
                raise pyfuse3.FUSEError(pyfuse3.ENOATTR)
        return self._changes.xattr(Inode(inode), name)

    @answers
    @_changes_names
    async def setxattr(
        self,
        inode: pyfuse3.InodeT,
        name: pyfuse3.XAttrNameT,
        value: bytes,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        made = self._notes.left_behind(ctx.pid, _attribute_made(inode, name)) is not None
        replaced = not made and self._changes.has_xattr(Inode(inode), name)
        number, done = self._operation(ctx, "setxattr", inode, name, replaced, before=())
        if done is None:
            self._changes.set_xattr(Inode(inode), name, value, ctx.pid, number)

    @answers
    @_changes_names
    async def removexattr(
        self, inode: pyfuse3.InodeT, name: pyfuse3.XAttrNameT, ctx: pyfuse3.RequestContext
    ) -> None:
        number, done = self._operation(ctx, "removexattr", inode, name, before=())
        if done is None:
            self._changes.remove_xattr(Inode(inode), name, ctx.pid, number)


def _attribute_made(inode: int, name: bytes) -> bytes:
    """The digest of a request that gives ``inode`` an attribute it did not have."""
    return request_digest("setxattr", inode, name, False)
