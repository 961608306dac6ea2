"""Hashing a span of an open file, or bytes on their way into it: what a chunk's slot is
compared with.

Reads through a buffer of the thread's own.  Not mmap: a file that is cut short while it is
mapped kills the process with SIGBUS.  xxhash lets other threads run while it works.
"""

import os
import threading

import xxhash

from stagefs.page_buffer import page_buffer

_BUFFER_BYTES = 1 << 20
_buffers = threading.local()


def slot_of(fd: int, offset: int, length: int) -> int:
    """The slot for ``length`` bytes at ``offset``: their xxh3-64, or 1 where that is 0.

    Blocking.  Raises OSError, also when the file is too short.
    """
    buffer: memoryview | None = getattr(_buffers, "view", None)
    if buffer is None:
        buffer = _buffers.view = page_buffer(_BUFFER_BYTES)
    if length <= _BUFFER_BYTES and os.preadv(fd, [buffer[:length]], offset) == length:
        return xxhash.xxh3_64_intdigest(buffer[:length]) or 1
    digest = xxhash.xxh3_64()
    done = 0
    while done < length:
        view = buffer[: min(_BUFFER_BYTES, length - done)]
        got = os.preadv(fd, [view], offset + done)
        if got == 0:
            raise OSError(f"the file ends at byte {offset + done}")
        digest.update(view[:got])
        done += got
    return digest.intdigest() or 1


class PassingSlots:
    """Slots of the chunks of one object whose bytes pass by in memory before anyone asks.

    ``passed`` is called by one thread at a time; ``take`` by any.
    """

    __slots__ = ("_chunk_bytes", "_digest", "_next", "_size_bytes", "_slots")

    def __init__(self, *, size_bytes: int, chunk_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._chunk_bytes = chunk_bytes
        self._slots: dict[int, int] = {}
        self._digest = xxhash.xxh3_64()
        # Up to where the digest's chunk is complete; -1: no chunk has been seen from its start.
        self._next = -1

    def passed(self, start: int, data: memoryview) -> None:
        """``data`` was written at byte ``start``.  A chunk that is not seen whole and in order gets
        no slot, and loses one that it had."""
        while data:
            chunk, within = divmod(start, self._chunk_bytes)
            stop = min((chunk + 1) * self._chunk_bytes, self._size_bytes)
            piece = data[: max(stop - start, 0)]
            if not piece:
                return
            self._pass(chunk, start, piece, first=not within, last=start + len(piece) == stop)
            start += len(piece)
            data = data[len(piece) :]

    def _pass(self, chunk: int, start: int, piece: memoryview, *, first: bool, last: bool) -> None:
        if first:
            self._slots.pop(chunk, None)
            if last:
                self._slots[chunk] = xxhash.xxh3_64_intdigest(piece) or 1
                return
            self._digest.reset()
        elif start != self._next:
            self._slots.pop(chunk, None)
            self._next = -1
            return
        self._digest.update(piece)
        self._next = start + len(piece)
        if last:
            self._slots[chunk] = self._digest.intdigest() or 1

    def take(self, chunk: int) -> int | None:
        """The slot of a chunk, once; None when it has to be read back."""
        return self._slots.pop(chunk, None)
