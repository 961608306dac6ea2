"""Vfs: every operation on the mounted tree, on plain values.

Concurrency: trio thread.  Only ``read`` may wait for a remote as long as its deadline allows;
lookup, open, readdir and symlink wait at most ``answer_deadline_s``, because a task in them
cannot be killed.  Names live in the namespace only, so nothing here needs to survive a
restart: a handle that an earlier daemon gave out encodes its inode and is opened again.

Handles: ``serial << 40 | inode``; the serial tells handles of this daemon apart, so that each
has its own read-ahead.
"""

import os
import stat
import time
from collections.abc import Callable

import msgspec

from stagefs.config import NamespaceSettings
from stagefs.errors import (
    Busy,
    CrossesMounts,
    IsADirectory,
    NotADirectory,
    NotFound,
    NotPermitted,
    ReadOnly,
    RepeatLookup,
    StageFSError,
)
from stagefs.model import ROOT_INODE, Handle, Inode
from stagefs.namespace.node import IMMUTABLE_CHECKED_NS, Node, NodeKind
from stagefs.namespace.store import Namespace
from stagefs.objects.content import OpenObject
from stagefs.objects.objects import Objects
from stagefs.objects.staged import staged_from
from stagefs.remote.url import SCHEMES
from stagefs.remote.versions import is_version
from stagefs.vfs.attributes import Attributes
from stagefs.vfs.bindings import Bindings
from stagefs.vfs.virtual import DIRECTORY_INODE, NAME, VirtualFiles

INODE_BITS = 40
INODE_MASK = (1 << INODE_BITS) - 1
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_TRUNC | os.O_APPEND

# Names do not change behind the kernel's back, except what a remote says of a bound directory:
# a new version is a new inode, and what the API changes is invalidated by name.
LONG_TIMEOUT_S = 3600.0

# Programs look for many names that are not there (PATH, imports).  What the API makes is
# invalidated by name, but an import makes too many names for that: it ends this much later.
ABSENCE_TIMEOUT_S = 1.0

# What a directory listing of the root shows after the namespace's own names.
_VIRTUAL_COOKIE = 1 << 61

_WORKSPACE = (
    "writing file content inside the mount is not supported yet; write elsewhere and stage the "
    "file in"
)


class FileSystemSize(msgspec.Struct, frozen=True):
    """For statfs: bytes and numbers of names."""

    capacity_bytes: int
    free_bytes: int
    files: int


