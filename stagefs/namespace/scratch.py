"""A checked catalog on its way into the namespace: a temporary SQLite file.

Entries are appended in the order of the catalog and read back in the order of directories,
so that a catalog in any order is inserted sequentially, and neither pass holds it in memory.
Directories are numbered, parents before children; number 0 is the catalog's top.
"""

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from stagefs.namespace.catalog import CatalogEntry

_BATCH_ROWS = 2000
_INSERT = "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?)"
_SORTED = (
    "SELECT directory, name, line, url, size_bytes, mtime_ns, checksum FROM entries"
    " ORDER BY directory, name, line"
)


class Row(msgspec.Struct, frozen=True, gc=False):
    directory: int
    name: bytes
    line: int
    url: str
    size_bytes: int
    mtime_ns: int
    checksum: str | None


class Directory(msgspec.Struct, gc=False):
    """``parent`` is a number, -1 for the top.  ``line`` is the first that names it."""

    parent: int
    name: bytes
    line: int


class Scratch:
    """``directory`` is where the file lies, without a name, so that nothing is left of it."""

    def __init__(self, directory: Path) -> None:
        fd, path = tempfile.mkstemp(dir=directory, prefix="import-")
        os.close(fd)
        self._connection = sqlite3.connect(path, isolation_level=None)
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -32768"):
            self._connection.execute(f"PRAGMA {pragma}")
        self._connection.execute(
            "CREATE TABLE entries (directory INTEGER, name BLOB, line INTEGER, url TEXT,"
            " size_bytes INTEGER, mtime_ns INTEGER, checksum TEXT)"
        )
        Path(path).unlink()
        self._connection.execute("BEGIN")
        self._batch: list[tuple[int, bytes, int, str, int, int, str | None]] = []
        self._numbers: dict[str, int] = {"": 0}
        self.directories = [Directory(-1, b"", 0)]
        self.entries = 0

    def add(self, entry: CatalogEntry) -> None:
        number = self._numbers.get(entry.directory)
        if number is None:
            number = self._number(entry.directory, entry.line)
        self._batch.append(
            (
                number,
                entry.name,
                entry.line,
                entry.url,
                entry.size_bytes,
                entry.mtime_ns,
                entry.checksum,
            )
        )
        self.entries += 1
        if len(self._batch) >= _BATCH_ROWS:
            self._flush()

    def finish(self) -> None:
        self._flush()
        self._connection.execute("COMMIT")
        self._numbers.clear()

    def rows(self) -> Iterator[Row]:
        """By directory, then name, then line."""
        cursor = self._connection.execute(_SORTED)
        while batch := cursor.fetchmany(_BATCH_ROWS):
            for row in batch:
                yield Row(*row)

    def close(self) -> None:
        self._connection.close()

    def _flush(self) -> None:
        self._connection.executemany(_INSERT, self._batch)
        self._batch.clear()

    def _number(self, path: str, line: int) -> int:
        """Numbers every directory of a path that is new."""
        parent, at = 0, 0
        while at >= 0:
            at = path.find("/", at + 1)
            part = path if at < 0 else path[:at]
            number = self._numbers.get(part)
            if number is None:
                number = self._numbers[part] = len(self.directories)
                name = part.rpartition("/")[2].encode("utf-8", "surrogateescape")
                self.directories.append(Directory(parent, name, line))
            parent = number
        return parent
