"""Vfs: finding names, and open files, on plain values.  What changes names is ``changes``.

Concurrency: trio thread.  Only ``read`` may wait for a remote as long as its deadline allows;
lookup, open, readdir and symlink wait at most ``answer_deadline_s``, because a task in them
cannot be killed.  Names live in the namespace only, so nothing here needs to survive a
restart: a handle that an earlier daemon gave out encodes its inode and is opened again.

Handles: ``serial << 40 | inode``; the serial tells handles of this daemon apart, so that each
has its own read-ahead.  It begins anywhere, so that two daemons of one mount rarely agree.

``thread`` is who asks, for what is answered with ESTALE to learn the name (``copying``).
"""

import os
import stat
import time

import msgspec

from stagefs.config import NamespaceSettings
from stagefs.errors import (
    IsADirectory,
    NotADirectory,
    NotFound,
    NotPermitted,
    RepeatLookup,
    StageFSError,
)
from stagefs.model import ROOT_INODE, Handle, Inode
from stagefs.namespace.node import IMMUTABLE_CHECKED_NS, ContentKind, Node, NodeKind
from stagefs.namespace.store import Namespace
from stagefs.objects.content import OpenObject
from stagefs.objects.courtesy import COURTESY
from stagefs.objects.objects import Objects
from stagefs.objects.staged import staged_from
from stagefs.remote.versions import is_version
from stagefs.vfs.bindings import Bindings
from stagefs.vfs.copying import Copying
from stagefs.vfs.learning import Learning
from stagefs.vfs.recording import RecordedOpen, Recording
from stagefs.vfs.virtual import DIRECTORY_INODE, NAME, VirtualFiles
from stagefs.vfs.workspace import Caller, OpenLocal, Place, Workspace

INODE_BITS = 40
INODE_MASK = (1 << INODE_BITS) - 1
SERIAL_MASK = 0x7FFFFF
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_TRUNC

# Names do not change behind the kernel's back, except what a remote says of a bound directory:
# a new version is a new inode, and what the API changes is invalidated by name.
LONG_TIMEOUT_S = 3600.0

# Programs look for many names that are not there (PATH, imports).  What the API makes is
# invalidated by name, but an import makes too many names for that: it ends this much later.
ABSENCE_TIMEOUT_S = 1.0

# What a directory listing of the root shows after the namespace's own names.
_VIRTUAL_COOKIE = 1 << 61

_FILE_TYPES = {
    NodeKind.DIRECTORY: stat.S_IFDIR,
    NodeKind.FILE: stat.S_IFREG,
    NodeKind.SYMLINK: stat.S_IFLNK,
    NodeKind.FIFO: stat.S_IFIFO,
    NodeKind.SOCKET: stat.S_IFSOCK,
    NodeKind.CHARACTER_DEVICE: stat.S_IFCHR,
    NodeKind.BLOCK_DEVICE: stat.S_IFBLK,
}


class FileSystemSize(msgspec.Struct, frozen=True):
    """For statfs: bytes of the disk that takes what tasks write, and the number of names."""

    total_bytes: int
    free_bytes: int
    files: int


