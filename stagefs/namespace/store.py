"""Namespace: the persistent tree of names that the mount shows.

It holds every name but those of ``.stagefs/``: the root with ``staging/`` and ``tasks/``, made
with the file, and what users make.  It knows nothing of content, remotes or requests.

Concurrency: all methods but ``checkpoint`` run in one thread (the trio thread) and never wait
for anything but the disk and, for at most some milliseconds, an import that writes in a process
of its own.  Each change is one transaction and one row of the change log.  Nodes and names
that were asked for are remembered in memory, ``known_max`` at most, and forgotten when they
change; ``refresh`` forgets all, after another process changed the file.

``operation`` is the number of a request that the kernel may send again when a daemon dies: it
is stored in the transaction of the change itself, so ``applied`` knows.

Errors: what each change raises is what the system call of that name does; StateFailed and
NoSpace when the disk fails.  Names are ``str`` with surrogateescape; InvalidName and
NameTooLong for those that can be none.
"""

import itertools
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from stagefs.errors import NotADirectory, NotFound
from stagefs.model import ROOT_INODE, Inode, ListedEntry
from stagefs.namespace import bound, names, overlay, removal, templates, versions
from stagefs.namespace.database import (
    Turn,
    checkpoint,
    open_database,
    transaction,
    translated,
)
from stagefs.namespace.edit import Edit
from stagefs.namespace.known import KNOWN_MAX, Known
from stagefs.namespace.node import (
    Node,
    NodeKind,
    StagedObject,
    Statistics,
    decoded_name,
    encoded_name,
)
from stagefs.namespace.rows import Rows


