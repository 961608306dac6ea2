"""Reading a cache directory from its files alone: to rebuild the index, and to look at a
directory that has none.

The files are the truth; this is the slow way to it, never taken at start.  Read-only but for
``Rebuild``, which adds missing rows to an index.

Concurrency: blocking.  ``Rebuild`` runs in a worker thread beside a serving daemon and so
rests after each batch, because a busy Python thread slows every read (DESIGN.md section 5).
"""

import contextlib
import itertools
import os
import re
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stagefs.cache import layout
from stagefs.cache.file_system import allocated_bytes
from stagefs.cache.index import Index, IndexRow
from stagefs.cache.journal import forget_noted, keys_noted
from stagefs.cache.layout import open_file
from stagefs.cache.packed import record_row, scan
from stagefs.errors import DamagedEntry

_BATCH_ROWS = 100
_REST_S = 0.005

_KEY = re.compile(r"[0-9a-f]{40}")


class Damage(NamedTuple):
    """A file, or a place in one, that is not what it should be."""

    path: Path
    reason: str


def object_files(paths: layout.Paths) -> Iterator[tuple[str, Path]]:
    """(key, path) of every object's own file."""
    for directory in sorted(_names(paths.objects)):
        below = paths.objects / directory
        for name in sorted(_names(below)):
            if _KEY.fullmatch(name) and name[:2] == directory:
                yield name, below / name


def segment_files(paths: layout.Paths) -> Iterator[tuple[int, Path]]:
    for name in sorted(_names(paths.segments)):
        if name.isdecimal():
            yield int(name), paths.segments / name


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []


class ObjectMap(NamedTuple):
    """What the trailer of an object's file says."""

    header: layout.EntryHeader
    present: bytearray
    slots: bytes
    slots_offset: int
    disk_bytes: int
    used_at: int

    @property
    def cached_bytes(self) -> int:
        full = self.present.count(1) * self.header.chunk_bytes
        if self.present and self.present[-1]:
            full -= len(self.present) * self.header.chunk_bytes - self.header.size_bytes
        return full

    def row(self, key: str) -> IndexRow:
        return IndexRow(
            key=bytes.fromhex(key),
            url=self.header.url,
            version=self.header.version,
            size_bytes=self.header.size_bytes,
            disk_bytes=self.disk_bytes,
            cached_bytes=self.cached_bytes,
            segment=0,
            offset=0,
            used_at=self.used_at,
        )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = open_file(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def read_object(path: Path, key: str) -> ObjectMap:
    """Raises DamagedEntry, OSError."""
    with opened(path) as fd:
        return read_open_object(fd, key)


def read_open_object(fd: int, key: str) -> ObjectMap:
    """Raises DamagedEntry, OSError."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise DamagedEntry("not a regular file")
    loaded = layout.read_map(fd, status.st_size)
    if loaded.header.object_id.key != key:
        raise DamagedEntry("the file holds another object than its name says")
    return ObjectMap(
        header=loaded.header,
        present=layout.present_chunks(loaded.slots),
        slots=loaded.slots,
        slots_offset=loaded.slots_offset,
        disk_bytes=allocated_bytes(status),
        used_at=int(max(status.st_mtime, status.st_atime) * 1000),
    )


def rows_of_objects(paths: layout.Paths) -> Iterator[IndexRow | Damage]:
    for key, path in object_files(paths):
        try:
            yield read_object(path, key).row(key)
        except FileNotFoundError:
            continue  # evicted meanwhile
        except (DamagedEntry, OSError) as exc:
            yield Damage(path, str(exc))


def rows_of_segment(path: Path, number: int, *, start: int = 0) -> Iterator[IndexRow | Damage]:
    try:
        with opened(path) as fd:
            used_at = int(os.fstat(fd).st_mtime * 1000)
            for record in scan(fd, start=start):
                if record is None:
                    yield Damage(path, "a stretch of the segment is damaged")
                elif record.live:
                    yield record_row(record.header.object_id.key, record, number, used_at=used_at)
    except FileNotFoundError:
        return
    except OSError as exc:
        yield Damage(path, str(exc))


class Rebuild:
    """Gives every file and record its row, bit by bit; rows that are there are newer and stay.

    One thread at a time.  ``damage`` is what was met so far.
    """

    def __init__(self, index: Index, paths: layout.Paths) -> None:
        self._index = index
        self._found = _all_rows(paths)
        self.damage: list[Damage] = []

    def go_on(self, *, batches: int, stop: threading.Event) -> bool:
        """Read some more; True when all is done.  Raises CacheFailed."""
        for _ in range(batches):
            batch = list(itertools.islice(self._found, _BATCH_ROWS))
            if not batch:
                self._index.finish_rebuild()
                return True
            self.damage += [found for found in batch if isinstance(found, Damage)]
            self._index.add_missing([found for found in batch if isinstance(found, IndexRow)])
            if stop.wait(_REST_S):
                return False
        return False


def _all_rows(paths: layout.Paths) -> Iterator[IndexRow | Damage]:
    yield from rows_of_objects(paths)
    # Of several records of one object the last stays, so the newest segment comes first.
    for number, path in reversed(list(segment_files(paths))):
        yield from reversed(list(rows_of_segment(path, number)))


def reconcile(index: Index, paths: layout.Paths) -> None:
    """At start: look at what changed after the last flush of a daemon that was killed, which
    is the files it was filling and the end of the segment it was writing.  Raises CacheFailed,
    OSError."""
    if not index.is_complete:
        if not any(segment_files(paths)) and not any(object_files(paths)):
            index.finish_rebuild()
        return
    rows: list[IndexRow] = []
    removed: list[bytes] = []
    for key in keys_noted(paths.directory):
        path = Path(paths.object_file(key))
        try:
            rows.append(read_object(path, key).row(key))
        except FileNotFoundError:
            removed.append(bytes.fromhex(key))
        except (DamagedEntry, OSError):
            # Counted when it is asked for; until then it can be evicted.
            with contextlib.suppress(OSError):
                rows.append(_row_of_damaged(key, path))
    rows += _unindexed_records(index, paths)
    if rows or removed:
        index.apply(rows=rows, removed=removed)
    forget_noted(paths.directory)


def _row_of_damaged(key: str, path: Path) -> IndexRow:
    status = path.lstat()
    return IndexRow(
        key=bytes.fromhex(key),
        url=b"",
        version=b"",
        size_bytes=0,
        disk_bytes=allocated_bytes(status),
        cached_bytes=0,
        segment=0,
        offset=0,
        used_at=int(status.st_mtime * 1000),
    )


def _unindexed_records(index: Index, paths: layout.Paths) -> Iterator[IndexRow]:
    last, end = index.fact("segment"), index.fact("segment_end")
    for number, path in segment_files(paths):
        if number >= last:
            for found in rows_of_segment(path, number, start=end if number == last else 0):
                if isinstance(found, IndexRow):
                    yield found
