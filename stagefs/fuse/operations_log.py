"""The shared memory as a daemon sees it: what must survive it, and nothing else.

For: making operations that change names take effect exactly once although the daemon may
die at any instruction (notes), remembering that a thread's next LOOKUP resolves a copy-up
or a changed version (pending), and counting answers.  Not for names or content: those are
in SQLite and in files.

Concurrency: one daemon maps it at a time; all calls are made on the event loop.  A slot is
published by its first word, written last and in one store, so that a daemon that is killed
between two stores leaves either no slot or a whole one.

Layout version 1, native unsigned 64-bit words.  The header and the list are written by the
supervisor while no daemon lives (``stagefs/supervisor/memory.py``).

=========  ==========================================================================
byte       content
=========  ==========================================================================
0          header: magic, version, answered, next operation, generation, resent mode,
           resent count, start (CLOCK_MONOTONIC ns), 1 where requests are sent again
4096       resent list: 4096 words, thread << 32 | opcode
40960      notes: 4096 slots of 8 words: finished << 32 | thread, operation, digest (2), and twice
           (parent, hash of the name << 1 | 1 when it was there before)
303104     pending: 4096 slots of 4 words: kind << 32 | thread, inode, expiry (ns), sandbox
434176     open writers: 2 words each, up to 1 MiB (``open_writers``)
=========  ==========================================================================
"""

import enum
import mmap
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, NewType

import xxhash

from stagefs.errors import NewerFormat
from stagefs.model import Inode

OperationNumber = NewType("OperationNumber", int)

MAGIC = int.from_bytes(b"STAGEFS\x01", "little")
LAYOUT_VERSION = 1
MEMORY_BYTES = 1 << 20
W_MAGIC, W_VERSION, W_ANSWERED, W_NEXT_OPERATION = 0, 1, 2, 3
W_GENERATION, W_RESENT_MODE, W_RESENT_COUNT, W_STARTED_NS = 4, 5, 6, 7
W_CAN_RESEND = 8
RESENT_OFFSET = 4096
RESENT_MAX = 4096
RESENT_NONE, RESENT_LISTED, RESENT_UNKNOWN = 0, 1, 2
NOTES_OFFSET = 40960
NOTES_MAX, NOTE_WORDS = 4096, 8
NOTE_FINISHED = 1 << 32
PENDING_OFFSET = 303104
PENDING_MAX, PENDING_WORDS = 4096, 4

DIGEST_BYTES = 16
PENDING_LIFE_NS = 5_000_000_000
# The repetitions are the first requests that a daemon gets (or, without RESEND, the kernel
# repeats at once).  A later equal call is a new one.
LEFT_BEHIND_LIFE_NS = 10_000_000_000
# The kernel looks up a name once to see whether it still is what it was, and once more.
LOOKUPS_BEFORE_REPETITION = 2
# SETATTR SYMLINK MKNOD MKDIR UNLINK RMDIR RENAME LINK SETXATTR REMOVEXATTR CREATE RENAME2
NAME_CHANGING_OPCODES = frozenset({4, 6, 8, 9, 10, 11, 12, 13, 21, 24, 35, 45})


class PendingKind(enum.IntFlag):
    """Why a thread was told to walk its path again."""

    COPY_UP = 1
    NEW_VERSION = 2
    RECORD = 4  # the name is wanted, so that it can be said who reads what
    GRANTED = 8  # the name is known: the next OPEN is served, for the sandbox in the fourth word


class NameBefore(NamedTuple):
    """Whether a name that an operation changes was there before it."""

    parent: Inode
    name: bytes
    present: bool


