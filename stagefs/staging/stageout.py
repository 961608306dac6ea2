"""StageOut: uploads what is in the queue, and is the one way to the queue.

The queue itself blocks, so its calls are made in one worker thread, one after another; nothing
here waits for an fsync on the event loop.  Outcomes are written down by one task, many in one
transaction, and until an outcome is durable its upload counts as being under way: it can be
neither begun again nor missed.  A daemon that dies loses at most what it knew of attempts; the
next one uploads again, and finds an object that is there already.

What cannot be written down because the disk is full is tried again until it can.

``news``: uploads as they are after an attempt or a decision that is durable, for whoever keeps
account of them.  Nobody waits for who does not take them: what does not fit is dropped, and
``of_commit`` tells.

Trio thread.  ``running`` must be entered first, and is left with everything that is known
written down.
"""

import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from stagefs.config import StageOutSettings
from stagefs.errors import NoSpace, StageFSError, StateFailed
from stagefs.outputs.queue import Queue
from stagefs.outputs.queue_rows import host_of
from stagefs.outputs.queued import (
    Done,
    NotDone,
    Outcome,
    QueueItem,
    Totals,
    Upload,
    UploadState,
)
from stagefs.remote.base import Remote
from stagefs.staging.patience import Patience
from stagefs.staging.under_way import UnderWay, send

log = logging.getLogger(__name__)

DISK_PAUSE_S = 2.0
TRIM_PAUSE_S = 600.0
TICK_S = 0.25
DRAIN_STALL_S = 3.0
# What is known to be durable at the end of a mount must not keep it from ending.
LAST_WORDS_S = 10.0
NEWS_MAX = 10_000
_Answer = TypeVar("_Answer")


