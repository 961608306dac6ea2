"""Bound directories: a remote directory shown in the namespace, listed on demand.

A listing is believed for the binding's time to live.  An older one is still shown while the
remote is asked again, because lookup and readdir cannot be killed while they wait; only a
directory that was never listed makes them wait, at most ``answer_deadline_s``, and the
listing goes on behind a deadline so that the next try finds it.  Where a protocol cannot
list, names are found one by one when they are looked up.

Concurrency: trio thread; one listing of a directory at a time, in the nursery of ``running``.
"""

import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import trio

from stagefs.config import NamespaceSettings, ReadSettings
from stagefs.errors import (
    DeadlineExceeded,
    NotADirectory,
    NotFound,
    NotSupported,
    ObjectMissing,
    RemoteError,
    StageFSError,
)
from stagefs.model import EntryKind, Inode, ListedEntry
from stagefs.namespace.node import Node
from stagefs.namespace.store import Namespace
from stagefs.objects.content import Shared
from stagefs.objects.objects import Objects
from stagefs.objects.staged import staged_from
from stagefs.remote.base import Remote
from stagefs.remote.url import join

log = logging.getLogger(__name__)

# Sizes that a listing did not tell are asked for, so many at once.
STATS_AT_ONCE = 16
# A name that was not there a moment ago is not asked for again, so many names at most.
MISSING_KEPT_MAX = 10_000
MISSING_HELD_S = 2.0
LISTED_AHEAD_FIRST, LISTED_AHEAD_MAX = 2, 8
# Directories that a task may leave out and still go from one to the next.
SKIPPED_MAX = 16
TOURS_MAX = 1024