class Notes:
    """Which thread was doing which name-changing operation.  Keyed by thread id.

    Thread id 0 (a caller outside the pid namespace) is nobody: it gets operation numbers,
    leaves no note, and never matches.

    Where the kernel does not send requests again (before 6.9), it walks the path again, and
    so asks for the name first.  If the operation took effect, the truth would end it with
    EEXIST or ENOENT before it is repeated; that LOOKUP must be answered as if the operation
    had not happened yet (``repeated_lookup``).

    A note lives from ``begin`` until just after its answer was written.  Not longer: the
    same thread may rightly ask the same again.
    """

    def __init__(
        self, words: memoryview, *, call_soon: Callable[[Callable[[], None]], object]
    ) -> None:
        self._words = words
        self._call_soon = call_soon
        self._slots: dict[int, int] = {}
        self._finished: list[int] = []
        self._left_behind: set[int] = set()
        self._lookups: dict[tuple[int, int], int] = {}
        self._believe_until_ns = 0
        self._walks_again = not words[W_CAN_RESEND]
        resent = self._resent_threads()
        self._free = []
        for slot in _slots(NOTES_OFFSET, NOTES_MAX, NOTE_WORDS):
            thread = words[slot] & 0xFFFFFFFF
            if thread and (resent is None or thread in resent):
                self._slots[thread] = slot
                self._left_behind.add(thread)
            else:
                words[slot] = 0
                self._free.append(slot)

    def begin(
        self, thread: int, digest: bytes, before: Sequence[NameBefore] = ()
    ) -> OperationNumber:
        """Note what ``thread`` is about to change; returns the number for its transaction.

        ``digest``: DIGEST_BYTES that are equal for a repetition of the same request only.
        ``before``: the (at most two) names it will change, as they are now.
        """
        self._forget_old()
        words = self._words
        number = OperationNumber(words[W_NEXT_OPERATION])
        words[W_NEXT_OPERATION] = number + 1
        self._left_behind.discard(thread)
        slot = self._slot_for(thread)
        if slot is not None:
            words[slot] = 0
            words[slot + 1] = number
            words[slot + 2 : slot + 4] = memoryview(digest).cast("Q")
            if self._walks_again:
                self._write_names(slot, before)
            words[slot] = thread
        return number

    def resent(self, thread: int, digest: bytes) -> OperationNumber | None:
        """The number under which the dead daemon began this very request, if it did.

        Whether it also took effect, the namespace knows.
        """
        if not self._left_behind:
            return None
        self._forget_old()
        if thread not in self._left_behind:
            return None
        self._left_behind.discard(thread)
        slot = self._slots[thread]
        if bytes(self._words[slot + 2 : slot + 4]) != digest:
            self._clear(thread)
            return None
        return OperationNumber(self._words[slot + 1])

    @property
    def expects_repetitions(self) -> bool:
        """Whether ``resent`` and ``left_behind`` can find anything: only just after a death."""
        return bool(self._left_behind)

    def left_behind(self, thread: int, digest: bytes) -> OperationNumber | None:
        """As ``resent``, for a request that only precedes the repetition: the note stays."""
        if thread not in self._left_behind:
            return None
        slot = self._slots[thread]
        if bytes(self._words[slot + 2 : slot + 4]) != digest:
            return None
        return OperationNumber(self._words[slot + 1])

    @property
    def expects_walks(self) -> bool:
        """Whether ``repeated_lookup`` can find anything: only just after a death, before 6.9."""
        return self._walks_again and bool(self._left_behind)

    def repeated_lookup(
        self, thread: int, parent: Inode, name: bytes
    ) -> tuple[OperationNumber, bool] | None:
        """For a LOOKUP: (number, present) when ``thread`` walks again to repeat an operation.

        If the namespace knows that number as applied, the LOOKUP is to be answered as if the
        name were (``present``: the inode that was changed; else ENOENT), without timeouts.
        """
        self._forget_old()
        if thread not in self._left_behind:
            return None
        slot, key = self._slots[thread], _name_key(name)
        for place in (slot + 4, slot + 6):
            if self._words[place] == parent and self._words[place + 1] >> 1 == key:
                count = self._lookups[thread, place] = self._lookups.get((thread, place), 0) + 1
                if count > LOOKUPS_BEFORE_REPETITION:
                    return None
                return OperationNumber(self._words[slot + 1]), bool(self._words[place + 1] & 1)
        return None

    def finish(self, thread: int) -> None:
        """The answer is about to be written: drop the note as soon as it is.

        pyfuse3 writes it before it gives the event loop back, so what ``call_soon``
        schedules runs just after.
        """
        slot = self._slots.get(thread)
        if slot is not None:
            self._words[slot] |= NOTE_FINISHED
            self._finished.append(thread)
            self._call_soon(self.forget_finished)

    def _resent_threads(self) -> set[int] | None:
        """The threads whose change of a name is sent again; None when nobody knows."""
        mode = self._words[W_RESENT_MODE]
        if mode == RESENT_UNKNOWN:
            return None
        if mode == RESENT_NONE:
            return set()
        start = RESENT_OFFSET // 8
        listed = self._words[start : start + self._words[W_RESENT_COUNT]]
        return {word >> 32 for word in listed if word & 0xFFFFFFFF in NAME_CHANGING_OPCODES}

    def _write_names(self, slot: int, before: Sequence[NameBefore]) -> None:
        words = self._words
        words[slot + 4] = words[slot + 6] = 0
        for place, name in zip((slot + 4, slot + 6), before, strict=False):
            words[place] = name.parent
            words[place + 1] = _name_key(name.name) << 1 | name.present

    def _slot_for(self, thread: int) -> int | None:
        slot = self._slots.get(thread)
        if slot is None and thread and self._free:
            slot = self._slots[thread] = self._free.pop()
        return slot

    def _clear(self, thread: int) -> None:
        slot = self._slots.pop(thread, None)
        if slot is not None:
            self._words[slot] = 0
            self._free.append(slot)

    def forget_finished(self) -> None:
        """Drop the notes of operations whose answers have been written by now."""
        if self._finished:
            for thread in self._finished:
                self._clear(thread)
            self._finished.clear()

    def _forget_old(self) -> None:
        """Finished notes, and those left behind whose repetition never came."""
        self.forget_finished()
        if not self._left_behind:
            return
        now = time.monotonic_ns()
        if not self._believe_until_ns:
            self._believe_until_ns = now + LEFT_BEHIND_LIFE_NS
        elif now > self._believe_until_ns:
            for thread in self._left_behind:
                self._clear(thread)
            self._left_behind.clear()


