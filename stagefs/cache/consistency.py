"""Comparing the index of a cache with its files, without a daemon or beside one.

Never writes.  The files are the truth: what differs is mended by the next daemon's rebuild (or
at once by removing index.sqlite).  A daemon may be at work meanwhile, so what differs is looked
at twice.
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from stagefs.cache import layout
from stagefs.cache.index import IndexRow, read_rows
from stagefs.cache.journal import keys_noted
from stagefs.cache.rebuild import (
    object_files,
    read_object,
    rows_of_objects,
    rows_of_segment,
    segment_files,
)
from stagefs.errors import DamagedEntry


class Difference(msgspec.Struct, frozen=True):
    """``key`` is empty where only a file is known."""

    key: str
    url: str
    said: str


class Compared(msgspec.Struct, frozen=True):
    entries: int
    differences: list[Difference]
    has_index: bool


def compare(directory: Path) -> Compared:
    """Blocking; looks at each object's trailer and each segment."""
    paths = layout.Paths(directory)
    indexed = read_rows(paths.index)
    if indexed is None:
        return Compared(sum(1 for _ in object_files(paths)), [], has_index=False)
    noted = set(keys_noted(directory))
    known = {row.key.hex(): row for row in indexed}
    found: list[Difference] = []
    seen: set[str] = set()
    for row in _rows_of_files(paths, found):
        key = row.key.hex()
        seen.add(key)
        before = known.get(key)
        if key in noted:
            continue  # the index has still to catch up with these
        if before is None:
            if row.segment or _is_there(paths, key):
                found.append(Difference(key, _text(row.url), "has a file, and is not in the index"))
        elif (before.url, before.size_bytes) != (row.url, row.size_bytes):
            found.append(Difference(key, _text(row.url), "is another object in the index"))
        elif not row.segment and before.cached_bytes != row.cached_bytes:
            found.append(
                Difference(
                    key,
                    _text(row.url),
                    f"has {row.cached_bytes} bytes, the index says {before.cached_bytes}",
                )
            )
    for key, row in known.items():
        if key not in seen and key not in noted and (row.segment or not _is_there(paths, key)):
            found.append(Difference(key, _text(row.url), "is in the index, and has no file"))
    return Compared(len(seen), found, has_index=True)


def _rows_of_files(paths: layout.Paths, found: list[Difference]) -> Iterator[IndexRow]:
    for row in rows_of_objects(paths):
        if isinstance(row, IndexRow):
            yield row
        else:
            found.append(Difference(row.path.name, "", f"its file is damaged: {row.reason}"))
    packed: dict[bytes, IndexRow] = {}
    for number, path in segment_files(paths):
        for record in rows_of_segment(path, number):
            if isinstance(record, IndexRow):
                packed[record.key] = record  # the newest record of a key counts
            else:
                found.append(Difference("", "", f"{path}: {record.reason}"))
    yield from packed.values()


def _is_there(paths: layout.Paths, key: str) -> bool:
    try:
        read_object(Path(paths.object_file(key)), key)
    except (OSError, DamagedEntry):
        return False
    return True


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