class Vfs:
    def __init__(
        self,
        *,
        namespace: Namespace,
        objects: Objects,
        bindings: Bindings,
        virtual: VirtualFiles,
        workspace: Workspace,
        copying: Copying,
        recording: Recording,
        learning: Learning,
        settings: NamespaceSettings,
    ) -> None:
        self._namespace = namespace
        self._objects = objects
        self._bindings = bindings
        self._virtual = virtual
        self._settings = settings
        self._revalidate_ns = int(settings.revalidate_s * 1e9)
        self._workspace = workspace
        self._copying = copying
        self._recording = recording
        self._learning = learning
        self._pending = copying.pending
        self._serial = time.time_ns() >> 10 & SERIAL_MASK
        self.open_files: dict[int, OpenObject | OpenLocal | RecordedOpen] = {}
        self._open_texts: dict[int, bytes] = {}

    # Names

    async def lookup(self, parent: Inode, name: str, thread: int) -> Node:
        """Raises NotFound, NotADirectory; what the remote says for a directory never listed.
        ReadOnly when the thread wants to write to what may not be written to."""
        if parent == ROOT_INODE and name == NAME:
            return self._virtual.directory
        if parent >= DIRECTORY_INODE:
            return self._virtual.lookup(name)
        directory = self._namespace.node(parent)
        if directory.lower or directory.bind_url is not None:
            await self._show_binding(directory, name)
        node = self._namespace.find(parent, name)
        if node is None:
            # The kernel only wants to know that; the path of the directory would cost more SQL.
            raise NotFound(f"There is no {name!r} in the directory with inode {parent}.")
        before = node.inode
        if node.successor:
            node = self._namespace.rebind_name(parent, name, node.successor)
        if self._pending and (sent := self._pending.sent_back(thread)) is not None:
            if sent not in (before, node.inode) and not self._leads_to(sent, node.inode):
                return node
            if self._pending.wants_copy_up(thread, sent):
                return self._copying.resolve(parent, name, node, thread)
            if self._pending.wants_record(thread, sent):
                self._recording.named(parent, name, node, thread)
        return node

    def _leads_to(self, old: Inode, new: Inode) -> bool:
        """Whether a file became a newer version, to which names have moved meanwhile: the kernel
        repeats a walk only once, so this is the walk that was asked for."""
        try:
            return self._namespace.newest(old).inode == new
        except NotFound:
            return False

    async def _show_binding(self, directory: Node, name: str | None) -> None:
        bound = self._bindings.shown_by(directory)
        if bound is None:
            return
        await self._bindings.listed(bound)
        if name is not None:
            await self._bindings.found(directory, bound, name)

    def node(self, inode: Inode) -> Node:
        """As the namespace has it: see ``live`` for the size and times of local files."""
        if inode >= DIRECTORY_INODE:
            return self._virtual.node(inode)
        return self._namespace.node(inode)

    def live(self, node: Node) -> tuple[Node, int]:
        """A local file as it is now, and its 512-byte blocks on the disk."""
        return self._workspace.local.live_and_blocks(node)

    async def opendir(self, inode: Inode) -> None:
        node = self.node(inode)
        if node.kind is not NodeKind.DIRECTORY:
            raise NotADirectory(f"{self._path(inode)} is not a directory.")
        if node.lower or node.bind_url is not None:
            await self._show_binding(node, None)

    def page(self, inode: Inode, after: int, limit: int) -> list[tuple[int, str, Node]]:
        """Names of a directory after the one with cookie ``after`` (0: from the start)."""
        if inode >= DIRECTORY_INODE:
            return self._virtual.page(after)
        if after >= _VIRTUAL_COOKIE:
            return []
        entries = self._namespace.page(inode, after, limit)
        if inode == ROOT_INODE and len(entries) < limit:
            entries.append((_VIRTUAL_COOKIE, NAME, self._virtual.directory))
        return entries

    @property
    def changes(self) -> int:
        """Rises with every change of a name: a listing made at another count is out of date."""
        return self._namespace.edits

    def name_timeout_s(self, directory: Inode) -> float:
        """How long the kernel may believe a name in ``directory`` without asking."""
        if directory >= DIRECTORY_INODE:
            return LONG_TIMEOUT_S
        node = self._namespace.node(directory)
        if not node.lower and node.bind_url is None:
            return LONG_TIMEOUT_S
        bound = self._bindings.shown_by(node)
        return LONG_TIMEOUT_S if bound is None else bound.bind_ttl_s

    def absence_timeout_s(self, directory: Inode) -> float:
        """How long the kernel may believe that a name is not in ``directory``."""
        if directory >= DIRECTORY_INODE:
            return LONG_TIMEOUT_S
        node = self._namespace.node(directory)
        return 0.0 if node.lower or node.bind_url is not None else ABSENCE_TIMEOUT_S

    def parent(self, inode: Inode) -> Node:
        """The directory that a directory lies in; the root lies in itself."""
        if inode in (ROOT_INODE, DIRECTORY_INODE):
            return self._namespace.node(ROOT_INODE)
        return self._namespace.node(self._namespace.parent(inode))

    def readlink(self, inode: Inode) -> str:
        return self.node(inode).target or ""

    # Reading

    async def open(self, inode: Inode, flags: int, caller: Caller) -> Handle:
        """Raises RepeatLookup when the name leads to a newer version, or is wanted because a shared
        file is to be written to."""
        granted, asked, refusal = None, False, None
        if self._pending:
            refusal = self._copying.refusal(inode, caller.thread)
            granted = self._pending.granted(caller.thread, inode)
            asked = self._pending.asked_name(caller.thread)
            self._pending.drop(caller.thread)
        node = self.node(inode)
        if node.kind is NodeKind.DIRECTORY:
            raise IsADirectory(f"{self._path(inode)} is a directory.")
        handle = self._new_handle(inode)
        if inode >= DIRECTORY_INODE:
            if flags & _WRITE_FLAGS:
                raise NotPermitted(f"{NAME} cannot be changed.")
            self._open_texts[handle] = self._virtual.text(inode)
            return handle
        if node.content is ContentKind.PRIVATE:
            self.open_files[handle] = await self._workspace.open(
                node,
                handle,
                writes=bool(flags & _WRITE_FLAGS),
                empty=bool(flags & os.O_TRUNC),
                caller=caller,
            )
            return handle
        if flags & _WRITE_FLAGS:
            raise refusal or self._copying.walk_again(node, caller.thread)
        names_it = granted is None and not asked and self._recording.active
        recorded = names_it and self._pending.put_record(caller.thread, inode)
        if node.successor:
            raise RepeatLookup(f"{self._path(inode)} has a newer version.")
        if recorded:
            # The same walk finds a newer version.
            await self._revalidate_old(node)
            raise RepeatLookup(f"inode {inode}: its name is wanted for the record")
        opened: OpenObject | OpenLocal
        if node.content is ContentKind.PUBLISHED:
            opened = self._workspace.opened(inode, handle, writes=False, caller=caller)
        else:
            await self._revalidate_old(node)
            opened = self._objects.open(node, reader=caller.thread)
            self._learning.used(inode, granted)
        self.open_files[handle] = self._recording.wrapped(handle, opened, node, granted)
        return handle

    def _new_handle(self, inode: Inode) -> Handle:
        while True:
            self._serial = self._serial + 1 & SERIAL_MASK
            handle = Handle(self._serial << INODE_BITS | inode)
            if handle not in self.open_files and handle not in self._workspace.writers:
                return handle

    async def _revalidate_old(self, node: Node) -> None:
        if (
            node.validator is not None
            and node.content is ContentKind.OBJECT
            and time.time_ns() - node.checked_ns > self._revalidate_ns
            and node.checked_ns != IMMUTABLE_CHECKED_NS
        ):
            await self._revalidate(node)

    async def _revalidate(self, node: Node) -> None:
        """Ask whether the remote still has this version.  One that does not answer changes
        nothing: what is cached stays readable, what is not fails when it is read."""
        assert node.object_id is not None
        assert node.validator is not None
        try:
            if await self._confirmed_by_listing(node):
                return
            answer = await self._objects.stat_soon(node.object_id.url)
        except RepeatLookup:
            raise
        except StageFSError as error:
            self._objects.errors.note(node.object_id.key, error)
            self._namespace.touch_checked(node.inode, time.time_ns())
            return
        if is_version(answer, node.validator) or node.checksum is not None:
            self._objects.confirmed(node)
            self._namespace.touch_checked(node.inode, time.time_ns())
            return
        self._namespace.supersede(
            node.inode, staged_from(answer, default_mode=self._settings.default_file_mode)
        )
        raise RepeatLookup(f"{node.object_id.url} has a newer version.")

    async def _confirmed_by_listing(self, node: Node) -> bool:
        """Whether the listing of the bound directory that has the node settled the question."""
        place = self._namespace.place(node.inode)
        if place is None:
            return False
        bound = self._bindings.shown_by(self._namespace.node(place[0]))
        if bound is None or not self._bindings.lists(bound):
            return False
        await self._bindings.confirmed(bound)
        if self._namespace.node(node.inode).successor:
            raise RepeatLookup(f"{self._path(node.inode)} has a newer version.")
        self._namespace.touch_checked(node.inode, self._namespace.node(bound.inode).listed_ns)
        return True

    async def read(self, handle: Handle, offset: int, size: int) -> memoryview | bytes:
        """At most ``size`` bytes; fewer only at the end.  See Objects.read for errors."""
        inode = Inode(handle & INODE_MASK)
        if inode >= DIRECTORY_INODE:
            text = self._open_texts.get(handle)
            if text is None:
                text = self._open_texts[handle] = self._virtual.text(inode)
            return text[offset : offset + size]
        opened = self._opened(handle, inode)
        if not isinstance(opened, RecordedOpen):
            return await self._read(opened, inode, offset, size)
        inner, tally = opened.inner, opened.tally
        cached = isinstance(inner, OpenLocal) or self._objects.cached(inner, offset, size)
        begun_ns = time.monotonic_ns()
        data = await self._read(inner, inode, offset, size)
        tally.served_bytes += len(data)
        if not cached:
            tally.fetched_bytes += len(data)
            tally.blocked_ns += time.monotonic_ns() - begun_ns
        return data

    async def _read(
        self, opened: OpenObject | OpenLocal, inode: Inode, offset: int, size: int
    ) -> memoryview | bytes:
        if isinstance(opened, OpenLocal):
            return await self._workspace.read(inode, offset, size)
        return await self._objects.read(opened, offset, size)

    def _opened(self, handle: Handle, inode: Inode) -> OpenObject | OpenLocal | RecordedOpen:
        opened = self.open_files.get(handle)
        if opened is None:
            node = self._namespace.node(inode)
            opened = self.open_files[handle] = (
                self._objects.open(node)
                if node.content is ContentKind.OBJECT
                else self._workspace.again(inode)
            )
        return opened

    def release(self, handle: Handle) -> None:
        opened = self.open_files.pop(handle, None)
        inode = Inode(handle & INODE_MASK)
        if isinstance(opened, RecordedOpen):
            self._recording.released(handle)
            opened = opened.inner
        if isinstance(opened, OpenObject):
            self._objects.release(opened)
        elif inode >= DIRECTORY_INODE:
            self._open_texts.pop(handle, None)
        else:
            self._workspace.release(handle, inode, known=opened is not None)

    def forgotten(self, inode: Inode) -> None:
        self._workspace.forgotten(inode)

    # Writing

    def open_new(
        self, node: Node, place: Place, flags: int, caller: Caller, *, is_new: bool
    ) -> Handle:
        """A handle on a file that was made there; ``is_new``: just now, so nobody has seen it."""
        handle = self._new_handle(node.inode)
        self.open_files[handle] = self._workspace.opened(
            node.inode, handle, writes=bool(flags & _WRITE_FLAGS), caller=caller
        )
        self._workspace.made(node.inode, place, is_new=is_new)
        return handle

    async def write(self, handle: Handle, offset: int, data: bytes) -> int:
        inode = Inode(handle & INODE_MASK)
        opened = self._opened(handle, inode)
        trusted = isinstance(opened, OpenLocal) and opened.trusted
        if isinstance(opened, OpenLocal) and opened.gives_way(len(data)):
            await COURTESY.wait_to_write()
        return await self._workspace.write(inode, offset, data, trusted=trusted)

    async def sync(self, handle: Handle, *, data_only: bool) -> None:
        await self._workspace.sync(Inode(handle & INODE_MASK), data_only=data_only)

    async def sync_names(self) -> None:
        await self._workspace.sync_names()

    def _path(self, inode: Inode) -> str:
        try:
            return self._namespace.path(inode)
        except NotFound:
            return f"inode {inode}"


def file_type(node: Node) -> int:
    """The S_IF* bits."""
    return _FILE_TYPES[node.kind]
