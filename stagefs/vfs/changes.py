"""Changes: every operation on the mounted tree that changes names or attributes.

Decides who may own what, what is published by getting a name in ``staging/``, and what of a
shared file needs a copy first.  Reading and handles are ``vfs``'s.

``operation``: the number of a request that may be sent again (``namespace.store``).
Concurrency: trio thread.  symlink waits for a remote at most ``answer_deadline_s``.
"""

import logging
import os
import stat
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from stagefs.config import NamespaceSettings
from stagefs.errors import Busy, CrossesMounts, NoAttribute, NotFound, NotPermitted, NotSupported
from stagefs.model import ROOT_INODE, Inode
from stagefs.namespace.node import ContentKind, Node, NodeKind, RenameFlags
from stagefs.namespace.store import Namespace
from stagefs.objects.objects import Objects
from stagefs.objects.staged import staged_from
from stagefs.remote.url import SCHEMES
from stagefs.vfs.attributes import Attributes
from stagefs.vfs.copying import Copying
from stagefs.vfs.learning import Learning
from stagefs.vfs.new_links import NewLinks
from stagefs.vfs.sandbox_roots import SandboxRoots
from stagefs.vfs.virtual import DIRECTORY_INODE, NAME
from stagefs.vfs.workspace import Caller, Workspace

log = logging.getLogger(__name__)

_OURS = b"user.stagefs."
_ACCESS_LISTS = b"system.posix_acl"
_KINDS = {
    stat.S_IFIFO: NodeKind.FIFO,
    stat.S_IFSOCK: NodeKind.SOCKET,
    stat.S_IFCHR: NodeKind.CHARACTER_DEVICE,
    stat.S_IFBLK: NodeKind.BLOCK_DEVICE,
}


class Owner(NamedTuple):
    uid: int
    gid: int


