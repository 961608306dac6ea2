"""One change of the namespace: the rows it edits while its transaction is open.

An Edit lives inside ``Namespace`` transactions and in the import's; it reads through SQL
only, so it sees its own work, and collects what must be forgotten in memory once it is
committed.  Every change gets a sequence number and a row in ``changes``; new names get their
place in listings from it.
"""

import json
import sqlite3
from collections.abc import Sequence

import msgspec

from stagefs.errors import NameExists, NotADirectory, NotFound, ReadOnly
from stagefs.model import Inode
from stagefs.namespace import overlay
from stagefs.namespace.known import Known
from stagefs.namespace.node import (
    Node,
    NodeKind,
    StagedObject,
    decoded_name,
    encoded_name,
)
from stagefs.namespace.node_edit import NodeEdit
from stagefs.namespace.overlay import Entry
from stagefs.namespace.rows import (
    FOUND,
    KEPT,
    OURS,
    SHOWN,
)

PLACE_BITS = 24
# Numbers of operations kept: many times the requests that a kernel can have in flight.
OPERATIONS_KEPT = 20_000
_TRIM_EVERY = 1024

_PUT_NAME = (
    "INSERT INTO names (parent, name, inode, place, flags) VALUES (?, ?, ?, ?, ?) "
    "ON CONFLICT (parent, name) DO UPDATE SET inode = excluded.inode, place = excluded.place,"
    " flags = excluded.flags"
)


