"""Files that tasks write: their handles, content and attributes, and when they are published.

For: everything that concerns the content of PRIVATE and PUBLISHED files, and the attributes of
all nodes that may change.  Not for names (``vfs``) nor for whose copy a write goes to
(``copying``): what comes here is a PRIVATE node already.

A file made or opened for writing inside ``staging/`` or a writable binding is published when
its last writer closes it; published files never change again.

Concurrency: trio thread.  Writes and truncations wait for the disk, and for the bytes of a
base that still shows through; removing content happens in a task of ``running``.
"""

import logging
import stat
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple, Protocol

import trio

from stagefs.errors import Busy, NoAttribute, NoSpace, NotFound, ReadOnly, StageFSError
from stagefs.model import ROOT_INODE, Handle, Inode
from stagefs.namespace.node import STAGING_INODE, ContentKind, Node, NodeKind
from stagefs.namespace.store import Namespace
from stagefs.objects.content import OpenObject
from stagefs.objects.courtesy import COURTESY
from stagefs.objects.objects import Objects
from stagefs.outputs.local import LocalFiles

log = logging.getLogger(__name__)

INODE_MASK = (1 << 40) - 1
SET_ID_BITS = stat.S_ISUID | stat.S_ISGID
# A program's capabilities must not survive a write to it.
CAPABILITY = b"security.capability"
# Files whose content is removed in one visit to a worker thread.
RECLAIM_FILES = 500
# Bases that are kept open for files that read through to them.
BASES_OPEN_MAX = 256
STAGING_KNOWN_MAX = 100_000
LEFT_BEHIND_AFTER_S = 10.0
KEPT_MAX = 100_000


class Caller(NamedTuple):
    """Who asks: ``root`` may do what a kernel lets CAP_FSETID do."""

    thread: int
    root: bool


class Place(NamedTuple):
    """Where a file was made."""

    directory: Inode
    name: str


class Writers(Protocol):
    """Counts of open handles that may write, kept where they outlive a daemon.  One that is closed
    counts no more; it is removed when its file is published, so that the next daemon does what a
    dead one did not get to."""

    def add(self, handle: Handle, thread: int) -> None: ...

    def close(self, handle: Handle) -> None: ...

    def closed(self) -> list[Handle]: ...

    def remove(self, handle: Handle) -> None: ...

    def count(self, inode: Inode) -> int: ...

    def __contains__(self, handle: Handle) -> bool: ...


class OpenLocal:
    """One open handle on a local file."""

    __slots__ = ("_local", "_namespace", "_writer", "inode", "trusted")

    def __init__(
        self,
        namespace: Namespace,
        local: LocalFiles,
        inode: Inode,
        *,
        trusted: bool,
        writer: int = 0,
    ) -> None:
        """``trusted``: root opened it, whose writes leave a program's privileges.  ``writer``: the
        thread that opened it, 0 when that is not known."""
        self._writer = writer
        self._namespace = namespace
        self._local = local
        self.inode = inode
        self.trusted = trusted

    def read_now(self, offset: int, size: int) -> memoryview | bytes | None:
        """The bytes, if that needs neither waiting nor the base."""
        return self._local.read_now(self._namespace.node(self.inode), offset, size)

    def gives_way(self, size: int) -> bool:
        """Whether a write of ``size`` bytes has to wait for those who read."""
        return COURTESY.comes_before(size, self._writer)

    def write_now(self, offset: int, data: bytes) -> int | None:
        """How much was written, if that needs neither the base nor a change of the node, and
        nobody else comes first."""
        if self.gives_way(len(data)):
            return None
        node = self._namespace.node(self.inode)
        if node.content is not ContentKind.PRIVATE:
            return None
        if (node.mode & SET_ID_BITS or node.has_xattrs) and not self.trusted:
            return None
        return self._local.write_now(node, offset, data)


