"""The books of a cache: bytes used, counters, which files' rows are out of date, which names go.

Entries write into it, the cache and eviction read it; it refers to neither.  It owns the one
lock under which names below ``objects/`` come and go, so that a file that is being evicted,
one that is being loaded and one that takes its name cannot be mistaken for each other.

Concurrency: any thread.  ``names`` is held for an open, a rename or an unlink, never for
longer work, because the event loop's thread takes it too; ``_lock`` for arithmetic only.
"""

import contextlib
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from stagefs.cache.file_system import allocated_bytes
from stagefs.cache.history import Event, write_events
from stagefs.cache.index import Index, IndexRow, Place, segment_end
from stagefs.cache.journal import GrowthJournal
from stagefs.cache.layout import Paths
from stagefs.errors import CacheFailed

logger = logging.getLogger(__name__)

# Fetching again what was evicted this recently is thrash: the capacity is too small for the work.
THRASH_WINDOW_S = 10 * 60
_EVICTIONS_REMEMBERED_MAX = 50_000


class Counters(msgspec.Struct):
    """What happened since the cache was opened."""

    damaged_chunks: int = 0
    damaged_entries: int = 0
    committed_chunks: int = 0
    stored_records: int = 0
    evicted_entries: int = 0
    evicted_chunks: int = 0
    evicted_bytes: int = 0
    thrash: int = 0
    index_failures: int = 0
    open_failures: int = 0


class Growing(Protocol):
    """An entry as the books see it."""

    @property
    def key(self) -> str: ...

    def index_row(self) -> IndexRow | None:
        """The row as it should be now; None when the entry is gone."""
        ...


