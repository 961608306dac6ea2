"""One cache entry: what the cache holds of one object, chunk by chunk.

Two kinds behind one face: ``ObjectFile`` (a sparse file of its own) here, ``PackedRecord``
(a record in a segment) in packed.py.  An entry knows neither capacity nor other entries.

Concurrency, the rules that make every byte right without a lock on the read path:

* A chunk is ABSENT, PRESENT (on disk, not verified in this daemon's life) or VERIFIED.
  **Only VERIFIED chunks may be read.**  PRESENT chunks are first verified (worker thread).
* A chunk leaves VERIFIED in the trio thread only (``demote``, ``drop_chunks``, ``discard``).
  So a reader there that looks at the state and then calls preadv without awaiting in between
  is safe.  A reader in another thread notes ``epoch``, looks at the state, reads, and starts
  again when ``epoch`` is another.
* **Fetch only into chunks that are ABSENT when the fetch starts.**  Punching (worker thread)
  takes PRESENT chunks only and makes them ABSENT when it has finished, so a fetch and a punch
  can never meet; commit leaves chunks alone that are not ABSENT.
* An evicted or discarded entry (``gone``) stays readable for those who still refer to it: its
  file is closed when nobody does, so a descriptor is never another file's.
"""

import abc
import contextlib
import os
import threading
from collections import deque
from itertools import count

from stagefs.cache import layout
from stagefs.cache.file_system import allocated_bytes, punch, read_fully, reserve, write_fully
from stagefs.cache.hashing import PassingSlots, slot_of
from stagefs.cache.index import IndexRow
from stagefs.cache.ledger import Ledger
from stagefs.errors import CacheFailed
from stagefs.model import Checksum, ObjectId

ABSENT, PRESENT, VERIFIED = 0, 1, 2

# One run of commits is punched as a whole; it is kept short so that order of arrival holds.
_RUN_CHUNKS_MAX = 16
_arrival_numbers = count(1)


def _unseen(_chunk: int) -> None:
    """No chunk has passed through memory."""


class OpenFile:
    """An open descriptor that lives as long as somebody refers to it.

    ``gone`` says that the file has lost its name (evicted, discarded, damaged).
    """

    __slots__ = ("__weakref__", "fd", "gone")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.gone = False

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.fd)


class Arrival:
    """A run of chunks that came one after the other; lower numbers came earlier."""

    __slots__ = ("count", "first", "number")

    def __init__(self, number: int, first: int, count: int) -> None:
        self.number = number
        self.first = first
        self.count = count


