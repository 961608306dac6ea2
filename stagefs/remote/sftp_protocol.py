"""SFTP version 3 as bytes: requests to send, answers to read.

After draft-ietf-secsh-filexfer-02 and, for what ends in ``@openssh.com``, OpenSSH's PROTOCOL
file.  Only what reading and writing whole files need.  Pure functions on bytes, without I/O
and without state; used in the engine process only.  Everything a server sent may be wrong:
each parser raises ProtocolError instead of believing it.
"""

import enum
import stat
import struct
from typing import NamedTuple

PROTOCOL_VERSION = 3
# OpenSSH refuses larger packets (SFTP_MAX_MSG_LENGTH); no answer to a request of ours is larger.
PACKET_BYTES_MAX = 256 << 10
# What a server without limits@openssh.com must be able to send (section 3 of the draft).
READ_BYTES_UNLIMITED = 32 << 10
READ_BYTES_MAX = 255 << 10
# Likewise of what it must be able to take.
WRITE_BYTES_UNLIMITED = 32 << 10
WRITE_BYTES_MAX = 255 << 10
LIMITS_EXTENSION = b"limits@openssh.com"
FSYNC_EXTENSION = b"fsync@openssh.com"
HARDLINK_EXTENSION = b"hardlink@openssh.com"
RENAME_EXTENSION = b"posix-rename@openssh.com"
STATVFS_EXTENSION = b"statvfs@openssh.com"

HEADER = struct.Struct(">IBI")
"""Length of what follows the length field, type, request id."""


class Kind(enum.IntEnum):
    """Packet types (SSH_FXP_*)."""

    INIT = 1
    VERSION = 2
    OPEN = 3
    CLOSE = 4
    READ = 5
    WRITE = 6
    FSTAT = 8
    SETSTAT = 9
    FSETSTAT = 10
    OPENDIR = 11
    READDIR = 12
    REMOVE = 13
    MKDIR = 14
    STAT = 17
    RENAME = 18
    STATUS = 101
    HANDLE = 102
    DATA = 103
    NAME = 104
    ATTRS = 105
    EXTENDED = 200
    EXTENDED_REPLY = 201


class Status(enum.IntEnum):
    """Error codes (SSH_FX_*)."""

    OK = 0
    EOF = 1
    NO_SUCH_FILE = 2
    PERMISSION_DENIED = 3
    FAILURE = 4
    BAD_MESSAGE = 5
    NO_CONNECTION = 6
    CONNECTION_LOST = 7
    OP_UNSUPPORTED = 8


class ProtocolError(Exception):
    """The server sent what SFTP does not allow.  The session cannot go on."""


class Attributes(NamedTuple):
    """What a server says of a file; None for what it leaves out.  ``mode`` has the file type."""

    size: int | None
    mode: int | None
    mtime_s: int | None

    @property
    def is_regular(self) -> bool:
        return self.mode is None or stat.S_IFMT(self.mode) in (stat.S_IFREG, 0)

    @property
    def is_directory(self) -> bool:
        return self.mode is not None and stat.S_ISDIR(self.mode)

    @property
    def is_symlink(self) -> bool:
        return self.mode is not None and stat.S_ISLNK(self.mode)

    @property
    def validator(self) -> str:
        """Fixes the content as far as SFTP v3 can tell: its times are whole seconds."""
        return f"mtime:{self.mtime_s or 0}:{self.size or 0}"


class Limits(NamedTuple):
    read_bytes: int
    open_handles: int
    write_bytes: int = WRITE_BYTES_UNLIMITED


class Space(NamedTuple):
    """What is left of the file system of a path."""

    free_bytes: int
    free_files: int
    read_only: bool


