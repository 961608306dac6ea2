"""An object's chunks in memory, for when the cache disk is full, read-only or broken.

Has the face of a cache entry, so that reading does not know the difference.  The bytes lie
in an anonymous sparse file (memfd), because that is what remotes write into; all volatile
entries together keep at most ``VolatileBudget.limit_bytes``, oldest chunks are punched first.
Trio thread only.
"""

import collections
import ctypes
import os

from stagefs.cache.hashing import PassingSlots
from stagefs.model import CHUNK_BYTES, Checksum, ObjectId

ABSENT, VERIFIED = 0, 2
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class VolatileBudget:
    """First in, first out over the chunks of all volatile entries."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._order: collections.deque[tuple[VolatileEntry, int]] = collections.deque()

    def add(self, entry: "VolatileEntry", chunk: int) -> None:
        self._order.append((entry, chunk))
        self.used_bytes += entry.chunk_bytes
        while self.used_bytes > self.limit_bytes and len(self._order) > 1:
            oldest, oldest_chunk = self._order.popleft()
            self.used_bytes -= oldest.chunk_bytes
            oldest.punch(oldest_chunk)

    def forget(self, entry: "VolatileEntry") -> None:
        kept = [item for item in self._order if item[0] is not entry]
        self.used_bytes -= (len(self._order) - len(kept)) * entry.chunk_bytes
        self._order = collections.deque(kept)


class VolatileEntry:
    """Chunks of one object in a memfd.  ``state`` has ABSENT and VERIFIED only."""

    __slots__ = (
        "_budget", "base", "checksum", "chunk_bytes", "chunk_count", "chunk_shift", "epoch", "fd",
        "key", "mtime_ns", "object_id", "size_bytes", "state", "validator",
    )  # fmt: skip

    def __init__(
        self,
        object_id: ObjectId,
        *,
        size_bytes: int,
        validator: str,
        budget: VolatileBudget,
    ) -> None:
        self.object_id = object_id
        self.key = object_id.key
        self.size_bytes = size_bytes
        self.validator = validator
        self.mtime_ns: int | None = None
        self.checksum: Checksum | None = None
        self.chunk_bytes = CHUNK_BYTES
        self.chunk_shift = CHUNK_BYTES.bit_length() - 1
        self.chunk_count = -(-size_bytes // CHUNK_BYTES)
        self.base = 0
        self.epoch = 0
        self.state = bytearray(self.chunk_count)
        self.fd = os.memfd_create("stagefs-volatile", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size_bytes)
        self._budget = budget

    def commit(
        self, first_chunk: int, count: int = 1, *, passing: PassingSlots | None = None
    ) -> None:
        """Nothing is hashed: these bytes do not outlive the daemon."""
        del passing
        for chunk in range(first_chunk, first_chunk + count):
            self.state[chunk] = VERIFIED
            self._budget.add(self, chunk)

    def reserve(self, first_chunk: int, count: int) -> None:
        """Memory comes page by page."""

    def give_back(self, chunks: list[int]) -> None:
        pass

    def verify(self, chunk: int, count: int = 1) -> bool:
        return self.state.count(VERIFIED, chunk, chunk + count) == count

    def punch(self, chunk: int) -> None:
        self.state[chunk] = ABSENT
        self.epoch += 1
        _libc.fallocate(
            self.fd,
            _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE,
            chunk * self.chunk_bytes,
            self.chunk_bytes,
        )

    def close(self) -> None:
        self._budget.forget(self)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
