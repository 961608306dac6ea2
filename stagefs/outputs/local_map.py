"""The chunk map beside a real file: which chunks of it are its own, and no longer its base's.

On disk: eight bytes that name the format, the size of a chunk (64 bits, little endian), then
one byte for each chunk, 1 when it is here; what lies beyond the end of the file is 0.  A byte
only ever goes from 0 to 1, in a single write, so that a kill leaves the one or the other.
"""

import os
import struct
from pathlib import Path

from stagefs.cache.file_system import read_fully, write_fully
from stagefs.errors import NewerFormat, StateFailed

FORMAT = 1
_MAGIC = b"SFSMAP\0"
_HEADER = struct.Struct("<7sBQ")
HERE = b"\1"


class ChunkMap:
    """``state`` has one byte for each chunk that the base has; 1 is here.  ``shift`` is the
    binary logarithm of the size of a chunk."""

    __slots__ = ("_is_dirty", "fd", "shift", "state")

    def __init__(self, fd: int, *, shift: int, state: bytearray) -> None:
        self.fd = fd
        self.shift = shift
        self.state = state
        self._is_dirty = True

    @classmethod
    def make(cls, path: Path | str, *, shift: int, base_bytes: int) -> "ChunkMap":
        """A new map, nothing of which is here.  Raises OSError."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            write_fully(fd, _HEADER.pack(_MAGIC, FORMAT, 1 << shift), 0)
        except OSError:
            os.close(fd)
            raise
        return cls(fd, shift=shift, state=bytearray(chunk_count(base_bytes, shift)))

    @classmethod
    def load(cls, path: Path | str, *, base_bytes: int) -> "ChunkMap":
        """Raises OSError; NewerFormat, StateFailed when the file is no map of ours."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            shift = _checked_shift(path, read_fully(fd, _HEADER.size, 0))
            count = chunk_count(base_bytes, shift)
            state = bytearray(read_fully(fd, count, _HEADER.size).ljust(count, b"\0"))
        except (OSError, NewerFormat, StateFailed):
            os.close(fd)
            raise
        return cls(fd, shift=shift, state=state)

    def mark(self, first: int, count: int) -> None:
        """Remember that chunks are here; their bytes are in the file already.  Raises OSError."""
        if self.state.count(1, first, first + count) == count:
            return
        here = HERE * count
        write_fully(self.fd, here, _HEADER.size + first)
        self.state[first : first + count] = here
        self._is_dirty = True

    def sync(self) -> None:
        """Blocking.  What is marked while this runs is written by the next call."""
        if self._is_dirty:
            self._is_dirty = False
            try:
                os.fsync(self.fd)
            except OSError:
                self._is_dirty = True
                raise


def chunk_count(size_bytes: int, shift: int) -> int:
    return (size_bytes + (1 << shift) - 1) >> shift


def _checked_shift(path: Path | str, header: bytes) -> int:
    if len(header) == _HEADER.size:
        magic, version, chunk_bytes = _HEADER.unpack(header)
        if magic == _MAGIC and version > FORMAT:
            raise NewerFormat(
                f"The chunk map {path} was written by a later StageFS (format {version}, this one "
                f"knows {FORMAT}): use that release."
            )
        if magic == _MAGIC and version == FORMAT and chunk_bytes.bit_count() == 1:
            return int(chunk_bytes.bit_length() - 1)
    raise StateFailed(
        f"The chunk map {path} is damaged: what was written to that file cannot be told from "
        "what it was copied from; restore it from a backup, or remove the file in the mount."
    )
