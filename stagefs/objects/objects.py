"""Objects: the face of reading.  Give it a node and a span, it gives bytes of one version.

Concurrency: trio thread.  Work that several readers share (first contact, proving a checksum,
fetches) runs in the nursery of ``run``; a reader only waits for it, within its deadline.
Nothing here is needed to answer a request after a restart: handles and contents are made
again from the node when a read comes for an unknown one.
"""

import collections
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, contextmanager
from collections.abc import Iterator

import msgspec
import trio

from stagefs.cache.store import Cache
from stagefs.errors import (
    CacheFailed,
    DeadlineExceeded,
    ObjectChanged,
    RemoteError,
    StageFSError,
)
from stagefs.model import Inode, ObjectInfo, Span, WholeObject
from stagefs.namespace.node import Node
from stagefs.namespace.store import Namespace
from stagefs.objects.content import (
    ABSENT,
    PRESENT,
    VERIFIED,
    Content,
    Counters,
    Failure,
    OpenObject,
    Shared,
)
from stagefs.objects.fetching import Fetcher
from stagefs.objects.inline import inline_read_flags
from stagefs.objects.proving import digest_of_file, mismatch
from stagefs.objects.readahead import ReadAhead
from stagefs.objects.recent import RecentError, RecentErrors
from stagefs.objects.room import Room
from stagefs.config import ReadSettings
from stagefs.objects.small import SHARED_NAME, SmallFetcher
from stagefs.objects.volatile import VolatileBudget
from stagefs.remote.base import Remote

log = logging.getLogger(__name__)

# Chunks hashed in one visit to a worker thread, when a sequential reader meets chunks of an
# earlier daemon.
VERIFY_AHEAD_CHUNKS = 16


class Transfer(msgspec.Struct, frozen=True):
    """A fetch under way, for status.  Seconds and bytes."""

    url: str
    start: int
    length: int
    landed: int
    age_s: float


