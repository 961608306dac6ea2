"""The queue's rows as SQLite keeps them, and as values.  Pure functions.

URLs and labels are BLOBs: they may hold bytes that are not UTF-8.
"""

import os
from typing import TypeAlias

from stagefs.model import Checksum, ChecksumKind
from stagefs.outputs.queued import QueueItem, Upload, UploadState
from stagefs.remote.url import parse

INSERT = """INSERT INTO uploads (commit_id, state, turn, owner, origin, host, url, file, label,
    size_bytes, checksums, mode, mtime_ns, overwrite, added_ns, changed_ns, removes)
    VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"""

# The view ``listed``.
Row: TypeAlias = tuple[
    int, str, str, str, str, bytes, str, bytes, int, str, int | None, int,
    int, int, str | None, int, int, int, bytes | None, int, bytes, int,
]  # fmt: skip


def host_of(url: str) -> str:
    """Scheme, user and host: what one connection serves, and what fails together."""
    return parse(url).host_url


def inserted(
    item: QueueItem,
    *,
    commit: str,
    state: UploadState,
    turn: int,
    owner: str,
    origin: str,
    now: int,
) -> tuple[object, ...]:
    return (
        commit,
        state.value,
        turn,
        owner,
        origin,
        os.fsencode(host_of(item.url)),
        os.fsencode(item.url),
        item.file,
        os.fsencode(item.label),
        item.size_bytes,
        " ".join(str(checksum) for checksum in item.checksums),
        item.mode,
        item.mtime_ns,
        item.overwrite,
        now,
        now,
        item.removes,
    )


def upload_of(row: Row, *, owner: str) -> Upload:
    item = QueueItem(
        url=os.fsdecode(row[5]),
        file=row[6],
        label=os.fsdecode(row[7]),
        size_bytes=row[8],
        checksums=tuple(_checksum(text) for text in row[9].split()),
        mode=row[10],
        mtime_ns=row[11],
        overwrite=bool(row[12]),
        removes=bool(row[21]),
    )
    return Upload(
        id=row[0],
        commit=row[1],
        state=UploadState(row[2]),
        item=item,
        attempts=row[13],
        reason=row[14],
        next_try_ns=row[15],
        added_ns=row[16],
        changed_ns=row[17],
        validator=None if row[18] is None else os.fsdecode(row[18]),
        origin=row[3],
        own=row[4] == owner,
    )


def _checksum(text: str) -> Checksum:
    kind, _, digest = text.partition(":")
    return Checksum(ChecksumKind(kind), digest)
