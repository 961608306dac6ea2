"""One open object: what is cached of it, what is on its way, what failed.

Invariants (trio thread only, no await between check and use):
* a chunk is in ``flights`` from the moment its fetch is decided until it is VERIFIED or the
  flight has ended: so any number of readers cause one fetch;
* ``serving`` is the entry that the hot path may read, or None while a declared checksum has
  still to be proved;
* whoever waits for a chunk waits on ``waiting[chunk]``; it is set when the chunk became
  readable or its flight ended, and the waiter then looks again.
"""

import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

import trio

from stagefs.cache.hashing import PassingSlots
from stagefs.errors import CacheFailed, ObjectChanged, StageFSError
from stagefs.model import MIB, Checksum, Inode, ObjectId, Span
from stagefs.namespace.node import Node
from stagefs.objects.courtesy import COURTESY
from stagefs.objects.readahead import ReadAhead
from stagefs.page_buffer import page_buffer

ABSENT, PRESENT, VERIFIED = 0, 1, 2

# Chunks that are committed together when nobody waits for one of them: each commit is a visit
# to a worker thread, and takes the lock of the file from those who write into it.
COMMIT_CHUNKS = 4

# pyfuse3 copies a read's answer into the device before anything else runs in this thread,
# so all inline reads can share one buffer.
_BUFFER = page_buffer(MIB)
_EMPTY = memoryview(b"")