class Objects:
    def __init__(
        self,
        *,
        namespace: Namespace,
        cache: Cache | None,
        remote_for: Callable[[str], Remote],
        settings: ReadSettings,
    ) -> None:
        self._namespace = namespace
        self._cache = cache
        self._remote_for = remote_for
        self._settings = settings
        self.counters = Counters()
        self.errors = RecentErrors()
        self._contents: collections.OrderedDict[str, Content] = collections.OrderedDict()
        self._volatile = VolatileBudget(settings.volatile_bytes_max)
        self._stats: dict[str, StatOnTheWay] = {}
        self._room = Room(cache, self._release_idle)
        self._inline_flags = inline_read_flags(cache.directory) if cache is not None else None
        self._nursery: trio.Nursery
        self._fetcher: Fetcher
        self._small: SmallFetcher | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Everything else may be called inside this only."""
        async with trio.open_nursery() as self._nursery:
            self._fetcher = Fetcher(
                nursery=self._nursery,
                remote_for=self._remote_for,
                room=self._room,
                volatile=self._volatile,
                errors=self.errors,
                counters=self.counters,
                settings=self._settings,
                ranges_refused=self._namespace.set_ranges_refused,
                changed=self._object_changed,
            )
            if self._cache is not None:
                self._small = SmallFetcher(
                    nursery=self._nursery,
                    remote_for=self._remote_for,
                    cache=self._cache,
                    failed=self._fetcher.failed,
                    counters=self.counters,
                    settings=self._settings,
                    arrived=self._small_arrived,
                )
            try:
                yield
            finally:
                self._nursery.cancel_scope.cancel()
                for content in list(self._contents.values()):
                    self._close(content)

    # Open objects

    def open(self, node: Node) -> OpenObject:
        """A handle on the node's object.  Contacts nobody."""
        content = self._content(node)
        content.holds += 1
        ahead = ReadAhead(
            window_bytes_max=self._settings.window_bytes_max,
            seek_tolerance_bytes=self._settings.seek_tolerance_bytes,
        )
        return OpenObject(content, ahead)

    def release(self, opened: OpenObject) -> None:
        opened.content.holds -= 1

    def _content(self, node: Node) -> Content:
        assert node.object_id is not None
        key = node.object_id.key
        content = self._contents.get(key)
        if content is not None:
            self._contents.move_to_end(key)
            if content.changed is None or content.inode == node.inode:
                return content
        content = Content(
            inode=node.inode,
            object_id=node.object_id,
            size_bytes=node.size_bytes,
            validator=node.validator,
            checksum=node.checksum,
            ranges=node.ranges,
        )
        self._contents[key] = content
        if self._cache is not None:
            entry = self._cache.entry(node.object_id, size_bytes=node.size_bytes)
            if entry is not None:
                self._adopt(content, entry)
        if len(self._contents) > self._settings.open_objects_max:
            self._release_some(len(self._contents) - self._settings.open_objects_max)
        return content

    def _adopt(self, content: Content, entry: object) -> None:
        """Serve ``content`` from ``entry``, held until the content is dropped."""
        from stagefs.cache.entry import Entry

        assert isinstance(entry, Entry)
        assert self._cache is not None
        self._cache.hold(entry)
        self._cache.note_use(entry)
        content.entry = entry
        content.preadv_flags = self._inline_flags
        if content.validator is None:
            content.validator = entry.validator
        if content.checksum is not None and entry.proved:
            content.checksum_proved = True
        if content.checksum_proved or not self._prove_before_read(content):
            content.serving = entry

    def _prove_before_read(self, content: Content) -> bool:
        return (
            content.checksum is not None
            and content.size_bytes <= self._settings.checksum_before_read_bytes_max
        )

    def _close(self, content: Content) -> None:
        from stagefs.cache.entry import Entry

        entry, content.entry, content.serving = content.entry, None, None
        self._contents.pop(content.object_id.key, None)
        if isinstance(entry, Entry) and self._cache is not None:
            self._cache.drop(entry)
        elif entry is not None:
            entry.close()  # type: ignore[attr-defined]

    def _release_idle(self) -> None:
        self._release_some(len(self._contents))

    def _release_some(self, count: int) -> None:
        for content in list(self._contents.values()):
            if count <= 0:
                return
            if content.idle:
                self._close(content)
                count -= 1

    # Reading

    async def read(self, opened: OpenObject, offset: int, size: int) -> memoryview | bytes:
        """At most ``size`` bytes from ``offset``, short only at the end of the object.

        Raises DeadlineExceeded after ``read_deadline_s``; ObjectChanged when the remote no longer
        has this version; AccessDenied, ObjectMissing, RemoteError as the remote says.
        """
        content = opened.content
        length = min(size, content.size_bytes - offset)
        if length <= 0:
            return b""
        span = Span(offset, length)
        self.counters.reads_slow += 1
        with trio.move_on_after(self._settings.read_deadline_s):
            return await self._read(content, opened.ahead, span)
        error = DeadlineExceeded(
            f"reading {content.url} at {offset}: nothing arrived within "
            f"{self._settings.read_deadline_s:g} s; see whether the server answers, then read again"
        )
        self.errors.note(content.object_id.key, error)
        log.warning("%s", error)
        raise error

    async def _read(self, content: Content, ahead: ReadAhead, span: Span) -> memoryview | bytes:
        wanted = ahead.wanted(span, size_bytes=content.size_bytes)
        while True:
            await self._ready(content)
            chunk = content.first_unreadable(span)
            if content.changed is None:
                self._fetcher.plan(content, wanted, urgent=span)
            if chunk is None:
                data = await self._pread(content, span)
                if data is not None:
                    return data
                continue
            entry = content.entry
            assert entry is not None
            if entry.state[chunk] == PRESENT:
                await self._verify(content, chunk, wanted)
            elif chunk in content.flights:
                await content.wait(chunk)
            else:
                self._fetcher.raise_failure(content, chunk)
                self._fetcher.plan(content, span, urgent=span)
                await content.wait(chunk)

    async def _pread(self, content: Content, span: Span) -> bytes | None:
        """The bytes from the cache file, or None when a chunk was dropped in the meantime."""
        entry = content.entry
        assert entry is not None
        if content.preadv_flags is not None:
            buffer = bytearray(span.length)
            try:
                done = os.preadv(
                    entry.fd, (buffer,), entry.base + span.start, content.preadv_flags
                )
            except OSError:
                done = 0
            if done == span.length:
                return bytes(buffer)
        epoch = entry.epoch
        try:
            data = await trio.to_thread.run_sync(
                os.pread, entry.fd, span.length, entry.base + span.start
            )
        except OSError as error:
            self._fetcher.to_memory(content, CacheFailed(f"reading the cache: {error.strerror}"))
            return None
        if entry.epoch != epoch or content.entry is not entry:
            return None
        if len(data) != span.length:
            self._damaged(content)
            return None
        return data

    def _damaged(self, content: Content) -> None:
        """The cache file became shorter under us: begin again with an empty entry."""
        from stagefs.cache.entry import Entry

        entry = content.entry
        content.entry = content.serving = None
        content.flights.clear()
        if isinstance(entry, Entry) and self._cache is not None:
            self._cache.drop(entry)
            self._cache.discard(entry)
        content.wake_all()

    async def _verify(self, content: Content, chunk: int, wanted: Span) -> None:
        """Check chunks that an earlier daemon left, the asked one first."""
        shared = content.shared.get("verify")
        if shared is not None:
            await shared.wait()
            return
        entry = content.entry
        assert entry is not None
        shared = content.shared["verify"] = Shared()
        try:
            await trio.to_thread.run_sync(entry.verify, chunk)
        finally:
            del content.shared["verify"]
            shared.event.set()
        content.wake((chunk,))
        last = min(content.chunks(wanted).stop, chunk + 1 + VERIFY_AHEAD_CHUNKS)
        more = [c for c in range(chunk + 1, last) if entry.state[c] == PRESENT]
        if more and "verify" not in content.shared:
            content.shared["verify"] = Shared()
            self._nursery.start_soon(self._verify_ahead, content, entry, more)

    async def _verify_ahead(self, content: Content, entry: object, chunks: list[int]) -> None:
        verify = entry.verify  # type: ignore[attr-defined]

        def run() -> None:
            for chunk in chunks:
                verify(chunk)

        shared = content.shared["verify"]
        try:
            await trio.to_thread.run_sync(run)
        finally:
            del content.shared["verify"]
            shared.event.set()
            content.wake(chunks)

    # Getting an object ready to be read

    async def _ready(self, content: Content) -> None:
        """Return when ``content`` has an entry that may be read or filled."""
        while content.entry is None:
            if content.changed is not None:
                raise content.changed
            if self._small is not None and self._small.takes(content):
                self._fetcher.raise_failure(content, 0)
                shared = self._small.want(content, urgent=True)
                assert shared is not None
                self._fetch_neighbours(content)
                await shared.wait()
            elif content.validator is None:
                await self._shared(content, "contact", self._first_contact)
            else:
                self._create_entry(content)
        if content.serving is None:
            await self._shared(content, "prove", self._prove)

    async def _shared(
        self, content: Content, name: str, work: Callable[[Content], Awaitable[None]]
    ) -> None:
        shared = content.shared.get(name)
        if shared is None:
            shared = content.shared[name] = Shared()
            self._nursery.start_soon(self._work, content, name, shared, work)
        await shared.wait()

    async def _work(
        self,
        content: Content,
        name: str,
        shared: Shared,
        work: Callable[[Content], Awaitable[None]],
    ) -> None:
        try:
            await work(content)
        except StageFSError as error:
            shared.error = error
        except Exception as error:  # noqa: BLE001 - a defect of ours costs this read, not the mount
            self.counters.unexpected += 1
            log.exception("%s of %s failed unexpectedly", name, content.url)
            shared.error = RemoteError(f"reading {content.url} failed unexpectedly ({error!r})")
        finally:
            del content.shared[name]
            shared.event.set()

    async def _first_contact(self, content: Content) -> None:
        """Learn the validator of an object that a catalog only named."""
        self._fetcher.raise_failure(content, 0)
        try:
            info = await self._remote_for(content.url).stat(content.url)
            if info.size_bytes != content.size_bytes:
                raise ObjectChanged(
                    f"{content.url} has {info.size_bytes} bytes, {content.size_bytes} were "
                    "registered; stage it in again with --replace"
                )
        except StageFSError as error:
            self._fetcher.failed(content, [0], error)
            raise
        self._contacted(content, info)

    def _contacted(self, content: Content, info: ObjectInfo) -> None:
        content.validator = info.validator
        content.ranges = content.ranges and info.ranges
        self._namespace.set_validator(
            content.inode, info.validator, checked_ns=time.time_ns(), ranges=content.ranges
        )

    def _create_entry(self, content: Content) -> None:
        assert content.validator is not None
        if self._cache is None:
            self._fetcher.to_memory(content, CacheFailed("there is no usable cache directory"))
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
            self._fetcher.to_memory(content, error)
            return
        self._adopt(content, entry)

    def _small_arrived(self, content: Content, whole: WholeObject, entry: object) -> None:
        if content.validator is None:
            self._contacted(content, whole.info)
        content.checksum_proved = True
        if content.entry is not None:
            return
        if isinstance(entry, StageFSError):
            self._fetcher.to_memory(content, CacheFailed(str(entry)))
            assert content.entry is not None
            os.pwrite(content.entry.fd, whole.data, 0)
            content.entry.commit(0, 1)  # type: ignore[arg-type]
            return
        self._adopt(content, entry)

    def _fetch_neighbours(self, content: Content) -> None:
        """Queue the names after this one when its directory is being walked."""
        small = self._small
        assert small is not None
        place = self._namespace.place(content.inode)
        if place is None:
            return
        directory, cookie = place
        after, count = small.step(directory, cookie)
        if not count:
            return
        last = after
        for next_cookie, _name, node in self._namespace.page(directory, after, count):
            last = next_cookie
            if node.object_id is None or not 0 < node.size_bytes:
                continue
            if node.object_id.key in self._contents:
                continue
            neighbour = self._content(node)
            if neighbour.entry is None and small.takes(neighbour):
                small.want(neighbour, urgent=False)
        small.queued(directory, last)

    # Declared checksums

    async def _prove(self, content: Content) -> None:
        """Fetch the whole, compare it with the declared checksum, and only then serve it."""
        await self._fetch_whole(content, lambda _bytes: None)
        entry = content.entry
        assert entry is not None
        assert content.checksum is not None
        found = await trio.to_thread.run_sync(
            lambda: digest_of_file(
                entry.fd,
                base=entry.base,
                size_bytes=content.size_bytes,
                kind=content.checksum.kind,  # type: ignore[union-attr]
            )
        )
        if found == content.checksum.digest:
            content.checksum_proved = True
            content.serving = entry
            entry.mark_proved()  # type: ignore[attr-defined]
            return
        self.counters.checksum_mismatches += 1
        error = mismatch(content.url, content.checksum, found)
        self.errors.note(content.object_id.key, error)
        log.error("%s", error)
        self._damaged(content)
        content.failures[0] = Failure(
            error, trio.current_time() + self._settings.failure_hold_s
        )
        raise error

    async def _fetch_whole(self, content: Content, progress: Callable[[int], None]) -> None:
        """Return when every chunk is verified.  Progress is told in bytes from the start."""
        whole = Span(0, content.size_bytes)
        while True:
            entry = content.entry
            if entry is None:
                raise RemoteError(f"{content.url} was dropped while it was being fetched")
            chunk = content.first_unreadable(whole)
            if chunk is None:
                progress(content.size_bytes)
                return
            progress(chunk << entry.chunk_shift)
            start = chunk << entry.chunk_shift
            span = Span(start, min(entry.chunk_bytes, content.size_bytes - start))
            window = Span(start, min(self._settings.window_bytes_max, content.size_bytes - start))
            if entry.state[chunk] == PRESENT:
                await self._verify(content, chunk, window)
                continue
            self._fetcher.raise_failure(content, chunk)
            self._fetcher.plan(content, window, urgent=span)
            await content.wait(chunk)

    async def warm(self, node: Node, progress: Callable[[int], None] = lambda _bytes: None) -> None:
        """Fetch the whole object and prove its declared checksum.  No deadline of its own: each
        fetch in it has the remote's."""
        if not node.size_bytes:
            return
        opened = self.open(node)
        content = opened.content
        try:
            while True:
                if content.serving is None and content.entry is not None:
                    await self._fetch_whole(content, progress)
                await self._ready(content)
                if not self._kept_whole(content):
                    raise CacheFailed(
                        f"{content.url} ({content.size_bytes} bytes) does not fit into the cache; "
                        "raise the capacity, or let tasks read it without warming"
                    )
                await self._fetch_whole(content, progress)
                if content.checksum is not None and not content.checksum_proved:
                    await self._shared(content, "prove", self._prove)
                return
        finally:
            self.release(opened)

    def _kept_whole(self, content: Content) -> bool:
        if self._cache is None:
            return content.size_bytes <= self._settings.volatile_bytes_max
        return content.size_bytes <= self._cache.capacity_bytes

    # Asking the remote about versions

    async def stat(self, url: str) -> ObjectInfo:
        """What the remote says now.  Shared by all that ask at once; goes on when a caller gives up,
        so that asking again finds the answer."""
        asked = self._stats.get(url)
        if asked is None:
            asked = self._stats[url] = StatOnTheWay()
            self._nursery.start_soon(self._stat, url, asked)
        await asked.event.wait()
        if asked.error is not None:
            raise asked.error
        assert asked.answer is not None
        return asked.answer

    async def stat_soon(self, url: str) -> ObjectInfo:
        """``stat`` for callers that cannot be killed while they wait (lookup, open, symlink)."""
        with trio.move_on_after(self._settings.answer_deadline_s):
            return await self.stat(url)
        raise DeadlineExceeded(
            f"asking for {url}: no answer within {self._settings.answer_deadline_s:g} s; "
            "the question goes on, try again"
        )

    async def _stat(self, url: str, asked: "StatOnTheWay") -> None:
        try:
            asked.answer = await self._remote_for(url).stat(url)
        except StageFSError as error:
            asked.error = error
        except Exception as error:  # noqa: BLE001 - a defect of ours costs this answer, not the mount
            self.counters.unexpected += 1
            log.exception("stat of %s failed unexpectedly", url)
            asked.error = RemoteError(f"asking for {url} failed unexpectedly ({error!r})")
        finally:
            asked.event.set()
            if self._stats.get(url) is asked:
                del self._stats[url]

    def _object_changed(self, content: Content) -> None:
        """The next open shall ask the remote at once."""
        self._namespace.touch_checked(content.inode, 0)

    # Seeing it

    def cached_bytes(self, node: Node) -> int:
        if node.object_id is None:
            return 0
        content = self._contents.get(node.object_id.key)
        entry = content.entry if content is not None else None
        if entry is None and self._cache is not None:
            entry = self._cache.entry(node.object_id, size_bytes=node.size_bytes)
        if entry is None:
            return 0
        state = entry.state
        held = (len(state) - state.count(ABSENT)) * entry.chunk_bytes
        if state and state[-1] != ABSENT:
            held -= len(state) * entry.chunk_bytes - node.size_bytes
        return held

    def last_error(self, node: Node) -> RecentError | None:
        return self.errors.get(node.object_id.key) if node.object_id is not None else None

    def waiting_reads(self) -> int:
        return sum(len(content.waiting) for content in self._contents.values())

    def open_objects(self) -> int:
        return len(self._contents)

    def transfers(self) -> list[Transfer]:
        return [
            Transfer(f.url, f.span.start, f.span.length, f.landed_bytes, f.age_s)
            for f in self._fetcher.flights
        ]


class StatOnTheWay:
    __slots__ = ("answer", "error", "event")

    def __init__(self) -> None:
        self.event = trio.Event()
        self.answer: ObjectInfo | None = None
        self.error: StageFSError | None = None


__all__ = ["Objects", "OpenObject", "SHARED_NAME", "VERIFIED", "contextmanager", "Iterator"]