_ATTRIBUTE_SIZE = 0x1
_ATTRIBUTE_UIDGID = 0x2
_ATTRIBUTE_PERMISSIONS = 0x4
_ATTRIBUTE_TIMES = 0x8
_ATTRIBUTE_EXTENDED = 0x80000000
_U32 = struct.Struct(">I")
_U64 = struct.Struct(">Q")
# All that OpenSSH sends: flags, size, uid, gid, permissions, atime, mtime.
_ALL_ATTRIBUTES = struct.Struct(">IQIIIII")
_ALL_FLAGS = 0xF
_OPEN_READ = 0x1
_OPEN_WRITE = 0x2
_OPEN_CREATE = 0x8
_OPEN_EXCLUSIVE = 0x20
_STATVFS = struct.Struct(">QQQQQQQQQQQ")
_STATVFS_READ_ONLY = 0x1


# Requests


def initialize() -> bytes:
    return struct.pack(">IBI", 5, Kind.INIT, PROTOCOL_VERSION)


def open_for_reading(request: int, path: bytes) -> bytes:
    length = len(path)
    head = struct.pack(">IBII", 17 + length, Kind.OPEN, request, length)
    return head + path + struct.pack(">II", _OPEN_READ, 0)


def open_new(request: int, path: bytes, mode: int | None) -> bytes:
    """A file that does not exist yet, for writing and reading."""
    flags = _OPEN_READ | _OPEN_WRITE | _OPEN_CREATE | _OPEN_EXCLUSIVE
    body = struct.pack(">I", len(path)) + path + struct.pack(">I", flags) + _mode_only(mode)
    return struct.pack(">IBI", 5 + len(body), Kind.OPEN, request) + body


def make_directory(request: int, path: bytes) -> bytes:
    body = struct.pack(">I", len(path)) + path + _mode_only(None)
    return struct.pack(">IBI", 5 + len(body), Kind.MKDIR, request) + body


def set_mode(request: int, handle: bytes, mode: int) -> bytes:
    body = struct.pack(">I", len(handle)) + handle + _mode_only(mode)
    return struct.pack(">IBI", 5 + len(body), Kind.FSETSTAT, request) + body


def set_times(request: int, path: bytes, mtime_s: int) -> bytes:
    """Both times of a file: the protocol sets none alone."""
    body = struct.pack(">I", len(path)) + path
    body += struct.pack(">III", _ATTRIBUTE_TIMES, mtime_s, mtime_s)
    return struct.pack(">IBI", 5 + len(body), Kind.SETSTAT, request) + body


def write_header(request: int, handle: bytes, offset: int, length: int) -> bytes:
    """What comes before the ``length`` bytes of a WRITE."""
    size = 21 + len(handle) + length
    head = struct.pack(">IBII", size, Kind.WRITE, request, len(handle))
    return head + handle + struct.pack(">QI", offset, length)


def rename(request: int, old: bytes, new: bytes) -> bytes:
    body = _strings(old, new)
    return struct.pack(">IBI", 5 + len(body), Kind.RENAME, request) + body


def _mode_only(mode: int | None) -> bytes:
    if mode is None:
        return struct.pack(">I", 0)
    return struct.pack(">II", _ATTRIBUTE_PERMISSIONS, mode)


def _strings(*parts: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)


def on_path(kind: Kind, request: int, path: bytes) -> bytes:
    """STAT, OPENDIR or REMOVE."""
    return struct.pack(">IBII", 9 + len(path), kind, request, len(path)) + path


def on_handle(kind: Kind, request: int, handle: bytes) -> bytes:
    """FSTAT, READDIR or CLOSE."""
    return struct.pack(">IBII", 9 + len(handle), kind, request, len(handle)) + handle


def read(request: int, handle: bytes, offset: int, length: int) -> bytes:
    head = struct.pack(">IBII", 21 + len(handle), Kind.READ, request, len(handle))
    return head + handle + struct.pack(">QI", offset, length)


def extended(request: int, name: bytes, *arguments: bytes) -> bytes:
    """``fsync@openssh.com`` takes a handle, ``statvfs`` a path, the others old and new path."""
    body = _strings(name, *arguments)
    return struct.pack(">IBI", 5 + len(body), Kind.EXTENDED, request) + body


# Answers: ``body`` is what follows the request id.


def string(body: memoryview, at: int = 0) -> tuple[bytes, int]:
    """A string and the position behind it."""
    try:
        (length,) = _U32.unpack_from(body, at)
    except struct.error as exc:
        raise ProtocolError("a packet ends within a string's length") from exc
    stop = at + 4 + length
    if stop > len(body):
        raise ProtocolError("a string is longer than its packet")
    return bytes(body[at + 4 : stop]), stop