class NewAttributes(msgspec.Struct, frozen=True):
    """What a task wants changed; None stays."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    size_bytes: int | None = None


class Changes:
    def __init__(
        self,
        *,
        namespace: Namespace,
        objects: Objects,
        attributes: Attributes,
        workspace: Workspace,
        copying: Copying,
        roots: SandboxRoots,
        learning: Learning,
        settings: NamespaceSettings,
        owner: Owner,
        public: Callable[[str], str],
    ) -> None:
        """``owner``: whom everything belongs to of which the namespace says nothing else;
        ``public`` takes the secrets out of a URL and remembers them elsewhere."""
        self._namespace = namespace
        self._objects = objects
        self._attributes = attributes
        self._workspace = workspace
        self._copying = copying
        self._roots = roots
        self._learning = learning
        self.new_links = NewLinks(namespace)
        self._pending = copying.pending
        self._settings = settings
        self._owner = owner
        self._public = public

    # Names

    def create(
        self, parent: Inode, name: str, mode: int, *, owner: Owner, operation: int | None
    ) -> Node:
        self._refuse_virtual(parent, name)
        uid, gid = self._owner_in(parent, owner)
        return self._namespace.create_file(
            parent, name, mode & 0o7777, uid=uid, gid=gid, operation=operation
        )

    def _owner_in(self, parent: Inode, owner: Owner) -> Owner:
        """Whom the namespace shall say that a new node in ``parent`` belongs to."""
        directory = self._namespace.node(parent)
        gid = owner.gid
        if directory.mode & stat.S_ISGID:
            gid = directory.gid if directory.gid >= 0 else self._owner.gid
        return self._kept_owner(owner.uid, gid)

    def _kept_owner(self, uid: int, gid: int) -> Owner:
        return Owner(
            -1 if uid == self._owner.uid else uid,
            -1 if gid == self._owner.gid else gid,
        )

    def make_directory(
        self, parent: Inode, name: str, mode: int, *, owner: Owner, operation: int | None
    ) -> Node:
        self._refuse_virtual(parent, name)
        uid, gid = self._owner_in(parent, owner)
        mode |= self._namespace.node(parent).mode & stat.S_ISGID
        return self._namespace.make_directory(
            *(parent, name, mode & 0o7777),
            uid=uid,
            gid=gid,
            sandbox=self._roots.row(parent, name),
            operation=operation,
        )

    def make_node(
        self,
        parent: Inode,
        name: str,
        mode: int,
        rdev: int,
        *,
        owner: Owner,
        operation: int | None,
    ) -> Node:
        """mknod(2)."""
        self._refuse_virtual(parent, name)
        uid, gid = self._owner_in(parent, owner)
        kind = _KINDS.get(stat.S_IFMT(mode))
        if kind is None:
            return self._namespace.create_file(
                parent, name, mode & 0o7777, uid=uid, gid=gid, operation=operation
            )
        return self._namespace.make_special(
            *(parent, name, kind, mode & 0o7777), rdev=rdev, uid=uid, gid=gid, operation=operation
        )

    async def symlink(
        self, parent: Inode, name: str, target: str, *, owner: Owner, operation: int | None
    ) -> Node | None:
        """An ordinary symlink, or for a URL a virtual link; None says that it became the latter.

        The daemon follows a URL with the rights and credentials of the mount's user, and a name
        in staging/ past the modes of the directories on the way: nobody else gets to use them.
        """
        self._refuse_virtual(parent, name)
        scheme = _scheme(target)
        if scheme is not None and owner.uid not in (0, self._owner.uid):
            log.warning("refused user %d a link by URL (%s)", owner.uid, scheme)
            raise NotPermitted(
                f"User {owner.uid} cannot link a URL in a mount of user {self._owner.uid}, whose"
                " credentials it would use: let him name it in staging/, and link that with ln."
            )
        if scheme == "staging":
            path = target.removeprefix("staging://").strip("/")
            node = self._namespace.resolve(f"staging/{path}" if path else "staging")
            if node.kind is NodeKind.DIRECTORY:
                shown = self._namespace.link_directory(
                    node.inode, parent, name, operation=operation
                )
                self.new_links.made(parent, shown)
            else:
                linked = self._namespace.link(node.inode, parent, name, operation=operation)
                self._linked(parent, linked)
            return None
        if scheme is None:
            uid, gid = self._owner_in(parent, owner)
            return self._namespace.make_symlink(
                parent, name, target, uid=uid, gid=gid, operation=operation
            )
        answer = await self._objects.stat_soon(self._public(target))
        staged = staged_from(answer, default_mode=self._settings.default_file_mode)
        known = self._namespace.find_object(staged.url, staged.version)
        if known is not None:
            node = self._namespace.link(known.inode, parent, name, operation=operation)
        else:
            node = self._namespace.register(parent, name, staged, operation=operation)
        self._linked(parent, node)
        return None

    def link(self, inode: Inode, parent: Inode, name: str, operation: int | None) -> Node:
        self._refuse_virtual(parent, name)
        if inode >= DIRECTORY_INODE:
            raise CrossesMounts(f"Files of {NAME} cannot be linked.")
        node = self._namespace.node(inode)
        publish = (
            node.content is ContentKind.PRIVATE
            and (self._workspace.in_staging(parent) or self._is_staged(inode))
            and self._workspace.publishing(node)
        )
        linked = self._namespace.link(inode, parent, name, publish=publish, operation=operation)
        self._linked(parent, linked)
        return linked

    def _linked(self, parent: Inode, node: Node) -> None:
        self._learning.link_made(parent, node)
        self.new_links.made(parent, node)

    def _is_staged(self, inode: Inode) -> bool:
        place = self._namespace.place(inode)
        return place is not None and self._workspace.in_staging(place[0])

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
        publish = self._publishes(parent, name, new_parent)
        if flags & RenameFlags.EXCHANGE and self._publishes(new_parent, new_name, parent):
            # What comes into ``staging/`` is named first.
            parent, name, new_parent, new_name = new_parent, new_name, parent, name
            publish = True
        moved = self._namespace.rename(
            parent, name, new_parent, new_name, flags, publish=publish, operation=operation
        )
        if parent != new_parent:
            self.new_links.made(new_parent, moved)
            if flags & RenameFlags.EXCHANGE:
                self.new_links.made(parent, self._namespace.lookup(parent, name))
        if moved.kind is NodeKind.DIRECTORY or flags & RenameFlags.EXCHANGE:
            self._workspace.directories_moved()
        self._workspace.names_went()

    def _publishes(self, parent: Inode, name: str, new_parent: Inode) -> bool:
        in_staging = self._workspace.in_staging
        if parent == new_parent or not in_staging(new_parent) or in_staging(parent):
            return False
        return self._workspace.publishing(self._namespace.lookup(parent, name))

    def unlink(self, parent: Inode, name: str, operation: int | None) -> None:
        self._refuse_virtual(parent, name)
        self._namespace.remove(parent, name, operation=operation)
        self._workspace.names_went()

    def rmdir(self, parent: Inode, name: str, operation: int | None) -> None:
        self._refuse_virtual(parent, name)
        self._refuse_fixed(parent, name)
        self._namespace.remove_directory(parent, name, operation=operation)

    async def set_attributes(self, inode: Inode, new: NewAttributes, caller: Caller) -> Node:
        """Of a shared file: only those of the caller's own copy change."""
        refusal = self._copying.refusal(inode, caller.thread)
        if self._pending:
            self._pending.drop(caller.thread)
        if inode >= DIRECTORY_INODE:
            raise NotPermitted(f"{NAME} cannot be changed.")
        node = self._namespace.node(inode)
        if node.kind is NodeKind.FILE and node.content is not ContentKind.PRIVATE:
            if self._is_so(self._workspace.local.live(node), new):
                return node
            raise refusal or self._copying.walk_again(node, caller.thread)
        uid, gid = self._kept_owner(
            node.uid if new.uid is None else new.uid, node.gid if new.gid is None else new.gid
        )
        return await self._workspace.set_attributes(
            node,
            mode=None if new.mode is None else new.mode & 0o7777,
            uid=None if new.uid is None else uid,
            gid=None if new.gid is None else gid,
            atime_ns=new.atime_ns,
            mtime_ns=new.mtime_ns,
            size_bytes=new.size_bytes,
            trusted=caller.root,
        )

    def _is_so(self, node: Node, new: NewAttributes) -> bool:
        """Whether nothing would change, so that no copy is needed."""
        owner = self._owner
        now = NewAttributes(
            mode=node.mode,
            uid=node.uid if node.uid >= 0 else owner.uid,
            gid=node.gid if node.gid >= 0 else owner.gid,
            atime_ns=node.atime_ns or node.mtime_ns,
            mtime_ns=node.mtime_ns,
            size_bytes=node.size_bytes,
        )
        wanted = msgspec.structs.asdict(new)
        if new.mode is not None:
            wanted["mode"] = new.mode & 0o7777
        return all(value is None or value == getattr(now, name) for name, value in wanted.items())

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

    # Extended attributes

    def xattr_names(self, inode: Inode) -> list[bytes]:
        if inode >= DIRECTORY_INODE:
            return []
        node = self._namespace.node(inode)
        own = self._namespace.xattrs(inode) if node.has_xattrs else []
        return own + [name.encode() for name in self._attributes.names(node)]

    def xattr(self, inode: Inode, name: bytes) -> bytes:
        if name.startswith(_ACCESS_LISTS):
            raise NotSupported("StageFS keeps no access control lists.")
        node = None if inode >= DIRECTORY_INODE else self._namespace.node(inode)
        if node is not None and name.startswith(_OURS):
            return self._attributes.get(node, os.fsdecode(name))
        if node is None or not node.has_xattrs:
            raise NoAttribute(f"There is no attribute {os.fsdecode(name)} here.")
        return self._namespace.xattr(inode, name)

    def has_xattr(self, inode: Inode, name: bytes) -> bool:
        try:
            self.xattr(inode, name)
        except (NoAttribute, NotSupported):
            return False
        return True

    def set_xattr(
        self, inode: Inode, name: bytes, value: bytes, thread: int, operation: int | None
    ) -> None:
        self._refuse_xattr(inode, name, thread)
        self._namespace.set_xattr(inode, name, value, operation=operation)

    def remove_xattr(self, inode: Inode, name: bytes, thread: int, operation: int | None) -> None:
        if name.startswith((_OURS, _ACCESS_LISTS)) or not self._namespace.node(inode).has_xattrs:
            self.xattr(inode, name)
        self._refuse_xattr(inode, name, thread)
        self._namespace.remove_xattr(inode, name, operation=operation)

    def _refuse_xattr(self, inode: Inode, name: bytes, thread: int) -> None:
        refusal = self._copying.refusal(inode, thread)
        if self._pending:
            self._pending.drop(thread)
        if inode >= DIRECTORY_INODE:
            raise NotPermitted(f"{NAME} cannot be changed.")
        if name.startswith(_OURS):
            raise NotPermitted(f"{os.fsdecode(name)} is what StageFS says and cannot be set.")
        if name.startswith(_ACCESS_LISTS):
            raise NotSupported("StageFS keeps no access control lists.")
        node = self._namespace.node(inode)
        if node.kind is NodeKind.FILE and node.content is not ContentKind.PRIVATE:
            raise refusal or self._copying.walk_again(node, thread)


def _scheme(target: str) -> str | None:
    """The scheme of a symlink's target when it is a URL that StageFS serves; else None."""
    scheme, separator, _rest = target.partition("://")
    return scheme.lower() if separator and scheme.lower() in SCHEMES else None
