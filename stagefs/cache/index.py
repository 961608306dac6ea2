"""The derived index: recency, sizes and places of all cache entries, in SQLite.

Never the truth: files and segments are.  It may be deleted at any time and is then rebuilt
from them (rebuild.py).  What it must not lose while it is there is a *row for every file*,
or a file would never be evicted: what it does not know yet is in the journal (journal.py).

Concurrency: one connection for writing, used under a lock by worker threads; one for
reading, which write-ahead logging never makes wait for a writer and which any thread uses
(SQLite lets one step in at a time).  synchronous=OFF: a kill -9 loses nothing, a power cut
may lose the index.
"""

import contextlib
import itertools
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from stagefs.cache.layout import open_file
from stagefs.errors import CacheFailed

INDEX_FORMAT = 1

# `segment` 0 is an object's own file.
_SCHEMA = """
CREATE TABLE entries (
    id INTEGER PRIMARY KEY,
    key BLOB NOT NULL UNIQUE,
    url BLOB NOT NULL,
    version BLOB NOT NULL,
    size_bytes INTEGER NOT NULL,
    disk_bytes INTEGER NOT NULL,
    cached_bytes INTEGER NOT NULL,
    segment INTEGER NOT NULL,
    offset INTEGER NOT NULL,
    used_at INTEGER NOT NULL
);
CREATE VIEW listed AS SELECT
    id, key, url, version, size_bytes, disk_bytes, cached_bytes, segment, offset, used_at
    FROM entries;
CREATE INDEX entries_by_use ON entries (used_at);
CREATE INDEX entries_by_segment ON entries (segment) WHERE segment > 0;
CREATE TABLE facts (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO facts VALUES ('entries', 0), ('disk_bytes', 0), ('cached_bytes', 0);
CREATE TRIGGER entries_insert AFTER INSERT ON entries BEGIN
    UPDATE facts SET value = value + 1 WHERE name = 'entries';
    UPDATE facts SET value = value + NEW.disk_bytes WHERE name = 'disk_bytes' AND NEW.segment = 0;
    UPDATE facts SET value = value + NEW.cached_bytes WHERE name = 'cached_bytes';
END;
CREATE TRIGGER entries_delete AFTER DELETE ON entries BEGIN
    UPDATE facts SET value = value - 1 WHERE name = 'entries';
    UPDATE facts SET value = value - OLD.disk_bytes WHERE name = 'disk_bytes' AND OLD.segment = 0;
    UPDATE facts SET value = value - OLD.cached_bytes WHERE name = 'cached_bytes';
END;
CREATE TRIGGER entries_update AFTER UPDATE OF disk_bytes, cached_bytes, segment ON entries BEGIN
    UPDATE facts SET value = value
        - CASE OLD.segment WHEN 0 THEN OLD.disk_bytes ELSE 0 END
        + CASE NEW.segment WHEN 0 THEN NEW.disk_bytes ELSE 0 END WHERE name = 'disk_bytes';
    UPDATE facts SET value = value - OLD.cached_bytes + NEW.cached_bytes
        WHERE name = 'cached_bytes';
END;
"""

_INSERT = """INSERT INTO entries (key, url, version, size_bytes, disk_bytes, cached_bytes, segment,
    offset, used_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"""
# All at once: each statement takes the interpreter away from the event loop for a moment.
_ROWS_AT_ONCE = 64
_KEYS_AT_ONCE = 512
_INSERT_MANY = _INSERT + ", (?, ?, ?, ?, ?, ?, ?, ?, ?)" * (_ROWS_AT_ONCE - 1)
_REPLACE = """ ON CONFLICT (key) DO UPDATE SET size_bytes = excluded.size_bytes,
    disk_bytes = excluded.disk_bytes, cached_bytes = excluded.cached_bytes,
    segment = excluded.segment, offset = excluded.offset,
    used_at = max(used_at, excluded.used_at)"""

_SET_FACT = "INSERT OR REPLACE INTO facts VALUES (?, ?)"


class IndexRow(NamedTuple):
    """``disk_bytes`` is st_blocks x 512 for an object's own file, the record's length for a
    packed one; ``used_at`` is milliseconds since 1970."""

    key: bytes
    url: bytes
    version: bytes
    size_bytes: int
    disk_bytes: int
    cached_bytes: int
    segment: int
    offset: int
    used_at: int


class Place(NamedTuple):
    segment: int
    offset: int
    record_bytes: int


def segment_end(last: Place) -> list[tuple[str, int]]:
    """The facts that say how far the segments have been indexed."""
    return [("segment", last.segment), ("segment_end", last.offset + last.record_bytes)]


class Totals(NamedTuple):
    """``disk_bytes`` counts objects' own files; segments are few and are asked themselves."""

    entries: int
    disk_bytes: int
    cached_bytes: int


