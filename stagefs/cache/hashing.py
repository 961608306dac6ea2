"""Hashing a span of an open file: what a chunk's slot is compared with.

Reads through a buffer of the thread's own.  Not mmap: a file that is cut short while it is
mapped kills the process with SIGBUS.  xxhash lets other threads run while it works.
"""

import os
import threading

import xxhash

_BUFFER_BYTES = 1 << 20
_buffers = threading.local()


def slot_of(fd: int, offset: int, length: int) -> int:
    """The slot for ``length`` bytes at ``offset``: their xxh3-64, or 1 where that is 0.

    Blocking.  Raises OSError, also when the file is too short.
    """
    buffer: memoryview | None = getattr(_buffers, "view", None)
    if buffer is None:
        buffer = _buffers.view = memoryview(bytearray(_BUFFER_BYTES))
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
