"""What remotes have in common whose clients can only block, and cannot ask for a version.

A subclass says how to look, list and read a part; this does the rest: every piece is read,
then the object is looked at again, and only when it is still the same version does the piece go
into the sink.  So no byte of another version lands, at the price of a request for each piece;
pieces grow while they come quickly.  Works in worker threads, one call each.
"""

import abc
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, TypeVar

import trio

from stagefs.errors import ObjectChanged, RemoteUnavailable
from stagefs.model import MIB, Checksum, ListedEntry, ObjectInfo, Span, WholeObject
from stagefs.remote.base import WHOLE_OBJECT_BYTES_MAX, BatchItem, Results, Sink
from stagefs.remote.batch import fetch_each, not_the_version, shorter, too_large
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.threads import Call, SinkCall
from stagefs.remote.url import check_writable
from stagefs.remote.versions import is_version

T = TypeVar("T")

LIST_PAGE_NAMES = 1000
PIECE_BYTES_MIN = 256 << 10
PIECE_BYTES_MAX = 8 * MIB
QUICK_S = 0.5


class BlockingRemote(abc.ABC):
    """The frame of such a driver.  It can only read; one that can write overrides ``put`` and
    ``delete``."""

    def __init__(self, settings: RemoteSettings) -> None:
        self._settings = settings
        self._answer_timeout_s = settings.connect_timeout_s + settings.answer_timeout_s
        self._threads = trio.CapacityLimiter(settings.concurrency * 2)
        self._lookup_threads = trio.CapacityLimiter(settings.lookups * 2)

    # What a subclass says, in worker threads.  Raises StageFSError and CallStopped only.

    @abc.abstractmethod
    def _head(self, call: Call[Any], url: str) -> ObjectInfo:
        """As ``stat``."""

    @abc.abstractmethod
    def _entries(self, call: Call[Any], url: str) -> Iterator[ListedEntry]:
        """As ``list``."""

    @abc.abstractmethod
    def _read(self, call: Call[Any], info: ObjectInfo, span: Span) -> bytes:
        """The bytes of a span; fewer when the object has no more."""

    # The interface.

    async def stat(self, url: str) -> ObjectInfo:
        return await self._call(lambda call: self._head(call, url), url).run(self._lookup_threads)

    async def list(self, url: str) -> AsyncIterator[Sequence[ListedEntry]]:
        def work(call: Call[tuple[ListedEntry, ...]]) -> tuple[ListedEntry, ...]:
            return tuple(self._entries(call, url))

        found = await self._call(work, url).run(self._lookup_threads)
        for start in range(0, len(found), LIST_PAGE_NAMES):
            yield found[start : start + LIST_PAGE_NAMES]

    async def fetch(self, url: str, span: Span, *, sink: Sink, validator: str | None) -> ObjectInfo:
        def work(call: SinkCall[ObjectInfo]) -> ObjectInfo:
            return self._fetch(call, url, span, validator)

        call = SinkCall(
            work,
            url=url,
            span=span,
            sink=sink,
            answer_timeout_s=self._answer_timeout_s,
            progress_timeout_s=self._settings.progress_timeout_s,
        )
        return await call.run(self._threads)

    async def fetch_batch(self, items: Sequence[BatchItem]) -> Results:
        async def fetch_whole(item: BatchItem) -> WholeObject:
            def work(call: Call[WholeObject]) -> WholeObject:
                return self._fetch_whole(call, item)

            return await self._call(work, item.url).run(self._threads)

        return await fetch_each(fetch_whole, items)

    async def put(
        self,
        url: str,
        *,
        source: int,
        size_bytes: int,
        overwrite: bool,
        checksum: Checksum | None,
        mode: int | None,
        progress: Callable[[int], None],
    ) -> ObjectInfo:
        """Read only, unless a subclass knows how to keep the promises."""
        del source, size_bytes, overwrite, checksum, mode, progress
        check_writable(url)
        raise AssertionError(f"{url} is none of this driver's")

    async def delete(self, url: str) -> None:
        """Read only, as ``put``."""
        check_writable(url)
        raise AssertionError(f"{url} is none of this driver's")

    @abc.abstractmethod
    async def aclose(self) -> None:
        """End what is kept between calls.  Idempotent."""

    def _call(self, work: Callable[[Call[T]], T], url: str) -> Call[T]:
        return Call(
            work,
            url=url,
            answer_timeout_s=self._answer_timeout_s,
            progress_timeout_s=self._settings.progress_timeout_s,
        )

    # In worker threads.

    def _fetch(
        self, call: SinkCall[ObjectInfo], url: str, span: Span, validator: str | None
    ) -> ObjectInfo:
        info = self._head(call, url)
        _check(info, validator)
        if span.stop > info.size_bytes:
            raise shorter(url, span.stop, info.size_bytes)
        call.found(info)
        size, start = PIECE_BYTES_MIN, span.start
        while start < span.stop:
            begun = time.monotonic()
            piece = self._same(call, info, Span(start, min(size, span.stop - start)))
            call.write(piece)
            start += len(piece)
            quick = time.monotonic() - begun < QUICK_S
            size = min(size * 2, PIECE_BYTES_MAX) if quick else PIECE_BYTES_MIN
        return info

    def _fetch_whole(self, call: Call[WholeObject], item: BatchItem) -> WholeObject:
        info = self._head(call, item.url)
        if info.size_bytes > WHOLE_OBJECT_BYTES_MAX:
            raise too_large(item.url, info.size_bytes)
        _check(info, item.validator)
        call.answered()
        data = self._same(call, info, Span(0, info.size_bytes)) if info.size_bytes else b""
        return WholeObject(info=info, data=data)

    def _same(self, call: Call[Any], info: ObjectInfo, span: Span) -> bytes:
        """A span of this very version."""
        data = self._read(call, info, span)
        call.checkpoint()
        now = self._head(call, info.url)
        _check(now, info.validator)
        if len(data) < span.length:
            raise RemoteUnavailable(
                f"The transfer of {info.url} ended before the last byte: try again."
            )
        if len(data) > span.length:
            raise ObjectChanged(
                f"{info.url} sent {len(data)} bytes where {span.length} were asked for."
            )
        return data


def _check(info: ObjectInfo, validator: str | None) -> None:
    if validator is not None and not is_version(info, validator):
        raise not_the_version(info.url, validator, info.validator)


@contextlib.contextmanager
def lent(pool: list[T], made: Callable[[], T], ended: Callable[[T], None]) -> Iterator[T]:
    """One of the pool, or a new one.  It goes back if all went well with it; else it is ended."""
    try:
        one = pool.pop()
    except IndexError:
        one = made()
    try:
        yield one
    except BaseException:
        ended(one)
        raise
    pool.append(one)