class Bindings:
    def __init__(
        self,
        *,
        namespace: Namespace,
        objects: Objects,
        remote_for: Callable[[str], Remote],
        read: ReadSettings,
        settings: NamespaceSettings,
        names_changed: Callable[[Sequence[tuple[Inode, str]]], None],
    ) -> None:
        self._namespace = namespace
        self._objects = objects
        self._remote_for = remote_for
        self._read = read
        self._settings = settings
        self._names_changed = names_changed
        self._on_the_way: dict[Inode, Shared] = {}
        self._failed_until: dict[Inode, tuple[StageFSError, float]] = {}
        self._unlistable: set[Inode] = set()
        self._missing_until: dict[tuple[Inode, str], float] = {}
        # By their parent: the cookie of the directory that was asked for last, and how many
        # behind it were listed ahead.
        self._tours: dict[Inode, tuple[int, int]] = {}
        # Listed before anybody asked.
        self._ahead: set[Inode] = set()
        self._nursery: trio.Nursery

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as self._nursery:
            yield
            self._nursery.cancel_scope.cancel()

    def shown_by(self, directory: Node) -> Node | None:
        """The bound directory whose names ``directory`` shows, or None."""
        while directory.lower:
            directory = self._namespace.node(directory.lower)
        return directory if directory.bind_url is not None else None

    def fresh(self, bound: Node) -> bool:
        return time.time_ns() - bound.listed_ns < bound.bind_ttl_s * 1e9

    async def listed(self, bound: Node) -> None:
        """Return when the names of ``bound`` may be shown."""
        if not bound.listed_ns or bound.inode in self._ahead:
            self._list_ahead(bound)
        if self.fresh(bound) or bound.inode in self._unlistable:
            return
        known = self._failed_until.get(bound.inode)
        if known is not None:
            if trio.current_time() < known[1]:
                if bound.listed_ns:
                    return
                raise known[0]
            del self._failed_until[bound.inode]
        shared = self._refreshing(bound)
        if not bound.listed_ns:
            await self._soon(bound, shared)

    async def confirmed(self, bound: Node) -> None:
        """Return when the listing of ``bound`` is not older than its time to live, or cannot be had
        now.  For an open that must see a new version: one question for all files in it."""
        known = self._failed_until.get(bound.inode)
        if self.fresh(bound) or (known is not None and trio.current_time() < known[1]):
            return
        await self._soon(bound, self._refreshing(bound))

    def lists(self, bound: Node) -> bool:
        """Whether the remote can list the directory, as far as is known."""
        return bound.inode not in self._unlistable

    def _list_ahead(self, bound: Node) -> None:
        """A task that goes from one directory to the next, as `find` does, wants those behind it
        too: they are listed ahead of it, two at first, twice as many each time."""
        self._ahead.discard(bound.inode)
        above = self._namespace.place(bound.inode)
        if above is None:
            return
        parent, here = above
        before, count = self._tours.pop(parent, (0, 0))
        if before == here:
            self._tours[parent] = before, count
            return
        skipped = self._namespace.page(parent, before, SKIPPED_MAX) if before else []
        if any(cookie == here for cookie, _name, _node in skipped):
            count = min(max(LISTED_AHEAD_FIRST, count * 2), LISTED_AHEAD_MAX)
            for _cookie, _name, node in self._namespace.page(parent, here, count):
                wanted = node.bind_url is not None and not node.listed_ns
                if wanted and node.inode not in self._on_the_way:
                    self._ahead.add(node.inode)
                    self._refreshing(node)
        else:
            count = 0
        if len(self._tours) >= TOURS_MAX:
            self._tours.clear()
            self._ahead.clear()
        self._tours[parent] = here, count

    def _refreshing(self, bound: Node) -> Shared:
        shared = self._on_the_way.get(bound.inode)
        if shared is None:
            shared = self._on_the_way[bound.inode] = Shared()
            self._nursery.start_soon(self._refresh, bound, shared)
        return shared

    async def _soon(self, bound: Node, shared: Shared) -> None:
        with trio.move_on_after(self._read.answer_deadline_s):
            await shared.wait()
            return
        raise DeadlineExceeded(
            f"listing {bound.bind_url}: no answer within {self._read.answer_deadline_s:g} s; "
            "the listing goes on, try again"
        )

    async def found(self, directory: Node, bound: Node, name: str) -> None:
        """Make ``name`` known if the remote has it: for directories that cannot be listed."""
        if bound.inode not in self._unlistable:
            return
        key = (bound.inode, name)
        if trio.current_time() < self._missing_until.get(key, 0.0):
            return
        try:
            node = self._namespace.lookup(directory.inode, name)
        except NotFound:
            pass
        else:
            if time.time_ns() - node.checked_ns < bound.bind_ttl_s * 1e9:
                return
        assert bound.bind_url is not None
        try:
            found = await self._objects.stat_soon(join(bound.bind_url, name))
        except ObjectMissing:
            if len(self._missing_until) >= MISSING_KEPT_MAX:
                self._missing_until.clear()
            self._missing_until[key] = trio.current_time() + MISSING_HELD_S
            return
        self._namespace.add_found(
            bound.inode,
            name,
            staged_from(found, default_mode=self._settings.default_file_mode),
        )

    async def _refresh(self, bound: Node, shared: Shared) -> None:
        try:
            entries = await self._entries(bound)
            changed = self._namespace.merge_listing(
                bound.inode,
                entries,
                now_ns=time.time_ns(),
                default_mode=self._settings.default_file_mode,
            )
            self._names_changed([(bound.inode, name) for name in changed])
            self._objects.listed(bound.inode)
        except NotSupported:
            self._unlistable.add(bound.inode)
        except (NotFound, NotADirectory) as error:
            log.info("listing %s: its directory is gone (%s)", bound.bind_url, error)
            shared.error = error
        except StageFSError as error:
            self._failed(bound, shared, error)
        except Exception as error:
            log.exception("listing %s failed unexpectedly", bound.bind_url)
            self._failed(bound, shared, RemoteError(f"listing {bound.bind_url} failed ({error!r})"))
        finally:
            del self._on_the_way[bound.inode]
            shared.event.set()

    def _failed(self, bound: Node, shared: Shared, error: StageFSError) -> None:
        log.log(error.log_level, "listing %s: %s", bound.bind_url, error)
        shared.error = error
        self._failed_until[bound.inode] = (
            error,
            trio.current_time() + self._read.failure_hold_s,
        )

    async def _entries(self, bound: Node) -> list[ListedEntry]:
        """What can be written to need not be there yet: the first upload makes it."""
        try:
            return await self._list(bound)
        except ObjectMissing:
            if not bound.writable:
                raise
            return []

    async def _list(self, bound: Node) -> list[ListedEntry]:
        assert bound.bind_url is not None
        entries: list[ListedEntry] = []
        unsized: list[ListedEntry] = []
        async for page in self._remote_for(bound.bind_url).list(bound.bind_url):
            for entry in page:
                if entry.kind is EntryKind.FILE and entry.info is None:
                    unsized.append(entry)
                else:
                    entries.append(entry)
        if unsized:
            limit = trio.CapacityLimiter(STATS_AT_ONCE)
            async with trio.open_nursery() as nursery:
                for entry in unsized:
                    nursery.start_soon(self._sized, entry, entries, limit)
        # New names are kept in this order: tasks read files in readdir's order or in that of
        # their names, and what they want next is fetched ahead in ours.
        entries.sort(key=lambda entry: entry.name)
        return entries

    async def _sized(
        self, entry: ListedEntry, entries: list[ListedEntry], limit: trio.CapacityLimiter
    ) -> None:
        async with limit:
            try:
                answer = await self._objects.stat(entry.url)
            except StageFSError as error:
                log.info("leaving %s out of its listing: %s", entry.url, error)
                return
        entries.append(ListedEntry(entry.name, entry.kind, entry.url, answer))
