"""Objects: the face of reading.  Give it a node and a span, it gives bytes of one version.

Concurrency: trio thread.  Work that several readers share (first contact, proving a checksum,
fetches) runs in the nursery of ``running``; a reader only waits for it, within its deadline.
Nothing here is needed to answer a request after a restart: handles and contents are made
again from the node when a read comes for an unknown one.
"""

import logging
import math
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import trio

from stagefs.cache.store import Cache
from stagefs.config import ReadSettings
from stagefs.errors import CacheFailed, DeadlineExceeded, RemoteError
from stagefs.model import Inode, ObjectInfo, Span
from stagefs.namespace.node import Node
from stagefs.namespace.store import Namespace
from stagefs.objects.asking import Asking
from stagefs.objects.content import (
    ABSENT,
    PRESENT,
    Content,
    Counters,
    Failure,
    OpenObject,
    ReadableEntry,
)
from stagefs.objects.contents import Contents
from stagefs.objects.fetching import SPAN_BYTES_MAX, Fetcher
from stagefs.objects.preparing import Preparing
from stagefs.objects.proving import digest_of_file, mismatch
from stagefs.objects.readahead import ReadAhead
from stagefs.objects.recent import RecentError, RecentErrors
from stagefs.objects.replicas import Replicas
from stagefs.objects.room import Room
from stagefs.objects.sharing import Sharing
from stagefs.objects.small import SmallFetcher
from stagefs.remote.base import Remote

log = logging.getLogger(__name__)