def status(body: memoryview) -> tuple[int, str]:
    """Error code and message.  Some servers leave the message out."""
    try:
        (code,) = _U32.unpack_from(body)
    except struct.error as exc:
        raise ProtocolError("a status without a code") from exc
    message = string(body, 4)[0] if len(body) > 4 else b""
    return code, message.decode("utf-8", "replace")


def attributes(body: memoryview, at: int = 0) -> tuple[Attributes, int]:
    """Attributes and the position behind them."""
    try:
        (flags,) = _U32.unpack_from(body, at)
        if flags == _ALL_FLAGS:
            _, size, _, _, mode, _, mtime = _ALL_ATTRIBUTES.unpack_from(body, at)
            return Attributes(size, mode, mtime), at + _ALL_ATTRIBUTES.size
        return _some_attributes(body, at + 4, flags)
    except struct.error as exc:
        raise ProtocolError("a packet ends within attributes") from exc


def _some_attributes(body: memoryview, at: int, flags: int) -> tuple[Attributes, int]:
    size = mode = mtime = None
    if flags & _ATTRIBUTE_SIZE:
        (size,) = _U64.unpack_from(body, at)
        at += 8
    if flags & _ATTRIBUTE_UIDGID:
        at += 8
    if flags & _ATTRIBUTE_PERMISSIONS:
        (mode,) = _U32.unpack_from(body, at)
        at += 4
    if flags & _ATTRIBUTE_TIMES:
        (mtime,) = _U32.unpack_from(body, at + 4)
        at += 8
    if flags & _ATTRIBUTE_EXTENDED:
        (pairs,) = _U32.unpack_from(body, at)
        at += 4
        for _ in range(2 * pairs):
            _, at = string(body, at)
    return Attributes(size, mode, mtime), at


def names(body: memoryview) -> list[tuple[bytes, Attributes]]:
    """The entries of one READDIR answer."""
    try:
        (count,) = _U32.unpack_from(body)
    except struct.error as exc:
        raise ProtocolError("a listing without a count") from exc
    entries = []
    at = 4
    for _ in range(count):
        name, at = string(body, at)
        _, at = string(body, at)  # the "long name", a line as of ls -l for people
        found, at = attributes(body, at)
        entries.append((name, found))
    return entries


def extensions(body: memoryview) -> dict[bytes, bytes]:
    """The extensions that a VERSION answer announces (``body`` begins behind the version)."""
    found = {}
    at = 0
    while at < len(body):
        name, at = string(body, at)
        found[name], at = string(body, at)
    return found


def limits(body: memoryview) -> Limits:
    """The answer to ``limits@openssh.com``; 0 means unlimited there."""
    try:
        packet, reading, writing, handles = struct.unpack_from(">QQQQ", body)
    except struct.error as exc:
        raise ProtocolError("a limits answer that is too short") from exc
    read_bytes = min(reading or READ_BYTES_MAX, READ_BYTES_MAX)
    write_bytes = min(writing or WRITE_BYTES_MAX, WRITE_BYTES_MAX)
    if packet:
        read_bytes = min(read_bytes, max(packet - 1024, READ_BYTES_UNLIMITED))
        write_bytes = min(write_bytes, max(packet - 1024, WRITE_BYTES_UNLIMITED))
    return Limits(read_bytes=read_bytes, open_handles=handles, write_bytes=write_bytes)


def space(body: memoryview) -> Space:
    """The answer to ``statvfs@openssh.com``."""
    try:
        found = _STATVFS.unpack_from(body)
    except struct.error as exc:
        raise ProtocolError("a statvfs answer that is too short") from exc
    _, unit, _, _, blocks, files, _, free_files, _, flags, _ = found
    # File systems that make inodes as they need them tell zero of zero.
    return Space(
        free_bytes=unit * blocks,
        free_files=free_files if files else 1,
        read_only=bool(flags & _STATVFS_READ_ONLY),
    )