class Edit(NodeEdit):
    """``sequence``: the number of this change.  ``result``: the inode it is about."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        now_ns: int,
        *,
        known: Known | None = None,
        last_sequence: int | None = None,
    ) -> None:
        """``known`` and ``last_sequence``: what is remembered from before and still right."""
        super().__init__(connection, now_ns, Known(0) if known is None else known)
        if last_sequence is None:
            last_sequence = self.rows.one("SELECT max(sequence) FROM changes") or 0
        self.last_sequence = last_sequence
        self.sequence = last_sequence + 1
        self._places = self.sequence << PLACE_BITS
        self.result = Inode(0)
        self.arguments: dict[str, object] = {}
        self.names_changed: list[tuple[Inode, str]] = []
        self.emptied: set[Inode] = set()
        self.kept: set[Inode] = set()
        # Whether something is due to a remote now; whether a file may have lost its last name,
        # and whether a directory did or has moved.
        self.outgoing = False
        self.unlinked = False
        self.directories_moved = False
        self._shown: list[tuple[Inode, str, Inode]] = []

    def log(self, result: Inode, **arguments: object) -> None:
        """What this change was, enough to do it again: inodes, names and values."""
        self.result = result
        self.arguments = arguments

    def write_log(self, kind: str, operation: int | None) -> None:
        arguments = {"inode": self.result, **self.arguments}
        if self._shown:
            arguments["shown"] = self._shown
        self.run(
            "INSERT INTO changes (sequence, kind, time_ns, arguments) VALUES (?, ?, ?, ?)",
            (self.sequence, kind, self.now_ns, _json(arguments)),
        )
        self.last_sequence = self.sequence
        if operation is None:
            return
        self.run("INSERT INTO operations VALUES (?, ?, ?)", (operation, self.result, self.sequence))
        if operation % _TRIM_EVERY == 0 or self.sequence % _TRIM_EVERY == 0:
            self.run(
                "DELETE FROM operations WHERE operation < (SELECT operation FROM operations"
                " ORDER BY operation DESC LIMIT 1 OFFSET ?)",
                (OPERATIONS_KEPT,),
            )

    # Finding what is to be changed

    def directory(self, inode: Inode) -> Node:
        """A directory whose names may be changed.  Raises NotFound, NotADirectory, ReadOnly."""
        node = self.node(inode)
        if node.kind is not NodeKind.DIRECTORY:
            raise NotADirectory(f"{self.rows.path(inode)} is not a directory.")
        if node.nlink == 0:
            raise NotFound(f"The directory with inode {inode} was removed.")
        if node.frozen:
            raise ReadOnly(
                f"{self.rows.path(inode)} is a template that sandboxes were made from and cannot "
                "change: make another template."
            )
        return node

    def entry(self, directory: Node, name: bytes) -> Entry | None:
        """The visible entry; a directory is never another place's (see ``show``)."""
        if directory.lower:
            self._clear_stale(directory, name)
        entry = overlay.find(self.rows, directory, name)
        if entry is None or not overlay.needs_node(entry):
            return entry
        return self.show(directory, name)

    def existing(self, directory: Node, name: bytes) -> Entry:
        entry = self.entry(directory, name)
        if entry is None:
            raise NotFound(
                f"There is no {decoded_name(name)!r} in {self.rows.path(directory.inode)}."
            )
        return entry

    def free_name(self, directory: Node, name: str) -> bytes:
        """The encoded name, if nothing has it.  Raises NameExists, InvalidName, NameTooLong."""
        encoded = encoded_name(name)
        if self.entry(directory, encoded) is not None:
            raise NameExists(
                f"{name!r} exists already in {self.rows.path(directory.inode)}: "
                "remove it first or take another name."
            )
        return encoded

    def show(self, directory: Node, name: bytes) -> Entry | None:
        """Give a subdirectory of the lower directory its node here; None when it would loop."""
        entry = overlay.find(self.rows, directory, name)
        if entry is None or not overlay.needs_node(entry):
            return entry
        below = self.node(directory.lower)
        if below.lower:
            entry = self.show(below, name)
            if entry is None:
                return None
        lower = entry.node
        counted = directory.counted and lower.frozen
        # What a sandbox shows of its template is finite: the template cannot change.
        if not counted and overlay.loops(self.rows, directory.inode, lower.inode):
            return None
        self._clear_stale(directory, name)
        inode = self.new_overlay(lower, counted=counted)
        self.put_name(directory.inode, name, inode, place=entry.place, flags=SHOWN)
        self._shown.append((directory.inode, decoded_name(name), inode))
        return Entry(self.node(inode), entry.place, own=True, counted=False, flags=SHOWN)

    def show_all(
        self, directory: Node, found: Sequence[tuple[int, bytes, Entry]]
    ) -> list[tuple[int, bytes, Entry]]:
        """A page of an overlay directory, with a node for each subdirectory."""
        shown = []
        for place, name, entry in found:
            kept = self.show(directory, name) if overlay.needs_node(entry) else entry
            if kept is not None:
                shown.append((place, name, kept))
        return shown

    def _clear_stale(self, directory: Node, name: bytes) -> None:
        """Forget a SHOWN directory whose lower one is gone or another one now.  Nothing below it
        is this place's own, so nothing is lost."""
        own = self.rows.own(directory.inode, name)
        if own is None or own.node is None or own.flags & (SHOWN | KEPT) != SHOWN:
            return
        entry = overlay.find(self.rows, directory, name)
        if entry is None or not entry.own:
            self.drop_name(directory.inode, name)
            self.end_directory(own.node.inode)

    # Names

    def next_place(self) -> int:
        self._places += 1
        assert self._places >> PLACE_BITS == self.sequence, "too many names in one change"
        return self._places

    def add_files(
        self, directory: Inode, files: Sequence[tuple[bytes, StagedObject]], flags: int
    ) -> None:
        """Many new files under names that have no row."""
        inodes = self.insert_files([staged for _name, staged in files])
        self.run_many(
            "INSERT INTO names (parent, name, inode, place, flags) VALUES (?, ?, ?, ?, ?)",
            [
                (directory, name, inode, self.next_place(), flags)
                for inode, (name, _staged) in zip(inodes, files, strict=True)
            ],
        )

    def put_name(self, parent: Inode, name: bytes, inode: int, *, place: int, flags: int) -> None:
        self.run(_PUT_NAME, (parent, name, inode, place, flags))
        self.names_changed.append((parent, decoded_name(name)))

    def drop_name(self, parent: Inode, name: bytes) -> None:
        self.run("DELETE FROM names WHERE parent = ? AND name = ?", (parent, name))
        self.names_changed.append((parent, decoded_name(name)))

    def attach(
        self,
        directory: Node,
        name: bytes,
        node: Node,
        *,
        place: int | None = None,
        is_counted: bool = False,
    ) -> None:
        """Give a node a name that nothing visible has.  Counts the link, if it is not already."""
        self.keep(directory.inode)
        place = self.next_place() if place is None else place
        flags = self._hidden_flags(directory, name)
        self.put_name(directory.inode, name, node.inode, place=place, flags=flags)
        is_directory = node.kind is NodeKind.DIRECTORY
        if not is_directory and not is_counted:
            self.add_links(node.inode, 1)
        self._changed(directory, subdirectories=1 if is_directory else 0)

    def attach_new(self, directory: Node, name: bytes, inode: Inode, kind: NodeKind) -> None:
        """As ``attach`` for a node just made, which counts this link already."""
        self.keep(directory.inode)
        flags = self._hidden_flags(directory, name)
        self.put_name(directory.inode, name, inode, place=self.next_place(), flags=flags)
        self._changed(directory, subdirectories=1 if kind is NodeKind.DIRECTORY else 0)

    def _hidden_flags(self, directory: Node, name: bytes) -> int:
        """A name of our own at a bound directory, in place of one the remote has."""
        if directory.bind_url is None or self.rows.own(directory.inode, name) is None:
            return 0
        return FOUND | KEPT | OURS

    def detach(self, directory: Node, name: bytes, entry: Entry, *, moves: bool = False) -> None:
        """Take a name away from this place.  Uncounts the link of a file, unless it moves to
        another name; a directory's node is left to the caller."""
        self.keep(directory.inode)
        self._hide(directory, name, entry)
        is_directory = entry.node.kind is NodeKind.DIRECTORY
        if not is_directory and not moves:
            self._unlink(entry)
        self._changed(directory, subdirectories=-1 if is_directory else 0)

    def _unlink(self, entry: Entry) -> None:
        if entry.own or entry.counted:
            self.add_links(entry.node.inode, -1)
            if entry.node.nlink <= 1 and entry.node.kind is NodeKind.FILE:
                self.unlinked = True

    def _hide(self, directory: Node, name: bytes, entry: Entry) -> None:
        """Remove the row, or leave one that hides what the lower directory or the remote has.
        What was uploaded of a directory made here, the remote has."""
        uploaded = directory.writable and entry.node.kind is NodeKind.DIRECTORY
        if entry.own and not entry.flags & (SHOWN | FOUND) and not uploaded:
            self.drop_name(directory.inode, name)
            if not directory.lower or overlay.find(self.rows, directory, name) is None:
                return
        self.put_name(directory.inode, name, 0, place=entry.place, flags=0)

    def repoint(
        self, directory: Node, name: bytes, entry: Entry, node: Node, flags: int, *, touch: bool
    ) -> None:
        """The name leads to another node from now on, at the same place in listings."""
        if entry.node.kind is not NodeKind.DIRECTORY:
            self._unlink(entry)
        self.put_name(directory.inode, name, node.inode, place=entry.place, flags=flags)
        if node.kind is not NodeKind.DIRECTORY:
            self.add_links(node.inode, 1)
        if touch:
            before = entry.node.kind is NodeKind.DIRECTORY
            after = node.kind is NodeKind.DIRECTORY
            self._changed(directory, subdirectories=after - before)

    def repoint_new(
        self, directory: Node, name: bytes, entry: Entry, inode: Inode, flags: int
    ) -> None:
        """As ``repoint`` from a file to one just made, which counts this link already."""
        self._unlink(entry)
        self.put_name(directory.inode, name, inode, place=entry.place, flags=flags)

    def end_directory(self, inode: Inode) -> None:
        """A directory lost its name.  The rows in it are left to ``removal.purge``."""
        self.set_nlink(inode, 0)
        self.directories_moved = True
        self.run("DELETE FROM sandboxes WHERE inode = ?", (inode,))
        self.run("DELETE FROM opened WHERE sandbox = ?", (inode,))
        if self.rows.has_names(inode) or self.rows.lower(inode):
            self.run("INSERT OR IGNORE INTO doomed VALUES (?)", (inode,))

    def _changed(self, directory: Node, *, subdirectories: int) -> None:
        if subdirectories:
            self.add_subdirectories(directory, subdirectories)
        self.touch(directory.inode)

    def keep(self, directory: Inode) -> None:
        """Something of this place's own happens in ``directory``: mark the names that lead there.

        The names above a kept one, or above one that was made here, are marked already.  What
        is kept stays so, which makes it worth remembering.
        """
        while directory not in self.known.kept and directory not in self.kept:
            self.kept.add(directory)
            above = self.rows.name_of(directory)
            if above is None or not above[3] & (SHOWN | FOUND) or above[3] & KEPT:
                return
            parent, name, _place, flags = above
            self.run(
                "UPDATE names SET flags = ? WHERE parent = ? AND name = ?",
                (flags | KEPT, parent, name),
            )
            directory = parent


def _json(arguments: dict[str, object]) -> str:
    try:
        return msgspec.json.encode(arguments).decode()
    except UnicodeEncodeError:
        # A name that is not UTF-8.
        return json.dumps(arguments, separators=(",", ":"))