class Vfs:
    def __init__(
        self,
        *,
        namespace: Namespace,
        objects: Objects,
        bindings: Bindings,
        attributes: Attributes,
        virtual: VirtualFiles,
        settings: NamespaceSettings,
        owner: tuple[int, int],
        public: Callable[[str], str],
    ) -> None:
        """``owner`` is the (uid, gid) that everything belongs to; ``public`` takes the secrets out
        of a URL and remembers them elsewhere."""
        self._public = public
        self._owner = owner
        self._namespace = namespace
        self._objects = objects
        self._bindings = bindings
        self._attributes = attributes
        self._virtual = virtual
        self._settings = settings
        self._revalidate_ns = int(settings.revalidate_s * 1e9)
        self._serial = 0
        self.open_objects: dict[int, OpenObject] = {}
        self._open_texts: dict[int, bytes] = {}

    # Names

    async def lookup(self, parent: Inode, name: str) -> Node:
        """Raises NotFound, NotADirectory; what the remote says for a directory never listed."""
        if parent == ROOT_INODE and name == NAME:
            return self._virtual.directory
        if parent >= DIRECTORY_INODE:
            return self._virtual.lookup(name)
        directory = self._namespace.node(parent)
        if directory.lower or directory.bind_url is not None:
            await self._show_binding(directory, name)
        node = self._namespace.lookup(parent, name)
        if node.successor:
            node = self._namespace.rebind_name(parent, name, node.successor)
        return node

    async def _show_binding(self, directory: Node, name: str | None) -> None:
        bound = self._bindings.shown_by(directory)
        if bound is None:
            return
        await self._bindings.listed(bound)
        if name is not None:
            await self._bindings.found(directory, bound, name)

    def node(self, inode: Inode) -> Node:
        if inode >= DIRECTORY_INODE:
            return self._virtual.node(inode)
        return self._namespace.node(inode)

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

    async def open(self, inode: Inode, flags: int) -> Handle:
        """A handle for reading.  Raises RepeatLookup when the name leads to a newer version."""
        node = self.node(inode)
        if node.kind is NodeKind.DIRECTORY:
            raise IsADirectory(f"{self._path(inode)} is a directory.")
        if flags & _WRITE_FLAGS:
            raise ReadOnly(f"{self._path(inode)} cannot be opened for writing: {_WORKSPACE}.")
        self._serial += 1
        handle = Handle((self._serial & 0x7FFFFF) << INODE_BITS | inode)
        if inode >= DIRECTORY_INODE:
            self._open_texts[handle] = self._virtual.text(inode)
            return handle
        if node.successor:
            raise RepeatLookup(f"{self._path(inode)} has a newer version.")
        if (
            node.validator is not None
            and time.time_ns() - node.checked_ns > self._revalidate_ns
            and node.checked_ns != IMMUTABLE_CHECKED_NS
        ):
            await self._revalidate(node)
        self.open_objects[handle] = self._objects.open(node)
        return handle

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
        opened = self.open_objects.get(handle)
        if opened is None:
            opened = self.open_objects[handle] = self._objects.open(self._namespace.node(inode))
        return await self._objects.read(opened, offset, size)

    def release(self, handle: Handle) -> None:
        opened = self.open_objects.pop(handle, None)
        if opened is not None:
            self._objects.release(opened)
        else:
            self._open_texts.pop(handle, None)

    # Changing names

    def make_directory(self, parent: Inode, name: str, mode: int, operation: int | None) -> Node:
        self._refuse_virtual(parent, name)
        return self._namespace.make_directory(parent, name, mode & 0o7777, operation=operation)

    async def symlink(
        self, parent: Inode, name: str, target: str, operation: int | None
    ) -> Node | None:
        """An ordinary symlink, or for a URL a virtual link; None says that it became the latter."""
        self._refuse_virtual(parent, name)
        scheme = _scheme(target)
        if scheme == "staging":
            path = target.removeprefix("staging://").strip("/")
            node = self._namespace.resolve(f"staging/{path}" if path else "staging")
            if node.kind is NodeKind.DIRECTORY:
                self._namespace.link_directory(node.inode, parent, name, operation=operation)
            else:
                self._namespace.link(node.inode, parent, name, operation=operation)
            return None
        if scheme is None:
            return self._namespace.make_symlink(parent, name, target, operation=operation)
        answer = await self._objects.stat_soon(self._public(target))
        staged = staged_from(answer, default_mode=self._settings.default_file_mode)
        known = self._namespace.find_object(staged.url, staged.version)
        if known is not None:
            self._namespace.link(known.inode, parent, name, operation=operation)
        else:
            self._namespace.register(parent, name, staged, operation=operation)
        return None

    def link(self, inode: Inode, parent: Inode, name: str, operation: int | None) -> Node:
        self._refuse_virtual(parent, name)
        if inode >= DIRECTORY_INODE:
            raise CrossesMounts(f"Files of {NAME} cannot be linked.")
        return self._namespace.link(inode, parent, name, operation=operation)

    def rename(
        self,
        parent: Inode,
        name: str,
        new_parent: Inode,
        new_name: str,
        flags: int,
        operation: int | None,
    ) -> None:
        self._refuse_virtual(parent, name)
        self._refuse_virtual(new_parent, new_name)
        self._refuse_fixed(parent, name)
        self._refuse_fixed(new_parent, new_name)
        self._namespace.rename(parent, name, new_parent, new_name, flags, operation=operation)

    def unlink(self, parent: Inode, name: str, operation: int | None) -> None:
        self._refuse_virtual(parent, name)
        self._namespace.remove(parent, name, operation=operation)

    def rmdir(self, parent: Inode, name: str, operation: int | None) -> None:
        self._refuse_virtual(parent, name)
        self._refuse_fixed(parent, name)
        self._namespace.remove_directory(parent, name, operation=operation)

    def set_attributes(
        self,
        inode: Inode,
        *,
        mode: int | None,
        mtime_ns: int | None,
        owner: tuple[int | None, int | None],
        size_bytes: int | None,
    ) -> Node:
        """Mode and mtime of directories.  Files are shared by all their links: those stay."""
        if inode >= DIRECTORY_INODE:
            raise NotPermitted(f"{NAME} cannot be changed.")
        node = self._namespace.node(inode)
        if node.kind is not NodeKind.DIRECTORY or size_bytes is not None:
            raise ReadOnly(f"{self._path(inode)} cannot be changed: {_WORKSPACE}.")
        if any(new is not None and new != now for new, now in zip(owner, self._owner, strict=True)):
            raise NotPermitted(f"{self._path(inode)} belongs to the user who mounted.")
        return self._namespace.set_attributes(
            inode, mode=None if mode is None else mode & 0o7777, mtime_ns=mtime_ns
        )

    def refuse_content(self, parent: Inode, name: str) -> ReadOnly:
        return ReadOnly(f"{self._path(parent)}/{name} cannot be created: {_WORKSPACE}.")

    def applied(self, operation: int) -> Node | None:
        """What an operation of an earlier daemon made or removed, if it took effect.

        What was removed may be forgotten already; then any node says that it took effect.
        """
        inode = self._namespace.applied(operation)
        if inode is None:
            return None
        try:
            return self._namespace.node(inode)
        except NotFound:
            return self._namespace.node(ROOT_INODE)

    def _refuse_virtual(self, parent: Inode, name: str) -> None:
        if parent >= DIRECTORY_INODE or (parent == ROOT_INODE and name == NAME):
            raise NotPermitted(f"{NAME} is made by StageFS and cannot be changed.")

    def _refuse_fixed(self, parent: Inode, name: str) -> None:
        if parent == ROOT_INODE and name in ("staging", "tasks"):
            raise Busy(f"{name}/ is part of every mount and stays where it is.")

    def _path(self, inode: Inode) -> str:
        try:
            return self._namespace.path(inode)
        except NotFound:
            return f"inode {inode}"

    # Extended attributes

    def xattr_names(self, inode: Inode) -> list[str]:
        return [] if inode >= DIRECTORY_INODE else self._attributes.names(self.node(inode))

    def xattr(self, inode: Inode, name: str) -> bytes:
        return self._attributes.get(self.node(inode), name)


def file_type(node: Node) -> int:
    """The S_IF* bits."""
    if node.kind is NodeKind.DIRECTORY:
        return stat.S_IFDIR
    return stat.S_IFLNK if node.kind is NodeKind.SYMLINK else stat.S_IFREG


def _scheme(target: str) -> str | None:
    """The scheme of a symlink's target when it is a URL that StageFS serves; else None."""
    scheme, separator, _rest = target.partition("://")
    return scheme.lower() if separator and scheme.lower() in SCHEMES else None
