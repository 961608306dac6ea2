"""What the cache asks of the file system under it: where it may lie, holes, allocated bytes.

Not a layer over os: only the calls that Python lacks, and one judgement (is this local?).
Plain blocking functions without state; any thread may call them.
"""

import ctypes
import errno
import os
from pathlib import Path

from stagefs.errors import UnsuitableState

# statfs(2) f_type of file systems that other machines share, with the word for the message.
# Values from statfs(2) and linux/magic.h, the last four from the projects themselves.
_NETWORK_TYPES = {
    0x6969: "NFS",
    0x517B: "SMB",
    0xFF534D42: "CIFS",
    0xFE534D42: "SMB",
    0x01021997: "9P",
    0x5346414F: "AFS",
    0x6B414653: "AFS",
    0x00C36400: "Ceph",
    0x73757245: "Coda",
    0x7461636F: "OCFS2",
    0x01161970: "GFS2",
    0x20030528: "OrangeFS",
    0x0BD00BD0: "Lustre",
    0x47504653: "GPFS",
    0x19830326: "BeeGFS",
    0xAAD7AAEA: "PanFS",
}
_FUSE_TYPE = 0x65735546
# FUSE file systems that keep their files on this machine; all others are taken for remote.
_LOCAL_FUSE_TYPES = {"fuseblk", "fuse.fuse-overlayfs", "fuse.bindfs", "fuse.mergerfs"}

_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.statfs.argtypes = [ctypes.c_char_p, ctypes.c_void_p]


def refuse_network_file_system(path: Path, *, what: str = "directory") -> None:
    """Raise UnsuitableState when ``path`` (or, while it is not there, the nearest parent that
    is) lies on a file system that other machines share.

    SQLite's write-ahead log and flock are not to be trusted there, and a cache on it would
    fetch every byte twice over the network.  ``what`` names the directory in the message.
    """
    existing = path.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    kind = _network_kind(existing)
    if kind is not None:
        raise UnsuitableState(
            f"the {what} {path} lies on a network file system ({kind}), where locks and SQLite"
            " are not safe: choose a directory on a local disk"
        )


def _network_kind(path: Path) -> str | None:
    # struct statfs begins with the type, one machine word; 256 bytes hold the rest everywhere.
    answer = ctypes.create_string_buffer(256)
    if _libc.statfs(os.fsencode(path), answer) != 0:
        number = ctypes.get_errno()
        raise UnsuitableState(f"cannot examine {path}: {os.strerror(number)}")
    magic = ctypes.c_ulong.from_buffer(answer).value & 0xFFFFFFFF
    if magic == _FUSE_TYPE:
        fuse_type = _mounted_type(path)
        return None if fuse_type in _LOCAL_FUSE_TYPES else fuse_type
    return _NETWORK_TYPES.get(magic)


def _mounted_type(path: Path) -> str:
    """The file system type as mounted (``fuse.sshfs``), found by device number in mountinfo."""
    device = path.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return "fuse"
    for line in reversed(lines):
        head, _, tail = line.partition(" - ")
        if head.split(" ", 3)[2] == wanted:
            return tail.split(" ", 1)[0]
    return "fuse"


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
