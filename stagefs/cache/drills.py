"""Damaging a cache on purpose, so that an administrator sees what StageFS does about it.

Each drill writes into the file of one entry behind the daemon's back, as a bad disk would.  A
reader must never see the damage: the chunk, or the entry, is fetched again.
"""

import enum
import os
from pathlib import Path

from stagefs.cache import layout
from stagefs.cache.inspect import EntryDetail
from stagefs.errors import InvalidName

_FOOTER_BYTES = 64


class Drill(enum.StrEnum):
    """``corrupt``: one bit of the first cached chunk; ``truncate``: the file loses its second half;
    ``drop-map``: the map of chunks becomes unreadable."""

    CORRUPT = "corrupt"
    TRUNCATE = "truncate"
    DROP_MAP = "drop-map"


def damage(directory: Path, entry: EntryDetail, drill: Drill) -> str:
    """Do it; returns what was done.  Raises InvalidName where the entry has nothing of the kind,
    OSError."""
    if not entry.present:
        raise InvalidName(f"Nothing of {entry.entry.url} is cached: there is nothing to damage.")
    name, _, offset = entry.entry.place.partition("@")
    path = directory / name
    if offset:
        return _in_segment(path, int(offset), entry, drill)
    if drill is Drill.CORRUPT:
        at = entry.present[0][0] * entry.chunk_bytes
        _flip(path, at)
        return f"flipped a bit of {path} at {at}"
    size = path.stat().st_size
    if drill is Drill.TRUNCATE:
        os.truncate(path, size // 2)
        return f"cut {path} from {size} to {size // 2} bytes"
    with path.open("r+b") as file:
        file.seek(size - _FOOTER_BYTES)
        file.write(bytes(_FOOTER_BYTES))
    return f"overwrote the end of {path}, where its map is found"


def _in_segment(path: Path, offset: int, entry: EntryDetail, drill: Drill) -> str:
    """A small object shares its file with others: only its own record is touched."""
    if drill is Drill.TRUNCATE:
        raise InvalidName(
            f"{entry.entry.url} is packed with other small objects: choose corrupt or drop-map."
        )
    # The head of a record comes before its data; its last hash covers lengths and header.
    if drill is Drill.DROP_MAP:
        at = offset + layout.RECORD_HEAD_BYTES - 1
    else:
        with path.open("rb") as file:
            file.seek(offset)
            record = layout.decode_record(file.read(layout.HEADER_BYTES_MAX), offset)
        if record is None:
            raise InvalidName(f"The record of {entry.entry.url} is damaged already.")
        at = record.data_offset
    _flip(path, at)
    return f"flipped a bit of {path} at {at}"


def _flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 0x10]))
