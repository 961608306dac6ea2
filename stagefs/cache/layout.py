"""The disk format of the cache: where files lie and what their bytes mean.

Pure encoding and decoding plus the reads these need; no policy, no locks, no open files kept.
Everything is little endian.  Nothing is ever synced: a hash over everything catches what a
power cut loses.  Any change to what is written raises FORMAT (a test holds the bytes).

    CACHEDIR.TAG, version, lock        a cache directory, its format, its daemon
    index.sqlite                       derived (index.py): may be deleted at any time
    growing.<n>                        which entries the index has to catch up with (journal.py)
    leases.sqlite                      pins and leases (leases.py): not derived
    objects/ab/<key>                   one object: data, trailer
    incoming/<key>.<n>                 the same before its first chunk is committed
    segments/<nnnnnn>                  small objects, one record after the other

An object's file: data in [0, size); at the next 4 KiB boundary the *trailer*: the header
(msgpack) in room of a multiple of 512 bytes, one u64 *slot* per chunk (0 = absent, else the
xxh3-64 of the chunk's data, a hash of 0 stored as 1), and the footer.  A slot is written
after its chunk's data; that 8-byte write is the commit.  A damaged slot is no more than a
damaged chunk, so slots need no checksum of their own.

A segment: a head of 16 bytes, then records at multiples of 8: mark, lengths, hash of the
data, hash of all that and the header; the header; the data.  A record is dropped by
overwriting its mark; its lengths stay, so that a scan can step over it.
"""

import os
import struct
from pathlib import Path
from typing import NamedTuple

import msgspec
import xxhash

from stagefs.cache.file_system import read_fully
from stagefs.errors import DamagedEntry
from stagefs.model import Checksum, ObjectId

FORMAT = 1
VERSION_TEXT = "stagefs cache format {}\n"
CACHEDIR_TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# This directory holds the cache of StageFS; backup programs may leave it out.\n"
    "# See https://bford.info/cachedir/\n"
)

CHUNK_BYTES_MIN = 64 << 10
CHUNK_BYTES_MAX = 64 << 20

_PAGE_BYTES = 4096
_HEADER_ROOM_BYTES = 512
HEADER_BYTES_MAX = 1 << 20

_FOOTER_MAGIC = b"STGFSOBJ"
_FOOTER = struct.Struct("<8sIIQQQ")  # magic, format, header bytes, trailer offset, hash, own hash
_FOOTER_HASHED_BYTES = _FOOTER.size - 8
SLOT = struct.Struct("<Q")

SEGMENT_HEAD = b"STGFSSEG" + struct.pack("<II", FORMAT, 0)
LIVE, DEAD = b"LIVE", b"DEAD"
_RECORD = struct.Struct("<4sIQQQ")  # mark, header bytes, data bytes, data hash, hash of the rest
RECORD_HEAD_BYTES = _RECORD.size


