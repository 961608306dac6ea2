"""Asking again: a remote that repeats what failed for a passing reason.

A wrapper with the interface of ``base.Remote``.  Only errors that call themselves transient are
repeated, with exponential back-off and jitter, at most ``attempts`` times and never begun
after ``attempts_deadline_s``; the server's own wish (Retry-After) is honoured when it fits
into that time.  A server that is away, as for a restart (RemoteAway), is asked again for
``restart_s`` instead, however often that is; but not for puts and removals, which whoever queues
them repeats for longer, and says so.  A fetch goes on behind the last byte that landed, in the
same version: that of the validator, or the one that the first attempt found.  A batch repeats
only the items that failed.  A put begins anew; when its object did appear and only the answer was
lost, the repetition finds it there.

Lives in the trio thread; keeps no state between calls.
"""

import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import trio

from stagefs.errors import (
    ObjectChanged,
    RemoteAway,
    RemoteDown,
    RemoteUnavailable,
    StageFSError,
)
from stagefs.model import Checksum, ListedEntry, ObjectInfo, Span, WholeObject
from stagefs.remote.base import BatchItem, Remote, Results, Sink, WatchingSink
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.threads import VersionSink

T = TypeVar("T")
# Who waits for a restart wants to know soon that it is over.
AWAY_PAUSE_S_MAX = 2.0

log = logging.getLogger(__name__)


class Retries:
    """How often something was asked again, of all remotes together."""

    def __init__(self) -> None:
        self.count = 0


class RetryingRemote:
    """``remote``, patiently."""

    def __init__(
        self,
        remote: Remote,
        settings: RemoteSettings,
        *,
        retries: Retries | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._remote = remote
        self._retries = retries or Retries()
        self._settings = settings
        self._jitter = jitter

    async def stat(self, url: str) -> ObjectInfo:
        return await self._repeat(lambda: self._remote.stat(url), waits=True)

    async def list(self, url: str) -> AsyncIterator[Sequence[ListedEntry]]:
        # The first page says whether the directory can be listed.  Later pages are not
        # repeated: a second listing may have another order.
        pages = self._remote.list(url)

        async def first_page() -> Sequence[ListedEntry] | None:
            nonlocal pages
            pages = self._remote.list(url)
            return await anext(pages, None)

        page = await self._repeat(first_page, waits=True)
        while page is not None:
            yield page
            page = await anext(pages, None)

    async def fetch(self, url: str, span: Span, *, sink: Sink, validator: str | None) -> ObjectInfo:
        resumed = ResumedSink(sink, span)

        async def rest() -> ObjectInfo:
            version = validator
            if resumed.position > span.start:
                if validator is None and resumed.found is None:
                    raise ObjectChanged(
                        f"The transfer of {url} broke, and its version is not known: "
                        "it cannot go on where it ended."
                    )
                version = resumed.found.validator if resumed.found else validator
            left = Span(resumed.position, span.stop - resumed.position)
            return await self._remote.fetch(url, left, sink=resumed, validator=version)

        return await self._repeat(rest, waits=True)

    async def fetch_batch(self, items: Sequence[BatchItem]) -> Results:
        results: dict[int, WholeObject | StageFSError] = {}

        async def missing_ones() -> None:
            wanted = [position for position in range(len(items)) if _is_open(results, position)]
            answers = await self._remote.fetch_batch([items[position] for position in wanted])
            results.update(zip(wanted, answers, strict=True))
            for answer in answers:
                if isinstance(answer, StageFSError) and answer.transient:
                    raise answer

        try:
            await self._repeat(missing_ones, waits=True)
        except StageFSError as exc:
            # The batch as a whole failed, or some items did to the end: each has its error.
            for position in range(len(items)):
                results.setdefault(position, exc)
        return [results[position] for position in range(len(items))]

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
        return await self._repeat(
            lambda: self._remote.put(
                url,
                source=source,
                size_bytes=size_bytes,
                overwrite=overwrite,
                checksum=checksum,
                mode=mode,
                progress=progress,
            )
        )

    async def delete(self, url: str) -> None:
        await self._repeat(lambda: self._remote.delete(url))

    async def aclose(self) -> None:
        await self._remote.aclose()

    async def _repeat(self, attempt: Callable[[], Awaitable[T]], *, waits: bool = False) -> T:
        return await repeated(
            attempt, self._settings, retries=self._retries, jitter=self._jitter, waits=waits
        )


async def repeated(
    attempt: Callable[[], Awaitable[T]],
    settings: RemoteSettings,
    *,
    retries: Retries | None = None,
    jitter: Callable[[], float] = random.random,
    waits: bool = False,
) -> T:
    """The result of the first attempt that does not fail for a passing reason.  ``waits``: also for
    a server that is away."""
    deadline = trio.current_time() + settings.attempts_deadline_s
    away_until: float | None = None
    tried = waited = 0
    while True:
        try:
            return await attempt()
        except StageFSError as exc:
            now = trio.current_time()
            if waits and isinstance(exc, RemoteAway):
                waited += 1
                away_until = away_until or now + settings.restart_s
                pause_s = min(_pause_s(settings, exc, waited, jitter), AWAY_PAUSE_S_MAX)
                if now + pause_s >= away_until:
                    raise
            else:
                tried += 1
                if not exc.transient or isinstance(exc, RemoteDown) or tried >= settings.attempts:
                    raise
                pause_s = _pause_s(settings, exc, tried, jitter)
                if now + pause_s >= deadline:
                    raise
            log.debug("attempt %d failed, the next in %.2f s: %s", tried + waited, pause_s, exc)
        if retries is not None:
            retries.count += 1
        await trio.sleep(pause_s)


def _pause_s(
    settings: RemoteSettings, exc: StageFSError, tried: int, jitter: Callable[[], float]
) -> float:
    limit_s = min(settings.backoff_s * 2.0 ** (tried - 1), settings.backoff_s_max)
    pause_s = limit_s * (0.5 + jitter() / 2)
    wish_s = exc.retry_after_s if isinstance(exc, RemoteUnavailable) else None
    return pause_s if wish_s is None else max(wish_s, pause_s)


def _is_open(results: Mapping[int, WholeObject | StageFSError], position: int) -> bool:
    result = results.get(position)
    return result is None or (isinstance(result, StageFSError) and result.transient)


class ResumedSink(VersionSink):
    """The caller's sink, and how far it is filled, and with what version."""

    def __init__(self, sink: Sink, span: Span) -> None:
        self._sink = sink
        self._watching = sink if isinstance(sink, WatchingSink) else None
        self._found: ObjectInfo | None = None
        self.position = span.start

    @property
    def found(self) -> ObjectInfo | None:
        return self._found

    @found.setter
    def found(self, info: ObjectInfo | None) -> None:
        self._found = info
        if isinstance(self._sink, VersionSink):
            self._sink.found = info

    @property
    def fd(self) -> int:
        return self._sink.fd

    @property
    def shift(self) -> int:
        return self._sink.shift

    def landed(self, span: Span) -> None:
        self._sink.landed(span)
        self.position = span.stop

    def passed(self, start: int, data: memoryview) -> None:
        if self._watching is not None:
            self._watching.passed(start, data)

    def between_pieces(self) -> None:
        if self._watching is not None:
            self._watching.between_pieces()
