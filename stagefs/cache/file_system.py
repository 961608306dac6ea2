"""What the cache asks of the file system under it: holes, allocated bytes, whole reads and writes.

Not a layer over os: only what Python lacks.  Plain blocking functions without state; any
thread may call them.
"""

import ctypes
import errno
import os

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def punch(fd: int, start: int, length: int) -> None:
    """Give the blocks of a span back to the file system; it reads as zeros afterwards.

    Raises OSError.  Where the file system cannot punch, nothing is freed and nothing raised:
    the caller has already declared the span absent.
    """
    mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
    while _libc.fallocate(fd, mode, start, length) != 0:
        number = ctypes.get_errno()
        if number == errno.EINTR:
            continue
        if number in (errno.EOPNOTSUPP, errno.ENOSYS):
            return
        raise OSError(number, os.strerror(number))


def reserve(fd: int, start: int, length: int) -> None:
    """Have blocks set aside for a span that is about to be written: the file system then does
    not look for them page by page.  Where it cannot, or will not, nothing happens."""
    _libc.fallocate(fd, _FALLOC_FL_KEEP_SIZE, start, length)


def allocated_bytes(status: os.stat_result) -> int:
    """What the file really takes on disk (st_blocks is in units of 512 bytes everywhere)."""
    return status.st_blocks * 512


def read_fully(fd: int, length: int, offset: int) -> bytes:
    """``length`` bytes from ``offset``, fewer only at the end of the file.  Raises OSError."""
    data = os.pread(fd, length, offset)
    if len(data) == length or not data:
        return data
    parts = [data]
    got = len(data)
    while got < length and (data := os.pread(fd, length - got, offset + got)):
        parts.append(data)
        got += len(data)
    return b"".join(parts)


def write_fully(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """All of ``data`` at ``offset``.  Raises OSError, also when the disk takes only a part."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        offset += written
        view = view[written:]
