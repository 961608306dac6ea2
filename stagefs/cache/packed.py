"""Segments: files that hold many small objects each, and the entries in them.

A hundred thousand small objects as files of their own cost as many inodes and a slow scan;
here they cost one write per batch.  A segment is only appended to, evicted as a whole (what
is still wanted is appended again, see eviction.py), and read at the place that the index
names.  A record that is not whole, or not what was looked for, is a miss.

Concurrency: ``append`` and ``retire`` by worker threads, under a lock; ``file`` and reads by
any thread.  A segment that is gone stays open for the entries that refer to it.
"""

import contextlib
import os
import threading
import weakref
from collections.abc import Iterator, Sequence

import msgspec

from stagefs.cache import layout
from stagefs.cache.entry import ABSENT, PRESENT, VERIFIED, Entry, OpenFile
from stagefs.cache.file_system import allocated_bytes, read_fully, write_fully
from stagefs.cache.index import IndexRow, Place
from stagefs.cache.ledger import Ledger
from stagefs.errors import CacheFailed, DamagedEntry
from stagefs.model import Checksum, ObjectId

SEGMENT_BYTES_MAX = 64 << 20
SEGMENT_BYTES_MIN = 1 << 20
# Segments kept open though no entry in use refers to them.
_OPEN_SEGMENTS_MAX = 64
_HEAD_GUESS_BYTES = 1024
_RESYNC_BYTES = 1 << 20
# Content is a remote's, and may look like the begin of a record at every place: after so many bytes
# of supposed headers the rest of the segment counts as lost, which costs fetching it again.
_RESYNC_HEADERS_BYTES_MAX = 64 << 20
_RECORDS_PER_WRITE = 512  # the kernel takes 1024 pieces at a time


class SmallObject(msgspec.Struct, frozen=True):
    """A whole small object, ready to be stored."""

    object_id: ObjectId
    data: bytes
    validator: str
    mtime_ns: int | None = None
    checksum: Checksum | None = None


class PackedRecord(Entry):
    """An entry in a segment: one chunk, or none when the object is empty."""

    __slots__ = ("_data_hash", "_record", "segment")

    def __init__(
        self,
        object_id: ObjectId,
        key: str,
        record: layout.Record,
        *,
        segment: int,
        file: OpenFile,
        state: int,
        ledger: Ledger,
    ) -> None:
        super().__init__(
            object_id,
            key,
            record.header,
            file=file,
            base=record.data_offset,
            state=bytearray([state] if record.data_bytes else []),
            ledger=ledger,
        )
        self.segment = segment
        self._record = record
        self._data_hash = record.data_hash

    @property
    def offset(self) -> int:
        """Where the record begins in its segment."""
        return self._record.offset

    def index_row(self) -> IndexRow | None:
        if self.gone:
            return None
        return record_row(self.key, self._record, self.segment, used_at=self.used_at)

    def _slot(self, chunk: int) -> int:
        return self._data_hash if chunk == 0 else 0

    def _write_slots(self, chunks: list[int], hashes: list[int]) -> None:
        # The data of a damaged record was fetched again.  A head torn by kill -9 is a miss.
        if chunks and not self.gone:
            self._data_hash = hashes[0]
            head = layout.rewrite_head(self._record, data_hash=hashes[0])
            write_fully(self.fd, head, self._record.offset)

    def _forget_slots(self, first: int, count: int) -> None:
        if first == 0 < count and not self.gone:
            self._data_hash = 0
            with contextlib.suppress(OSError):
                head = layout.rewrite_head(self._record, data_hash=0)
                write_fully(self.fd, head, self._record.offset)

    def _arrived(self, chunks: list[int]) -> None:
        """The space is the same as before."""

    def _unname(self) -> None:
        # Not the file: the other records of the segment stay.
        with contextlib.suppress(OSError):
            write_fully(self.fd, layout.DEAD, self._record.offset)
        self._ledger.forget_row(self.key)


def record_row(key: str, record: layout.Record, segment: int, *, used_at: int) -> IndexRow:
    return IndexRow(
        key=bytes.fromhex(key),
        url=record.header.url,
        version=record.header.version,
        size_bytes=record.header.size_bytes,
        disk_bytes=record.end - record.offset,
        cached_bytes=record.header.size_bytes,
        segment=segment,
        offset=record.offset,
        used_at=used_at,
    )


