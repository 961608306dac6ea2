"""The operations on the cache: list, show, usage, verify, evict, pin, warm, capacity.

What is chosen is chosen in the trio thread; reading the index, hashing and removing are done
in worker threads.  A subject is a path (a file, or a directory with all files below it), a
URL, or the key of an entry.
"""

import functools
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import trio

from stagefs.cache.entry import ABSENT, Entry
from stagefs.cache.eviction import Plan
from stagefs.cache.history import Event, write_events
from stagefs.cache.index import IndexRow
from stagefs.cache.kept_capacity import keep_capacity
from stagefs.cache.store import Cache
from stagefs.config import CacheSettings
from stagefs.errors import Busy, CacheFailed, InvalidName, NotADirectory, NotFound
from stagefs.model import ObjectId
from stagefs.namespace.node import Node, NodeKind
from stagefs.namespace.store import Namespace
from stagefs.objects.objects import Objects
from stagefs.remote.registry import Remotes
from stagefs.staging import values
from stagefs.staging.names import first_error
from stagefs.staging.tree import Place, Tree, parse_place
from stagefs.staging.turns import Turns
from stagefs.staging.values import Progress, ProgressCallback
from stagefs.staging.verifying import Position, PositionFile
from stagefs.state_directory import cache_limits

PIN_OWNER = "admin"
WARMED_AT_ONCE = 16
# Chunks taken from readers at a time while they are verified: they are checked again on demand.
VERIFIED_AT_ONCE = 16
EVICTED_AT_ONCE = 500
_KEY = re.compile(r"[0-9a-f]{40}")


class Subject(msgspec.Struct, frozen=True):
    """One object that an operation is about: its key in the cache and its public URL."""

    key: str
    url: str