# Chunks hashed in one visit to a worker thread: many enough to make the visit cheap, few
# enough that a reader behind it need not wait long.
VERIFY_CHUNKS = 4


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
        inline_flags: int | None,
        remote_for: Callable[[str], Remote],
        settings: ReadSettings,
        once_for: Callable[[str], Remote] | None = None,
    ) -> None:
        """``inline_flags``: see ``inline.inline_read_flags`` of the cache's directory.
        ``once_for``: see ``Replicas``; None: as ``remote_for``."""
        self._namespace = namespace
        self._cache = cache
        self._remote_for = remote_for
        self._once_for = once_for or remote_for
        self._settings = settings
        self.counters = Counters()
        self.errors = RecentErrors()
        self._contents = Contents(
            cache, inline_flags=inline_flags, settings=settings, counters=self.counters
        )
        self.replicas: Replicas
        self._nursery: trio.Nursery
        self._room: Room
        self._fetcher: Fetcher
        self._asking: Asking
        self._sharing: Sharing
        self._preparing: Preparing

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Everything else may be called inside this only."""
        async with trio.open_nursery() as self._nursery:
            self._build(self._nursery)
            try:
                yield
            finally:
                self._nursery.cancel_scope.cancel()
        self._contents.close_all()

    def _build(self, nursery: trio.Nursery) -> None:
        settings, remote_for = self._settings, self._remote_for
        self._room = Room(self._cache, self._contents.close_idle)
        self._sharing = Sharing(nursery, self.counters)
        self.replicas = Replicas(
            nursery=nursery,
            namespace=self._namespace,
            remote_for=remote_for,
            once_for=self._once_for,
            affinity=settings.affinity or "",
        )
        self._fetcher = Fetcher(
            nursery=nursery,
            replicas=self.replicas,
            room=self._room,
            contents=self._contents,
            errors=self.errors,
            counters=self.counters,
            settings=settings,
            ranges_refused=self._namespace.set_ranges_refused,
            changed=self._object_changed,
        )
        self._asking = Asking(
            nursery=nursery,
            remote_for=remote_for,
            answer_deadline_s=settings.answer_deadline_s,
        )
        self._preparing = Preparing(
            namespace=self._namespace,
            contents=self._contents,
            fetcher=self._fetcher,
            sharing=self._sharing,
            replicas=self.replicas,
            remote_for=remote_for,
        )
        if self._cache is not None:
            small = SmallFetcher(
                nursery=nursery,
                replicas=self.replicas,
                remote_for=remote_for,
                cache=self._cache,
                failed=self._fetcher.failed,
                counters=self.counters,
                settings=settings,
                arrived=self._preparing.small_arrived,
                stored=self._preparing.small_stored,
            )
            self._preparing.fetch_small_with(small, ahead_max=settings.small_ahead_max)

    # Open objects

    def open(self, node: Node, *, hoards: bool = False, reader: int = 0) -> OpenObject:
        """A handle on the node's object.  Contacts nobody.  ``hoards``, ``reader``: see
        OpenObject."""
        ahead = ReadAhead(
            size_bytes=node.size_bytes,
            window_bytes_max=self._room.ahead_bytes_max(self._settings.window_bytes_max),
            seek_tolerance_bytes=self._settings.seek_tolerance_bytes,
        )
        return OpenObject(node, ahead, hoards=hoards, reader=reader)

    def release(self, opened: OpenObject) -> None:
        content, opened.content = opened.content, None
        if content is not None:
            content.holds -= 1
            content.hoards -= opened.hoards

    def _content(self, opened: OpenObject) -> Content:
        content = opened.content
        if content is None:
            content = opened.content = self._contents.of(opened.node)
            content.holds += 1
            content.hoards += opened.hoards
            self._preparing.reached(content)
        return content

    def confirmed(self, node: Node) -> None:
        """The remote says that the node's version is what it has."""
        assert node.object_id is not None
        content = self._contents.get(node.object_id.key)
        if content is not None:
            content.changed = None

    def listed(self, directory: Inode) -> None:
        """The names of a bound directory became known."""
        self._preparing.listed(directory)

    # Reading

    async def read(self, opened: OpenObject, offset: int, size: int) -> memoryview | bytes:
        """At most ``size`` bytes from ``offset``, short only at the end of the object.

        Raises DeadlineExceeded after ``read_deadline_s``; ObjectChanged when the remote no longer
        has this version; AccessDenied, ObjectMissing, RemoteError as the remote says.
        """
        length = min(size, opened.node.size_bytes - offset)
        if length <= 0:
            return b""
        content = self._content(opened)
        data = opened.read_now(offset, length)
        if data is not None:
            return data
        span = Span(offset, length)
        self.counters.reads_slow += 1
        with trio.move_on_after(self._settings.read_deadline_s):
            return await self._read(content, opened.ahead, span)
        error = DeadlineExceeded(
            f"reading {content.url} at {offset}: nothing arrived within "
            f"{self._settings.read_deadline_s:g} s; see whether the server answers, then read again"
        )
        self._fetcher.given_up(content, span, error)
        raise error

    def cached(self, opened: OpenObject, offset: int, size: int) -> bool:
        """Whether a read needs nothing from the remote, as far as is known before it."""
        content = self._content(opened)
        length = min(size, content.size_bytes - offset)
        if length <= 0 or content.whole is not None:
            return True
        entry = content.entry
        if entry is None:
            return False
        chunks = content.chunks(Span(offset, length))
        return entry.state.count(ABSENT, chunks.start, chunks.stop) == 0

    async def _read(self, content: Content, ahead: ReadAhead, span: Span) -> memoryview | bytes:
        wanted = ahead.wanted(span)
        waited_since = math.inf
        while True:
            await self._preparing.entry(content)
            if content.whole is not None:
                return content.whole[span.start : span.stop]
            if content.serving is None:
                self._fetcher.raise_failure(content, 0)
                await self._sharing.run(content, "prove", self._prove)
            chunk = content.first_unreadable(span)
            entry = content.entry
            assert entry is not None
            if chunk is not None and entry.state[chunk] == ABSENT:
                self._fetcher.raise_failure(content, chunk, waited_since=waited_since)
                waited_since = min(waited_since, trio.current_time())
            if content.changed is None:
                self._fetcher.plan(content, wanted, urgent=span)
            self._verify(content, wanted)
            if chunk is None:
                data = await self._pread(content, span)
                if data is not None:
                    return data
                continue
            if entry.state[chunk] == PRESENT and chunk not in content.to_verify:
                await content.shared["verify"].wait()
            elif entry.state[chunk] == PRESENT:
                await content.wait(chunk)
            else:
                await content.wait(chunk)

    async def _pread(self, content: Content, span: Span) -> memoryview | bytes | None:
        """The bytes from the cache file, or None when a chunk was dropped in the meantime."""
        entry = content.entry
        assert entry is not None
        ready = content.read_at_once(entry, span.start, span.length)
        if ready is not None:
            return ready
        epoch = entry.epoch
        try:
            data = await trio.to_thread.run_sync(
                os.pread, entry.fd, span.length, entry.base + span.start
            )
        except OSError as error:
            self._contents.serve_from_memory(
                content, CacheFailed(f"reading the cache: {error.strerror}")
            )
            return None
        if entry.epoch != epoch or content.entry is not entry:
            return None
        if len(data) != span.length:
            self._contents.start_again(content)
            return None
        return data

    def _verify(self, content: Content, wanted: Span) -> None:
        """See that the chunks of ``wanted`` that an earlier daemon left get checked, in order."""
        chunks = content.chunks(wanted)
        entry = content.entry
        assert entry is not None
        first = entry.state.find(PRESENT, chunks.start, chunks.stop)
        if first < 0:
            return
        under_way = content.to_verify
        if first in under_way:
            content.to_verify = range(under_way.start, max(under_way.stop, chunks.stop))
        elif not under_way:
            content.to_verify = range(first, chunks.stop)
        self._sharing.begin(content, "verify", self._verify_all)

    async def _verify_all(self, content: Content) -> None:
        entry = content.entry
        assert entry is not None
        try:
            while content.to_verify and content.entry is entry:
                todo = content.to_verify
                first, stop = todo.start, min(todo.start + VERIFY_CHUNKS, todo.stop)
                await trio.to_thread.run_sync(entry.verify, first, stop - first)
                content.to_verify = range(stop, content.to_verify.stop)
                content.wake(range(first, stop))
        finally:
            content.to_verify = range(0)
            content.wake_all()

    # Declared checksums

    async def _prove(self, content: Content) -> None:
        """Fetch the whole, compare it with the declared checksum, and only then serve it."""
        while not await self._is_proved(content):
            await self._preparing.entry(content)

    async def _is_proved(self, content: Content) -> bool:
        """Raises ChecksumMismatch; False: it is to be fetched again, from one replica alone."""
        await self._fetch_whole(content, lambda _bytes: None)
        entry = content.entry
        assert entry is not None
        checksum = content.checksum
        assert checksum is not None
        found = await trio.to_thread.run_sync(
            lambda: digest_of_file(
                entry.fd,
                base=entry.base,
                size_bytes=content.size_bytes,
                kind=checksum.kind,
            )
        )
        if found == checksum.digest:
            content.checksum_proved = True
            content.serving = entry
            return True
        self.counters.checksum_mismatches += 1
        error = mismatch(content.url, checksum, found)
        self.errors.note(content.key, error)
        log.error("%s", error)
        self._contents.start_again(content)
        if self.replicas.blame(content):
            return False
        hold_s = self._settings.failure_hold_s
        content.failures[0] = Failure(error, found=trio.current_time(), hold_s=hold_s)
        raise error

    async def _fetch_whole(self, content: Content, progress: Callable[[int], None]) -> None:
        """Return when every chunk is verified.  Progress is told in bytes from the start."""
        await self._fetch_first(
            content, content.size_bytes, progress, window_bytes=self._settings.window_bytes_max
        )

    async def _fetch_first(
        self,
        content: Content,
        count: int,
        progress: Callable[[int], None],
        *,
        window_bytes: int,
    ) -> None:
        """The same for the first ``count`` bytes, of which so many are asked for ahead."""
        wanted = Span(0, count)
        waited_since = math.inf
        while True:
            entry = content.entry
            if entry is None:
                raise RemoteError(f"{content.url} was dropped while it was being fetched")
            chunk = content.first_unreadable(wanted)
            if chunk is None:
                progress(count)
                return
            progress(chunk << entry.chunk_shift)
            start = chunk << entry.chunk_shift
            span = Span(start, min(entry.chunk_bytes, content.size_bytes - start))
            window = Span(start, min(window_bytes, max(count - start, span.length)))
            if entry.state[chunk] == PRESENT:
                self._verify(content, window)
                await content.shared["verify"].wait()
                continue
            self._fetcher.raise_failure(content, chunk, waited_since=waited_since)
            waited_since = min(waited_since, trio.current_time())
            self._fetcher.plan(content, window, urgent=span)
            await content.wait(chunk)

    async def warm(self, node: Node, progress: Callable[[int], None] = lambda _bytes: None) -> None:
        """Fetch the whole object and prove its declared checksum.  No deadline of its own: each
        fetch in it has the remote's."""
        if not node.size_bytes:
            return
        opened = self.open(node, hoards=True)
        content = self._content(opened)
        try:
            while True:
                await self._preparing.entry(content)
                while content.whole is not None:
                    await content.wait(0)
                if not self._kept_whole(content):
                    raise CacheFailed(
                        f"{content.url} ({content.size_bytes} bytes) does not fit into the cache; "
                        "raise the capacity, or let tasks read it without warming"
                    )
                await self._fetch_whole(content, progress)
                if content.checksum is not None and not content.checksum_proved:
                    await self._sharing.run(content, "prove", self._prove)
                return
        finally:
            self.release(opened)

    async def fetch_ahead(self, node: Node, bytes_max: int) -> None:
        """Have the start of an object that nobody reads yet, ``bytes_max`` of it at most, with one
        fetch at a time.  No deadline of its own, as ``warm``; who reads it is told of errors."""
        if not node.size_bytes or self._cache is None:
            return
        opened = self.open(node, hoards=True)
        content = self._content(opened)
        try:
            if content.whole is not None or (content.complete() and content.checksum_proved):
                return
            self.counters.ahead_objects += 1
            await self._preparing.entry(content, ahead=True)
            if content.entry is None:
                return
            count = min(bytes_max, content.size_bytes)
            await self._fetch_first(
                content, count, lambda _bytes: None, window_bytes=SPAN_BYTES_MAX
            )
            if content.serving is None and count == content.size_bytes:
                await self._sharing.run(content, "prove", self._prove)
        finally:
            self.release(opened)

    def ahead_bytes_max(self, wanted_bytes: int) -> int:
        """How much of ``wanted_bytes`` may be fetched ahead into this cache."""
        return self._room.ahead_bytes_max(wanted_bytes)

    def _kept_whole(self, content: Content) -> bool:
        if self._cache is None:
            return content.size_bytes <= self._settings.volatile_bytes_max
        return content.size_bytes <= self._cache.capacity_bytes

    # Asking the remote about versions

    async def stat(self, url: str) -> ObjectInfo:
        """What the remote says now; waits as long as the remote's own deadlines allow."""
        return await self._asking.stat(url)

    async def stat_soon(self, url: str) -> ObjectInfo:
        """``stat`` for callers that cannot be killed while they wait (lookup, open, symlink)."""
        return await self._asking.stat_soon(url)

    def _object_changed(self, content: Content) -> None:
        """The next open shall ask the remote at once."""
        self._namespace.touch_checked(content.inode, 0)

    # Seeing it

    def cached_bytes(self, node: Node) -> int:
        if node.object_id is None:
            return 0
        content = self._contents.get(node.object_id.key)
        if content is not None and content.whole is not None:
            return len(content.whole)
        entry: ReadableEntry | None = content.entry if content is not None else None
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
        return sum(len(content.waiting) for content in self._contents.all())

    def open_objects(self) -> int:
        return len(self._contents)

    def close_idle(self) -> None:
        """Let go of what nobody reads now, so that the cache can evict it."""
        self._contents.close_idle()

    def transfers(self) -> list[Transfer]:
        return [
            Transfer(f.url, f.span.start, f.span.length, f.landed_bytes, f.age_s)
            for f in self._fetcher.flights
        ]
