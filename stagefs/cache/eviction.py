"""Making room: what goes, in which order, and how it goes without a reader noticing.

In two steps, because readers look at chunk states in the trio thread without locks:
``plan`` (trio thread, cheap) chooses victims and makes readers keep off them; ``carry_out``
(worker thread, blocking) removes them.  The order is least recently used first:

1. entries that nobody holds, whole: an object's own file is unlinked, of a packed object the
   whole segment goes, and what of it is held, leased or was used lately is appended again;
2. only when that is not enough, chunks of objects that are held, oldest arrival first.

Entries under a pin or lease stay, whole.  What is loaded again between the two steps is
rescued: ``Ledger.leaving`` has its key until a worker really takes it.
"""

import contextlib
import heapq
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from stagefs.cache import layout
from stagefs.cache.entry import ObjectFile
from stagefs.cache.file_system import read_fully, write_fully
from stagefs.cache.history import Event
from stagefs.cache.index import IndexRow, Place
from stagefs.cache.leases import Leases
from stagefs.cache.ledger import Ledger
from stagefs.cache.open_entries import OpenEntries
from stagefs.cache.packed import Segments
from stagefs.errors import CacheFailed

_ROWS_AT_A_TIME = 64
# Rows looked at and files chosen in one plan: bounds its time in the trio thread to some
# milliseconds.  Whoever still lacks room plans again.
_ROWS_MAX = 2048
_FILES_MAX = 256
# A segment of which more than half must stay is left alone for this long.
_STUCK_S = 60


@dataclass(slots=True)
class Plan:
    """What a worker is to remove.  ``kept`` are keys that an explicit eviction had to leave."""

    files: list[tuple[str, int]] = field(default_factory=list)  # key, bytes on disk
    segments: list[int] = field(default_factory=list)
    records: list[IndexRow] = field(default_factory=list)
    runs: list[tuple[ObjectFile, int, int]] = field(default_factory=list)
    held: set[str] = field(default_factory=set)
    used_at: dict[str, int] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    asked_by: str = ""

    def __bool__(self) -> bool:
        return bool(self.files or self.segments or self.records or self.runs)