class Entry(abc.ABC):
    """The common face.  Sizes and offsets in bytes; ``base`` is where object byte 0 lies in
    ``fd``.  ``holds`` counts those who need the entry to stay (cache.hold, cache.drop)."""

    __slots__ = (
        "_epochs",
        "_file",
        "_is_discarded",
        "_ledger",
        "_lock",
        "base",
        "checksum",
        "chunk_bytes",
        "chunk_count",
        "chunk_shift",
        "epoch",
        "fd",
        "header",
        "holds",
        "key",
        "mtime_ns",
        "object_id",
        "size_bytes",
        "state",
        "used_at",
        "validator",
    )

    def __init__(
        self,
        object_id: ObjectId,
        key: str,
        header: layout.EntryHeader,
        *,
        file: OpenFile,
        base: int,
        state: bytearray,
        ledger: Ledger,
    ) -> None:
        self.object_id = object_id
        self.key = key
        self.header = header
        self.size_bytes = header.size_bytes
        self.chunk_bytes = header.chunk_bytes
        self.chunk_shift = header.chunk_bytes.bit_length() - 1
        self.chunk_count = header.chunk_count
        self.validator = layout.validator_text(header)
        self.mtime_ns: int | None = header.mtime_ns
        self.checksum: Checksum | None = header.checksum
        self.fd = file.fd
        self.base = base
        self.state = state
        self.epoch = 0
        self.holds = 0
        self.used_at = ledger.now_ms()
        self._file = file
        self._is_discarded = False
        self._ledger = ledger
        self._lock = threading.Lock()
        self._epochs = count(1)

    @property
    def gone(self) -> bool:
        """Not to be found again: what is committed from now on is not kept."""
        return self._is_discarded or self._file.gone

    @property
    def file(self) -> OpenFile:
        return self._file

    @property
    def cached_bytes(self) -> int:
        """Bytes of the object that are here, verified or not."""
        present = (self.chunk_count - self.state.count(ABSENT)) * self.chunk_bytes
        if self.chunk_count and self.state[-1]:
            present -= self.chunk_count * self.chunk_bytes - self.size_bytes
        return present

    @property
    def is_complete(self) -> bool:
        return ABSENT not in self.state

    def chunk_length(self, chunk: int) -> int:
        return min(self.chunk_bytes, self.size_bytes - (chunk << self.chunk_shift))

    # Worker threads.

    def verify(self, chunk: int, count: int = 1) -> bool:
        """Compare chunks that are PRESENT with their slots; damaged ones become ABSENT and are
        counted.  True when all of them are VERIFIED at the end.  Blocking."""
        right = [self._verify_one(each) for each in range(chunk, chunk + count)]
        return all(right)

    def _verify_one(self, chunk: int) -> bool:
        damaged = False
        while self.state[chunk] == PRESENT:
            epoch = self.epoch
            try:
                right = self._hash_chunk(chunk) == self._slot(chunk)
            except OSError:
                right = False
            with self._lock:
                if self.state[chunk] != PRESENT:
                    break
                if right:
                    self.state[chunk] = VERIFIED
                elif self.epoch == epoch:
                    self._ledger.count("damaged_chunks")
                    self._forget_slots(chunk, 1)
                    self.state[chunk] = ABSENT
                    self.epoch = next(self._epochs)
                    damaged = True
        if damaged:
            self._lost_chunks()
        return self.state[chunk] == VERIFIED

    def commit(
        self, first_chunk: int, count: int = 1, *, passing: PassingSlots | None = None
    ) -> None:
        """Take in chunks whose data has been written to ``fd``: write their slots, those that
        ``passing`` has not seen hashed from the file.  After this a kill -9 keeps them.  Chunks
        not ABSENT are left alone.  Blocking.  Raises CacheFailed."""
        wanted = [c for c in range(first_chunk, first_chunk + count) if self.state[c] == ABSENT]
        seen = passing.take if passing is not None else _unseen
        try:
            hashes = [seen(chunk) or self._hash_chunk(chunk) for chunk in wanted]
        except OSError as exc:
            raise self._failed(exc) from exc
        self._enter(wanted, hashes)

    def reserve(self, first_chunk: int, count: int) -> None:
        """Set disk blocks aside for chunks that are about to be fetched, if that helps.  Blocking;
        follow it with ``give_back`` of those that did not come."""

    def give_back(self, chunks: list[int]) -> None:
        """Free the blocks that ``reserve`` set aside for chunks that nobody fetches.  Blocking."""

    def commit_data(self, chunk: int, data: bytes | bytearray | memoryview) -> None:
        """Write and take in one whole chunk that is at hand.  Blocking.  Raises CacheFailed."""
        assert len(data) == self.chunk_length(chunk), "commit_data takes whole chunks"
        if self.state[chunk] != ABSENT:
            return
        try:
            write_fully(self.fd, data, self.base + (chunk << self.chunk_shift))
        except OSError as exc:
            raise self._failed(exc) from exc
        self._enter([chunk], [layout.chunk_hash(data)])

    def _enter(self, chunks: list[int], hashes: list[int]) -> None:
        if not chunks:
            return
        try:
            self._write_slots(chunks, hashes)
        except OSError as exc:
            raise self._failed(exc) from exc
        for chunk in chunks:
            self.state[chunk] = VERIFIED
            self._ledger.note_refetch(self.key, chunk)
        self._ledger.count("committed_chunks", len(chunks))
        self._arrived(chunks)

    def _hash_chunk(self, chunk: int) -> int:
        """The slot for what the file holds.  Raises OSError, also when the file is too short."""
        offset = self.base + (chunk << self.chunk_shift)
        return slot_of(self.fd, offset, self.chunk_length(chunk))

    def _failed(self, exc: OSError) -> CacheFailed:
        reason = exc.strerror or str(exc)
        return CacheFailed(f"the cache cannot store {self.object_id.url}: {reason}")

    # The trio thread.

    def demote(self, first_chunk: int, count: int) -> None:
        """Make readers keep off chunks that are about to be punched: VERIFIED becomes PRESENT."""
        state = self.state
        for chunk in range(first_chunk, first_chunk + count):
            if state[chunk] == VERIFIED:
                state[chunk] = PRESENT
        self.epoch = next(self._epochs)

    def drop_chunks(self, first_chunk: int, count: int) -> None:
        """Declare chunks wrong: they are ABSENT at once, and after a restart.  Their space is
        kept for the data that will be fetched next.  Trio thread; writes a few bytes."""
        with self._lock:
            for chunk in range(first_chunk, first_chunk + count):
                self.state[chunk] = ABSENT
            self.epoch = next(self._epochs)
            self._forget_slots(first_chunk, count)

    def discard(self) -> None:
        """Declare the whole entry wrong: nothing of it is ever read again.  Trio thread; the
        space is freed when nobody refers to the entry any more."""
        with self._lock:
            for chunk in range(self.chunk_count):
                self.state[chunk] = ABSENT
            self.epoch = next(self._epochs)
            if not self.gone:
                self._is_discarded = True
                self._unname()

    # What the two kinds do differently.

    @abc.abstractmethod
    def index_row(self) -> IndexRow | None: ...

    def hashes(self) -> list[tuple[int, int]]:
        """(chunk, its xxh3-64; 1 stands for 0 too) of all that are here.  Blocking."""
        here = [chunk for chunk in range(self.chunk_count) if self.state[chunk] != ABSENT]
        return [(chunk, self._slot(chunk)) for chunk in here]

    @abc.abstractmethod
    def _slot(self, chunk: int) -> int: ...

    @abc.abstractmethod
    def _write_slots(self, chunks: list[int], hashes: list[int]) -> None: ...

    @abc.abstractmethod
    def _forget_slots(self, first: int, count: int) -> None:
        """Best effort: a slot that stays behind is found wrong, or right, when it is verified."""

    @abc.abstractmethod
    def _arrived(self, chunks: list[int]) -> None: ...

    def _lost_chunks(self) -> None:
        """Damaged chunks are gone: the books are to know."""

    @abc.abstractmethod
    def _unname(self) -> None: ...


