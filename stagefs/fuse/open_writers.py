"""Which open files may be written to: a table in the shared memory, so that it outlives a daemon.

For: refusing to publish a file that somebody still has open for writing (a mapping counts: it
keeps its file open).  Not for reading handles, and not for content.

Concurrency: event loop of the one daemon that maps the memory.  A slot is published by its
first word, written last, and freed by the same word, so a kill between two stores leaves
either no slot or a whole one.

A slot is two words: the handle (which holds the inode), and ``thread << 1 | answered``, with the
highest bit set once it is closed and what follows from that is not yet done.
An OPEN that was counted and whose answer the kernel never got is sent again and would count
twice: slots that are not ``answered`` and whose thread sends an OPEN again are dropped when
the next daemon begins (without RESEND, where nobody knows which come again, all of those).
"""

import collections
from collections.abc import Callable

from stagefs.errors import NoSpace
from stagefs.fuse.operations_log import (
    MEMORY_BYTES,
    RESENT_LISTED,
    RESENT_OFFSET,
    RESENT_UNKNOWN,
    W_RESENT_COUNT,
    W_RESENT_MODE,
)
from stagefs.model import Handle, Inode

WRITERS_OFFSET = 434176
WRITER_WORDS = 2
WRITERS_MAX = (MEMORY_BYTES - WRITERS_OFFSET) // (8 * WRITER_WORDS)
INODE_MASK = (1 << 40) - 1
_OPEN, _CREATE = 14, 35
_CLOSED = 1 << 63


class OpenWriters:
    """``words``: the shared memory.  ``call_soon`` runs a callable after the answer was written."""

    def __init__(
        self, words: memoryview, *, call_soon: Callable[[Callable[[], None]], object]
    ) -> None:
        self._words = words
        self._call_soon = call_soon
        self._slots: dict[Handle, int] = {}
        self._counts: collections.Counter[Inode] = collections.Counter()
        self._begun: list[Handle] = []
        self._closed: list[Handle] = []
        mode = words[W_RESENT_MODE]
        resent = self._threads_opening() if mode == RESENT_LISTED else set()
        self._free = []
        start = WRITERS_OFFSET // 8
        for slot in range(start, start + WRITERS_MAX * WRITER_WORDS, WRITER_WORDS):
            handle, state = words[slot], words[slot + 1]
            unanswered = not state & (_CLOSED | 1)
            if not handle or (unanswered and (mode == RESENT_UNKNOWN or state >> 1 in resent)):
                words[slot] = 0
                self._free.append(slot)
            elif state & _CLOSED:
                self._slots[Handle(handle)] = slot
                self._closed.append(Handle(handle))
            else:
                words[slot + 1] |= 1
                self._slots[Handle(handle)] = slot
                self._counts[Inode(handle & INODE_MASK)] += 1

    def _threads_opening(self) -> set[int]:
        start = RESENT_OFFSET // 8
        listed = self._words[start : start + self._words[W_RESENT_COUNT]]
        return {word >> 32 for word in listed if word & 0xFFFFFFFF in (_OPEN, _CREATE)}

    def __contains__(self, handle: Handle) -> bool:
        return handle in self._slots

    def add(self, handle: Handle, thread: int) -> None:
        """Count a handle that is about to be answered.  Raises NoSpace beyond WRITERS_MAX."""
        if not self._free:
            raise NoSpace(
                f"{WRITERS_MAX} files are open for writing in this mount, which is the limit: "
                "close some."
            )
        slot = self._slots[handle] = self._free.pop()
        self._words[slot + 1] = thread << 1
        self._words[slot] = handle
        self._counts[Inode(handle & INODE_MASK)] += 1
        self._begun.append(handle)
        if len(self._begun) == 1:
            self._call_soon(self._answered)

    def close(self, handle: Handle) -> None:
        """It counts no more; ``remove`` it when what follows from that is done."""
        slot = self._slots.get(handle)
        if slot is not None and not self._words[slot + 1] & _CLOSED:
            self._words[slot + 1] |= _CLOSED
            self._uncount(handle)

    def closed(self) -> list[Handle]:
        """Those that an earlier daemon closed, and did not remove."""
        return list(self._closed)

    def remove(self, handle: Handle) -> None:
        self.close(handle)
        slot = self._slots.pop(handle, None)
        if slot is not None:
            self._words[slot] = 0
            self._free.append(slot)

    def _uncount(self, handle: Handle) -> None:
        inode = Inode(handle & INODE_MASK)
        self._counts[inode] -= 1
        if not self._counts[inode]:
            del self._counts[inode]

    def count(self, inode: Inode) -> int:
        """How many handles may write to the file."""
        return self._counts.get(inode, 0)

    def inodes(self) -> list[Inode]:
        return list(self._counts)

    def _answered(self) -> None:
        for handle in self._begun:
            slot = self._slots.get(handle)
            if slot is not None:
                self._words[slot + 1] |= 1
        self._begun.clear()