class PendingLookups:
    """(thread, inode) of requests that were answered with ESTALE and come back as LOOKUP.

    At most one for each thread, never for thread id 0.
    """

    def __init__(self, words: memoryview) -> None:
        self._words = words
        self._slots: dict[int, int] = {}
        self._free = []
        now = time.monotonic_ns()
        for slot in _slots(PENDING_OFFSET, PENDING_MAX, PENDING_WORDS):
            if words[slot] and words[slot + 2] > now:
                self._slots[words[slot] & 0xFFFFFFFF] = slot
            else:
                words[slot] = 0
                self._free.append(slot)

    def __bool__(self) -> bool:
        """Whether there are any: lets the usual request skip ``drop`` and ``take``."""
        return bool(self._slots)

    def put(self, thread: int, inode: Inode, kind: PendingKind) -> bool:
        """Remember what the thread's next LOOKUP of ``inode`` means.  False for thread 0."""
        if not thread:
            return False
        self.drop(thread)
        if not self._free:
            self.drop(next(iter(self._slots)))
        slot = self._slots[thread] = self._free.pop()
        words = self._words
        words[slot + 1] = inode
        words[slot + 2] = time.monotonic_ns() + PENDING_LIFE_NS
        words[slot] = int(kind) << 32 | thread
        return True

    def take(self, thread: int, inode: Inode) -> PendingKind | None:
        """What is pending for this thread and inode; it is no longer pending afterwards."""
        slot = self._slots.get(thread)
        if slot is None:
            return None
        words = self._words
        matches = words[slot + 1] == inode and words[slot + 2] > time.monotonic_ns()
        kind = PendingKind(words[slot] >> 32)
        if not matches:
            return None
        self.drop(thread)
        return kind

    def put_record(self, thread: int, inode: Inode) -> bool:
        """``put`` for a thread of which it is wanted in which sandbox it opens the file."""
        return self.put(thread, inode, PendingKind.RECORD)

    def wants_record(self, thread: int, inode: Inode) -> bool:
        slot = self._slot_of(thread, inode)
        return slot is not None and self._words[slot] >> 32 == PendingKind.RECORD

    def asked_name(self, thread: int) -> bool:
        """Whether the thread was sent to look up a name for the record, whatever came of it."""
        slot = self._slots.get(thread)
        return slot is not None and self._words[slot] >> 32 == PendingKind.RECORD

    def grant(self, thread: int, inode: Inode, sandbox: Inode) -> None:
        """The thread's next OPEN of ``inode`` is that of ``sandbox`` (0: of none)."""
        if self.put(thread, inode, PendingKind.GRANTED):
            self._words[self._slots[thread] + 3] = sandbox

    def granted(self, thread: int, inode: Inode) -> Inode | None:
        slot = self._slot_of(thread, inode)
        if slot is None or self._words[slot] >> 32 != PendingKind.GRANTED:
            return None
        return Inode(self._words[slot + 3])

    def sent_back(self, thread: int) -> Inode | None:
        """The file that the thread asked for when it was told to walk again."""
        slot = self._slots.get(thread)
        return None if slot is None else Inode(self._words[slot + 1])

    def _slot_of(self, thread: int, inode: Inode) -> int | None:
        slot = self._slots.get(thread)
        if slot is None:
            return None
        words = self._words
        fits = words[slot + 1] == inode and words[slot + 2] > time.monotonic_ns()
        return slot if fits else None

    def put_copy_up(self, thread: int, inode: Inode) -> bool:
        """``put`` for a thread that wants to write to a shared file."""
        return self.put(thread, inode, PendingKind.COPY_UP)

    def wants_copy_up(self, thread: int, inode: Inode) -> bool:
        """Whether the thread's LOOKUP of ``inode`` is the one that was asked for.  It stays
        pending until ``drop``, so that a daemon that dies meanwhile does not lose it."""
        slot = self._slot_of(thread, inode)
        return slot is not None and bool(PendingKind(self._words[slot] >> 32) & PendingKind.COPY_UP)

    def drop(self, thread: int) -> None:
        """The thread asked something else: its repetition will not come."""
        slot = self._slots.pop(thread, None)
        if slot is not None:
            self._words[slot] = 0
            self._free.append(slot)