class Eviction:
    def __init__(
        self, ledger: Ledger, segments: Segments, leases: Leases, entries: OpenEntries
    ) -> None:
        self._ledger = ledger
        self._segments = segments
        self._leases = leases
        self._entries = entries
        self._leaving_segments: set[int] = set()
        # Segments that mostly had to stay, and when that was found.
        self._stuck_segments: dict[int, float] = {}
        self._resume_after = (-1, -1)

    # The trio thread.

    def plan(self, wanted_bytes: int) -> Plan:
        """Choose what to remove to free about ``wanted_bytes``.  Raises CacheFailed."""
        plan = Plan(used_at=dict(self._ledger.uses_since_flush()))
        for entry in self._entries:
            if entry.gone and not entry.holds:
                self._entries.forget(entry)
        freed = self._choose_unused(plan, wanted_bytes)
        if freed < wanted_bytes:
            freed += self._choose_used(plan, wanted_bytes - freed)
        if freed < wanted_bytes:
            self._choose_runs(plan, wanted_bytes - freed)
        self._note_segments(plan)
        return plan

    def plan_of(self, keys: Iterable[str]) -> Plan:
        """Remove exactly these entries, but for those held or leased (``Plan.kept``).  Raises
        CacheFailed."""
        plan = Plan(asked_by="an administrator")
        for key in keys:
            row = self._row(key)
            if row is None:
                continue
            entry = self._entries.get(key)
            if self._leases.covers(key) or (entry is not None and entry.holds):
                plan.kept.append(key)
            elif row.segment:
                if entry is not None:
                    self._entries.forget(entry)
                    entry.discard()
                plan.records.append(row)
            else:
                self._choose_file(plan, key, row)
        return plan

    def _choose_unused(self, plan: Plan, wanted_bytes: int) -> int:
        """Rows whose recency the index knows, oldest first."""
        freed = 0
        after = self._resume_after
        for _ in range(0, _ROWS_MAX, _ROWS_AT_A_TIME):
            rows = self._ledger.index.oldest(_ROWS_AT_A_TIME, after=after)
            for number, row in rows:
                after = (row.used_at, number)
                key = row.key.hex()
                # On a full disk the index cannot forget what is gone: it would go for ever.
                if key not in plan.used_at and not self._ledger.is_removed(key):
                    freed += self._choose(plan, row)
                if freed >= wanted_bytes or len(plan.files) == _FILES_MAX:
                    self._resume_after = (-1, -1)
                    return wanted_bytes
            if len(rows) < _ROWS_AT_A_TIME:
                self._resume_after = (-1, -1)
                return freed
        # All these had to stay.  The next plan goes on behind them.
        self._resume_after = after
        return freed

    def _choose_used(self, plan: Plan, wanted_bytes: int) -> int:
        """Entries used, or new, since the index was written: newer than all the others."""
        freed = 0
        for key, _ in sorted(plan.used_at.items(), key=lambda used: used[1]):
            row = self._row(key)
            if row is not None:
                freed += self._choose(plan, row)
            if freed >= wanted_bytes:
                break
        return freed

    def _row(self, key: str) -> IndexRow | None:
        growing = self._ledger.growing_row(key)
        if growing is not None or self._ledger.is_removed(key):
            return growing
        return self._ledger.index.row(bytes.fromhex(key))

    def _choose(self, plan: Plan, row: IndexRow) -> int:
        """Take this row's entry into the plan if it may go; returns the bytes that frees."""
        key = row.key.hex()
        if row.segment:
            if row.segment in plan.segments or row.segment in self._leaving_segments:
                return 0
            if self._leases.covers(key) or self._is_stuck(row.segment):
                return 0
            plan.segments.append(row.segment)
            # At least half: see _survivors.
            return self._segments.disk_bytes(row.segment) // 2
        entry = self._entries.get(key)
        if self._leases.covers(key) or (entry is not None and entry.holds):
            return 0
        return self._choose_file(plan, key, row)

    def _is_stuck(self, number: int) -> bool:
        since = self._stuck_segments.get(number)
        return since is not None and self._ledger.clock() - since < _STUCK_S

    def _choose_file(self, plan: Plan, key: str, row: IndexRow) -> int:
        entry = self._entries.get(key)
        disk_bytes = row.disk_bytes
        with self._ledger.names:
            if key in self._ledger.leaving:
                return 0
            self._ledger.leaving.add(key)
        if isinstance(entry, ObjectFile):
            self._entries.forget(entry)
            entry.retire()
            disk_bytes = entry.disk_bytes
        plan.files.append((key, disk_bytes))
        return disk_bytes

    def _choose_runs(self, plan: Plan, wanted_bytes: int) -> None:
        """Chunks of held objects, the oldest of all of them first."""
        heap = [
            (number, place, entry)
            for place, entry in enumerate(self._entries.held())
            if isinstance(entry, ObjectFile)
            and not self._leases.covers(entry.key)
            and (number := entry.oldest_number()) is not None
        ]
        heapq.heapify(heap)
        freed = 0
        while heap and freed < wanted_bytes:
            _, place, entry = heapq.heappop(heap)
            first, count = entry.take_oldest()
            plan.runs.append((entry, first, count))
            freed += count * entry.chunk_bytes
            number = entry.oldest_number()
            if number is not None:
                heapq.heappush(heap, (number, place, entry))

    def _note_segments(self, plan: Plan) -> None:
        numbers = set(plan.segments)
        self._leaving_segments |= numbers
        for entry in self._entries.in_segments(numbers) if numbers else []:
            if entry.holds:
                plan.held.add(entry.key)
            else:
                self._entries.forget(entry)

    # A worker thread.

    def carry_out(self, plan: Plan) -> int:
        """Remove what the plan says; returns the bytes freed.  What fails stays in the books
        and is chosen again."""
        freed = sum(self._remove_file(plan, *file) for file in plan.files)
        for number in plan.segments:
            try:
                freed += self._remove_segment(number, plan)
            finally:
                self._leaving_segments.discard(number)
        for row in plan.records:
            self._remove_record(plan, row)
        for entry, first, count in plan.runs:
            with contextlib.suppress(CacheFailed):
                punched = entry.punch(first, count)
                self._ledger.count("evicted_chunks", punched)
                freed += punched * entry.chunk_bytes
        # Entries named by the plan must not be kept alive by it: closing frees their space.
        plan.runs.clear()
        self._ledger.flush()
        self._ledger.count("evicted_bytes", freed)
        self._ledger.write_events()
        return freed

    def _remove_file(self, plan: Plan, key: str, disk_bytes: int) -> int:
        name = self._ledger.paths.object_file(key)
        row = None
        with contextlib.suppress(CacheFailed):
            row = self._row(key)
        fd = -1
        try:
            # With the file open, unlink is quick; the blocks are freed by close, outside the lock.
            with contextlib.suppress(FileNotFoundError):
                fd = layout.open_file(name, os.O_RDONLY)
            with self._ledger.names:
                if key not in self._ledger.leaving:
                    return 0  # rescued
                self._ledger.leaving.discard(key)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
                self._ledger.forget_row(key)
        except OSError:
            with self._ledger.names:
                self._ledger.leaving.discard(key)
            return 0
        finally:
            if fd >= 0:
                os.close(fd)
        self._ledger.add_used(-disk_bytes)
        self._ledger.count("evicted_entries")
        self._ledger.note_eviction(key)
        self._note_event(plan, key, row, disk_bytes)
        return disk_bytes

    def _note_event(self, plan: Plan, key: str, row: IndexRow | None, disk_bytes: int) -> None:
        url = "" if row is None else row.url.decode("utf-8", "replace")
        event = Event(self._ledger.clock(), "evicted", key, url, disk_bytes, plan.asked_by)
        self._ledger.note_event(event)

    def _remove_segment(self, number: int, plan: Plan) -> int:
        self._segments.seal(number)
        rows: list[IndexRow] = []
        try:
            rows = self._ledger.index.rows_of_segment(number)
            survivors = self._survivors(rows, plan)
            staying_bytes = sum(row.disk_bytes for row in survivors)
            if staying_bytes > self._segments.disk_bytes(number) // 2:
                self._stuck_segments[number] = self._ledger.clock()
                return 0
            moved = self._append_again(number, survivors)
        except (CacheFailed, OSError):
            # No room to move anything: a pinned record keeps its segment, others give way.
            if any(self._leases.covers(row.key.hex()) for row in rows):
                return 0
            moved = []
        self._ledger.tolerate(lambda: self._ledger.index.move_segment(number, moved))
        freed = self._segments.remove(number)
        self._stuck_segments.pop(number, None)
        stayed = {key for key, *_ in moved}
        for row in rows:
            if row.key in stayed:
                freed -= row.disk_bytes
            else:
                self._ledger.note_eviction(row.key.hex())
                self._note_event(plan, row.key.hex(), row, row.disk_bytes)
        self._ledger.count("evicted_entries", len(rows) - len(moved))
        return max(0, freed)

    def _survivors(self, rows: list[IndexRow], plan: Plan) -> list[IndexRow]:
        """What is appended again: all that is held or leased; then, newest first and up to half
        of the segment's bytes, what was used in the later half of the time since its oldest
        record was."""
        used_at = {row.key: max(row.used_at, plan.used_at.get(row.key.hex(), 0)) for row in rows}
        if not rows:
            return []
        middle = (min(used_at.values()) + self._ledger.now_ms()) // 2
        allowance = sum(row.disk_bytes for row in rows) // 2
        survivors = []
        for row in sorted(rows, key=lambda row: used_at[row.key], reverse=True):
            key = row.key.hex()
            if key in plan.held or self._leases.covers(key):
                survivors.append(row)
            elif used_at[row.key] > middle and row.disk_bytes <= allowance:
                survivors.append(row)
                allowance -= row.disk_bytes
        return survivors

    def _append_again(
        self, number: int, survivors: list[IndexRow]
    ) -> list[tuple[bytes, int, Place]]:
        """Raises CacheFailed, OSError."""
        if not survivors:
            return []
        file = self._segments.file(number)
        rows, records = [], []
        for row in survivors:
            record = read_fully(file.fd, row.disk_bytes, row.offset)
            said = layout.decode_record(record, row.offset)
            if said is not None and said.live and len(record) == row.disk_bytes:
                rows.append(row)
                records.append(record)
        places = self._segments.append(records)
        return [(row.key, row.offset, place) for row, place in zip(rows, places, strict=True)]

    def _remove_record(self, plan: Plan, row: IndexRow) -> None:
        """Mark a record dead, so that a rebuild does not bring it back; its space goes with its
        segment."""
        with contextlib.suppress(OSError):
            write_fully(self._segments.file(row.segment).fd, layout.DEAD, row.offset)
        gone = [(row.key, row.segment, row.offset)]
        self._ledger.tolerate(lambda: self._ledger.index.remove_packed(gone))
        self._ledger.count("evicted_entries")
        self._note_event(plan, row.key.hex(), row, row.disk_bytes)