class Segments:
    def __init__(self, ledger: Ledger, *, segment_bytes: int = SEGMENT_BYTES_MAX) -> None:
        """Lists the segments (few, each large) and asks for their sizes.  Raises OSError."""
        self._ledger = ledger
        self._paths = ledger.paths
        self.segment_bytes = segment_bytes
        self._lock = threading.Lock()
        self._files_lock = threading.Lock()  # never held for I/O but an open
        self._files: weakref.WeakValueDictionary[int, OpenFile] = weakref.WeakValueDictionary()
        self._kept: dict[int, OpenFile] = {}
        self._disk_bytes: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        with os.scandir(self._paths.segments) as found:
            for each in found:
                if each.name.isdecimal() and each.is_file(follow_symlinks=False):
                    status = each.stat(follow_symlinks=False)
                    self._disk_bytes[int(each.name)] = allocated_bytes(status)
                    self._sizes[int(each.name)] = status.st_size
        self._active = max(self._sizes, default=0)
        self._is_sealed = False
        ledger.add_used(sum(self._disk_bytes.values()))

    def numbers(self) -> list[int]:
        return sorted(self._sizes)

    def disk_bytes(self, number: int) -> int:
        return self._disk_bytes.get(number, 0)

    def total_disk_bytes(self) -> int:
        return sum(list(self._disk_bytes.values()))

    def size_bytes(self, number: int) -> int:
        return self._sizes.get(number, 0)

    def file(self, number: int) -> OpenFile:
        """The open segment.  Raises OSError."""
        with self._files_lock:
            file = self._files.get(number)
            if file is None:
                path = self._paths.segment_file(number)
                file = self._files[number] = OpenFile(layout.open_file(path, os.O_RDWR))
            self._kept[number] = file
            if len(self._kept) > _OPEN_SEGMENTS_MAX:
                del self._kept[next(iter(self._kept))]
            return file

    def append(self, records: Sequence[bytes]) -> list[Place]:
        """Append encoded records; returns where each lies.  One write per segment
        that is touched.  Raises CacheFailed, and then none of them counts."""
        places: list[Place] = []
        with self._lock:
            start = 0
            while start < len(records):
                number, file, offset = self._segment_for(len(records[start]))
                stop, end = start, offset
                while stop < len(records) and end + len(records[stop]) <= self.segment_bytes:
                    places.append(Place(number, end, len(records[stop])))
                    end += len(records[stop])
                    stop += 1
                if stop == start:  # a record larger than a whole segment gets one of its own
                    places.append(Place(number, end, len(records[stop])))
                    stop += 1
                self._write(number, file, records[start:stop], offset)
                start = stop
        return places

    def _segment_for(self, record_bytes: int) -> tuple[int, OpenFile, int]:
        number = self._active
        size = self._sizes.get(number)
        if size is not None and not self._is_sealed:
            offset = layout.aligned(size)
            if offset + record_bytes <= self.segment_bytes:
                with contextlib.suppress(OSError):
                    return number, self.file(number), offset
        number += 1
        try:
            path = self._paths.segment_file(number)
            fd = layout.open_file(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            file = OpenFile(fd)
            with self._files_lock:
                self._files[number] = self._kept[number] = file
            write_fully(fd, layout.SEGMENT_HEAD, 0)
        except OSError as exc:
            raise CacheFailed(f"the cache cannot begin a segment: {exc.strerror}") from exc
        self._active = number
        self._is_sealed = False
        self._sizes[number] = len(layout.SEGMENT_HEAD)
        return number, file, len(layout.SEGMENT_HEAD)

    def _write(self, number: int, file: OpenFile, records: Sequence[bytes], offset: int) -> None:
        end = offset
        try:
            for start in range(0, len(records), _RECORDS_PER_WRITE):
                batch = records[start : start + _RECORDS_PER_WRITE]
                length = sum(map(len, batch))
                # Not joined first: that would copy megabytes while no other thread can run.
                if os.pwritev(file.fd, batch, end) != length:
                    write_fully(file.fd, b"".join(batch), end)
                end += length
        except OSError as exc:
            with contextlib.suppress(OSError):
                os.ftruncate(file.fd, offset)
            raise CacheFailed(f"the cache cannot store small objects: {exc.strerror}") from exc
        finally:
            disk_bytes = allocated_bytes(os.fstat(file.fd))
            self._ledger.add_used(disk_bytes - self._disk_bytes.get(number, 0))
            self._disk_bytes[number] = disk_bytes
        self._sizes[number] = end

    def seal(self, number: int) -> None:
        """Append to this segment no more: it is about to be evicted."""
        with self._lock:
            if number == self._active:
                self._is_sealed = True

    def remove(self, number: int) -> int:
        """Take the segment's name away; returns the bytes of disk that it took."""
        with self._lock:
            with self._files_lock:
                file = self._files.pop(number, None)
                self._kept.pop(number, None)
            if file is not None:
                file.gone = True
            self._sizes.pop(number, None)
            freed = self._disk_bytes.pop(number, 0)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._paths.segment_file(number))
        self._ledger.add_used(-freed)
        return freed

    # Reading.

    def load(self, object_id: ObjectId, key: str, place: Place) -> PackedRecord:
        """The entry at ``place``, VERIFIED already when the page cache has all of it.

        Raises DamagedEntry when the record is not whole or another object's, OSError.
        """
        file = self.file(place.segment)
        cached = _read_if_cached(file.fd, place.record_bytes, place.offset)
        data = cached or read_head(file.fd, place.offset)
        record = layout.decode_record(data, place.offset)
        if record is None or not record.live or record.header.object_id != object_id:
            raise DamagedEntry(f"segment {place.segment} has no whole record at {place.offset}")
        state = PRESENT if record.data_hash else ABSENT
        if cached is not None and record.data_hash:
            begin = record.data_offset - record.offset
            content = memoryview(data)[begin : begin + record.data_bytes]
            if layout.chunk_hash(content) == record.data_hash:
                state = VERIFIED
        return PackedRecord(
            object_id,
            key,
            record,
            segment=place.segment,
            file=file,
            state=state,
            ledger=self._ledger,
        )

    def entry_of(self, object_id: ObjectId, record: layout.Record, number: int) -> PackedRecord:
        """The entry of a record that was appended just now.  Raises OSError."""
        return PackedRecord(
            object_id,
            object_id.key,
            record,
            segment=number,
            file=self.file(number),
            state=VERIFIED,
            ledger=self._ledger,
        )