class ReadableEntry(Protocol):
    """What reading needs of ``cache.Entry`` and of ``VolatileEntry``."""

    @property
    def key(self) -> str: ...
    @property
    def fd(self) -> int: ...
    @property
    def base(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def state(self) -> bytearray: ...
    @property
    def chunk_bytes(self) -> int: ...
    @property
    def chunk_shift(self) -> int: ...
    def commit(
        self, first_chunk: int, count: int = 1, *, passing: PassingSlots | None = None
    ) -> None: ...
    def verify(self, chunk: int, count: int = 1) -> bool: ...
    def reserve(self, first_chunk: int, count: int) -> None: ...
    def give_back(self, chunks: list[int]) -> None: ...


class Failure:
    """Why a chunk cannot be had, when that was found, and until when nobody need ask again (trio's
    clock)."""

    __slots__ = ("error", "found", "until")

    def __init__(self, error: StageFSError, *, found: float, hold_s: float) -> None:
        self.error = error
        self.found = found
        self.until = found + hold_s


class Content:
    """See the module docstring.  Made and dropped by Objects only."""

    __slots__ = (
        "changed",
        "checksum",
        "checksum_proved",
        "entry",
        "failures",
        "flight_count",
        "flights",
        "hoards",
        "holds",
        "inode",
        "key",
        "object_id",
        "place",
        "postponed",
        "preadv_flags",
        "ranges",
        "serving",
        "shared",
        "size_bytes",
        "to_verify",
        "url",
        "validator",
        "waiting",
        "whole",
    )  # fmt: skip

    def __init__(
        self,
        *,
        inode: Inode,
        object_id: ObjectId,
        size_bytes: int,
        validator: str | None,
        checksum: Checksum | None,
        ranges: bool,
    ) -> None:
        self.inode = inode
        self.object_id = object_id
        self.key = object_id.key
        self.url = object_id.url
        self.size_bytes = size_bytes
        self.validator = validator
        self.checksum = checksum
        self.checksum_proved = checksum is None
        self.ranges = ranges
        self.entry: ReadableEntry | None = None
        self.serving: ReadableEntry | None = None
        self.preadv_flags: int | None = None
        # A small object that has arrived and is still being stored.
        self.whole: bytes | None = None
        self.holds = 0
        # Those of them that only want it cached.
        self.hoards = 0
        # Where it lies, when it was fetched ahead of a task and no task has read it yet.
        self.place: tuple[Inode, int] | None = None
        self.flights: dict[int, Flight] = {}
        self.flight_count = 0
        # What is to be fetched ahead as soon as fewer fetches are on their way.
        self.postponed: Span | None = None
        self.waiting: dict[int, trio.Event] = {}
        self.failures: dict[int, Failure] = {}
        self.shared: dict[str, Shared] = {}
        # What an earlier daemon left and is being checked, in order.
        self.to_verify = range(0)
        self.changed: ObjectChanged | None = None

    @property
    def idle(self) -> bool:
        return not (self.holds or self.flights or self.waiting or self.shared or self.whole)

    def chunks(self, span: Span) -> range:
        entry = self.entry
        assert entry is not None
        if not span.length:
            return range(0)
        return range(span.start >> entry.chunk_shift, ((span.stop - 1) >> entry.chunk_shift) + 1)

    def first_unreadable(self, span: Span) -> int | None:
        """The first chunk of ``span`` that is not VERIFIED."""
        entry = self.entry
        assert entry is not None
        chunks = self.chunks(span)
        state = entry.state
        if state.count(VERIFIED, chunks.start, chunks.stop) == len(chunks):
            return None
        for chunk in chunks:
            if state[chunk] != VERIFIED:
                return chunk
        return None

    def complete(self) -> bool:
        entry = self.entry
        return entry is not None and entry.state.count(ABSENT) == 0

    def wake(self, chunks: Sequence[int]) -> None:
        for chunk in chunks:
            event = self.waiting.pop(chunk, None)
            if event is not None:
                event.set()

    def wake_all(self) -> None:
        waiting, self.waiting = self.waiting, {}
        for event in waiting.values():
            event.set()

    def read_at_once(self, entry: ReadableEntry, offset: int, length: int) -> memoryview | None:
        """What the page cache holds of chunks that are VERIFIED; None: not all of it.

        Valid until the next call, for any content.
        """
        if self.preadv_flags is None or length > len(_BUFFER):
            return None
        piece = _BUFFER[:length]
        try:
            done = os.preadv(entry.fd, (piece,), entry.base + offset, self.preadv_flags)
        except OSError:
            return None
        return piece if done == length else None

    async def wait(self, chunk: int) -> None:
        event = self.waiting.get(chunk)
        if event is None:
            event = self.waiting[chunk] = trio.Event()
            flight = self.flights.get(chunk)
            if flight is not None:
                flight.hurry()
        await event.wait()


class Flight:
    """One fetch on its way: the sink that the remote writes through.

    ``chunks`` are those it will bring; each is committed when it is whole, in a worker thread:
    hashing what no remote has shown takes time, and the file's lock is often held by those
    who write into it.
    """

    __slots__ = (
        "_begin", "_begun_at", "_committed", "_content", "_counters", "_entry", "_failure",
        "_idle", "_passing", "_reserved", "_served_before", "_whole", "chunks", "span",
    )  # fmt: skip

    def __init__(
        self,
        content: Content,
        entry: ReadableEntry,
        chunks: range,
        *,
        counters: "Counters",
        begin: Callable[[Callable[[], Awaitable[None]]], None],
    ) -> None:
        """``begin`` starts a task that outlives the caller."""
        self._content = content
        self._entry = entry
        self._counters = counters
        self._begin = begin
        self._begun_at = trio.current_time()
        self._whole = self._committed = chunks.start
        self._idle = trio.Event()
        self._idle.set()
        self._failure: CacheFailed | None = None
        self._passing = PassingSlots(size_bytes=content.size_bytes, chunk_bytes=entry.chunk_bytes)
        self._served_before = COURTESY.served
        self._reserved = False
        self.chunks = chunks
        start = chunks.start << entry.chunk_shift
        stop = min(chunks.stop << entry.chunk_shift, content.size_bytes)
        self.span = Span(start, stop - start)

    def passed(self, start: int, data: memoryview) -> None:
        """See ``remote.base.WatchingSink``.  In the fetch's thread."""
        self._passing.passed(start, data)

    def between_pieces(self) -> None:
        content = self._content
        if content.holds == content.hoards:
            self._served_before = COURTESY.pause(self._served_before)

    @property
    def url(self) -> str:
        return self._content.url

    @property
    def age_s(self) -> float:
        return trio.current_time() - self._begun_at

    @property
    def landed_bytes(self) -> int:
        return min((self._whole << self._entry.chunk_shift) - self.span.start, self.span.length)

    @property
    def fd(self) -> int:
        return self._entry.fd

    @property
    def shift(self) -> int:
        return -self._entry.base

    def landed(self, span: Span) -> None:
        """See ``remote.base.Sink``.  Raises CacheFailed when an earlier chunk could not be kept."""
        if self._failure is not None:
            raise self._failure
        self._counters.fetched_bytes += span.length
        self._whole = span.stop >> self._entry.chunk_shift
        if span.stop >= self.span.stop:
            self._whole = self.chunks.stop
        ready = range(self._committed, self._whole)
        if (
            len(ready) >= COMMIT_CHUNKS
            or self._whole == self.chunks.stop
            or any(chunk in self._content.waiting for chunk in ready)
        ):
            self.hurry()

    def hurry(self) -> None:
        """Commit now what has landed: somebody waits for it, or it is enough."""
        if self._whole > self._committed and self._idle.is_set():
            self._idle = trio.Event()
            self._begin(self._commit)

    async def reserve(self) -> None:
        """Before the fetch: set its disk blocks aside (see ``cache.entry``)."""
        self._reserved = True
        await trio.to_thread.run_sync(self._entry.reserve, self.chunks.start, len(self.chunks))

    async def give_back(self) -> None:
        """When the fetch has failed, and while its chunks are still in ``flights``."""
        if self._reserved:
            flights = self._content.flights
            left = [chunk for chunk in self.chunks if flights.get(chunk) is self]
            await trio.to_thread.run_sync(self._entry.give_back, left)

    async def settled(self) -> None:
        """Return when all that landed is committed.  Raises CacheFailed."""
        self.hurry()
        await self._idle.wait()
        if self._failure is not None:
            raise self._failure

    async def _commit(self) -> None:
        try:
            while self._committed < self._whole and self._failure is None:
                first, self._committed = self._committed, self._whole
                # Chunks that were here before are none of ours: they may just be evicted.
                flights = self._content.flights
                mine = [c for c in range(first, self._committed) if flights.get(c) is self]
                await trio.to_thread.run_sync(self._commit_chunks, mine)
                for chunk in mine:
                    if flights.get(chunk) is self:
                        del flights[chunk]
                self._content.wake(mine)
        except CacheFailed as error:
            self._failure = error
        finally:
            self._idle.set()

    def _commit_chunks(self, chunks: Sequence[int]) -> None:
        for run in _runs(chunks):
            self._entry.commit(run.start, len(run), passing=self._passing)


def _runs(chunks: Sequence[int]) -> list[range]:
    """Adjoining numbers together."""
    runs: list[range] = []
    for chunk in chunks:
        if runs and runs[-1].stop == chunk:
            runs[-1] = range(runs[-1].start, chunk + 1)
        else:
            runs.append(range(chunk, chunk + 1))
    return runs


class Counters:
    """Running figures for status and metrics."""

    __slots__ = (
        "ahead_objects", "batches", "checksum_mismatches", "failed_fetches", "fetched_bytes",
        "fetches", "in_flight_bytes", "reads_slow", "small_objects", "unexpected",
        "volatile_objects",
    )  # fmt: skip

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)

    ahead_objects: int
    fetched_bytes: int
    fetches: int
    failed_fetches: int
    in_flight_bytes: int
    batches: int
    small_objects: int
    reads_slow: int
    checksum_mismatches: int
    volatile_objects: int
    unexpected: int

    def snapshot(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


class Shared:
    """One piece of work that several readers wait for; its error reaches all of them."""

    __slots__ = ("error", "event")

    def __init__(self) -> None:
        self.event = trio.Event()
        self.error: StageFSError | None = None

    async def wait(self) -> None:
        await self.event.wait()
        if self.error is not None:
            raise self.error


class OpenObject:
    """One open file handle on a node's object.

    Its content is opened by the first read that reaches the daemon: most handles on a warm file
    are served from the kernel's page cache and never come here.
    """

    __slots__ = ("ahead", "content", "hoards", "node", "reader")

    def __init__(
        self, node: Node, ahead: ReadAhead, *, hoards: bool = False, reader: int = 0
    ) -> None:
        """``hoards``: nobody reads; the object is to be cached.  ``reader``: the thread that
        opened it, 0 when that is not known."""
        self.node = node
        self.reader = reader
        self.hoards = hoards
        self.content: Content | None = None
        self.ahead = ahead

    def read_now(self, offset: int, size: int) -> memoryview | None:
        """The bytes, if that needs neither a fetch nor waiting for the disk; else None.

        The answer is valid until the next call (any handle's).
        """
        content = self.content
        if content is None or offset >= self.ahead.trigger or content.serving is None:
            return None
        entry = content.serving
        stop = offset + size
        stop = min(stop, content.size_bytes)
        length = stop - offset
        if length <= 0:
            return _EMPTY
        shift = entry.chunk_shift
        first = offset >> shift
        last = ((stop - 1) >> shift) + 1
        if entry.state.count(VERIFIED, first, last) != last - first:
            return None
        data = content.read_at_once(entry, offset, length)
        if data is not None:
            COURTESY.served += 1
            COURTESY.reader = self.reader
        return data