class StageOut:
    def __init__(
        self,
        queue: Queue,
        *,
        remote_for: Callable[[str], Remote],
        settings: StageOutSettings,
        patience: Patience | None = None,
    ) -> None:
        self._queue = queue
        self._remote_for = remote_for
        self._settings = settings
        self._patience = patience or Patience(settings)
        self._thread = trio.CapacityLimiter(1)
        self._under_way: dict[int, UnderWay] = {}
        # Uploads that wait after a failure: until when, and how often they failed.
        self._waiting: dict[int, float] = {}
        self._failures: dict[int, int] = {}
        self._to_activate: list[str] = []
        self._to_discard: list[str] = []
        self._in_the_making: set[str] = set()
        self._totals: Totals = {}
        self._totals_number = 0
        # In the worker thread.
        self._counts_made = 0
        self._trouble: str | None = None
        self._urgent = 0
        self.uploaded = 0
        self.uploaded_bytes = 0
        self._look_again = trio.Event()
        self._to_write = trio.Event()
        self._writing = trio.Lock()
        self._moved = trio.Event()
        self._expected = False
        self._tell, self.news = trio.open_memory_channel[Upload](NEWS_MAX)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Raises StageFSError when the queue cannot be read."""
        swept = await self._blocking(self._queue.sweep)
        if swept:
            log.info("removed %d files of outputs that nobody needs any more", swept)
        self._totals = await self._blocking(self._queue.totals)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._schedule, nursery)
                nursery.start_soon(self._write)
                nursery.start_soon(self._trim)
                yield
                nursery.cancel_scope.cancel()
        finally:
            with trio.move_on_after(LAST_WORDS_S, shield=True):
                await self._write_once()

    # What comes in

    @property
    def directory(self) -> Path:
        return self._queue.directory

    def directory_of(self, commit: str) -> Path:
        return self._queue.directory_of(commit)

    async def make_directory_of(self, commit: str) -> Path:
        """Where the files of a commit go before ``prepare``."""
        return await self._blocking(self._queue.make_directory_of, commit)

    async def prepare(self, commit: str, items: Sequence[QueueItem]) -> None:
        """Durable when it returns, but nothing is uploaded: follow it with ``activate`` or
        ``discard``.  Raises NoSpace, StateFailed."""
        await self._change(self._queue.prepare, commit, items)
        self._in_the_making.add(commit)

    async def activate(self, commit: str) -> None:
        """Upload what was prepared.  Never fails: where the disk refuses now it is done later,
        by this daemon or the next, because whoever calls this has promised it already."""
        self._to_activate.append(commit)
        await self._write_once()
        self._to_write.set()

    async def discard(self, commit: str) -> None:
        """Take back what was prepared.  Never fails, as ``activate``."""
        self._to_discard.append(commit)
        await self._write_once()
        self._to_write.set()

    async def add(self, commit: str, items: Sequence[QueueItem]) -> None:
        """``prepare`` and ``activate`` in one step.  Raises NoSpace, StateFailed."""
        await self._change(self._queue.add, commit, items)
        self._look_again.set()

    def expect(self, more: bool) -> None:
        """Whether there is more to come, which keeps this ``busy``."""
        self._expected = more
        self._pulse()

    async def unsettled(self) -> list[str]:
        """Commits that an earlier daemon of this state directory left prepared."""
        return [
            commit
            for commit in await self._blocking(self._queue.unsettled)
            if commit not in self._in_the_making
        ]

    # What somebody decides

    async def retry(self, ids: Sequence[int] | None) -> int:
        """Try these again now, or everything that waits or failed; see ``Queue.retry``."""
        chosen = await self._chosen(ids)
        await self._change(self._queue.retry, chosen)
        await self._announce(chosen)
        for number in chosen:
            self._waiting.pop(number, None)
            self._failures.pop(number, None)
        self._patience.forget_hosts()
        self._look_again.set()
        return len(chosen)

    async def cancel(self, ids: Sequence[int] | None, *, discard: bool = False) -> int:
        """Give these up, or everything that waits or failed; see ``Queue.cancel``.

        Returns when none of them is on its way any more.
        """
        chosen = await self._chosen(ids)
        await self._change(partial(self._queue.cancel, chosen, discard=discard))
        await self._announce(chosen)
        stopping = [self._under_way[number] for number in chosen if number in self._under_way]
        for one in stopping:
            one.scope.cancel()
        for one in stopping:
            await one.over.wait()
        for number in chosen:
            self._waiting.pop(number, None)
            self._failures.pop(number, None)
        return len(chosen)

    async def _chosen(self, ids: Sequence[int] | None) -> list[int]:
        if ids is not None:
            return list(ids)
        states = (UploadState.QUEUED, UploadState.FAILED)
        found: list[Upload] = []
        while page := await self.uploads(states=states, after=found[-1].id if found else 0):
            found += page
        return [upload.id for upload in found]

    async def _announce(self, ids: Sequence[int]) -> None:
        for upload in await self._blocking(self._queue.some, ids):
            with suppress(trio.WouldBlock):
                self._tell.send_nowait(upload)

    # Looking

    @property
    def owner(self) -> str:
        """The name of our state directory, for ever."""
        return self._queue.owner

    @property
    def is_urgent(self) -> bool:
        """Whether somebody waits for the queue to become empty."""
        return self._urgent > 0

    async def of_commit(self, commit: str) -> list[Upload]:
        return await self._blocking(self._queue.of_commit, commit)

    async def uploads(
        self,
        *,
        states: Collection[UploadState] | None = None,
        after: int = 0,
        limit: int = 1000,
    ) -> list[Upload]:
        """As the queue has them: those under way are ``queued``."""
        return await self._blocking(
            partial(self._queue.uploads, states=states, after=after, limit=limit)
        )

    def file_of(self, upload: Upload) -> Path:
        return self._queue.directory_of(upload.commit) / upload.item.file

    @property
    def totals(self) -> Totals:
        return self._totals

    @property
    def trouble(self) -> str | None:
        """What keeps the queue from being written, or None."""
        return self._trouble

    @property
    def under_way(self) -> Sequence[UnderWay]:
        return [one for one in self._under_way.values() if one.outcome is None]

    @property
    def sent_bytes(self) -> int:
        """Of finished uploads and of those under way; falls when one of them begins anew."""
        return self.uploaded_bytes + sum(one.sent_bytes for one in self.under_way)

    @property
    def busy(self) -> bool:
        """Whether anything waits, is on its way, or is about to be queued."""
        queued = UploadState.QUEUED in self._totals
        return bool(self._under_way or self._in_the_making or self._expected or queued)

    async def until_empty(
        self, *, stall_s: float | None, tell: Callable[[], None] = lambda: None
    ) -> None:
        """Return when nothing is ``busy``, or when no byte has moved for ``stall_s``."""
        seen, seen_at = (-1, -1), trio.current_time()
        while self.busy:
            tell()
            now = trio.current_time()
            if (found := (self.uploaded, self.sent_bytes)) != seen:
                seen, seen_at = found, now
            elif stall_s is not None and now - seen_at > stall_s:
                return
            with trio.move_on_after(TICK_S):
                await self.moved()

    async def drain(self) -> None:
        """At the end of a mount: upload what goes in a few seconds.  The rest stays queued."""
        with trio.move_on_after(self._settings.drain_s):
            async with self.hurry():
                await self.until_empty(stall_s=DRAIN_STALL_S)

    async def moved(self) -> None:
        """Wait until something has been queued, uploaded, failed or been decided."""
        await self._moved.wait()

    @asynccontextmanager
    async def hurry(self) -> AsyncIterator[None]:
        """Everything that waits is tried now, and pauses stay short meanwhile."""
        self._urgent += 1
        self._waiting.clear()
        self._patience.forget_hosts()
        self._look_again.set()
        try:
            yield
        finally:
            self._urgent -= 1

    # Uploading

    async def _schedule(self, nursery: trio.Nursery) -> None:
        while True:
            self._look_again = trio.Event()
            now = trio.current_time()
            try:
                await self._begin_uploads(nursery, now)
            except StageFSError as error:
                log.error("the stage-out queue cannot be read: %s", error)
                self._trouble = str(error)
                await trio.sleep(DISK_PAUSE_S)
                continue
            with trio.move_on_at(self._next_look(now)):
                await self._look_again.wait()

    async def _begin_uploads(self, nursery: trio.Nursery, now: float) -> None:
        places = self._settings.concurrency - len(self.under_way)
        if places <= 0:
            return
        waiting = {number for number, until in self._waiting.items() if until > now}
        found = await self._blocking(
            partial(
                self._queue.next_uploads,
                # One of each URL that is under way may come, and is left out below.
                places + len(self._under_way),
                without=waiting | self._under_way.keys(),
                hosts_held=list(self._patience.held(now, self._busy_hosts())),
            )
        )
        for upload in found:
            if len(self.under_way) < self._settings.concurrency and self._may_begin(upload):
                one = self._under_way[upload.id] = UnderWay(upload)
                nursery.start_soon(self._upload, one)

    def _may_begin(self, upload: Upload) -> bool:
        if upload.id in self._under_way:
            return False
        if any(one.upload.item.url == upload.item.url for one in self._under_way.values()):
            return False
        host = host_of(upload.item.url)
        return not (self._patience.doubtful(host) and host in self._busy_hosts())

    def _busy_hosts(self) -> set[str]:
        return {one.host for one in self.under_way}

    def _next_look(self, now: float) -> float:
        """When the next pause after ``now`` is over; what has no pause waits for an event."""
        held = self._patience.held(now, self._busy_hosts()).values()
        times = [until for until in (*self._waiting.values(), *held) if until > now]
        return min(times, default=float("inf"))

    async def _upload(self, one: UnderWay) -> None:
        upload = one.upload
        try:
            with one.scope:
                one.outcome = await self._attempted(one)
        finally:
            if one.outcome is None:  # cancelled, by somebody or with the daemon
                del self._under_way[upload.id]
                one.over.set()
                self._pulse()
        if one.outcome is not None:
            self._to_write.set()
            # Its place is free; whether it is durable does not matter for that.
            self._look_again.set()

    async def _attempted(self, one: UnderWay) -> Outcome:
        upload, now = one.upload, trio.current_time
        try:
            validator = await send(one, self._remote_for, self.file_of(upload))
        except StageFSError as error:
            self._patience.failed_at(one.host, error, now(), urgent=self._urgent > 0)
            return self._failure(upload, error)
        except Exception as error:  # a bug in one driver must not end the mount
            log.exception("the upload of %s failed unexpectedly", upload.item.url)
            unexpected = StateFailed(
                f"The upload of {upload.item.url} failed unexpectedly ({type(error).__name__}):"
                " see the daemon's log."
            )
            return self._failure(upload, unexpected)
        self._patience.worked_at(one.host)
        self._failures.pop(upload.id, None)
        self._waiting.pop(upload.id, None)
        self.uploaded += 1
        self.uploaded_bytes += upload.item.size_bytes
        log.info("uploaded %s (upload %d)", upload.item.url, upload.id)
        return Done(upload.id, validator)

    def _failure(self, upload: Upload, error: StageFSError) -> NotDone:
        # An attempt of an earlier daemon counts for the listing, not for the pause.
        failures = self._failures[upload.id] = self._failures.get(upload.id, 0) + 1
        pause_s = self._patience.pause_s(error, failures, urgent=self._urgent > 0)
        if pause_s is None:
            self._failures.pop(upload.id)
            self._waiting.pop(upload.id, None)
            log.error("the upload of %s (upload %d) failed: %s", upload.item.url, upload.id, error)
            return NotDone(upload.id, str(error), final=True)
        self._waiting[upload.id] = trio.current_time() + pause_s
        log.warning("upload %d is tried again in %.1f s: %s", upload.id, pause_s, error)
        return NotDone(upload.id, str(error), final=False, next_try_ns=self._at_ns(pause_s))

    # Writing down

    async def _write(self) -> None:
        while True:
            self._to_write = trio.Event()
            if await self._write_once():
                await self._to_write.wait()
            else:
                await trio.sleep(DISK_PAUSE_S)

    async def _write_once(self) -> bool:
        """Make durable what is known.  False when the disk refuses: it is known still."""
        async with self._writing:  # nothing is written twice
            return await self._written()

    async def _written(self) -> bool:
        ended = [one for one in self._under_way.values() if one.outcome is not None]
        activated, discarded = list(self._to_activate), list(self._to_discard)
        outcomes = [one.outcome for one in ended if one.outcome is not None]
        if not activated and not discarded and not ended:
            return True
        try:
            await self._change(self._record, activated, discarded, outcomes)
        except (NoSpace, StateFailed) as error:
            if self._trouble is None:
                log.error("the stage-out queue cannot be written: %s", error)
            self._trouble = str(error)
            return False
        self._trouble = None
        self._in_the_making.difference_update(activated, discarded)
        # More may have come meanwhile, behind these.
        del self._to_activate[: len(activated)], self._to_discard[: len(discarded)]
        for one in ended:
            self._under_way.pop(one.upload.id, None)
            one.over.set()
        self._look_again.set()
        self._pulse()
        await self._announce([one.upload.id for one in ended])
        return True

    def _record(
        self, activated: Sequence[str], discarded: Sequence[str], outcomes: Sequence[Outcome]
    ) -> None:
        """In the worker thread."""
        for commit in activated:
            self._queue.activate(commit)
        for commit in discarded:
            self._queue.discard(commit)
        self._queue.settle(outcomes)

    async def _trim(self) -> None:
        keep = partial(
            self._queue.trim, keep_s=self._settings.keep_s, keep_max=self._settings.keep_max
        )
        while True:
            try:
                while await self._change(keep):
                    pass
            except StageFSError as error:
                log.warning("the stage-out queue is not trimmed: %s", error)
            await trio.sleep(TRIM_PAUSE_S)

    def _pulse(self) -> None:
        self._moved.set()
        self._moved = trio.Event()

    async def _change(self, call: Callable[..., _Answer], *arguments: object) -> _Answer:
        """A call that may change the totals.  Calls that end together wake their tasks in any
        order, so what was counted last is told by its number."""

        def work() -> tuple[_Answer, int, Totals]:
            answer = call(*arguments)
            self._counts_made += 1
            return answer, self._counts_made, self._queue.totals()

        answer, number, totals = await self._blocking(work)
        if number > self._totals_number:
            self._totals_number, self._totals = number, totals
        self._pulse()
        return answer

    async def _blocking(self, call: Callable[..., _Answer], *arguments: object) -> _Answer:
        return await trio.to_thread.run_sync(call, *arguments, limiter=self._thread)

    def _at_ns(self, pause_s: float) -> int:
        """For people to read: pauses are kept by trio's clock."""
        return time.time_ns() + int(pause_s * 1e9)