class ObjectFile(Entry):
    """An entry in a file of its own.  ``is_placed`` is False until the first commit has given
    the file its trailer and its name below ``objects/``."""

    __slots__ = ("_accounted_bytes", "_arrivals", "_incoming", "_slots_offset", "is_placed")

    def __init__(
        self,
        object_id: ObjectId,
        key: str,
        header: layout.EntryHeader,
        *,
        file: OpenFile,
        state: bytearray,
        ledger: Ledger,
        slots_offset: int | None = None,
        disk_bytes: int = 0,
        incoming: str = "",
    ) -> None:
        """Either loaded (``slots_offset``, ``disk_bytes``) or new (``incoming``: its name until
        the first commit)."""
        super().__init__(object_id, key, header, file=file, base=0, state=state, ledger=ledger)
        self._incoming = incoming
        self.is_placed = slots_offset is not None
        self._slots_offset = slots_offset or 0
        self._accounted_bytes = disk_bytes
        self._arrivals: deque[Arrival] | None = None

    @property
    def disk_bytes(self) -> int:
        """Bytes of disk that the books know of."""
        return self._accounted_bytes

    def index_row(self) -> IndexRow | None:
        if self.gone:
            return None
        return IndexRow(
            key=bytes.fromhex(self.key),
            url=self.header.url,
            version=self.header.version,
            size_bytes=self.size_bytes,
            disk_bytes=self._accounted_bytes,
            cached_bytes=self.cached_bytes,
            segment=0,
            offset=0,
            used_at=self.used_at,
        )

    def _slot(self, chunk: int) -> int:
        data = read_fully(self.fd, layout.SLOT.size, self._slots_offset + layout.SLOT.size * chunk)
        if len(data) != layout.SLOT.size:
            return 0
        return int(layout.SLOT.unpack(data)[0])

    def _write_slots(self, chunks: list[int], hashes: list[int]) -> None:
        if not self.is_placed:
            self._place()
        start = 0
        while start < len(chunks):
            stop = start + 1
            while stop < len(chunks) and chunks[stop] == chunks[stop - 1] + 1:
                stop += 1
            slots = b"".join(map(layout.SLOT.pack, hashes[start:stop]))
            write_fully(self.fd, slots, self._slots_offset + layout.SLOT.size * chunks[start])
            start = stop

    def _place(self) -> None:
        with self._lock:
            if self.is_placed:
                return
            trailer = layout.encode_trailer(self.header)
            write_fully(self.fd, trailer.header, trailer.offset)
            write_fully(self.fd, trailer.footer, trailer.footer_offset)
            self._slots_offset = trailer.slots_offset
            if not self.gone:
                self._ledger.place(self, self._incoming)
            self.is_placed = True

    def reserve(self, first_chunk: int, count: int) -> None:
        start = first_chunk << self.chunk_shift
        stop = min((first_chunk + count) << self.chunk_shift, self.size_bytes)
        reserve(self.fd, start, stop - start)

    def give_back(self, chunks: list[int]) -> None:
        for chunk in chunks:
            with self._lock:
                if self.state[chunk] == ABSENT:
                    with contextlib.suppress(OSError):
                        self._punch_data(chunk)
        if self.is_placed:
            self._account()

    def _forget_slots(self, first: int, count: int) -> None:
        if self.is_placed:
            with contextlib.suppress(OSError):
                write_fully(
                    self.fd,
                    bytes(layout.SLOT.size * count),
                    self._slots_offset + layout.SLOT.size * first,
                )

    def _arrived(self, chunks: list[int]) -> None:
        with self._lock:
            arrivals = self._order()
            for chunk in chunks:
                last = arrivals[-1] if arrivals else None
                if (
                    last is not None
                    and last.number
                    and last.first + last.count == chunk
                    and last.count < _RUN_CHUNKS_MAX
                ):
                    last.count += 1
                else:
                    arrivals.append(Arrival(next(_arrival_numbers), chunk, 1))
        self._account()

    def _lost_chunks(self) -> None:
        if self.is_placed:
            self._ledger.note_growing(self)

    def _account(self) -> None:
        with self._lock:
            if self.gone:
                return
            disk_bytes = allocated_bytes(os.fstat(self.fd))
            self._ledger.add_used(disk_bytes - self._accounted_bytes)
            self._accounted_bytes = disk_bytes
        self._ledger.note_growing(self)

    def _order(self) -> "deque[Arrival]":
        """Runs in order of arrival; those of an earlier daemon have number 0 and come first."""
        if self._arrivals is None:
            self._arrivals = deque()
            chunk = self.state.find(PRESENT)
            while chunk >= 0:
                stop = chunk
                limit = min(chunk + _RUN_CHUNKS_MAX, self.chunk_count)
                while stop < limit and self.state[stop] == PRESENT:
                    stop += 1
                self._arrivals.append(Arrival(0, chunk, stop - chunk))
                chunk = self.state.find(PRESENT, stop)
        return self._arrivals

    # Eviction of chunks: take_oldest in the trio thread, punch in a worker.

    def oldest_number(self) -> int | None:
        """When the oldest run arrived (comparable between entries); None when there is none."""
        with self._lock:
            arrivals = self._order()
            return arrivals[0].number if arrivals else None

    def take_oldest(self) -> tuple[int, int]:
        """Demote the oldest run and give it to the caller, who has it punched.  Trio thread."""
        with self._lock:
            arrival = self._order().popleft()
        self.demote(arrival.first, arrival.count)
        return arrival.first, arrival.count

    def punch(self, first_chunk: int, count: int) -> int:
        """Free the space of those chunks that are PRESENT (not those that were verified again
        since they were demoted); returns how many.  Blocking.  Raises CacheFailed."""
        punched = 0
        for chunk in range(first_chunk, first_chunk + count):
            # One chunk at a time: the trio thread may want the lock.
            with self._lock:
                if self.state[chunk] == PRESENT:
                    self._punch_one(chunk)
                    punched += 1
                elif self.state[chunk] == VERIFIED:
                    self._order().append(Arrival(next(_arrival_numbers), chunk, 1))
        self._account()
        return punched

    def _punch_one(self, chunk: int) -> None:
        self._forget_slots(chunk, 1)
        try:
            self._punch_data(chunk)
        except OSError as exc:
            raise self._failed(exc) from exc
        self.state[chunk] = ABSENT
        self.epoch = next(self._epochs)
        self._ledger.note_eviction(self.key, chunk)

    def _punch_data(self, chunk: int) -> None:
        start = chunk << self.chunk_shift
        stop = min(start + self.chunk_bytes, layout.trailer_offset(self.size_bytes))
        punch(self.fd, start, stop - start)

    def retire(self) -> None:
        """Say that the file is losing its name: it is being evicted as a whole.  Trio thread."""
        self._file.gone = True

    def _unname(self) -> None:
        if not self.is_placed:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._incoming)
            return
        self._ledger.add_used(-self._accounted_bytes)
        self._ledger.unplace(self.key)