class SharedMemory:
    """The mapped memory, its two tables, and the count that tells the supervisor of progress."""

    def __init__(self, fd: int, *, call_soon: Callable[[Callable[[], None]], object]) -> None:
        words = memoryview(mmap.mmap(fd, MEMORY_BYTES)).cast("Q")
        if words[W_MAGIC] != MAGIC or words[W_VERSION] != LAYOUT_VERSION:
            raise NewerFormat(
                f"The supervisor of this mount shares memory of layout {words[W_VERSION]}, and "
                f"this daemon knows layout {LAYOUT_VERSION}; unmount and mount again."
            )
        self._words = words
        self.generation = words[W_GENERATION]
        self.words = words
        self.notes = Notes(words, call_soon=call_soon)
        self.pending = PendingLookups(words)

    def count_answer(self) -> None:
        """To be called as each request begins: deaths with answers between are forgiven."""
        self._words[W_ANSWERED] += 1
        self.notes.forget_finished()


def request_digest(*what: object) -> bytes:
    """Equal for a repetition of the same request only, as long as ``what`` is."""
    return xxhash.xxh3_128_digest(repr(what).encode("utf-8", "surrogateescape"))


def _name_key(name: bytes) -> int:
    return xxhash.xxh3_64_intdigest(name) >> 1


def _slots(offset: int, count: int, words: int) -> range:
    start = offset // 8
    return range(start, start + count * words, words)
