"""One local file: its descriptor, which of its bytes are its own, and who is at work on it.

What a byte at ``offset`` is: below ``base_bytes`` and in a chunk that is not here, the base's;
anything else, the real file's (holes are zeros).  Chunks never stop being here, ``base_bytes``
never rises, and the file is never shorter than it: so truncating and appending need nothing
of the base.

What the disk says after a kill: bytes of a chunk are in the file before its byte in the map.
A cut takes effect with ftruncate; the namespace hears of the smaller ``base_bytes`` after that
and at the latest before the file grows again.  So of what the namespace says no more than the
size of the file counts, and a kill at any step leaves the file as it was or as it shall be.

Power loss is promised for what ``sync`` has covered, and for a chunk as a whole: a chunk that
was changed after the last sync may lose what it had from the base.

Concurrency: trio thread; ``turn`` is for work that waits for the disk.  While it is held
(``busy``) nobody else writes, fills or cuts; those that need not wait look at ``busy`` and
act without awaiting in between.  Readers take no turn: they see each chunk before or after
it came here, which is the same bytes.
"""

import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from stagefs.model import Inode
from stagefs.outputs.local_map import ChunkMap, chunk_count


class Piece:
    """Bytes ``start`` to ``stop`` (exclusive), all of which are the base's or the file's."""

    __slots__ = ("of_base", "start", "stop")

    def __init__(self, start: int, stop: int, *, of_base: bool) -> None:
        self.start = start
        self.stop = stop
        self.of_base = of_base


class LocalFile:
    """``fd`` is -1 until there is a real file.  ``whole``: there is one, all bytes are its own,
    and the namespace knows (the hot path looks at nothing else).  ``used`` and ``holds`` are for
    the table of open files.  ``held_times``: (atime, mtime) to show while only filling
    happens.  ``base_known`` is what the namespace has for ``base_bytes``."""

    __slots__ = (
        "_lock", "_sync_lock", "base_bytes", "base_known", "busy", "chunks", "fd", "filling",
        "held_times", "holds", "inode", "name_synced", "sync_asked", "sync_done",
        "sync_done_data", "used", "whole",
    )  # fmt: skip

    def __init__(self, inode: Inode, base_known: int) -> None:
        self.inode = inode
        self.fd = -1
        self.chunks: ChunkMap | None = None
        self.base_known = base_known
        self.base_bytes = base_known
        self.whole = False
        self.busy = False
        self.used = True
        self.holds = 0
        self.held_times: tuple[int, int] | None = None
        self.filling: dict[int, trio.Event] = {}
        self.name_synced = False
        self.sync_asked = 0
        self.sync_done = 0
        self.sync_done_data = 0
        self._lock: trio.Lock | None = None
        self._sync_lock: trio.Lock | None = None

    def __del__(self) -> None:
        # The last who refers to it closes it: a worker thread may take it out of the table.
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self.fd)
        if self.chunks is not None:
            with contextlib.suppress(OSError):
                os.close(self.chunks.fd)

    def opened(self, fd: int, chunks: ChunkMap | None, *, size_bytes: int) -> None:
        self.fd = fd
        self.chunks = chunks
        self.base_bytes = min(self.base_bytes, size_bytes)
        self.look()

    def look(self) -> None:
        """Find out whether it is whole."""
        self.whole = (
            self.fd >= 0
            and (not self.base_bytes or self.first_absent() is None)
            and not self.base_unsaved
        )

    @property
    def base_unsaved(self) -> bool:
        """The file must not grow before the namespace has heard of ``base_bytes``."""
        return self.base_known > self.base_bytes

    # Turns

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        if self._lock is None:
            self._lock = trio.Lock()
        async with self._lock:
            self.busy = True
            try:
                yield
            finally:
                self.busy = False

    @property
    def sync_lock(self) -> trio.Lock:
        if self._sync_lock is None:
            self._sync_lock = trio.Lock()
        return self._sync_lock

    # What is here.  For files with a descriptor.

    def is_own(self, offset: int, size: int) -> bool:
        """Whether none of these bytes is the base's."""
        stop = min(offset + size, self.base_bytes)
        if offset >= stop:
            return True
        chunks = self.chunks
        assert chunks is not None
        first, last = offset >> chunks.shift, ((stop - 1) >> chunks.shift) + 1
        return chunks.state.count(1, first, last) == last - first

    def pieces(self, offset: int, stop: int) -> list[Piece]:
        """Bytes ``offset`` to ``stop`` (exclusive), in order."""
        if self.fd < 0:
            return [Piece(offset, stop, of_base=True)]
        found: list[Piece] = []
        chunks = self.chunks
        while offset < min(stop, self.base_bytes):
            assert chunks is not None
            chunk = offset >> chunks.shift
            end = min((chunk + 1) << chunks.shift, self.base_bytes, stop)
            of_base = not chunks.state[chunk]
            if found and found[-1].of_base == of_base:
                found[-1].stop = end
            else:
                found.append(Piece(offset, end, of_base=of_base))
            offset = end
        if offset < stop:
            if found and not found[-1].of_base:
                found[-1].stop = stop
            else:
                found.append(Piece(offset, stop, of_base=False))
        return found

    def base_part(self, chunk: int) -> tuple[int, int]:
        """Where the base's bytes of a chunk begin and end; the end may be before the start."""
        chunks = self.chunks
        assert chunks is not None
        return chunk << chunks.shift, min((chunk + 1) << chunks.shift, self.base_bytes)

    def first_absent(self) -> int | None:
        chunks = self.chunks
        if chunks is None:
            return None
        found = chunks.state.find(0, 0, chunk_count(self.base_bytes, chunks.shift))
        return None if found < 0 else found

    def absent_bytes(self) -> int:
        """How many bytes show through."""
        chunks = self.chunks
        if self.fd < 0 or chunks is None:
            return self.base_bytes if self.fd < 0 else 0
        count = chunk_count(self.base_bytes, chunks.shift)
        absent = chunks.state.count(0, 0, count) << chunks.shift
        if count and not chunks.state[count - 1]:
            absent -= (count << chunks.shift) - self.base_bytes
        return absent

    # Writing

    def to_fill(self, offset: int, stop: int) -> int | None:
        """A chunk that needs bytes of the base before ``offset`` to ``stop`` can be written."""
        if offset >= self.base_bytes:
            return None
        chunks = self.chunks
        assert chunks is not None
        first = offset >> chunks.shift
        last = (min(stop, self.base_bytes) - 1) >> chunks.shift
        for chunk in (first, last):
            start, end = self.base_part(chunk)
            if not chunks.state[chunk] and (offset > start or stop < end):
                return chunk
        return None

    def wrote(self, offset: int, size: int) -> int:
        """Mark what was just written, which needed no filling; returns how much of it counts: a
        chunk that is not here and of which only a part was written is as if nothing was.
        Raises OSError."""
        chunks = self.chunks
        stop = offset + size
        if chunks is None or offset >= self.base_bytes:
            return size
        first = offset >> chunks.shift
        last = (min(stop, self.base_bytes) - 1) >> chunks.shift
        start, end = self.base_part(last)
        if stop < end and not chunks.state[last]:
            stop = start
            last -= 1
        if last >= first:
            chunks.mark(first, last + 1 - first)
            self.look()
        return max(0, stop - offset)

    def cut(self, size_bytes: int) -> None:
        """The real file has this size now."""
        if size_bytes < self.base_bytes:
            self.base_bytes = size_bytes
            self.look()

    def saved(self, base_bytes: int) -> None:
        """The namespace knows."""
        self.base_known = base_bytes
        self.look()
