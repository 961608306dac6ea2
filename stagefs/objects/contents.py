"""The table of open objects: which are open, from which entry each is served, which may go.

Trio thread only.  An entry is held in the cache for as long as its content is in the table.
"""

import collections
import itertools
import logging
from collections.abc import Iterable
from typing import TypeVar

import trio

from stagefs.cache.entry import Entry
from stagefs.cache.packed import PackedRecord
from stagefs.cache.store import Cache
from stagefs.config import ReadSettings
from stagefs.errors import CacheFailed
from stagefs.namespace.node import Node
from stagefs.objects.content import Content, Counters
from stagefs.objects.volatile import VolatileBudget, VolatileEntry

_With = TypeVar("_With")

log = logging.getLogger(__name__)

WARNING_INTERVAL_S = 60.0


class Contents:
    def __init__(
        self,
        cache: Cache | None,
        *,
        inline_flags: int | None,
        settings: ReadSettings,
        counters: Counters,
    ) -> None:
        self._cache = cache
        self._settings = settings
        self._counters = counters
        self._volatile = VolatileBudget(settings.volatile_bytes_max)
        self._inline_flags = inline_flags
        self._warn_after = 0.0
        self._by_key: collections.OrderedDict[str, Content] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._by_key)

    def get(self, key: str) -> Content | None:
        return self._by_key.get(key)

    def all(self) -> list[Content]:
        return list(self._by_key.values())

    def of(self, node: Node) -> Content:
        """The content of a node's object, opened if need be.  Contacts nobody."""
        assert node.object_id is not None
        key = node.object_id.key
        content = self._by_key.get(key)
        if content is not None:
            self._by_key.move_to_end(key)
            return content
        return self._open(node)

    def newly_opened(self, wanted: Iterable[tuple[Node, _With]]) -> list[tuple[Content, _With]]:
        """The contents of those nodes' objects that were not open before."""
        new = {}
        for node, what in wanted:
            assert node.object_id is not None
            key = node.object_id.key
            if key not in self._by_key:
                new[key] = node, what
        absent = set() if self._cache is None else self._cache.absent(list(new))
        return [
            (self._open(node, is_absent=key in absent), what) for key, (node, what) in new.items()
        ]

    def _open(self, node: Node, *, is_absent: bool = False) -> Content:
        """``is_absent``: the cache is known to hold nothing of it."""
        assert node.object_id is not None
        content = Content(
            inode=node.inode,
            object_id=node.object_id,
            size_bytes=node.size_bytes,
            validator=node.validator,
            checksum=node.checksum,
            ranges=node.ranges,
        )
        self._by_key[content.key] = content
        if self._cache is not None and not is_absent:
            entry = self._cache.entry(node.object_id, size_bytes=node.size_bytes)
            if entry is not None and self._cache.hold(entry):
                # A small object was compared with its checksum before it was stored.
                content.checksum_proved |= isinstance(entry, PackedRecord)
                self._serve_from(content, entry)
        if len(self._by_key) > self._settings.open_objects_max:
            # Many at once: what cannot be closed is looked at again each time.
            self._close_idle(len(self._by_key) // 8)
        return content

    def create(self, content: Content) -> None:
        """Give ``content``, whose validator is known, an empty entry: in the cache, or in memory
        where the cache cannot."""
        assert content.validator is not None
        if self._cache is None:
            reason = CacheFailed("there is no usable cache directory")
            self.serve_from_memory(content, reason)
            return
        try:
            entry = self._cache.create(
                content.object_id,
                size_bytes=content.size_bytes,
                validator=content.validator,
                mtime_ns=None,
                checksum=content.checksum,
            )
        except CacheFailed as error:
            self.serve_from_memory(content, error)
            return
        self.adopt(content, entry)

    def adopt(self, content: Content, entry: Entry) -> None:
        """Serve ``content`` from ``entry``, unless that was evicted a moment ago."""
        assert self._cache is not None
        if self._cache.hold(entry):
            self._serve_from(content, entry)

    def _serve_from(self, content: Content, entry: Entry) -> None:
        """``entry`` is held for this content."""
        assert self._cache is not None
        self._let_go(content)
        self._cache.note_use(entry)
        content.entry = entry
        content.preadv_flags = self._inline_flags
        if content.validator is None:
            content.validator = entry.validator
        self._serve(content)

    def serve_from_memory(self, content: Content, reason: CacheFailed) -> VolatileEntry:
        """The cache disk cannot take this object: hold what is read of it in memory instead."""
        if isinstance(content.entry, VolatileEntry):
            return content.entry
        # One line for many objects: they all read past the same disk.
        if trio.current_time() >= self._warn_after:
            self._warn_after = trio.current_time() + WARNING_INTERVAL_S
            log.warning("reading %s without the cache: %s", content.url, reason)
        self._counters.volatile_objects += 1
        self._let_go(content)
        memory = content.entry = VolatileEntry(
            content.object_id,
            size_bytes=content.size_bytes,
            validator=content.validator or "",
            budget=self._volatile,
        )
        content.preadv_flags = 0
        content.flights.clear()
        content.failures.clear()
        self._serve(content)
        content.wake_all()
        return memory

    def start_again(self, content: Content) -> None:
        """What is cached of ``content`` is wrong: forget it all."""
        entry = content.entry
        self._let_go(content)
        content.flights.clear()
        if isinstance(entry, Entry):
            entry.discard()
        content.wake_all()

    def close_idle(self) -> None:
        """Let go of what nobody uses, so that it can be evicted."""
        self._close_idle(len(self._by_key))

    def close_all(self) -> None:
        for content in self.all():
            self._close(content)

    def prove_before_read(self, content: Content) -> bool:
        return content.size_bytes <= self._settings.checksum_before_read_bytes_max

    def _serve(self, content: Content) -> None:
        if content.checksum_proved or not self.prove_before_read(content):
            content.serving = content.entry

    def _let_go(self, content: Content) -> None:
        entry, content.entry, content.serving = content.entry, None, None
        if isinstance(entry, Entry) and self._cache is not None:
            self._cache.drop(entry)
        elif isinstance(entry, VolatileEntry):
            entry.close()

    def _close(self, content: Content) -> None:
        self._by_key.pop(content.key, None)
        self._let_go(content)

    def _close_idle(self, count: int) -> None:
        idle = (content for content in self._by_key.values() if content.idle)
        for content in list(itertools.islice(idle, count)):
            self._close(content)
