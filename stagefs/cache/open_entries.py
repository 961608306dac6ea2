"""The entries that are loaded now: those somebody holds, and a bounded number of others.

Loading costs an open and a few reads, so entries that nobody holds stay loaded for a while;
the least recently dropped go first.  Going means only to be forgotten here: an entry closes
its file when nobody refers to it.

Concurrency: the trio thread, but for ``add``, which workers may call; what they add is seen
by the next call in the trio thread.
"""

from collections import deque
from collections.abc import Iterator

from stagefs.cache.entry import Entry, ObjectFile
from stagefs.cache.packed import PackedRecord

IDLE_FILES_MAX = 512  # each costs an open file
IDLE_RECORDS_MAX = 16_384  # each costs about a kilobyte of memory


class OpenEntries:
    def __init__(self) -> None:
        self._loaded: dict[str, Entry] = {}
        self._idle_files: dict[str, Entry] = {}
        self._idle_records: dict[str, Entry] = {}
        self._added: deque[Entry] = deque()

    def add(self, entry: Entry) -> None:
        """Any thread."""
        self._added.append(entry)

    def get(self, key: str) -> Entry | None:
        if self._added:
            self._absorb()
        entry = self._loaded.get(key)
        if entry is not None and entry.gone:
            self.forget(entry)
            return None
        return entry

    def hold(self, entry: Entry) -> bool:
        if self._added:
            self._absorb()
        if entry.holds == 0:
            if entry.gone:
                return False
            known = self._loaded.setdefault(entry.key, entry)
            if known is not entry:
                return False
            self._idle_of(entry).pop(entry.key, None)
        entry.holds += 1
        return True

    def drop(self, entry: Entry) -> None:
        assert entry.holds > 0, "drop without hold"
        entry.holds -= 1
        if entry.holds or entry.gone:
            return
        if isinstance(entry, ObjectFile) and not entry.is_placed:
            # Created, and nothing of it was ever committed.
            entry.discard()
            self.forget(entry)
        else:
            self._add_idle(entry)

    def forget(self, entry: Entry) -> None:
        if self._loaded.get(entry.key) is entry:
            del self._loaded[entry.key]
            self._idle_of(entry).pop(entry.key, None)

    def held(self) -> list[Entry]:
        self._absorb()
        return [entry for entry in self._loaded.values() if entry.holds]

    def in_segments(self, numbers: set[int]) -> list[Entry]:
        self._absorb()
        return [
            entry
            for entry in self._loaded.values()
            if isinstance(entry, PackedRecord) and entry.segment in numbers
        ]

    def __iter__(self) -> Iterator[Entry]:
        self._absorb()
        return iter(list(self._loaded.values()))

    def _absorb(self) -> None:
        while self._added:
            entry = self._added.popleft()
            if entry.gone:
                continue
            before = self._loaded.get(entry.key)
            if before is entry:
                continue
            if before is not None and not before.gone:
                if before.holds:
                    continue  # the same content; those who hold it go on with it
                self.forget(before)
            self._loaded[entry.key] = entry
            if entry.holds == 0 and (not isinstance(entry, ObjectFile) or entry.is_placed):
                self._add_idle(entry)

    def _idle_of(self, entry: Entry) -> dict[str, Entry]:
        return self._idle_files if isinstance(entry, ObjectFile) else self._idle_records

    def _add_idle(self, entry: Entry) -> None:
        idle = self._idle_of(entry)
        idle[entry.key] = entry
        limit = IDLE_FILES_MAX if isinstance(entry, ObjectFile) else IDLE_RECORDS_MAX
        while len(idle) > limit:
            key = next(iter(idle))
            del idle[key]
            del self._loaded[key]