class Workspace:
    def __init__(
        self,
        *,
        namespace: Namespace,
        objects: Objects,
        local: LocalFiles,
        writers: Writers,
        kept_up_to: int,
    ) -> None:
        """``kept_up_to``: files with inodes up to this one may be open under an earlier daemon, so
        without a name they stay until the kernel forgets them."""
        self._namespace = namespace
        self._objects = objects
        self.local = local
        self.writers = writers
        self._kept_up_to = kept_up_to
        self._forgotten: set[Inode] = set()
        self._opens: dict[Inode, int] = {}
        # Of files that are still open since they were made: asking SQL for it costs more.
        self._made: dict[Inode, Place] = {}
        self._bases: dict[Inode, OpenObject] = {}
        self._staging: dict[Inode, bool] = {}
        self._unlinked_seen = -1
        self._reclaim_wanted = trio.Event()
        self._reclaimed = trio.Event()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        for handle in self.writers.closed():
            self._closed(handle)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._reclaim_when_wanted)
            nursery.start_soon(self._publish_left_behind)
            yield
            nursery.cancel_scope.cancel()

    # Where names lie

    def in_staging(self, directory: Inode) -> bool:
        """Whether a directory is ``staging/`` or lies below it, or is in a writable binding."""
        known = self._staging.get(directory)
        if known is not None:
            return known
        inode, path = directory, []
        while inode not in {STAGING_INODE, ROOT_INODE}:
            path.append(inode)
            try:
                if self._namespace.node(inode).writable:
                    inode = STAGING_INODE
                    break
                inode = self._namespace.parent(inode)
            except NotFound:
                break
        if len(self._staging) > STAGING_KNOWN_MAX:
            self._staging.clear()
        known = inode == STAGING_INODE
        for above in (*path, directory):
            self._staging[above] = known
        return known

    def directories_moved(self) -> None:
        self._staging.clear()

    # Handles

    async def open(
        self, node: Node, handle: Handle, *, writes: bool, empty: bool, caller: Caller
    ) -> OpenLocal:
        """``empty``: O_TRUNC."""
        if empty:
            await self.truncate(node, 0, trusted=caller.root)
        return self.opened(node.inode, handle, writes=writes, caller=caller)

    def opened(self, inode: Inode, handle: Handle, *, writes: bool, caller: Caller) -> OpenLocal:
        if writes:
            self.writers.add(handle, caller.thread)
        self._opens[inode] = self._opens.get(inode, 0) + 1
        return OpenLocal(
            self._namespace, self.local, inode, trusted=caller.root, writer=caller.thread
        )

    def made(self, inode: Inode, place: Place, *, is_new: bool) -> None:
        """A file that was just opened was made for that; ``is_new``: nobody else has seen it."""
        self._made[inode] = place
        if is_new:
            self.local.expect_new(inode)

    def again(self, inode: Inode) -> OpenLocal:
        """A handle that an earlier daemon gave out."""
        self._opens[inode] = self._opens.get(inode, 0) + 1
        return OpenLocal(self._namespace, self.local, inode, trusted=False)

    def release(self, handle: Handle, inode: Inode, *, known: bool) -> None:
        """``known``: this daemon opened it, or read from it."""
        if known:
            left = self._opens.get(inode, 1) - 1
            if left:
                self._opens[inode] = left
            else:
                self._opens.pop(inode, None)
                self._release_base(inode)
        self.writers.close(handle)
        self._closed(handle)
        if inode not in self._opens:
            self._made.pop(inode, None)
            if not self._has_name(inode):
                self._reclaim_soon()

    def _closed(self, handle: Handle) -> None:
        inode = Inode(handle & INODE_MASK)
        if not self.writers.count(inode):
            self._no_writer_left(inode)
        self.writers.remove(handle)

    def _has_name(self, inode: Inode) -> bool:
        try:
            return self._namespace.node(inode).nlink > 0
        except NotFound:
            return False

    def _no_writer_left(self, inode: Inode) -> None:
        try:
            node = self._namespace.node(inode)
        except NotFound:
            return
        if node.content is ContentKind.PRIVATE and node.nlink and self._is_for_others(inode):
            self._namespace.publish([inode])

    async def _publish_left_behind(self) -> None:
        """What was closed while no daemon heard of it: where requests are not sent again, or when
        the mount ended under its writers."""
        begun_ns = time.time_ns()
        if self._kept_up_to:
            # Requests that were in flight come first: who made a file may be about to open it.
            await trio.sleep(LEFT_BEHIND_AFTER_S)
        for inode in self._namespace.private_content():
            await trio.lowlevel.checkpoint()
            if self.writers.count(inode) or inode in self._opens:
                continue
            try:
                made_ns = self._namespace.node(inode).ctime_ns
                if made_ns < begun_ns:
                    self._no_writer_left(inode)
            except StageFSError as error:
                log.log(error.log_level, "inode %d is not published: %s", inode, error)

    def _is_for_others(self, inode: Inode) -> bool:
        made = self._made.get(inode)
        if made is not None:
            node = self._namespace.find(*made)
            if node is not None and node.inode == inode and node.nlink == 1:
                return self.in_staging(made.directory)
        if self._is_newer_version(inode):
            return True
        place = self._namespace.place(inode)
        return place is not None and self.in_staging(place[0])

    def _is_newer_version(self, inode: Inode) -> bool:
        """Whether all links of a published file lead to this one now."""
        lower = self._namespace.node(inode).lower
        try:
            return bool(lower) and self._namespace.node(lower).successor == inode
        except NotFound:
            return False

    # Content

    async def read(self, inode: Inode, offset: int, size: int) -> memoryview | bytes:
        return await self.local.read(self._namespace.node(inode), offset, size)

    async def write(self, inode: Inode, offset: int, data: bytes, *, trusted: bool) -> int:
        """Raises NoSpace; ReadOnly for a file that was published meanwhile."""
        node = self._namespace.node(inode)
        if node.content is not ContentKind.PRIVATE:
            raise ReadOnly(
                f"{self._namespace.path(inode)} was published and cannot change: open it again."
            )
        if not trusted:
            node = self._without_privileges(node)
        try:
            done = self.local.write_now(node, offset, data)
            return await self.local.write(node, offset, data) if done is None else done
        except NoSpace:
            if not await self._room_was_made():
                raise
        return await self.local.write(node, offset, data)

    async def truncate(self, node: Node, size_bytes: int, *, trusted: bool) -> Node:
        if not trusted:
            node = self._without_privileges(node)
        await self.local.truncate(node, size_bytes)
        return node

    async def sync(self, inode: Inode, *, data_only: bool) -> None:
        """Content and names are on the disk afterwards."""
        node = self._namespace.node(inode)
        if node.content is not ContentKind.OBJECT:
            await self.local.sync(node, data_only=data_only)
        await self.sync_names()

    async def sync_names(self) -> None:
        await trio.to_thread.run_sync(self._namespace.sync)

    async def read_base(self, node: Node, offset: int, size: int) -> memoryview | bytes:
        """Bytes of what a copied-up file was copied from."""
        if node.lower:
            return await self.local.read(self._namespace.node(node.lower), offset, size)
        opened = self._bases.get(node.inode)
        if opened is None:
            if len(self._bases) >= BASES_OPEN_MAX:
                self._release_base(next(iter(self._bases)))
            opened = self._bases[node.inode] = self._objects.open(node)
        return await self._objects.read(opened, offset, size)

    async def complete(self, node: Node, copied: Callable[[int], None]) -> None:
        """Copy what still shows through from what the file was copied from, which may then be
        evicted.  ``copied`` is told how far that is, in bytes."""
        try:
            await self.local.complete(node, copied)
        finally:
            self._release_base(node.inode)

    def _release_base(self, inode: Inode) -> None:
        base = self._bases.pop(inode, None)
        if base is not None:
            self._objects.release(base)

    def _without_privileges(self, node: Node) -> Node:
        """Whoever changes a program's content takes its set-user-id and capabilities away: the
        kernel leaves that to us (HANDLE_KILLPRIV_V2)."""
        mode = without_set_id(node.mode)
        if mode != node.mode:
            node = self._namespace.set_attributes(node.inode, mode=mode)
        if node.has_xattrs:
            try:
                self._namespace.remove_xattr(node.inode, CAPABILITY)
            except NoAttribute:
                return node
            node = self._namespace.node(node.inode)
        return node

    # Attributes

    async def set_attributes(
        self,
        node: Node,
        *,
        mode: int | None,
        uid: int | None,
        gid: int | None,
        atime_ns: int | None,
        mtime_ns: int | None,
        size_bytes: int | None,
        trusted: bool,
    ) -> Node:
        """``node`` is no shared file.  Ids are those the namespace keeps."""
        if size_bytes is not None:
            node = await self.truncate(node, size_bytes, trusted=trusted)
        if (
            mode is None
            and node.kind is not NodeKind.DIRECTORY
            and (uid is not None or gid is not None)
        ):
            mode = without_set_id(node.mode)
        if (mode, uid, gid, atime_ns, mtime_ns) == (None, None, None, None, None):
            return self._settled(node)
        # tar and cp say again what is so already: that costs no transaction, as long as the real
        # file can take the new time of change.
        mode = None if mode == node.mode else mode
        uid = None if uid == node.uid else uid
        gid = None if gid == node.gid else gid
        of_namespace = (mode, uid, gid) != (None, None, None)
        of_content = not of_namespace or atime_ns is not None or mtime_ns is not None
        if (
            of_content
            and node.content is ContentKind.PRIVATE
            and self.local.set_times(node, atime_ns=atime_ns, mtime_ns=mtime_ns)
        ):
            if not of_namespace:
                return self._settled(node)
            atime_ns = mtime_ns = None
        node = self._namespace.set_attributes(
            node.inode,
            mode=node.mode if mode is None else mode,
            uid=uid,
            gid=gid,
            atime_ns=atime_ns,
            mtime_ns=mtime_ns,
        )
        return self._settled(node)

    def _settled(self, node: Node) -> Node:
        """What was changed by name in ``staging/`` is published at once: nobody will close it."""
        if (
            node.content is ContentKind.PRIVATE
            and not self.writers.count(node.inode)
            and node.nlink
            and self._is_for_others(node.inode)
        ):
            self._namespace.publish([node.inode])
        return self._namespace.node(node.inode)

    # Publishing

    def publishing(self, node: Node) -> bool:
        """Whether what is about to get a name in ``staging/`` has files to publish.

        Raises Busy while one of them is open for writing.
        """
        if node.kind is NodeKind.DIRECTORY:
            private: Sequence[Inode] = self._namespace.private_files(node.inode)
        else:
            private = [node.inode] if node.content is ContentKind.PRIVATE else []
        for inode in private:
            if self.writers.count(inode):
                raise Busy(
                    f"{self._namespace.path(inode)} is still open for writing and cannot be "
                    "published: close it first."
                )
        return bool(private)

    # Making room

    def names_went(self) -> None:
        """Some name was removed or replaced: content without a name goes soon."""
        if self._namespace.unlinked_edits != self._unlinked_seen:
            self._unlinked_seen = self._namespace.unlinked_edits
            self._reclaim_soon()

    def _reclaim_soon(self) -> None:
        self._reclaim_wanted.set()

    async def _room_was_made(self) -> bool:
        """Wait until content without a name is gone.  False when there was none."""
        if not self._unused():
            return False
        self._reclaim_soon()
        await self._reclaimed.wait()
        return True

    def _unused(self) -> list[Inode]:
        # Those that stay may come first.
        found = self._namespace.unlinked_content(
            RECLAIM_FILES + KEPT_MAX * bool(self._kept_up_to) + len(self._opens)
        )
        return [inode for inode in found if inode not in self._opens and self._may_go(inode)]

    def _may_go(self, inode: Inode) -> bool:
        return inode > self._kept_up_to or inode in self._forgotten

    def forgotten(self, inode: Inode) -> None:
        """The kernel dropped an inode: a file without a name is open no more."""
        if inode > self._kept_up_to:
            return
        try:
            node = self._namespace.node(inode)
        except NotFound:
            return
        if node.content is not ContentKind.OBJECT and not node.nlink:
            self._forgotten.add(inode)
            self._reclaim_soon()

    async def _reclaim_when_wanted(self) -> None:
        while True:
            await self._reclaim_wanted.wait()
            self._reclaim_wanted = trio.Event()
            try:
                await self._reclaim()
            except StageFSError as error:  # tried again when something else is removed
                log.log(error.log_level, "removing content without a name: %s", error)
            self._reclaimed.set()
            self._reclaimed = trio.Event()

    async def _reclaim(self) -> None:
        while unused := self._unused():
            await trio.to_thread.run_sync(self.local.remove, unused)
            self._namespace.drop_unlinked(unused)
            self._forgotten.difference_update(unused)


def without_set_id(mode: int) -> int:
    """As the kernel does it: set-group-id without group execution means something else."""
    mode &= ~stat.S_ISUID
    return mode & ~stat.S_ISGID if mode & stat.S_IXGRP else mode
