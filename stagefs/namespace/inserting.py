"""The second half of an import: checked entries become nodes and names.

Writes beside a living daemon: each transaction takes at most about TURN_S, and before each
the import steps back for whoever waits (see ``database.Turn``).  The whole import is one
row of the change log, written with its first names.
"""

import itertools
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from stagefs.errors import InvalidCatalog, NotADirectory, ReadOnly, StageFSError
from stagefs.model import ROOT_INODE, Inode
from stagefs.namespace.catalog import declared_version
from stagefs.namespace.database import Turn, connect, move_log, open_database, transaction
from stagefs.namespace.edit import PLACE_BITS, Edit
from stagefs.namespace.node import Node, NodeKind, decoded_name, encoded_name
from stagefs.namespace.rows import FOUND, KEPT, Rows, fingerprint
from stagefs.namespace.scratch import Directory, Row, Scratch

TURN_S = 0.005
_ROWS_MIN, _ROWS_START, _ROWS_MAX = 50, 300, 5000
_CHECKPOINT_ROWS = 25_000

_INSERT_NODE = (
    "INSERT INTO nodes (inode, kind, mode, nlink, size_bytes, mtime_ns, ctime_ns, url, version,"
    " checksum, fingerprint) VALUES (?, 2, ?, 1, ?, ?, ?, ?, ?, ?, ?)"
)
_INSERT_NAME = "INSERT INTO names (parent, name, inode, place, flags) VALUES (?, ?, ?, ?, ?)"
_LAST_INODE = "SELECT seq FROM sqlite_sequence WHERE name = 'nodes'"
_NodeRow = tuple[int, int, int, int, int, str, str, str | None, int]
_NameRow = tuple[int, bytes, int, int, int]


class Stopped(StageFSError):
    """Somebody asked the import to end."""


class Result(msgspec.Struct):
    """Counts of entries, and of directories made."""

    imported: int = 0
    unchanged: int = 0
    replaced: int = 0
    directories: int = 0


class _Place(msgspec.Struct, gc=False):
    """A directory of the catalog in the namespace.  ``fresh``: made by this import."""

    inode: Inode
    fresh: bool = False
    touched: bool = False


