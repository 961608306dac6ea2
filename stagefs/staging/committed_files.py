"""What a commit does with the bytes of one output: digest them, and put them where they wait for
their upload.  Blocking, for worker threads; the descriptor is of a whole file that cannot change.
"""

import errno
import hashlib
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

import xxhash

from stagefs.errors import NoSpace, StageFSError, StateFailed
from stagefs.model import MIB, Checksum, ChecksumKind
from stagefs.page_buffer import page_buffer

PIECE_BYTES = MIB
# File systems that have no hard links, or none between these two places, get a copy.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES)


class _Digest(Protocol):
    def update(self, data: memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...


def _digest(kind: ChecksumKind) -> _Digest:
    if kind is ChecksumKind.XXH3:
        return xxhash.xxh3_64()
    if kind is ChecksumKind.SHA256:
        return hashlib.sha256()
    return hashlib.md5(usedforsecurity=False)


def digests(
    fd: int, kinds: Collection[ChecksumKind], progress: Callable[[int], None]
) -> tuple[int, list[Checksum]]:
    """Size and checksums.  ``progress`` is told the bytes of each piece, and may raise to end it.

    Raises StateFailed.
    """
    made = [(kind, _digest(kind)) for kind in kinds]
    buffer = page_buffer(PIECE_BYTES)
    offset = 0
    try:
        while count := os.preadv(fd, [buffer], offset):
            for _kind, digest in made:
                digest.update(buffer[:count])
            offset += count
            progress(count)
    except OSError as exc:
        raise _failed(exc, "an output") from exc
    return offset, [Checksum(kind, digest.hexdigest()) for kind, digest in made]


def keep(fd: int, target: Path) -> None:
    """The same bytes under ``target``: a hard link where the file systems can, else a copy.  The
    bytes are synced, the name is left to the caller.  What is there at ``target`` is kept.

    Raises NoSpace, StateFailed.
    """
    try:
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Only with a directory's descriptor does os.link follow the link in /proc.
            os.link(f"/proc/self/fd/{fd}", target.name, dst_dir_fd=directory)
        finally:
            os.close(directory)
    except OSError as exc:
        if exc.errno not in _NO_LINK:
            raise _failed(exc, str(target)) from exc
        _copy(fd, target)


def _copy(source: int, target: Path) -> None:
    try:
        made = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            offset = 0
            while piece := os.pread(source, PIECE_BYTES, offset):
                offset += _write_all(made, piece)
            os.fsync(made)
        except OSError:
            target.unlink(missing_ok=True)
            raise
        finally:
            os.close(made)
    except OSError as exc:
        raise _failed(exc, str(target)) from exc


def _write_all(fd: int, piece: bytes) -> int:
    view = memoryview(piece)
    while view:
        view = view[os.write(fd, view) :]
    return len(piece)


def _failed(exc: OSError, what: str) -> StageFSError:
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"The disk is full, so {what} cannot be kept for its upload: free space.")
    return StateFailed(f"{what} cannot be kept for its upload: {exc.strerror}; check the disk.")