class Ledger:
    def __init__(
        self, paths: Paths, index: Index, *, used_bytes: int, clock: Callable[[], float] = time.time
    ) -> None:
        """Raises OSError."""
        self.paths = paths
        self.index = index
        self.clock = clock
        self.names = threading.Lock()
        # Keys that a plan has chosen and whose files a worker has not removed yet (under `names`).
        self.leaving: set[str] = set()
        self._lock = threading.Lock()
        self._flushing = threading.Lock()  # one flush at a time: each ends the journals before it
        self._used_bytes = used_bytes
        self._counters = Counters()
        self._journal = GrowthJournal(paths.directory)
        self._growing: dict[str, Growing] = {}
        self._removed: set[str] = set()
        self._used_at: dict[str, int] = {}
        self._evictions: OrderedDict[tuple[str, int], float] = OrderedDict()
        self._events: list[Event] = []

    # Bytes and counters.

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    def add_used(self, change_bytes: int) -> None:
        with self._lock:
            self._used_bytes += change_bytes

    def set_used(self, used_bytes: int) -> None:
        with self._lock:
            self._used_bytes = used_bytes

    def count(self, name: str, increment: int = 1) -> None:
        with self._lock:
            setattr(self._counters, name, getattr(self._counters, name) + increment)

    def counters(self) -> Counters:
        with self._lock:
            return msgspec.structs.replace(self._counters)

    # Recency.

    def now_ms(self) -> int:
        return int(self.clock() * 1000)

    def note_use(self, key: str, at_ms: int) -> None:
        self._used_at[key] = at_ms

    def used_since_flush(self, key: str) -> int | None:
        return self._used_at.get(key)

    def uses_since_flush(self) -> list[tuple[str, int]]:
        return list(self._used_at.items())

    # Names.

    def place(self, entry: Growing, incoming: str) -> None:
        """Give the file of an entry its name.  Word of it first: a file that nobody knows of
        would stay for ever.  Raises OSError."""
        key = entry.key
        with self._lock:
            self._note(entry)
        name = self.paths.object_file(key)
        with self.names:
            with contextlib.suppress(FileNotFoundError):
                self.add_used(-allocated_bytes(os.lstat(name)))  # what it takes the place of
            try:
                os.rename(incoming, name)
            except FileNotFoundError:
                os.makedirs(os.path.dirname(name), mode=0o700, exist_ok=True)
                os.rename(incoming, name)
            self.leaving.discard(key)
            with self._lock:
                # A flush that took away the row of an earlier file of this key writes it again.
                self._removed.discard(key)
                self._note(entry)
        self.note_refetch(key)

    def _note(self, entry: Growing) -> None:
        if entry.key not in self._growing:
            self._journal.note(entry.key)
            self._growing[entry.key] = entry

    def unplace(self, key: str) -> None:
        """Take the name away; whoever has the file open keeps it.  Cheap: frees no blocks while
        somebody has the file open.  Raises OSError."""
        with self.names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.paths.object_file(key))
            self.leaving.discard(key)
        self.forget_row(key)

    def forget_row(self, key: str) -> None:
        with self._lock:
            self._removed.add(key)
            self._growing.pop(key, None)

    def is_removed(self, key: str) -> bool:
        """Whether a row of the index, if there is one, only waits for the index to take writes."""
        return key in self._removed

    def note_growing(self, entry: Growing) -> None:
        """Say that an entry's bytes have changed."""
        if entry.key in self._growing:
            return
        try:
            with self._lock:
                self._note(entry)
        except OSError as exc:
            self.count("index_failures")
            logger.warning("the cache's journal cannot be written: %s", exc)

    def growing_row(self, key: str) -> IndexRow | None:
        """The row of an entry that the index may not know yet."""
        entry = self._growing.get(key)
        return None if entry is None else entry.index_row()

    def write_records(self, rows: Sequence[IndexRow], *, end: Place) -> None:
        """Tell the index of records appended up to ``end``.  Raises CacheFailed."""
        with self._lock:
            self._removed.difference_update([row.key.hex() for row in rows])
        self.index.apply(rows=rows, facts=segment_end(end))

    def tolerate(self, write: Callable[[], object]) -> bool:
        """Run an index write that reading can do without; a failure is counted and logged."""
        try:
            write()
        except CacheFailed as exc:
            self.count("index_failures")
            logger.warning("%s", exc)
            return False
        return True

    def flush(self) -> None:
        """Write what is out of date to the index: one transaction.  Blocking; worker thread."""
        with self._flushing:
            self._flush()

    def _flush(self) -> None:
        used, self._used_at = self._used_at, {}
        touched = [(bytes.fromhex(key), at) for key, at in list(used.items())]
        with self._lock:
            growing, self._growing = self._growing, {}
            finished = self._journal.begin() if growing else []
        written = {key: row for key, entry in growing.items() if (row := entry.index_row())}
        with self._lock:
            removed, self._removed = self._removed, set()
        rows = [row for key, row in written.items() if key not in removed]
        if not (touched or rows or removed):
            return
        gone = [bytes.fromhex(key) for key in removed]
        if self.tolerate(lambda: self.index.apply(rows=rows, used=touched, removed=gone)):
            with self._lock:
                self._journal.forget(finished)
            return
        with self._lock:
            self._removed |= removed - self._growing.keys()
            self._growing = growing | self._growing
        self._used_at = used | self._used_at

    def close(self) -> None:
        self.flush()
        with self._lock:
            self._journal.close()

    # Thrash.

    def note_eviction(self, key: str, chunk: int = -1) -> None:
        """Remember that this entry, or this chunk of it, was evicted now."""
        with self._lock:
            self._evictions[key, chunk] = self.clock()
            self._evictions.move_to_end((key, chunk))
            if len(self._evictions) > _EVICTIONS_REMEMBERED_MAX:
                self._evictions.popitem(last=False)

    def note_event(self, event: Event) -> None:
        """For the history; written by ``write_events``."""
        with self._lock:
            self._events.append(event)

    def write_events(self) -> None:
        """Blocking."""
        with self._lock:
            events, self._events = self._events, []
        write_events(self.paths.directory, events)

    def note_refetch(self, key: str, chunk: int = -1) -> None:
        if not self._evictions:
            return
        with self._lock:
            evicted_at = self._evictions.pop((key, chunk), None)
            if evicted_at is not None and self.clock() - evicted_at < THRASH_WINDOW_S:
                self._counters.thrash += 1
