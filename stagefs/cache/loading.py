"""Finding what is on disk of one object: a record of a segment, or a file of its own.

Whatever is not whole, or not what it should be, is counted, dropped from disk, and not found.
Concurrency: the trio thread; an open and a few small reads.
"""

import contextlib
import os
from collections.abc import Sequence

from stagefs.cache import layout, rebuild
from stagefs.cache.entry import Entry, ObjectFile, OpenFile
from stagefs.cache.file_system import allocated_bytes
from stagefs.cache.ledger import Ledger
from stagefs.cache.packed import Segments
from stagefs.errors import CacheFailed, DamagedEntry
from stagefs.model import ObjectId

# Larger objects are never in segments, so the index need not be asked for them.
PACKED_BYTES_MAX = 128 << 10


class Loading:
    def __init__(self, ledger: Ledger, segments: Segments) -> None:
        self._ledger = ledger
        self._segments = segments

    def load(self, object_id: ObjectId, key: str, *, size_bytes: int) -> Entry | None:
        entry = None
        if size_bytes <= PACKED_BYTES_MAX:
            entry = self._load_record(object_id, key)
        return entry or self._load_file(object_id, key)

    def absent(self, keys: Sequence[str]) -> set[str]:
        """Those of which nothing is on disk for certain: cheaper than to ``load`` each in vain."""
        try:
            found = self._ledger.index.packed_of([bytes.fromhex(key) for key in keys])
        except CacheFailed:
            return set()
        packed = {key.hex() for key in found}
        name = self._ledger.paths.object_file
        return {key for key in keys if key not in packed and not os.access(name(key), os.F_OK)}

    def _load_record(self, object_id: ObjectId, key: str) -> Entry | None:
        try:
            place = self._ledger.index.place_of(bytes.fromhex(key))
        except CacheFailed:
            self._ledger.count("index_failures")
            return None
        if place is None:
            return None
        try:
            return self._segments.load(object_id, key, place)
        except FileNotFoundError:
            pass  # its segment was evicted a moment ago, or its row came back with an old index
        except DamagedEntry:
            self._ledger.count("damaged_entries")
        except OSError:
            self._ledger.count("open_failures")
            return None
        self._ledger.forget_row(key)
        return None

    def _load_file(self, object_id: ObjectId, key: str) -> Entry | None:
        try:
            with self._ledger.names:
                # Whatever a plan meant to do with it: it is wanted now.
                self._ledger.leaving.discard(key)
                fd = layout.open_file(self._ledger.paths.object_file(key), os.O_RDWR)
        except FileNotFoundError:
            return None
        except OSError:
            self._ledger.count("open_failures")
            return None
        file = OpenFile(fd)
        try:
            found = rebuild.read_open_object(fd, key)
        except (DamagedEntry, OSError):
            self._ledger.count("damaged_entries")
            self._drop_damaged(key, file)
            return None
        return ObjectFile(
            object_id,
            key,
            found.header,
            file=file,
            state=found.present,
            ledger=self._ledger,
            slots_offset=found.slots_offset,
            disk_bytes=found.disk_bytes,
        )

    def _drop_damaged(self, key: str, file: OpenFile) -> None:
        with contextlib.suppress(OSError):
            self._ledger.add_used(-allocated_bytes(os.fstat(file.fd)))
            self._ledger.unplace(key)