class Inserter:
    def __init__(
        self, database: Path, scratch: Scratch, prefix: str, *, replace: bool, file_mode: int
    ) -> None:
        open_database(database).close()
        self._connection = connect(database)
        self._connection.execute("PRAGMA wal_autocheckpoint = 0")
        self._connection.execute("PRAGMA cache_size = -65536")
        self._turn = Turn(database)
        self._rows = Rows(self._connection)
        self._scratch = scratch
        self._replace = replace
        self._mode = file_mode & 0o777
        self._prefix = [part for part in prefix.split("/") if part]
        self._places: dict[int, _Place] = {}
        self._directories = self._with_prefix(scratch.directories)
        self._sequence = 0
        self._next_place = 0
        self.result = Result()

    def close(self) -> None:
        self._connection.close()
        self._turn.close()

    def _with_prefix(self, directories: list[Directory]) -> dict[int, Directory]:
        """The prefix's directories get numbers below 0, the catalog's top is the last of them."""
        numbered = dict(enumerate(directories))
        depth = len(self._prefix)
        self._places[-depth] = _Place(ROOT_INODE)
        for at, name in enumerate(self._prefix, start=1):
            numbered[at - depth] = Directory(at - depth - 1, encoded_name(name), 0)
        return numbered

    # Checking

    def check(self) -> None:
        """Raises InvalidCatalog, NotADirectory, ReadOnly.  Changes nothing."""
        below: set[tuple[int, bytes]] = set()
        for number in sorted(self._directories):
            if number != -len(self._prefix):
                self._check_directory(number)
                directory = self._directories[number]
                below.add((directory.parent, directory.name))
        last_directory, last_name, last_line = 0, b"", 0
        for row in self._scratch.rows():
            if row.name == last_name and row.directory == last_directory:
                raise InvalidCatalog(
                    f"Line {row.line} of the catalog names {self._shown(row)} again: "
                    f"line {last_line} did."
                )
            last_directory, last_name, last_line = row.directory, row.name, row.line
            if (row.directory, row.name) in below:
                raise InvalidCatalog(
                    f"Line {row.line} of the catalog: {self._shown(row)} is a directory "
                    "in other lines."
                )
            place = self._places.get(row.directory)
            if place is not None:
                self._check_existing(place.inode, row)

    def _check_directory(self, number: int) -> None:
        directory = self._directories[number]
        parent = self._places.get(directory.parent)
        if parent is None:
            return
        self._writable(parent.inode)
        own = self._rows.own(parent.inode, directory.name)
        if own is None or own.node is None:
            return
        if own.node.kind is not NodeKind.DIRECTORY:
            path = self._rows.path(own.node.inode)
            if number <= 0:
                raise NotADirectory(f"{path} is not a directory: import into another one.")
            raise InvalidCatalog(
                f"Line {directory.line} of the catalog: {path} exists and is not a directory."
            )
        self._places[number] = _Place(own.node.inode)

    def _writable(self, inode: Inode) -> Node:
        node = self._rows.node(inode)
        if node is None or node.nlink == 0:
            raise NotADirectory(f"The directory with inode {inode} was removed meanwhile.")
        if node.lower or node.frozen:
            raise ReadOnly(
                f"{self._rows.path(inode)} shows another directory, or is shown by sandboxes: "
                "import into an ordinary directory."
            )
        return node

    def _check_existing(self, directory: Inode, row: Row) -> None:
        own = self._rows.own(directory, row.name)
        if own is None or own.node is None or _is_same(own.node, row):
            return
        if own.node.kind is NodeKind.DIRECTORY:
            raise InvalidCatalog(
                f"Line {row.line} of the catalog: {self._shown(row)} exists and is a directory."
            )
        if not self._replace:
            raise InvalidCatalog(
                f"Line {row.line} of the catalog: {self._shown(row)} exists and is another object: "
                "use --replace to give it this version."
            )

    def _shown(self, row: Row) -> str:
        parts = [decoded_name(row.name)]
        number = row.directory
        while number > 0:
            directory = self._directories[number]
            parts.append(decoded_name(directory.name))
            number = directory.parent
        return repr("/".join(reversed(parts)))

    # Inserting

    def insert(self) -> Iterator[int]:
        """After each transaction: how many entries are done."""
        rows = self._scratch.rows()
        at_once = _ROWS_START
        done = since_checkpoint = 0
        while batch := list(itertools.islice(rows, at_once)):
            started_s = time.monotonic()
            self._insert(batch)
            took_s = time.monotonic() - started_s
            at_once = max(_ROWS_MIN, min(_ROWS_MAX, int(len(batch) * min(2.0, TURN_S / took_s))))
            done += len(batch)
            since_checkpoint += len(batch)
            yield done
            if since_checkpoint >= _CHECKPOINT_ROWS:
                since_checkpoint = 0
                move_log(self._connection)
        if self._sequence == 0:
            self._insert([])
        move_log(self._connection)

    def _insert(self, batch: list[Row]) -> None:
        self._turn.step_back()
        try:
            with transaction(self._connection):
                edit = Edit(self._connection, time.time_ns())
                if self._next_place >> PLACE_BITS != self._sequence or not self._sequence:
                    self._log(edit)
                if not batch:
                    self._place(edit, 0)
                self._insert_rows(edit, batch)
        except sqlite3.IntegrityError as exc:
            raise InvalidCatalog(
                "A name of the catalog was made by somebody else during the import: run it again."
            ) from exc

    def _log(self, edit: Edit) -> None:
        self._sequence = edit.sequence
        self._next_place = edit.sequence << PLACE_BITS
        edit.log(
            ROOT_INODE,
            prefix="/".join(self._prefix),
            entries=self._scratch.entries,
            replace=self._replace,
        )
        edit.write_log("import", None)

    def _insert_rows(self, edit: Edit, batch: list[Row]) -> None:
        now_ns = edit.now_ns
        inode = 1 + (edit.rows.one(_LAST_INODE) or 0)
        nodes: list[_NodeRow] = []
        names: list[_NameRow] = []
        number, place = -1, _Place(ROOT_INODE)
        for row in batch:
            if row.directory != number:
                # Making directories takes inode numbers too.
                self._write(edit, nodes, names)
                number, place = row.directory, self._place(edit, row.directory)
                inode = 1 + (edit.rows.one(_LAST_INODE) or 0)
            flags = 0
            if not place.fresh:
                self._touch(edit, place)
                own = edit.rows.own(place.inode, row.name)
                if own is not None and own.node is not None and _is_same(own.node, row):
                    self.result.unchanged += 1
                    continue
                if own is not None:
                    flags = self._make_way(edit, place.inode, row, own.node, own.flags)
            version = declared_version(row.size_bytes, row.mtime_ns, row.checksum)
            nodes.append(
                (
                    inode,
                    self._mode,
                    row.size_bytes,
                    row.mtime_ns,
                    now_ns,
                    row.url,
                    version,
                    row.checksum,
                    fingerprint(row.url, version),
                )
            )
            self._next_place += 1
            names.append((place.inode, row.name, inode, self._next_place, flags))
            inode += 1
        self._write(edit, nodes, names)

    def _write(self, edit: Edit, nodes: list[_NodeRow], names: list[_NameRow]) -> None:
        if nodes:
            edit.run_many(_INSERT_NODE, nodes)
            edit.run_many(_INSERT_NAME, names)
            self.result.imported += len(nodes)
            nodes.clear()
            names.clear()

    def _make_way(
        self, edit: Edit, directory: Inode, row: Row, node: Node | None, flags: int
    ) -> int:
        """Take away the row that an entry replaces; the flags of the new one."""
        if node is not None:
            if node.kind is NodeKind.DIRECTORY or not self._replace:
                raise InvalidCatalog(
                    f"Line {row.line} of the catalog: {self._shown(row)} was made by somebody else "
                    "during the import: run it again."
                )
            edit.add_links(node.inode, -1)
            self.result.replaced += 1
            self.result.imported -= 1
        edit.drop_name(directory, row.name)
        # What hid a remote's name, or came from the remote, has one below.
        return FOUND | KEPT if node is None or flags & FOUND else 0

    def _touch(self, edit: Edit, place: _Place) -> None:
        if not place.touched:
            self._writable(place.inode)
            edit.keep(place.inode)
            edit.touch(place.inode)
            place.touched = True

    def _place(self, edit: Edit, number: int) -> _Place:
        place = self._places.get(number)
        if place is not None:
            return place
        directory = self._directories[number]
        parent = self._place(edit, directory.parent)
        parent_node = self._writable(parent.inode)
        own = edit.rows.own(parent.inode, directory.name)
        if own is not None and own.node is not None and own.node.kind is NodeKind.DIRECTORY:
            place = _Place(own.node.inode)
        else:
            flags = 0
            if own is not None:
                flags = FOUND | KEPT
                edit.drop_name(parent.inode, directory.name)
            inode = edit.new_directory(0o755)
            self._next_place += 1
            edit.put_name(parent.inode, directory.name, inode, place=self._next_place, flags=flags)
            edit.add_subdirectories(parent_node, 1)
            if not parent.fresh:
                self._touch(edit, parent)
            place = _Place(inode, fresh=True)
            self.result.directories += 1
        self._places[number] = place
        return place


def _is_same(node: Node, row: Row) -> bool:
    version = declared_version(row.size_bytes, row.mtime_ns, row.checksum)
    found = node.object_id
    return found is not None and found.url == row.url and found.version == version
