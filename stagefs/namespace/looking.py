"""Looking at the namespace, and the transactions that change it.

Nodes and names that were asked for are remembered in memory, ``known_max`` at most, and
forgotten when they change.  ``store`` has what is said for both.
"""

import itertools
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self, TypeVar

from stagefs.errors import NoSpace, NotADirectory, NotFound
from stagefs.model import ROOT_INODE, Inode
from stagefs.namespace import contents, overlay, recorded, versions
from stagefs.namespace.database import (
    Turn,
    checkpoint,
    open_database,
    sync,
    transaction,
    translated,
)
from stagefs.namespace.edit import Edit
from stagefs.namespace.known import KNOWN_MAX, Known
from stagefs.namespace.node import (
    TEMPLATES_INODE,
    CommitRow,
    Node,
    NodeKind,
    Opened,
    SandboxRow,
    Statistics,
    decoded_name,
    encoded_name,
)
from stagefs.namespace.reserve import Reserve
from stagefs.namespace.rows import Rows

_T = TypeVar("_T")


class Looking:
    """The open file: what is there, and ``_change`` for what ``Namespace`` does to it."""

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
        self._reserve = Reserve(path)
        self._reserve.keep()
        self._clock_ns = clock_ns
        self._known = Known(known_max)
        # Rises with every change that this process knows of.
        self.edits = 0
        # Rises when there may be more in ``unlinked_content`` than before.
        self.unlinked_edits = 0
        # Rises when there may be more in ``due_uploads`` than before.
        self.outgoing_edits = 0
        # Whether some sandbox notes what it opens.
        self.recording = recorded.any_recording(self._rows)
        self._data_version = self._rows.one("PRAGMA data_version")
        # Of the change log; None when another process may have written it.
        self._last_sequence: int | None = None

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        known_max: int = KNOWN_MAX,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> Self:
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
        moved = checkpoint(self._path)
        self._reserve.keep()
        return moved

    def sync(self) -> None:
        """Every change until now survives a power loss.  Blocks: for a worker thread."""
        sync(self._path)

    def refresh(self) -> None:
        self.edits += 1
        self.unlinked_edits += 1
        self.outgoing_edits += 1
        self._last_sequence = None
        self._known.clear()

    # Looking

    def lookup(self, parent: Inode, name: str) -> Node:
        """Raises NotFound, NotADirectory."""
        node = self.find(parent, name)
        if node is None:
            raise NotFound(f"There is no {name!r} in {self.path(parent)}.")
        return node

    def find(self, parent: Inode, name: str) -> Node | None:
        """As ``lookup``; None when there is no such name."""
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

    def upcoming(self, directory: Inode, after: int, limit: int) -> list[tuple[int, str, Node]]:
        """As ``page``, for names that will be used soon: their nodes are remembered."""
        found = self.page(directory, after, limit)
        for _cookie, _name, node in found:
            self._known.add_node(node)
        return found

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

    def is_removed(self, directory: Inode) -> bool:
        """Whether it was removed, by itself or in a tree, and ``purge`` did not come by yet."""
        with self._reading():
            *_, top = self._rows.ancestors(directory)
        return top not in (ROOT_INODE, TEMPLATES_INODE)

    def shown(self, inode: Inode, limit: int) -> list[tuple[Inode, str]]:
        """(directory, name) wherever the inode is seen: its names, and the same in directories that
        show theirs; at most ``limit``, and none of an inode with more names than that."""
        with self._reading():
            names = self._rows.names_of(inode)
            found = (
                (directory, decoded_name(name))
                for parent, name in (names if len(names) <= limit else [])
                for directory in (parent, *self._rows.overlays(parent))
            )
            return list(itertools.islice(found, limit))

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

    # Sandboxes

    def sandbox(self, inode: Inode) -> SandboxRow | None:
        """What is known of a directory that is a sandbox itself."""
        with self._reading():
            return self._rows.sandbox(inode)

    def sandboxes(self) -> list[SandboxRow]:
        """All, in the order of their inodes.  Those in a tree that was removed are among them until
        ``purge`` came by; they have no path."""
        with self._reading():
            return self._rows.sandboxes()

    def sandbox_of(self, directory: Inode) -> SandboxRow | None:
        """The sandbox that a directory is or lies in, the innermost one."""
        known = self._known.sandboxes
        if directory in known:
            return known[directory]
        with self._reading():
            return self._find_sandbox(directory)

    def commit_record(self, commit_id: str) -> CommitRow | None:
        with self._reading():
            return self._rows.commit(commit_id)

    def commits(self, sandbox: str | None = None) -> list[CommitRow]:
        """Of the sandbox that had this path then, or all; the oldest first."""
        with self._reading():
            return self._rows.commits(sandbox)

    # Content and attributes

    def private_files(self, inode: Inode) -> list[Inode]:
        """The private files that are ``inode`` or below it by names of its own."""
        with self._reading():
            return contents.private_files(self._rows, inode)

    def private_content(self) -> list[Inode]:
        """All private files that have a name."""
        with self._reading():
            return contents.private(self._rows)

    def unlinked_content(self, limit: int) -> list[Inode]:
        """Local files whose last name is gone and that no private copy was made of."""
        with self._reading():
            return contents.unlinked(self._rows, limit)

    def content_inodes(self) -> set[Inode]:
        """All local files: real files of others belong to nobody."""
        with self._reading():
            return set(self._rows.column("SELECT inode FROM nodes WHERE content > 0"))

    def xattr(self, inode: Inode, name: bytes) -> bytes:
        """Raises NoAttribute."""
        with self._reading():
            return contents.xattr(self._rows, inode, name)

    def xattrs(self, inode: Inode) -> list[bytes]:
        """The names of the extended attributes of a node."""
        if not self.node(inode).has_xattrs:
            return []
        with self._reading():
            return contents.xattrs(self._rows, inode)

    def opened(self, sandbox: Inode) -> list[Opened]:
        """What a recording sandbox opened, in the order of first use."""
        with self._reading():
            return recorded.of(self._rows, sandbox)

    def add_opened(self, seen: Sequence[tuple[Inode, Opened]]) -> None:
        """(sandbox, what it did since the last time) each."""
        with self._transaction() as edit:
            recorded.add(edit, seen)

    def statistics(self) -> Statistics:
        with self._reading():
            return self._rows.statistics()

    def last_inode(self) -> Inode:
        """The highest inode that was ever given to a node."""
        with self._reading():
            found = self._rows.one("SELECT seq FROM sqlite_sequence WHERE name = 'nodes'")
        return Inode(found or 0)

    # Inside

    def _directory(self, inode: Inode) -> Node:
        node = self.node(inode)
        if node.kind is not NodeKind.DIRECTORY:
            raise NotADirectory(f"{self.path(inode)} is not a directory.")
        return node

    def _find(self, parent: Inode, name: str) -> Node | None:
        directory = self._directory(parent)
        encoded = encoded_name(name)
        with self._reading():
            entry = overlay.find(self._rows, directory, encoded)
        if entry is not None and overlay.needs_node(entry):
            with self._change("show", None) as edit:
                entry = edit.show(directory, encoded)
                edit.log(parent if entry is None else entry.node.inode)
        if entry is None:
            return None
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

    def _find_sandbox(self, directory: Inode) -> SandboxRow | None:
        known = self._known.sandboxes
        found: SandboxRow | None = None
        walked: list[Inode] = []
        for inode in self._rows.ancestors(directory):
            if inode in known:
                found = known[inode]
                break
            walked.append(inode)
            found = self._rows.sandbox(inode)
            if found is not None:
                break
        self._known.add_sandbox(walked, found)
        return found

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

    def _making_room(self, change: Callable[[], _T]) -> _T:
        """Carry out what takes names away, on a full disk in the room that was kept for it."""
        try:
            return change()
        except NoSpace:
            if not self._reserve.give_up():
                raise
            return change()

    @contextmanager
    def _transaction(self) -> Iterator[Edit]:
        self._turn.take()
        try:
            with transaction(self._connection):
                version = self._rows.one("PRAGMA data_version")
                if version != self._data_version:
                    self._data_version = version
                    self.refresh()
                edit = Edit(
                    self._connection,
                    self._clock_ns(),
                    known=self._known,
                    last_sequence=self._last_sequence,
                )
                yield edit
            self._forget(edit)
        except sqlite3.Error as exc:
            raise translated(exc, self._path) from exc
        finally:
            self._turn.give()

    def _forget(self, edit: Edit) -> None:
        self.edits += 1
        self.unlinked_edits += edit.unlinked
        self.outgoing_edits += edit.outgoing
        known = self._known
        if edit.directories_moved:
            known.sandboxes.clear()
            self.recording = recorded.any_recording(self._rows)
        self._last_sequence = edit.last_sequence
        for inode in edit.nodes_changed:
            node = edit.nodes_now.get(inode)
            if node is None:
                known.nodes.pop(inode, None)
            else:
                known.add_node(node)
        known.add_kept(edit.kept)
        if edit.shown_anew:
            known.shown_anew()
        for emptied in edit.emptied:
            for directory in (emptied, *self._rows.overlays(emptied)):
                known.names.pop(directory, None)
        overlays: dict[Inode, list[Inode]] = {}
        for parent, name in edit.names_changed:
            if parent not in overlays:
                overlays[parent] = [parent, *known.overlays(parent, self._rows.overlays)]
            for directory in overlays[parent]:
                known.forget_name(directory, name)

    def _named(self, parent: Inode, name: str, inode: Inode) -> Node:
        node = self.node(inode)
        self._known.add_name(parent, name, inode)
        return node