class Namespace:
    def __init__(
        self,
        path: Path,
        connection: sqlite3.Connection,
        *,
        known_max: int,
        clock_ns: Callable[[], int],
    ) -> None:
        self._path = path
        self._connection = connection
        self._rows = Rows(connection)
        self._turn = Turn(path)
        self._clock_ns = clock_ns
        self._known = Known(known_max)
        # Rises with every change that this process knows of.
        self.edits = 0
        self._data_version = self._rows.one("PRAGMA data_version")

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        known_max: int = KNOWN_MAX,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> "Namespace":
        """Raises NewerFormat; UnsuitableState for a file that is damaged or not ours."""
        return cls(path, open_database(path), known_max=known_max, clock_ns=clock_ns)

    def close(self) -> None:
        try:
            self._connection.close()
        except sqlite3.Error as exc:
            raise translated(exc, self._path) from exc
        finally:
            self._turn.close()

    def checkpoint(self) -> bool:
        """Move the log into the file; see ``database.checkpoint``.  Blocks: for a worker thread."""
        return checkpoint(self._path)

    def refresh(self) -> None:
        self.edits += 1
        self._known.clear()

    # Looking

    def lookup(self, parent: Inode, name: str) -> Node:
        """Raises NotFound, NotADirectory."""
        names = self._known.names.get(parent)
        if names is not None:
            inode = names.get(name)
            if inode is not None:
                node = self._known.nodes.get(inode)
                if node is not None:
                    return node
        return self._find(parent, name)

    def node(self, inode: Inode) -> Node:
        """Raises NotFound.  An inode without names is there until ``drop_unlinked``."""
        node = self._known.nodes.get(inode)
        if node is None:
            with self._reading():
                node = self._rows.node(inode)
            if node is None:
                raise NotFound(f"There is no inode {inode} in the namespace.")
            self._known.add_node(node)
        return node

    def page(self, directory: Inode, after: int, limit: int) -> list[tuple[int, str, Node]]:
        """Up to ``limit`` (cookie, name, node) after the cookie ``after``, 0 for the start.

        Cookies are below 2**62, and stay what they are while names come and go: no old name
        is repeated or left out.  An empty page is the end.
        """
        node = self._directory(directory)
        with self._reading():
            if not node.lower:
                return self._rows.page(directory, after, limit)
            return self._overlay_page(node, after, limit)

    def parent(self, inode: Inode) -> Inode:
        """A directory that has the inode (a file may have several); the root's is the root."""
        if inode == ROOT_INODE:
            return ROOT_INODE
        place = self.place(inode)
        if place is None:
            raise NotFound(f"The inode {inode} has no name.")
        return place[0]

    def place(self, inode: Inode) -> tuple[Inode, int] | None:
        """(directory, cookie) of one name of the inode."""
        with self._reading():
            above = self._rows.name_of(inode)
        return None if above is None else (above[0], above[2])

    def overlays(self, directory: Inode) -> list[Inode]:
        """Directories that show this one: a name that changes here changes there."""
        with self._reading():
            return self._rows.overlays(directory)

    def path(self, inode: Inode) -> str:
        """One of the paths that lead to the inode, for messages: ``/staging/a/b``."""
        with self._reading():
            return self._rows.path(inode)

    def resolve(self, path: str) -> Node:
        """``a/b/c`` from the root; symbolic links are not followed.  Raises as ``lookup``."""
        node = self.node(ROOT_INODE)
        for part in path.split("/"):
            if part:
                node = self.lookup(node.inode, part)
        return node

    def find_object(self, url: str, version: str) -> Node | None:
        """A file that has a name and is this version of the object at the (public) URL."""
        with self._reading():
            return versions.find_object(self._rows, url, version)

    def newest(self, inode: Inode) -> Node:
        """The last of the successors of a node; itself when it has none."""
        with self._reading():
            return versions.newest(self._rows, self.node(inode))

    def applied(self, operation: int) -> Inode | None:
        """The inode that an operation made or changed, None when it never took effect."""
        with self._reading():
            found = self._rows.one("SELECT inode FROM operations WHERE operation = ?", operation)
        return None if found is None else Inode(found)

    def statistics(self) -> Statistics:
        with self._reading():
            return self._rows.statistics()

    # Changing names

    def make_directory(
        self, parent: Inode, name: str, mode: int = 0o755, *, operation: int | None = None
    ) -> Node:
        with self._change("make_directory", operation) as edit:
            inode = names.make_directory(edit, parent, name, mode)
        return self._named(parent, name, inode)

    def make_symlink(
        self, parent: Inode, name: str, target: str, *, operation: int | None = None
    ) -> Node:
        with self._change("make_symlink", operation) as edit:
            inode = names.make_symlink(edit, parent, name, target)
        return self._named(parent, name, inode)

    def link(self, inode: Inode, parent: Inode, name: str, *, operation: int | None = None) -> Node:
        """A further name of a file or symlink.  Raises NotPermitted for directories."""
        with self._change("link", operation) as edit:
            names.link(edit, inode, parent, name)
        return self._named(parent, name, inode)

    def link_directory(
        self, target: Inode, parent: Inode, name: str, *, operation: int | None = None
    ) -> Node:
        """A directory that shows ``target`` and keeps its own changes to itself."""
        with self._change("link_directory", operation) as edit:
            inode = names.link_directory(edit, target, parent, name)
        return self._named(parent, name, inode)

    def rename(
        self,
        parent: Inode,
        name: str,
        new_parent: Inode,
        new_name: str,
        flags: int = 0,
        *,
        operation: int | None = None,
    ) -> Node:
        """``flags``: RenameFlags.  A file or empty directory at the new name is replaced."""
        with self._change("rename", operation) as edit:
            inode = names.rename(edit, parent, name, new_parent, new_name, flags)
        return self.node(inode)

    def remove(self, parent: Inode, name: str, *, operation: int | None = None) -> Node:
        """Take away the name of a file or symlink; the node, whose ``nlink`` may be 0 now."""
        with self._change("remove", operation) as edit:
            inode = names.remove(edit, parent, name)
        return self.node(inode)

    def remove_directory(self, parent: Inode, name: str, *, operation: int | None = None) -> Node:
        with self._change("remove_directory", operation) as edit:
            inode = names.remove_directory(edit, parent, name)
        return self.node(inode)

    def remove_tree(self, parent: Inode, name: str, *, operation: int | None = None) -> Node:
        """Take away a name with all below it, at once; see ``purge`` for the rest of large ones.

        Raises Busy for a template of sandboxes that still exist.
        """
        with self._change("remove_tree", operation) as edit:
            inode = removal.remove_tree(edit, parent, name)
        return self.node(inode)

    def purge(self) -> bool:
        """One short step of removing what large trees left.  True when there is more."""
        with self._reading():
            if self._rows.one("SELECT 1 FROM doomed LIMIT 1") is None:
                return False
        with self._transaction() as edit:
            return removal.purge(edit)

    def drop_unlinked(
        self, inodes: Sequence[Inode] | None = None, *, limit: int = removal.PURGE_ROWS
    ) -> list[Inode]:
        """Forget nodes whose last name is gone, when the kernel has forgotten them.

        None: any, for when a mount begins.  The inodes that were dropped.
        """
        with self._transaction() as edit:
            return removal.drop_unlinked(edit, None if inodes is None else list(inodes), limit)

    def set_attributes(
        self,
        inode: Inode,
        *,
        mode: int | None = None,
        mtime_ns: int | None = None,
        operation: int | None = None,
    ) -> Node:
        with self._change("set_attributes", operation) as edit:
            names.set_attributes(edit, inode, mode, mtime_ns)
        return self.node(inode)

    def instantiate_template(
        self,
        template: Inode,
        parent: Inode,
        names: Sequence[str],
        *,
        operation: int | None = None,
    ) -> list[Node]:
        """A sandbox for each name, showing what is in the directory ``template``, which cannot
        change from now on.  Make templates in TEMPLATES_INODE, where no path leads."""
        with self._change("instantiate_template", operation) as edit:
            inodes = templates.instantiate(edit, template, parent, names)
        return [self.node(inode) for inode in inodes]

    # What names lead to

    def register(
        self, parent: Inode, name: str, staged: StagedObject, *, operation: int | None = None
    ) -> Node:
        with self._change("register", operation) as edit:
            inode = versions.register(edit, parent, name, staged)
        return self._named(parent, name, inode)

    def register_many(
        self,
        wanted: Sequence[tuple[Inode, str, StagedObject]],
        *,
        operation: int | None = None,
    ) -> list[Node]:
        """(directory, name, object) each; all of them or none."""
        with self._change("register_many", operation) as edit:
            inodes = versions.register_many(edit, wanted)
        return [self.node(inode) for inode in inodes]

    def replace(
        self, parent: Inode, name: str, staged: StagedObject, *, operation: int | None = None
    ) -> Node:
        """The name leads to a new node; other links of the old one keep it.  Raises NotFound."""
        with self._change("replace", operation) as edit:
            inode = versions.replace(edit, parent, name, staged)
        return self._named(parent, name, inode)

    def supersede(
        self, inode: Inode, staged: StagedObject, *, operation: int | None = None
    ) -> Node:
        """The remote has a newer version: names inside ``staging/`` lead to it at once, others
        find it as the old node's ``successor`` (see ``rebind_name``).  The new node."""
        with self._change("supersede", operation) as edit:
            new = versions.supersede(edit, inode, staged)
        return self.node(new)

    def rebind_name(
        self, parent: Inode, name: str, inode: Inode, *, operation: int | None = None
    ) -> Node:
        """One name moves to the newest version that follows ``inode``."""
        with self._change("rebind_name", operation) as edit:
            new = versions.rebind(edit, parent, name, inode)
        return self._named(parent, name, new)

    def set_validator(
        self,
        inode: Inode,
        validator: str,
        *,
        checked_ns: int,
        ranges: bool | None = None,
        operation: int | None = None,
    ) -> Node:
        """What the remote said at first contact."""
        with self._change("set_validator", operation) as edit:
            versions.set_validator(edit, inode, validator, checked_ns=checked_ns, ranges=ranges)
        return self.node(inode)

    def set_validators(self, told: Sequence[tuple[Inode, str]], *, checked_ns: int) -> None:
        """First contact with many small objects at once: (inode, validator) of each."""
        with self._change("set_validators", None) as edit:
            versions.set_validators(edit, told, checked_ns=checked_ns)

    # What only this node has learnt is not in the change log.

    def touch_checked(self, inode: Inode, checked_ns: int) -> Node:
        """The remote confirmed the version at that time; 0: it must be asked again."""
        with self._transaction() as edit:
            edit.run("UPDATE nodes SET checked_ns = ? WHERE inode = ?", (checked_ns, inode))
            edit.nodes_changed.add(inode)
        return self.node(inode)

    def set_ranges_refused(self, inode: Inode) -> None:
        """The server sends whole objects only."""
        with self._transaction() as edit:
            edit.run("UPDATE nodes SET flags = flags | 1 WHERE inode = ?", (inode,))
            edit.nodes_changed.add(inode)

    # Bound directories

    def bind(
        self,
        parent: Inode,
        name: str,
        url: str,
        ttl_s: float,
        *,
        mode: int = 0o755,
        operation: int | None = None,
    ) -> Node:
        with self._change("bind", operation) as edit:
            inode = bound.bind(edit, parent, name, url, ttl_s, mode)
        return self._named(parent, name, inode)

    def merge_listing(
        self,
        directory: Inode,
        entries: Sequence[ListedEntry],
        *,
        now_ns: int,
        default_mode: int = 0o644,
    ) -> list[str]:
        """The remote's listing as of ``now_ns``; the known names that lead elsewhere now.

        Raises NotFound, NotADirectory when the directory is gone or not bound.
        """
        with self._change("merge_listing", None) as edit:
            return bound.merge_listing(
                edit, directory, entries, now_ns=now_ns, default_mode=default_mode
            )

    def add_found(self, directory: Inode, name: str, found: StagedObject | str) -> Node:
        """A name that the remote turned out to have: a file, or the URL of a directory.

        What a user made under that name stays.  Raises NotFound when a user removed the name.
        """
        with self._change("add_found", None) as edit:
            inode = bound.add_found(edit, directory, name, found)
        return self.node(inode)

    # Inside

    def _directory(self, inode: Inode) -> Node:
        node = self.node(inode)
        if node.kind is not NodeKind.DIRECTORY:
            raise NotADirectory(f"{self.path(inode)} is not a directory.")
        return node

    def _find(self, parent: Inode, name: str) -> Node:
        directory = self._directory(parent)
        encoded = encoded_name(name)
        with self._reading():
            entry = overlay.find(self._rows, directory, encoded)
        if entry is not None and overlay.needs_node(entry):
            with self._change("show", None) as edit:
                entry = edit.show(directory, encoded)
                edit.log(parent if entry is None else entry.node.inode)
        if entry is None:
            raise NotFound(f"There is no {name!r} in {self.path(parent)}.")
        self._known.add_node(entry.node)
        self._known.add_name(parent, name, entry.node.inode)
        return entry.node

    def _overlay_page(self, directory: Node, after: int, limit: int) -> list[tuple[int, str, Node]]:
        while True:
            found = list(itertools.islice(overlay.view(self._rows, directory, after), limit))
            if any(overlay.needs_node(entry) for _place, _name, entry in found):
                with self._change("show", None) as edit:
                    shown = edit.show_all(directory, found)
                    edit.log(directory.inode)
            else:
                shown = found
            # Left out were entries that would show a directory below itself.
            if shown or not found:
                return [(place, decoded_name(name), entry.node) for place, name, entry in shown]
            after = found[-1][0]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            raise translated(exc, self._path) from exc

    @contextmanager
    def _change(self, kind: str, operation: int | None) -> Iterator[Edit]:
        with self._transaction() as edit:
            yield edit
            edit.write_log(kind, operation)

    @contextmanager
    def _transaction(self) -> Iterator[Edit]:
        self._turn.take()
        try:
            with transaction(self._connection):
                version = self._rows.one("PRAGMA data_version")
                if version != self._data_version:
                    self._data_version = version
                    self.refresh()
                edit = Edit(self._connection, self._clock_ns())
                yield edit
            self._forget(edit)
        except sqlite3.Error as exc:
            raise translated(exc, self._path) from exc
        finally:
            self._turn.give()

    def _forget(self, edit: Edit) -> None:
        self.edits += 1
        known = self._known
        for inode in edit.nodes_changed:
            known.nodes.pop(inode, None)
        for emptied in edit.emptied:
            for directory in (emptied, *self._rows.overlays(emptied)):
                known.names.pop(directory, None)
        overlays: dict[Inode, list[Inode]] = {}
        for parent, name in edit.names_changed:
            if parent not in overlays:
                overlays[parent] = [parent, *self._rows.overlays(parent)]
            for directory in overlays[parent]:
                known.forget_name(directory, name)

    def _named(self, parent: Inode, name: str, inode: Inode) -> Node:
        node = self.node(inode)
        self._known.add_name(parent, name, inode)
        return node
