"""The few messages of the FUSE protocol that the supervisor reads or writes itself.

Layouts and constants are those of Linux ``include/uapi/linux/fuse.h`` (protocol 7.38;
NOTIFY_RESEND from 7.40).  Not for file-system requests: those are libfuse's.
"""

import errno
import os
import struct
from typing import NamedTuple

INIT = 26
NOTIFY_RESEND = 7
RESENT_BIT = 1 << 63
INIT_MINOR_MAX = 38
REQUEST_BYTES_MAX = (1 << 20) + (1 << 16)
MAX_WRITE_BYTES = 1 << 20
MAX_BACKGROUND = 1000
CONGESTION_THRESHOLD = 750

# What the kernel is told that this file system does.  Not among them, on purpose:
# POSIX_LOCKS and FLOCK_LOCKS (locks stay in the kernel and cost no request),
# READDIRPLUS_AUTO (attributes are always sent), AUTO_INVAL_DATA (an inode's content is one
# version for ever), WRITEBACK_CACHE, SETXATTR_EXT (libfuse 3.14 does not know its layout).
ASYNC_READ = 1 << 0
ATOMIC_O_TRUNC = 1 << 3
BIG_WRITES = 1 << 5
DO_READDIRPLUS = 1 << 13
ASYNC_DIO = 1 << 15
PARALLEL_DIROPS = 1 << 18
MAX_PAGES = 1 << 22
HANDLE_KILLPRIV_V2 = 1 << 28
WANTED_FLAGS = (
    ASYNC_READ
    | ATOMIC_O_TRUNC
    | BIG_WRITES
    | DO_READDIRPLUS
    | ASYNC_DIO
    | PARALLEL_DIROPS
    | MAX_PAGES
    | HANDLE_KILLPRIV_V2
)
INIT_EXT = 1 << 30
HAS_RESEND = 1 << (39 - 32)  # in flags2

_IN_HEADER = struct.Struct("=IIQQIIIHH")  # len opcode unique nodeid uid gid pid extlen padding
_OUT_HEADER = struct.Struct("=IiQ")  # len error unique
_INIT_IN = struct.Struct("=IIIII44x")  # major minor max_readahead flags flags2
_INIT_IN_OLD = struct.Struct("=IIII")  # before 7.36
_INIT_OUT = struct.Struct("=IIIIHHIIHHII24x")


class Request(NamedTuple):
    """The head of one request: who asks (a thread id) for what."""

    opcode: int
    unique: int
    thread: int

    @property
    def resent(self) -> bool:
        return bool(self.unique & RESENT_BIT)


class KernelInit(NamedTuple):
    """The kernel's INIT: what it can do, and the message as it came."""

    unique: int
    major: int
    minor: int
    max_readahead: int
    flags: int
    flags2: int

    @property
    def can_resend(self) -> bool:
        """Whether FUSE_NOTIFY_RESEND exists (kernel 6.9 and later)."""
        return bool(self.flags & INIT_EXT and self.flags2 & HAS_RESEND)


def parse_request(message: bytes | memoryview) -> Request:
    _, opcode, unique, _, _, _, thread, _, _ = _IN_HEADER.unpack_from(message)
    return Request(opcode, unique, thread)


def parse_init(message: bytes) -> KernelInit:
    """Raises ValueError for anything that is not an INIT of protocol 7."""
    request = parse_request(message)
    if request.opcode != INIT:
        raise ValueError(f"the kernel's first request is opcode {request.opcode}, not INIT")
    body = message[_IN_HEADER.size :]
    if len(body) >= _INIT_IN.size:
        major, minor, readahead, flags, flags2 = _INIT_IN.unpack_from(body)
    else:
        major, minor, readahead, flags = _INIT_IN_OLD.unpack_from(body)
        flags2 = 0
    if major != 7:
        raise ValueError(f"the kernel speaks FUSE protocol {major}.{minor}, not 7")
    return KernelInit(request.unique, major, minor, readahead, flags, flags2)


def init_reply(init: KernelInit) -> bytes:
    """The answer to INIT.  Everything that all daemons of this mount must agree with."""
    body = _INIT_OUT.pack(
        7,
        min(init.minor, INIT_MINOR_MAX),
        init.max_readahead,
        init.flags & WANTED_FLAGS,
        MAX_BACKGROUND,
        CONGESTION_THRESHOLD,
        MAX_WRITE_BYTES,
        1,  # time granularity in ns
        MAX_WRITE_BYTES // os.sysconf("SC_PAGE_SIZE"),
        0,  # map alignment
        0,  # flags2: none wanted, so INIT_EXT is not set either
        0,  # max stack depth
    )
    return _OUT_HEADER.pack(_OUT_HEADER.size + len(body), 0, init.unique) + body


def replayed_init(init: KernelInit) -> bytes:
    """INIT as each daemon's libfuse gets it: offering only what the kernel was told.

    libfuse then cannot rely on a capability that another version of it would have asked
    for and this mount does not have.
    """
    body = _INIT_IN.pack(
        7, min(init.minor, INIT_MINOR_MAX), init.max_readahead, init.flags & WANTED_FLAGS, 0
    )
    head = _IN_HEADER.pack(_IN_HEADER.size + len(body), INIT, init.unique, 0, 0, 0, 0, 0, 0)
    return head + body


def resend_notice() -> bytes:
    return _OUT_HEADER.pack(_OUT_HEADER.size, NOTIFY_RESEND, 0)


def stale_reply(unique: int) -> bytes:
    return error_reply(unique, errno.ESTALE)


def error_reply(unique: int, code: int) -> bytes:
    return _OUT_HEADER.pack(_OUT_HEADER.size, -code, unique)