def read_head(fd: int, offset: int) -> bytes:
    """Enough of a record to decode its head and header.  Raises OSError."""
    data = read_fully(fd, _HEAD_GUESS_BYTES, offset)
    if len(data) >= layout.RECORD_HEAD_BYTES:
        needed = layout.RECORD_HEAD_BYTES + layout.header_bytes_of(data)
        if len(data) < needed <= layout.HEADER_BYTES_MAX:
            data = read_fully(fd, needed, offset)
    return data


def _read_if_cached(fd: int, length: int, offset: int) -> bytes | None:
    buffer = bytearray(length)
    try:
        got = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError:  # not in the page cache, or a file system that cannot tell
        return None
    return bytes(buffer) if got == length else None


def scan(fd: int, *, start: int = 0) -> Iterator[layout.Record | None]:
    """All records of a segment from ``start`` on, dead ones too; None for each damaged stretch
    that was stepped over.  Raises OSError."""
    end = os.fstat(fd).st_size
    offset = max(start, len(layout.SEGMENT_HEAD))
    while offset + layout.RECORD_HEAD_BYTES <= end:
        record = layout.decode_record(read_head(fd, offset), offset)
        if record is not None and record.data_offset + record.data_bytes <= end:
            yield record
            offset = record.end
            continue
        yield None
        following = _next_record(fd, offset + 8, end)
        if following is None:
            return
        offset = following


def _next_record(fd: int, offset: int, end: int) -> int | None:
    """Where the next whole record begins at or after ``offset``, a multiple of 8."""
    tried_bytes = 0
    while offset < end:
        window = read_fully(fd, _RESYNC_BYTES, offset)
        for place in range(0, len(window), 8):
            if window[place : place + 4] in (layout.LIVE, layout.DEAD):
                head = read_head(fd, offset + place)
                if layout.decode_record(head, offset + place) is not None:
                    return offset + place
                tried_bytes += len(head)
                if tried_bytes > _RESYNC_HEADERS_BYTES_MAX:
                    return None
        offset += max(len(window), 8)
    return None