class CacheOperations:
    def __init__(
        self,
        *,
        cache: Cache | None,
        directory: Path,
        settings: CacheSettings,
        namespace: Namespace,
        objects: Objects,
        remotes: Remotes,
        tree: Tree,
    ) -> None:
        self._maybe_cache = cache
        self._directory = directory
        self._settings = settings
        self._namespace = namespace
        self._objects = objects
        self._remotes = remotes
        self._tree = tree
        self._warming = Turns(WARMED_AT_ONCE)

    @property
    def _cache(self) -> Cache:
        if self._maybe_cache is None:
            raise CacheFailed(
                f"This mount runs without a cache, because {self._directory} cannot be used: see"
                " the log, mend the disk and mount again."
            )
        return self._maybe_cache

    # Seeing

    async def list_entries(self, request: values.ListEntries) -> values.EntryPage:
        limit = max(1, request.limit)
        if not request.after:
            await trio.to_thread.run_sync(self._cache.flush_index)
        rows = await trio.to_thread.run_sync(
            functools.partial(self._cache.rows_after, request.after or "", limit=limit)
        )
        entries = [self._describe(row) for row in rows]
        return values.EntryPage(entries, after=entries[-1].key if len(rows) == limit else None)

    async def show(self, request: values.ShowEntry) -> values.CacheEntry:
        subjects = await self._subjects(request.subject)
        if len(subjects) != 1:
            raise InvalidName(f"{request.subject} is {len(subjects)} objects: name one.")
        rows = {row.key.hex(): row for row in await self._rows(url=subjects[0].url)}
        row = rows.get(subjects[0].key)
        if row is None:
            raise NotFound(f"Nothing of {request.subject} is cached.")
        return self._describe(row)

    async def usage(self) -> values.CacheUsage:
        await trio.to_thread.run_sync(self._cache.flush_index)
        return self.usage_now()

    def usage_now(self) -> values.CacheUsage:
        """As of the last flush of the index; some quick reads of it."""
        now = self._cache.usage()
        return values.CacheUsage(
            directory=str(self._directory),
            capacity_bytes=now.capacity_bytes,
            used_bytes=now.used_bytes,
            cached_bytes=now.cached_bytes,
            entries=now.entries,
            leases=now.leases,
            free_bytes=now.free_bytes,
            free_floor_bytes=now.free_floor_bytes,
            index_complete=now.index_complete,
            counters=msgspec.structs.asdict(now.counters),
        )

    async def _rows(self, url: str | None = None) -> list[IndexRow]:
        return await trio.to_thread.run_sync(functools.partial(self._cache.rows, url=url))

    def _describe(self, row: IndexRow) -> values.CacheEntry:
        key = row.key.hex()
        pins = [lease.owner for lease in self._cache.leases_of(key)]
        return values.CacheEntry(
            key=key,
            url=_text(row.url),
            version=_text(row.version),
            size_bytes=row.size_bytes,
            cached_bytes=row.cached_bytes,
            disk_bytes=row.disk_bytes,
            used_ns=row.used_at * 1_000_000,
            pinned=bool(pins),
            pins=pins,
        )

    # Which objects are meant

    async def _subjects(self, subject: str) -> list[Subject]:
        """The objects of a path, a URL or a key.  Raises NotFound when there is none."""
        if subject.startswith(("/", "staging:")):
            place = parse_place(subject)
            node = await self._tree.node(place)
            return [_subject_of(below) async for _place, below in self._files(place, node)]
        if _KEY.fullmatch(subject):
            found = [row for row in await self._rows() if row.key.hex() == subject]
        else:
            found = await self._rows(url=self._remotes.public(subject))
        if not found:
            raise NotFound(f"Nothing of {subject} is cached.")
        return [Subject(row.key.hex(), _text(row.url)) for row in found]

    async def _files(self, place: Place, node: Node) -> AsyncIterator[tuple[Place, Node]]:
        """Every staged file at or below a place."""
        if node.object_id is not None:
            yield place, node
            return
        if node.kind is not NodeKind.DIRECTORY:
            raise NotADirectory(f"{place} is no staged file.")
        left = [(place, node)]
        while left:
            here, directory = left.pop()
            await self._tree.shown(directory)
            after = 0
            while page := self._namespace.page(directory.inode, after, values.PAGE_ENTRIES_MAX):
                after = page[-1][0]
                for _cookie, name, below in page:
                    if below.kind is NodeKind.DIRECTORY:
                        left.append((here.below(name), below))
                    elif below.object_id is not None:
                        yield here.below(name), below
                await trio.lowlevel.checkpoint()

    # Changing

    async def verify(self, request: values.Verify, progress: ProgressCallback) -> values.Verified:
        """Hash every cached chunk again.  What is damaged goes, and is fetched when it is read."""
        if request.subject is not None:
            if request.resume:
                raise InvalidName("Only a verify of the whole cache goes on where it was stopped.")
            wanted = {subject.key for subject in await self._subjects(request.subject)}
            rows = [row for row in await self._rows() if row.key.hex() in wanted]
            position = await self._verify_rows(rows, Position(), progress, PositionFile(None))
        else:
            file = PositionFile(self._cache.directory)
            begin = file.read() if request.resume else Position()
            rows = sorted(await self._rows(), key=lambda row: row.key)
            position = await self._verify_rows(rows, begin, progress, file)
        now_s, damaged = time.time(), position.damaged
        await self._note(*(Event(now_s, "damaged", url=line, by="verify") for line in damaged))
        return values.Verified(position.entries, position.chunks, position.bytes_read, damaged)

    async def _verify_rows(
        self,
        rows: list[IndexRow],
        position: Position,
        progress: ProgressCallback,
        file: PositionFile,
    ) -> Position:
        """Those behind ``position``; the one that was reached is in the file if this is stopped."""
        left = [row for row in rows if row.key.hex() > position.after]
        total = position.bytes_read + sum(row.cached_bytes for row in left)
        try:
            for row in left:
                progress(Progress("verifying", position.bytes_read, total))
                position = await self._verify_row(row, position)
                if file.is_due:
                    await trio.to_thread.run_sync(file.write, position)
                else:
                    await trio.lowlevel.checkpoint()
        except BaseException:  # the command was stopped, or the mount is; it goes on
            file.write(position)
            raise
        file.remove()
        return position

    async def _verify_row(self, row: IndexRow, position: Position) -> Position:
        before = self._cache.counters().damaged_entries
        entry = self._cache.entry(
            ObjectId(_text(row.url), _text(row.version)), size_bytes=row.size_bytes
        )
        entries, checked, damaged = 0, 0, []
        if entry is not None:
            entries = 1
            checked, wrong = await self._verify_entry(entry)
            if wrong:
                damaged = [f"{_text(row.url)}: {wrong} of {checked} chunks were damaged"]
        elif self._cache.counters().damaged_entries > before:
            entries, damaged = 1, [f"{_text(row.url)}: its file was damaged"]
        return Position(
            after=row.key.hex(),
            entries=position.entries + entries,
            chunks=position.chunks + checked,
            bytes_read=position.bytes_read + row.cached_bytes,
            damaged=[*position.damaged, *damaged],
        )

    async def _verify_entry(self, entry: Entry) -> tuple[int, int]:
        """(chunks checked, chunks found damaged)."""
        checked = wrong = 0
        with self._held(entry) as is_held:
            if not is_held:
                return 0, 0
            for first in range(0, entry.chunk_count, VERIFIED_AT_ONCE):
                count = min(VERIFIED_AT_ONCE, entry.chunk_count - first)
                cached = [c for c in range(first, first + count) if entry.state[c] != ABSENT]
                if not cached:
                    continue
                entry.demote(first, count)
                for chunk in cached:
                    is_right = await trio.to_thread.run_sync(entry.verify, chunk)
                    wrong += not is_right and entry.state[chunk] == ABSENT
                checked += len(cached)
        return checked, wrong

    @contextmanager
    def _held(self, entry: Entry) -> Iterator[bool]:
        is_held = self._cache.hold(entry)
        try:
            yield is_held
        finally:
            if is_held:
                self._cache.drop(entry)

    async def evict(self, request: values.Evict, progress: ProgressCallback) -> values.Evicted:
        if (request.subject is None) != request.all:
            raise InvalidName("Say what to evict: one subject, or everything.")
        if request.subject is not None:
            keys = [subject.key for subject in await self._subjects(request.subject)]
        else:
            keys = [row.key.hex() for row in await self._rows()]
        # What came since the last flush has no row yet.
        await trio.to_thread.run_sync(self._cache.flush_index)
        # What is only kept open for the next reader may go.
        self._objects.close_idle()
        freed = kept = 0
        for start in range(0, len(keys), EVICTED_AT_ONCE):
            progress(Progress("evicting", start, len(keys), unit="objects"))
            plan = self._cache.plan_eviction(keys[start : start + EVICTED_AT_ONCE])
            if plan is not None:
                kept += len(plan.kept)
                freed += await self._carry_out(plan)
        if request.subject is not None and kept:
            raise Busy(f"{request.subject} stays cached: it is pinned, or open in a program.")
        return values.Evicted(entries=len(keys) - kept, freed_bytes=freed, kept=kept)

    async def _carry_out(self, plan: Plan) -> int:
        # A plan that was made must be carried out: what it names is not served any more.
        with trio.CancelScope(shield=True) as scope:
            freed = await trio.to_thread.run_sync(self._cache.carry_out, plan)
        assert not scope.cancelled_caught
        return freed

    async def pin(self, request: values.Pin) -> values.Pinned:
        subjects = await self._subjects(request.subject)
        keys = [subject.key for subject in subjects]
        if request.pinned:
            items = [(subject.key, subject.url) for subject in subjects]
            call: Callable[[], object] = functools.partial(self._cache.pin, items, owner=PIN_OWNER)
        else:
            call = functools.partial(self._cache.unpin, keys, owner=PIN_OWNER)
        await trio.to_thread.run_sync(call)
        return values.Pinned(len(keys))

    async def warm(self, request: values.Warm, progress: ProgressCallback) -> values.Warmed:
        """Fetch all files at or below the paths.  The first that fails ends it."""
        files: dict[int, tuple[Place, Node]] = {}
        for path in request.paths:
            place = parse_place(path)
            node = await self._tree.node(place)
            async for below, file in self._files(place, node):
                files[file.inode] = below, file
        total = sum(node.size_bytes for _place, node in files.values())
        done: dict[int, int] = {}

        async def fetch(place: Place, node: Node) -> None:
            def landed(so_far: int) -> None:
                done[node.inode] = so_far
                progress(Progress(f"fetching {place}", sum_of(done), total))

            async with self._warming.turn(request.priority):
                await self._objects.warm(node, landed)
            done[node.inode] = node.size_bytes

        works: list[Callable[[], Awaitable[None]]] = [
            functools.partial(fetch, place, node) for place, node in files.values()
        ]
        await first_error(works, WARMED_AT_ONCE)
        return values.Warmed(entries=len(files), bytes_total=total)

    async def capacity(
        self, request: values.Capacity, progress: ProgressCallback
    ) -> values.CacheUsage:
        """Set, for this daemon and those after it, and make room at once."""
        cache, wanted = self._cache, request.capacity_bytes
        if wanted is not None and wanted < 0:
            raise InvalidName("A capacity is not negative.")
        if request.default:
            limits = cache_limits(self._settings, self._directory, cached_bytes=cache.used_bytes)
            wanted = limits.capacity_bytes
        if wanted is not None:
            configured = self._settings.capacity_bytes
            kept = None if request.default else wanted
            keep = functools.partial(keep_capacity, self._directory, kept, configured=configured)
            await trio.to_thread.run_sync(keep)
            cache.capacity_bytes = wanted
            await self._make_room(progress)
            await self._note(
                Event(time.time(), "capacity", size_bytes=wanted, by="an administrator")
            )
        return await self.usage()

    async def cleanup(
        self, request: values.Cleanup, progress: ProgressCallback
    ) -> values.CacheUsage:
        """Evict until at most so much is left, or all that may go is gone."""
        if request.to_bytes < 0:
            raise InvalidName("A size is not negative.")
        cache = self._cache
        # What came since the last flush has no row yet.
        await trio.to_thread.run_sync(cache.flush_index)
        self._objects.close_idle()
        while (excess := cache.used_bytes - request.to_bytes) > 0:
            progress(Progress("cleaning up", cache.used_bytes, None))
            plan = cache.plan_freeing(excess)
            if plan is None or not await self._carry_out(plan):
                break
        return await self.usage()

    async def _make_room(self, progress: ProgressCallback) -> None:
        cache = self._cache
        self._objects.close_idle()
        while cache.over_capacity():
            progress(Progress("making room", cache.used_bytes, None))
            plan = cache.plan_room()
            if plan is None or not await self._carry_out(plan):
                break

    async def _note(self, *events: Event) -> None:
        """For the history."""
        await trio.to_thread.run_sync(write_events, self._directory, events)


def sum_of(done: dict[int, int]) -> int:
    return sum(done.values())


def _subject_of(node: Node) -> Subject:
    assert node.object_id is not None
    return Subject(node.object_id.key, node.object_id.url)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