class EntryHeader(msgspec.Struct, frozen=True):
    """What a trailer or record says of its object.  Text is bytes: URLs need not be UTF-8."""

    url: bytes
    version: bytes
    validator: bytes
    size_bytes: int
    chunk_bytes: int
    mtime_ns: int | None
    checksum: Checksum | None

    @property
    def object_id(self) -> ObjectId:
        return ObjectId(url=_text(self.url), version=_text(self.version))

    @property
    def chunk_count(self) -> int:
        return -(-self.size_bytes // self.chunk_bytes)


def entry_header(
    object_id: ObjectId,
    *,
    validator: str,
    size_bytes: int,
    chunk_bytes: int,
    mtime_ns: int | None,
    checksum: Checksum | None,
) -> EntryHeader:
    return EntryHeader(
        url=_bytes(object_id.url),
        version=_bytes(object_id.version),
        validator=_bytes(validator),
        size_bytes=size_bytes,
        chunk_bytes=chunk_bytes,
        mtime_ns=mtime_ns,
        checksum=checksum,
    )


def validator_text(header: EntryHeader) -> str:
    return _text(header.validator)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


_encode_header = msgspec.msgpack.Encoder(order="deterministic").encode
_decode_header = msgspec.msgpack.Decoder(EntryHeader).decode


def chunk_hash(data: bytes | bytearray | memoryview) -> int:
    """The slot of a chunk with this content: never 0, which says absent."""
    return xxhash.xxh3_64_intdigest(data) or 1


class Paths:
    """Where things lie below a cache directory.  Names come from keys and numbers only."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tag = directory / "CACHEDIR.TAG"
        self.version = directory / "version"
        self.lock = directory / "lock"
        self.index = directory / "index.sqlite"
        self.leases = directory / "leases.sqlite"
        self.objects = directory / "objects"
        self.incoming = directory / "incoming"
        self.segments = directory / "segments"
        self._objects_text = str(self.objects)
        self._incoming_text = str(self.incoming)

    def object_file(self, key: str) -> str:
        return f"{self._objects_text}/{key[:2]}/{key}"

    def incoming_file(self, key: str, number: int) -> str:
        """``number`` tells apart those who begin the same object again."""
        return f"{self._incoming_text}/{key}.{number}"

    def segment_file(self, number: int) -> Path:
        return self.segments / f"{number:06d}"


# Objects' files.


class Trailer(NamedTuple):
    """Where the parts of an object's file lie, and the two parts that never change."""

    offset: int
    slots_offset: int
    footer_offset: int
    header: bytes
    footer: bytes


def encode_trailer(header: EntryHeader) -> Trailer:
    encoded = _encode_header(header)
    offset = trailer_offset(header.size_bytes)
    slots_offset = offset + _room(len(encoded))
    head = _FOOTER.pack(
        _FOOTER_MAGIC, FORMAT, len(encoded), offset, xxhash.xxh3_64_intdigest(encoded), 0
    )[:_FOOTER_HASHED_BYTES]
    return Trailer(
        offset=offset,
        slots_offset=slots_offset,
        footer_offset=slots_offset + SLOT.size * header.chunk_count,
        header=encoded,
        footer=head + SLOT.pack(xxhash.xxh3_64_intdigest(head)),
    )


def trailer_offset(size_bytes: int) -> int:
    return -(-size_bytes // _PAGE_BYTES) * _PAGE_BYTES


def _room(length: int) -> int:
    return -(-length // _HEADER_ROOM_BYTES) * _HEADER_ROOM_BYTES


class LoadedMap(NamedTuple):
    header: EntryHeader
    slots_offset: int
    slots: bytes


def read_map(fd: int, file_bytes: int) -> LoadedMap:
    """The header and slots of an object's file.  Raises DamagedEntry, OSError."""
    footer_offset = file_bytes - _FOOTER.size
    if footer_offset < 0:
        raise DamagedEntry("the file is too short to hold a map")
    footer = read_fully(fd, _FOOTER.size, footer_offset)
    if len(footer) != _FOOTER.size:
        raise DamagedEntry("the file ends before its map")
    magic, written_format, header_bytes, offset, header_hash, own_hash = _FOOTER.unpack(footer)
    hashed = xxhash.xxh3_64_intdigest(footer[:_FOOTER_HASHED_BYTES])
    if magic != _FOOTER_MAGIC or own_hash != hashed or written_format != FORMAT:
        raise DamagedEntry("the map's footer is missing or damaged")
    slots_start = _room(header_bytes)
    if header_bytes > HEADER_BYTES_MAX or offset + slots_start > footer_offset:
        raise DamagedEntry("the map's footer points outside the file")
    # No more slots than chunks of the least size: what is read stays in proportion to the object.
    slots_bytes_max = SLOT.size * (offset // CHUNK_BYTES_MIN + 1)
    if footer_offset - offset - slots_start > slots_bytes_max:
        raise DamagedEntry("the map is too large for its object")
    body = read_fully(fd, footer_offset - offset, offset)
    encoded = body[:header_bytes]
    if xxhash.xxh3_64_intdigest(encoded) != header_hash:
        raise DamagedEntry("the map's header is damaged")
    header = decode_header(encoded)
    slots = body[slots_start:]
    if offset != trailer_offset(header.size_bytes) or len(slots) != SLOT.size * header.chunk_count:
        raise DamagedEntry("the map does not fit the file")
    return LoadedMap(header=header, slots_offset=offset + slots_start, slots=slots)


def decode_header(encoded: bytes | memoryview) -> EntryHeader:
    """Raises DamagedEntry."""
    try:
        header = _decode_header(encoded)
    except msgspec.MsgspecError as exc:
        raise DamagedEntry("the header cannot be decoded") from exc
    chunk_bytes = header.chunk_bytes
    if header.size_bytes < 0 or chunk_bytes <= 0 or chunk_bytes & (chunk_bytes - 1):
        raise DamagedEntry("the header's sizes make no sense")
    return header


_PRESENT = bytes([0]) + bytes([1]) * 255


def present_chunks(slots: bytes) -> bytearray:
    """One byte per slot: 0 where it is zero, else 1.

    The eight bytes of all slots are joined by OR as eight long integers: a million chunks
    take milliseconds, where a loop over them would hold up the event loop.
    """
    count = len(slots) // SLOT.size
    if count == 1:
        return bytearray(b"\1" if any(slots) else b"\0")
    joined = 0
    for place in range(SLOT.size):
        joined |= int.from_bytes(slots[place :: SLOT.size], "little")
    return bytearray(joined.to_bytes(count, "little").translate(_PRESENT))


def open_file(path: str | Path, flags: int) -> int:
    """Open below the cache directory: private, never through a symbolic link.  Raises OSError."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


# Segments' records.


class Record(NamedTuple):
    """One record of a segment; offsets count from the start of the segment's file."""

    offset: int
    header: EntryHeader
    data_offset: int
    data_bytes: int
    data_hash: int
    live: bool

    @property
    def end(self) -> int:
        return aligned(self.data_offset + self.data_bytes)

    def moved_to(self, offset: int) -> "Record":
        data_offset = offset + self.data_offset - self.offset
        return self._replace(offset=offset, data_offset=data_offset)


def aligned(offset: int) -> int:
    return -(-offset // 8) * 8


def encode_record(header: EntryHeader, data: bytes) -> tuple[bytes, Record]:
    """The bytes of a record, padded to where the next one begins, and what they say (as if at
    offset 0)."""
    encoded = _encode_header(header)
    data_hash = chunk_hash(data)
    record = record_head(encoded, data_bytes=len(data), data_hash=data_hash) + data
    said = Record(
        offset=0,
        header=header,
        data_offset=RECORD_HEAD_BYTES + len(encoded),
        data_bytes=len(data),
        data_hash=data_hash,
        live=True,
    )
    return record + bytes(-len(record) % 8), said


def record_head(encoded: bytes, *, data_bytes: int, data_hash: int) -> bytes:
    rest = _RECORD.pack(LIVE, len(encoded), data_bytes, data_hash, 0)[4:-8]
    own_hash = xxhash.xxh3_64_intdigest(rest + encoded)
    return _RECORD.pack(LIVE, len(encoded), data_bytes, data_hash, own_hash) + encoded


def rewrite_head(record: Record, *, data_hash: int) -> bytes:
    """The head of ``record`` for data that hashes to ``data_hash``: as long as it was."""
    encoded = _encode_header(record.header)
    return record_head(encoded, data_bytes=record.data_bytes, data_hash=data_hash)


def decode_record(data: bytes | memoryview, offset: int) -> Record | None:
    """The record whose head ``data`` begins with, or None where there is none that is whole.

    ``data`` needs to hold the head and the header; a header that is cut short is None too.
    """
    if len(data) < RECORD_HEAD_BYTES:
        return None
    mark, header_bytes, data_bytes, data_hash, own_hash = _RECORD.unpack_from(data)
    if mark not in (LIVE, DEAD) or len(data) < RECORD_HEAD_BYTES + header_bytes:
        return None
    encoded = bytes(data[RECORD_HEAD_BYTES : RECORD_HEAD_BYTES + header_bytes])
    rest = bytes(data[4 : RECORD_HEAD_BYTES - 8])
    if xxhash.xxh3_64_intdigest(rest + encoded) != own_hash:
        return None
    try:
        header = decode_header(encoded)
    except DamagedEntry:
        return None
    return Record(
        offset=offset,
        header=header,
        data_offset=offset + RECORD_HEAD_BYTES + header_bytes,
        data_bytes=data_bytes,
        data_hash=data_hash,
        live=mark == LIVE,
    )


def header_bytes_of(head: bytes) -> int:
    """How long the header is that follows this head of a record, as far as the head is right."""
    return int(_RECORD.unpack_from(head)[1])