class Index:
    """All methods raise CacheFailed when SQLite does; then nothing of that call was done."""

    def __init__(self, path: Path) -> None:
        """Open, or create where it is missing or cannot be used.  ``is_complete`` then tells
        whether every file has its row, or a rebuild must find them."""
        self._path = path
        self._lock = threading.Lock()
        self._retired: list[sqlite3.Connection] = []
        self.is_damaged = False
        with self._translated("opened"):
            try:
                self._writer = self._connect()
                self._check()
            except sqlite3.DatabaseError as exc:
                if _is_failing_disk(exc):
                    raise
                self._recreate()
            self._reader = self._connect()
        self.is_complete = self.fact("complete") == 1

    def _connect(self) -> sqlite3.Connection:
        # SQLite would create the file with the umask's mode; its companions copy the mode.
        try:
            os.close(open_file(self._path, os.O_RDWR | os.O_CREAT))
        except OSError as exc:
            raise CacheFailed(f"the cache's index {self._path} cannot be opened: {exc}") from exc
        connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = OFF")
            # The log counts as used space: a small cache must not be filled by it.
            connection.execute("PRAGMA wal_autocheckpoint = 256")
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _check(self) -> None:
        (written_format,) = self._writer.execute("PRAGMA user_version").fetchone()
        if written_format == 0:
            self._writer.executescript(
                f"BEGIN; {_SCHEMA} PRAGMA user_version = {INDEX_FORMAT}; COMMIT;"
            )
        elif written_format != INDEX_FORMAT:
            # Derived data of another release is not worth a migration.
            raise sqlite3.DatabaseError(f"format {written_format}")
        self._writer.execute("SELECT count(*) FROM facts").fetchone()

    def _recreate(self) -> None:
        if hasattr(self, "_writer"):
            self._writer.close()
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self._path}{suffix}").unlink(missing_ok=True)
        self._writer = self._connect()
        self._check()

    def recreate(self) -> None:
        """Start from nothing after damage was seen; a rebuild must follow.  Worker thread."""
        with self._lock, self._translated("recreated"):
            # The trio thread may be reading from it at this moment.
            self._retired.append(self._reader)
            self._recreate()
            self._reader = self._connect()
            self.is_complete = self.is_damaged = False

    @contextlib.contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as exc:
            if _is_damage(exc):
                self.is_damaged = True
            raise CacheFailed(f"the cache's index cannot be {what}: {exc}") from exc

    def close(self) -> None:
        with self._lock, self._translated("closed"):
            for connection in (*self._retired, self._reader, self._writer):
                connection.close()

    # The event loop's thread.

    def place_of(self, key: bytes) -> Place | None:
        """Where the packed record of ``key`` lies; None when there is none."""
        with self._translated("read"):
            row = self._reader.execute(
                "SELECT segment, offset, disk_bytes FROM entries WHERE key = ? AND segment > 0",
                (key,),
            ).fetchone()
        return None if row is None else Place(*row)

    def packed_of(self, keys: Sequence[bytes]) -> set[bytes]:
        """Which of these have a packed record."""
        found: set[bytes] = set()
        with self._translated("read"):
            for start in range(0, len(keys), _KEYS_AT_ONCE):
                some = keys[start : start + _KEYS_AT_ONCE]
                marks = ", ".join("?" * len(some))
                rows = self._reader.execute(
                    f"SELECT key FROM entries WHERE key IN ({marks}) AND segment > 0",  # noqa: S608
                    some,
                )
                found.update(key for (key,) in rows.fetchall())
        return found

    def oldest(self, limit: int, *, after: tuple[int, int]) -> list[tuple[int, IndexRow]]:
        """Up to ``limit`` (id, row) in order of last use, beginning after (used_at, id)."""
        with self._translated("read"):
            rows = self._reader.execute(
                "SELECT * FROM listed WHERE (used_at, id) > (?, ?) ORDER BY used_at, id LIMIT ?",
                (*after, limit),
            ).fetchall()
        return [(row[0], IndexRow(*row[1:])) for row in rows]

    def row(self, key: bytes) -> IndexRow | None:
        with self._translated("read"):
            found = self._reader.execute("SELECT * FROM listed WHERE key = ?", (key,)).fetchone()
        return None if found is None else IndexRow(*found[1:])

    # Worker threads.

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._translated("written"):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise
            self._writer.execute("COMMIT")

    def apply(
        self,
        *,
        rows: Sequence[IndexRow] = (),
        used: Iterable[tuple[bytes, int]] = (),
        removed: Iterable[bytes] = (),
        facts: Iterable[tuple[str, int]] = (),
    ) -> None:
        """One transaction: removed rows go, then rows come, then recency and facts are set."""
        with self._transaction() as connection:
            connection.executemany("DELETE FROM entries WHERE key = ?", [(key,) for key in removed])
            many = len(rows) - len(rows) % _ROWS_AT_ONCE
            for start in range(0, many, _ROWS_AT_ONCE):
                values = itertools.chain.from_iterable(rows[start : start + _ROWS_AT_ONCE])
                connection.execute(_INSERT_MANY + _REPLACE, tuple(values))
            connection.executemany(_INSERT + _REPLACE, rows[many:])
            connection.executemany(
                "UPDATE entries SET used_at = ? WHERE key = ?", [(at, key) for key, at in used]
            )
            connection.executemany(_SET_FACT, facts)

    def add_missing(self, rows: Sequence[IndexRow]) -> None:
        """Insert those rows of which there is none yet (for a rebuild)."""
        with self._transaction() as connection:
            connection.executemany(f"{_INSERT} ON CONFLICT DO NOTHING", rows)

    def finish_rebuild(self) -> None:
        self.apply(facts=[("complete", 1)])
        self.is_complete = True

    def remove_packed(self, records: Iterable[tuple[bytes, int, int]]) -> None:
        """Forget (key, segment, offset) unless the key has moved to another place since."""
        with self._transaction() as connection:
            connection.executemany(
                "DELETE FROM entries WHERE key = ? AND segment = ? AND offset = ?", records
            )

    def move_segment(self, number: int, moved: Sequence[tuple[bytes, int, Place]]) -> None:
        """The records of a segment go, but for those moved: (key, old offset, new place)."""
        with self._transaction() as connection:
            connection.executemany(
                "UPDATE entries SET segment = ?, offset = ?"
                " WHERE key = ? AND segment = ? AND offset = ?",
                [(new.segment, new.offset, key, number, old) for key, old, new in moved],
            )
            if moved:
                connection.executemany(_SET_FACT, segment_end(moved[-1][2]))
            connection.execute("DELETE FROM entries WHERE segment = ?", (number,))

    def rows_of_segment(self, number: int) -> list[IndexRow]:
        with self._lock, self._translated("read"):
            found = self._writer.execute(
                "SELECT * FROM listed WHERE segment = ?", (number,)
            ).fetchall()
        return [IndexRow(*row[1:]) for row in found]

    # Any thread.

    def rows(self, *, url: bytes | None = None) -> list[IndexRow]:
        """All entries (of ``url``), most recently used first."""
        with self._translated("read"):
            return _listed(self._reader, url)

    def page(self, *, after: bytes, limit: int) -> list[IndexRow]:
        """Up to ``limit`` rows in order of their keys, beginning behind ``after``."""
        with self._translated("read"):
            found = self._reader.execute(
                "SELECT * FROM listed WHERE key > ? ORDER BY key LIMIT ?", (after, limit)
            ).fetchall()
        return [IndexRow(*row[1:]) for row in found]

    def totals(self) -> Totals:
        return Totals(
            entries=self.fact("entries"),
            disk_bytes=self.fact("disk_bytes"),
            cached_bytes=self.fact("cached_bytes"),
        )

    def fact(self, name: str) -> int:
        with self._translated("read"):
            found = self._reader.execute(
                "SELECT value FROM facts WHERE name = ?", (name,)
            ).fetchone()
        return 0 if found is None else int(found[0])


