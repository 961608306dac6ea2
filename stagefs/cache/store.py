"""The cache of one staging area: entries by object id, bounded by a capacity.

Composes the parts of this package and is their only face upwards.  It knows no remote, no
namespace and no FUSE.  When its disk fails it raises CacheFailed and the caller goes on
without it.

Concurrency: methods say who calls them.  *Trio thread*: cheap, never waits for more than an
open and a read.  *Worker*: blocking, any thread but one at a time for each kind.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from pathlib import Path

import msgspec

from stagefs.cache import directory, layout, rebuild
from stagefs.cache.entry import Entry, ObjectFile, OpenFile
from stagefs.cache.eviction import Eviction, Plan
from stagefs.cache.file_system import allocated_bytes
from stagefs.cache.index import Index, IndexRow
from stagefs.cache.leases import Lease, Leases
from stagefs.cache.ledger import Counters, Ledger
from stagefs.cache.loading import PACKED_BYTES_MAX, Loading
from stagefs.cache.open_entries import OpenEntries
from stagefs.cache.packed import (
    SEGMENT_BYTES_MAX,
    SEGMENT_BYTES_MIN,
    Segments,
    SmallObject,
    record_row,
)
from stagefs.errors import CacheFailed
from stagefs.model import CHUNK_BYTES, MIB, Checksum, ObjectId

_FREE_FLOOR_SHARE, _FREE_FLOOR_BYTES_MAX = 0.02, 512 * MIB
_REBUILD_BATCHES = 100  # at each flush: about ten thousand entries, half a second


class Usage(msgspec.Struct, frozen=True):
    """Bytes of disk and of objects.  ``entries`` and ``cached_bytes`` are as of the last flush."""

    entries: int
    cached_bytes: int
    used_bytes: int
    capacity_bytes: int
    free_bytes: int
    free_floor_bytes: int
    leases: int
    index_complete: bool
    counters: Counters


class Cache:
    def __init__(
        self,
        locked: directory.LockedDirectory,
        index: Index,
        leases: Leases,
        *,
        capacity_bytes: int,
        chunk_bytes: int,
        free_floor_bytes: int,
        high_mark: float,
        low_mark: float,
        clock: Callable[[], float],
    ) -> None:
        """Use ``open``.  Raises CacheFailed, OSError."""
        self.capacity_bytes = capacity_bytes
        self.chunk_bytes = chunk_bytes
        self.free_floor_bytes = free_floor_bytes
        self.high_mark = high_mark
        self.low_mark = low_mark
        self._locked: directory.LockedDirectory | None = locked
        self._paths = locked.paths
        self._index = index
        self._leases = leases
        self._ledger = Ledger(self._paths, index, used_bytes=index.totals().disk_bytes, clock=clock)
        segment_bytes = min(SEGMENT_BYTES_MAX, max(SEGMENT_BYTES_MIN, capacity_bytes // 32))
        self._segments = Segments(self._ledger, segment_bytes=segment_bytes)
        self._loading = Loading(self._ledger, self._segments)
        self._entries = OpenEntries()
        self._eviction = Eviction(self._ledger, self._segments, leases, self._entries)
        self._incoming_numbers = count(1)
        self._stop = threading.Event()
        self._rebuilding = threading.Lock()
        self._rebuild: rebuild.Rebuild | None = None
        self._overhead_bytes = self._measure_overhead()

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        capacity_bytes: int,
        chunk_bytes: int = CHUNK_BYTES,
        free_floor_bytes: int | None = None,
        high_mark: float = 0.95,
        low_mark: float = 0.90,
        clock: Callable[[], float] = time.time,
    ) -> "Cache":
        """Take the directory and open what is in it, without a scan.  Worker.

        Room is made above ``high_mark``, down to ``low_mark`` (shares of the capacity).
        ``chunk_bytes`` (a power of two) is for new entries; old ones keep theirs.
        ``free_floor_bytes`` of the file system stay free: by default 2 %, at most 512 MiB.
        Raises StateInUse, NewerFormat, UnsuitableState; CacheFailed when the disk is at fault
        and the caller does without a cache.
        """
        assert layout.CHUNK_BYTES_MIN <= chunk_bytes <= layout.CHUNK_BYTES_MAX
        assert chunk_bytes & (chunk_bytes - 1) == 0, "chunks are powers of two"
        with contextlib.ExitStack() as undo:
            locked = undo.enter_context(contextlib.closing(directory.take(path)))
            try:
                if free_floor_bytes is None:
                    system = os.statvfs(path)
                    share_bytes = int(system.f_blocks * system.f_frsize * _FREE_FLOOR_SHARE)
                    free_floor_bytes = min(share_bytes, _FREE_FLOOR_BYTES_MAX)
                index = undo.enter_context(contextlib.closing(Index(locked.paths.index)))
                leases = undo.enter_context(
                    contextlib.closing(Leases(locked.paths.leases, clock=clock))
                )
                rebuild.reconcile(index, locked.paths)
                cache = cls(
                    locked,
                    index,
                    leases,
                    capacity_bytes=capacity_bytes,
                    chunk_bytes=chunk_bytes,
                    free_floor_bytes=free_floor_bytes,
                    high_mark=high_mark,
                    low_mark=low_mark,
                    clock=clock,
                )
            except OSError as exc:
                raise CacheFailed(f"the cache directory {path} cannot be used: {exc}") from exc
            undo.pop_all()
        return cache

    def close(self) -> None:
        """Write the index and give up the directory.  Worker.  Idempotent."""
        if self._locked is None:
            return
        self._stop.set()
        self._ledger.close()
        with contextlib.suppress(CacheFailed):
            self._index.close()
        self._leases.close()
        self._locked.close()
        self._locked = None

    @property
    def directory(self) -> Path:
        return self._paths.directory

    # Entries.

    def entry(self, object_id: ObjectId, *, size_bytes: int) -> Entry | None:
        """What the cache holds of an object, or None.  Trio thread.

        What is damaged, or says another size, is counted, dropped, and None.
        """
        key = object_id.key
        entry = self._entries.get(key)
        if entry is None:
            entry = self._loading.load(object_id, key, size_bytes=size_bytes)
            if entry is None:
                return None
            self._entries.add(entry)
        if entry.size_bytes != size_bytes:
            self._ledger.count("damaged_entries")
            self._entries.forget(entry)
            entry.discard()
            return None
        return entry

    def absent(self, keys: Sequence[str]) -> set[str]:
        """Those of many keys of which the cache holds nothing for certain.  Trio thread."""
        return self._loading.absent([key for key in keys if self._entries.get(key) is None])

    def create(
        self,
        object_id: ObjectId,
        *,
        size_bytes: int,
        validator: str,
        mtime_ns: int | None,
        checksum: Checksum | None = None,
    ) -> ObjectFile:
        """A new entry with no chunk yet, in place of whatever there was.  Any thread, some
        tens of microseconds.  Raises CacheFailed.

        Nothing of it stays unless a chunk is committed before the last ``drop``.
        """
        header = layout.entry_header(
            object_id,
            validator=validator,
            size_bytes=size_bytes,
            chunk_bytes=self.chunk_bytes,
            mtime_ns=mtime_ns,
            checksum=checksum,
        )
        key = object_id.key
        incoming = self._paths.incoming_file(key, next(self._incoming_numbers))
        try:
            fd = layout.open_file(incoming, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        except OSError as exc:
            raise CacheFailed(
                f"the cache cannot begin an entry for {object_id.url}: {exc.strerror}"
            ) from exc
        entry = ObjectFile(
            object_id,
            key,
            header,
            file=OpenFile(fd),
            state=bytearray(header.chunk_count),
            ledger=self._ledger,
            incoming=incoming,
        )
        self._ledger.note_use(key, entry.used_at)
        self._entries.add(entry)
        return entry

    def store_small(self, items: Sequence[SmallObject]) -> list[Entry]:
        """Store whole small objects in one write; their entries are complete and VERIFIED.
        Worker.  Raises CacheFailed, and then none is stored."""
        assert all(len(item.data) <= PACKED_BYTES_MAX for item in items), "not a small object"
        if not items:
            return []
        encoded = [self._encode_small(item) for item in items]
        places = self._segments.append([data for data, _ in encoded])
        entries: list[Entry] = []
        rows: list[IndexRow] = []
        used_at = self._ledger.now_ms()
        try:
            for item, (_, said), place in zip(items, encoded, places, strict=True):
                record = said.moved_to(place.offset)
                entry = self._segments.entry_of(item.object_id, record, place.segment)
                entries.append(entry)
                rows.append(record_row(entry.key, record, place.segment, used_at=used_at))
        except OSError as exc:
            raise CacheFailed(f"the cache cannot store small objects: {exc.strerror}") from exc
        self._ledger.write_records(rows, end=places[-1])
        for stored in entries:
            self._entries.add(stored)
        self._ledger.count("stored_records", len(entries))
        return entries

    def _encode_small(self, item: SmallObject) -> tuple[bytes, layout.Record]:
        fits = len(item.data) <= self.chunk_bytes
        header = layout.entry_header(
            item.object_id,
            validator=item.validator,
            size_bytes=len(item.data),
            # A record is one chunk, also where those of files are smaller.
            chunk_bytes=self.chunk_bytes if fits else PACKED_BYTES_MAX,
            mtime_ns=item.mtime_ns,
            checksum=item.checksum,
        )
        return layout.encode_record(header, item.data)

    def hold(self, entry: Entry) -> bool:
        """Keep an entry from being evicted as a whole.  Trio thread.  False when it has been
        evicted already (or loaded anew): ask for it again."""
        return self._entries.hold(entry)

    def drop(self, entry: Entry) -> None:
        """Undo one ``hold``.  Trio thread."""
        self._entries.drop(entry)

    def note_use(self, entry: Entry) -> None:
        """The entry was used now.  Trio thread; costs next to nothing."""
        entry.used_at = now_ms = self._ledger.now_ms()
        self._ledger.note_use(entry.key, now_ms)

    # Capacity.

    @property
    def used_bytes(self) -> int:
        """What the cache takes on disk, committed or being fetched, to within a few seconds."""
        return self._ledger.used_bytes + self._overhead_bytes

    @property
    def headroom_bytes(self) -> int:
        """How much may be fetched before the capacity or the free-space floor is reached; below
        0 when either is passed.  Any thread."""
        left = self.capacity_bytes - self.used_bytes
        return min(left, self._free_bytes() - self.free_floor_bytes)

    def over_capacity(self) -> bool:
        """Whether room should be made: above the high mark, or below the free-space floor."""
        return (
            self.used_bytes > self.capacity_bytes * self.high_mark
            or self._free_bytes() < self.free_floor_bytes
        )

    def _free_bytes(self) -> int:
        try:
            system = os.statvfs(self._paths.directory)
        except OSError:
            return 0
        return system.f_bavail * system.f_frsize

    def plan_room(self, extra_bytes: int = 0) -> Plan | None:
        """Choose what goes so that use falls to the low mark less ``extra_bytes``; None when
        nothing needs to, or can.  Trio thread.  Then ``carry_out`` in a worker."""
        target_bytes = int(self.capacity_bytes * self.low_mark)
        wanted_bytes = max(
            self.used_bytes + extra_bytes - target_bytes,
            self.free_floor_bytes + extra_bytes - self._free_bytes(),
        )
        if wanted_bytes <= 0:
            return None
        return self._plan(lambda: self._eviction.plan(wanted_bytes)) or None

    def _plan(self, choose: Callable[[], Plan]) -> Plan | None:
        try:
            return choose()
        except CacheFailed:
            self._ledger.count("index_failures")
            return None

    def carry_out(self, plan: Plan) -> int:
        """Remove what was planned; returns the bytes freed.  Worker."""
        return self._eviction.carry_out(plan)

    def make_room(self) -> int:
        """Plan and carry out until the low mark is reached; returns the bytes freed.  Only for
        callers without readers (both steps run in the calling thread)."""
        total = 0
        while self.over_capacity() or total:
            plan = self.plan_room()
            freed = self.carry_out(plan) if plan is not None else 0
            if freed == 0:
                break
            total += freed
        return total

    def plan_freeing(self, wanted_bytes: int) -> Plan | None:
        """Choose what to evict to free so much, whatever the capacity is.  Trio thread."""
        return self._plan(lambda: self._eviction.plan(wanted_bytes)) or None

    def plan_eviction(self, keys: Iterable[str]) -> Plan | None:
        """Evict exactly these; those held or leased stay and are named in ``Plan.kept``.  None
        when there is none of them.  Trio thread.  Then ``carry_out`` in a worker."""
        return self._plan(lambda: self._eviction.plan_of(keys))

    # Pins and leases.

    def pin(
        self, items: Iterable[tuple[str, str]], *, owner: str, expires: float | None = None
    ) -> None:
        """Keep these (key, URL), cached or not yet, for ``owner`` until ``expires`` (seconds
        since 1970; None: until unpinned).  Worker.  Raises CacheFailed."""
        self._leases.pin(items, owner=owner, expires=expires)

    def unpin(self, keys: Iterable[str] | None, *, owner: str | None = None) -> int:
        """End leases (None: on all keys, of all owners); returns how many.  Worker.  Raises
        CacheFailed."""
        return self._leases.unpin(keys, owner=owner)

    def leases(self) -> list[Lease]:
        return self._leases.list()

    def lease_owners(self) -> list[str]:
        """Everybody who keeps something."""
        return self._leases.owners()

    def leases_held_by(self, owner: str) -> int:
        return self._leases.count_of(owner)

    def leases_of(self, key: str) -> list[Lease]:
        return self._leases.of(key)

    # The index, and looking in.

    def flush_index(self) -> None:
        """Write recency and sizes to the index.  Worker; every few seconds and at close.

        An index that is missing or proved damaged is rebuilt from the files, a bit at each call.
        """
        if self._index.is_damaged and self._ledger.tolerate(self._index.recreate):
            self._rebuild = None
        self._ledger.flush()
        if not self._index.is_complete:
            self._ledger.tolerate(lambda: self.rebuild_index(batches=_REBUILD_BATCHES))
        with contextlib.suppress(CacheFailed):
            self._leases.expire()
        self._overhead_bytes = self._measure_overhead()

    def _measure_overhead(self) -> int:
        """What all takes that is neither an object's file nor a segment: a few hundred names."""
        total = 0
        with contextlib.suppress(OSError):
            total = allocated_bytes(self._paths.directory.stat())
            for directory in (self._paths.directory, self._paths.objects):
                with os.scandir(directory) as found:
                    for each in found:
                        with contextlib.suppress(FileNotFoundError):
                            total += allocated_bytes(each.stat(follow_symlinks=False))
        return total

    @property
    def index_complete(self) -> bool:
        """False while files may lack their rows: ``flush_index`` finds them bit by bit."""
        return self._index.is_complete

    def rebuild_index(self, *, batches: int = sys.maxsize) -> bool:
        """Find files and records that have no row; True when that is done.  Worker; takes its
        time, so that readers do not notice.  Raises CacheFailed."""
        with self._rebuilding:
            if self._index.is_complete:
                return True
            self._rebuild = self._rebuild or rebuild.Rebuild(self._index, self._paths)
            if not self._rebuild.go_on(batches=batches, stop=self._stop):
                return False
            damage, self._rebuild = self._rebuild.damage, None
        self._ledger.count("damaged_entries", len(damage))
        for each in damage:
            if each.path.parent.parent == self._paths.objects:
                with contextlib.suppress(OSError):
                    each.path.unlink()
        self._ledger.flush()
        self._ledger.set_used(self._index.totals().disk_bytes + self._segments.total_disk_bytes())
        return True

    def stop_rebuilding(self) -> None:
        """Make a rebuild end soon, so that its thread can be waited for.  Any thread."""
        self._stop.set()

    def counters(self) -> Counters:
        return self._ledger.counters()

    def usage(self) -> Usage:
        """Any thread; some quick reads of the index.  Raises CacheFailed."""
        totals = self._index.totals()
        return Usage(
            entries=totals.entries,
            cached_bytes=totals.cached_bytes,
            used_bytes=self.used_bytes,
            capacity_bytes=self.capacity_bytes,
            free_bytes=self._free_bytes(),
            free_floor_bytes=self.free_floor_bytes,
            leases=self._leases.count(),
            index_complete=self._index.is_complete,
            counters=self._ledger.counters(),
        )

    def rows(self, *, url: str | None = None) -> list[IndexRow]:
        """All entries (of ``url``), most recently used first.  Worker; writes the index first.
        Raises CacheFailed."""
        self._ledger.flush()
        wanted = None if url is None else url.encode("utf-8", "surrogateescape")
        return self._index.rows(url=wanted)

    def rows_after(self, key: str, *, limit: int) -> list[IndexRow]:
        """Up to ``limit`` entries by key, behind ``key`` ("": from the first): for long lists in
        pages, as of the last flush.  Any thread.  Raises CacheFailed."""
        return self._index.page(after=bytes.fromhex(key), limit=limit)

    def row(self, key: str) -> IndexRow | None:
        """As of the last flush.  Any thread.  Raises CacheFailed."""
        return self._index.row(bytes.fromhex(key))
