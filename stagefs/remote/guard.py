"""Remotes that fail fast and are not pressed: two wrappers with the interface of ``base.Remote``.

``GuardedRemote`` stands before the places (``limit``): it refuses at once what a remote that is
down would only fail later, and lets nobody in while the server wants to be left alone.
``MeasuredRemote`` stands behind them, around the driver: it tells ``Health`` how each attempt
went, and begins a transfer anew, once and behind the last byte that landed, that takes longer
than nearly all before it; whose sink has another replica to turn to is sent there instead.  The
slow transfer is ended and not raced: no byte is fetched twice, and a server in trouble gets no
more to do.  Both share one ``Health``.  They live in the trio thread.
"""

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import trio

from stagefs.errors import DeadlineExceeded, RemoteDown, RemoteUnavailable, StageFSError
from stagefs.model import Checksum, ListedEntry, ObjectInfo, Span
from stagefs.remote.base import BatchItem, Remote, Results, Sink
from stagefs.remote.health import Health
from stagefs.remote.retry import ResumedSink
from stagefs.remote.settings import RemoteSettings


@runtime_checkable
class ChoosySink(Protocol):
    """A sink whose owner may ask another replica."""

    @property
    def has_elsewhere(self) -> bool: ...


class GuardedRemote:
    """``remote``, asked only when that may help."""

    def __init__(self, remote: Remote, health: Health, settings: RemoteSettings) -> None:
        self._remote = remote
        self._health = health
        self._patience_s = settings.attempts_deadline_s

    async def stat(self, url: str) -> ObjectInfo:
        await self._admission(url)
        return await self._remote.stat(url)

    async def list(self, url: str) -> AsyncIterator[Sequence[ListedEntry]]:
        await self._admission(url)
        async for page in self._remote.list(url):
            yield page

    async def fetch(self, url: str, span: Span, *, sink: Sink, validator: str | None) -> ObjectInfo:
        await self._admission(url)
        return await self._remote.fetch(url, span, sink=sink, validator=validator)

    async def fetch_batch(self, items: Sequence[BatchItem]) -> Results:
        if items:
            await self._admission(items[0].url)
        return await self._remote.fetch_batch(items)

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
        await self._admission(url)
        return await self._remote.put(
            url,
            source=source,
            size_bytes=size_bytes,
            overwrite=overwrite,
            checksum=checksum,
            mode=mode,
            progress=progress,
        )

    async def delete(self, url: str) -> None:
        await self._admission(url)
        await self._remote.delete(url)

    async def aclose(self) -> None:
        await self._remote.aclose()

    async def _admission(self, url: str) -> None:
        """Raises RemoteDown, or RemoteUnavailable when the server's wish is beyond patience."""
        begun_s = trio.current_time()
        while True:
            now_s = trio.current_time()
            check_down(self._health, url, now_s)
            wait_s = self._health.busy_for_s(now_s)
            if not wait_s:
                return
            if now_s + wait_s - begun_s > self._patience_s:
                raise RemoteUnavailable(
                    f"{url} is not asked for {wait_s:.0f} s, as its server wishes: "
                    f"{self._health.reason}",
                    retry_after_s=wait_s,
                )
            await trio.sleep(wait_s)


class MeasuredRemote:
    """``remote``, observed."""

    def __init__(self, remote: Remote, health: Health) -> None:
        self._remote = remote
        self._health = health
        self._under_way = 0
        self._ended = trio.lowlevel.ParkingLot()

    async def stat(self, url: str) -> ObjectInfo:
        async with self._attempt(url):
            return await self._remote.stat(url)

    async def list(self, url: str) -> AsyncIterator[Sequence[ListedEntry]]:
        pages = self._remote.list(url)
        while True:
            async with self._attempt(url):
                page = await anext(pages, None)
            if page is None:
                return
            yield page

    async def fetch(self, url: str, span: Span, *, sink: Sink, validator: str | None) -> ObjectInfo:
        async with self._attempt(url):
            patience_s = self._health.patience_s(span.length)
            resumed = ResumedSink(sink, span)
            with trio.move_on_after(patience_s), self._timed(resumed):
                return await self._remote.fetch(url, span, sink=resumed, validator=validator)
            self._health.was_slow(url, trio.current_time())
            if isinstance(sink, ChoosySink) and sink.has_elsewhere:
                raise DeadlineExceeded(
                    f"The transfer of {url} is slower than nearly all before it: another replica "
                    "is asked."
                )
            version = resumed.found.validator if resumed.found else validator
            if resumed.position > span.start and version is None:
                raise RemoteUnavailable(
                    f"The transfer of {url} is slower than nearly all before it: try again."
                )
            left = Span(resumed.position, span.stop - resumed.position)
            with self._timed(resumed):
                return await self._remote.fetch(url, left, sink=resumed, validator=version)

    async def fetch_batch(self, items: Sequence[BatchItem]) -> Results:
        if not items:
            return await self._remote.fetch_batch(items)
        async with self._attempt(items[0].url) as failed:
            results = await self._remote.fetch_batch(items)
            for result in results:
                if isinstance(result, StageFSError) and result.transient:
                    failed.append(result)
                    break
        return results

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
        async with self._attempt(url):
            return await self._remote.put(
                url,
                source=source,
                size_bytes=size_bytes,
                overwrite=overwrite,
                checksum=checksum,
                mode=mode,
                progress=progress,
            )

    async def delete(self, url: str) -> None:
        async with self._attempt(url):
            await self._remote.delete(url)

    async def aclose(self) -> None:
        await self._remote.aclose()

    @contextlib.asynccontextmanager
    async def _attempt(self, url: str) -> AsyncIterator[Results]:
        """One attempt, when there is room for it; errors that were not raised may be added."""
        health = self._health
        while self._under_way >= health.allowed:
            await self._ended.park()
        # It may have come to be known while this one waited.
        check_down(health, url, trio.current_time())
        health.begun()
        self._under_way += 1
        failed: Results = []
        try:
            yield failed
        except StageFSError as error:
            health.failed(error, trio.current_time(), at_once=self._under_way)
            raise
        except BaseException:
            health.given_up()
            raise
        else:
            for one in failed:
                if isinstance(one, StageFSError):
                    health.failed(one, trio.current_time(), at_once=self._under_way)
            if not failed:
                health.succeeded()
        finally:
            self._under_way -= 1
            self._ended.unpark_all()

    @contextlib.contextmanager
    def _timed(self, resumed: ResumedSink) -> Iterator[None]:
        begun_s, begun = trio.current_time(), resumed.position
        try:
            yield
        finally:
            # A part tells of the rate as well as the whole does; a stall must not count as usual.
            if resumed.position > begun:
                taken_s = trio.current_time() - begun_s
                self._health.transferred(resumed.position - begun, taken_s)


def check_down(health: Health, url: str, now_s: float) -> None:
    """Raises RemoteDown."""
    wait_s = health.down_for_s(now_s)
    if wait_s:
        raise RemoteDown(
            f"{url} is not asked for now, because its server fails again and again; the next "
            f"attempt is made in {wait_s:.0f} s. The last reason: {health.reason}",
            retry_after_s=wait_s,
        )