def read_rows(path: Path, *, url: bytes | None = None) -> list[IndexRow] | None:
    """All rows, read without a daemon and without changing anything; None when the index is
    missing, incomplete, damaged or of another format: then the files have to be read."""
    try:
        with _read_only(path) as connection:
            return _listed(connection, url)
    except (sqlite3.Error, FileNotFoundError):
        return None


def has_whole_index(path: Path) -> bool:
    try:
        with _read_only(path):
            return True
    except (sqlite3.Error, FileNotFoundError):
        return False


@contextlib.contextmanager
def _read_only(path: Path) -> Iterator[sqlite3.Connection]:
    """Raises sqlite3.Error or FileNotFoundError unless the index is whole."""
    path.stat()
    # Without a log nobody has it open and the file is all there is; then it is read without
    # the log and shared memory that SQLite would otherwise leave in a directory not ours.
    mode = "mode=ro" if Path(f"{path}-wal").exists() else "immutable=1"
    uri = f"{path.absolute().as_uri()}?{mode}"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
        (written_format,) = connection.execute("PRAGMA user_version").fetchone()
        complete = connection.execute("SELECT value FROM facts WHERE name = 'complete'")
        if written_format != INDEX_FORMAT or complete.fetchone() != (1,):
            raise sqlite3.DatabaseError("not a whole index of this format")
        yield connection


def _listed(connection: sqlite3.Connection, url: bytes | None) -> list[IndexRow]:
    found = connection.execute(
        "SELECT * FROM listed WHERE ?1 IS NULL OR url = ?1 ORDER BY used_at DESC, id DESC", (url,)
    )
    return [IndexRow(*row[1:]) for row in found]


def _is_failing_disk(exc: sqlite3.DatabaseError) -> bool:
    """A full or broken disk, where starting again would not help (nor be right)."""
    primary = getattr(exc, "sqlite_errorcode", 0) & 0xFF
    return primary in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)


def _is_damage(exc: sqlite3.Error) -> bool:
    primary = getattr(exc, "sqlite_errorcode", 0) & 0xFF
    return primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
