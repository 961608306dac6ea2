"""BoundUploads: hands what is closed in writable bindings over to the stage-out queue.

The namespace keeps what is due (``namespace.outgoing``), written in the transaction that published
the file, so nothing that was closed can be forgotten.  Here it gets a second name in the
outputs directory, and a row in the queue; only then does the namespace stop owing it:

1. ready: what shows through from a base is copied; the file is synced; its digests are known.
2. leave: the namespace notes under which commit the queue will know it.
3. add: the file's second name, and the rows of the queue, durable.
4. left: the namespace leaves it to the queue.

A daemon that dies between 2 and 4 asks the queue whether it knows the commit.  What was closed
waits for ``settle_s`` first, because many programs write under a temporary name, or set times
and modes when they have closed: until 2, what happens to the name takes the upload back.

What the queue tells of an upload afterwards is kept in the namespace, for attributes and lists.
Concurrency: trio thread; one round at a time.
"""

import functools
import logging
import os
import shutil
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import msgspec
import trio

from stagefs.errors import NotFound, StageFSError
from stagefs.model import Checksum, ChecksumKind, Inode
from stagefs.namespace.node import OutgoingState, OutgoingUpload
from stagefs.namespace.store import Namespace
from stagefs.outputs.local import LocalFiles
from stagefs.outputs.queued import QueueItem, Upload, UploadState
from stagefs.remote.url import last_name, parse
from stagefs.staging.committed_files import digests, keep
from stagefs.staging.stageout import StageOut

log = logging.getLogger(__name__)

# How long it takes until something that is due is noticed.
TICK_S = 0.25
PAUSE_S, PAUSE_S_MAX = 1.0, 60.0
AT_ONCE = 64
FILES_AT_ONCE = 4
PAGE_ROWS = 500
_STATES = {
    UploadState.QUEUED: OutgoingState.QUEUED,
    UploadState.DONE: OutgoingState.DONE,
    UploadState.FAILED: OutgoingState.FAILED,
    UploadState.CANCELLED: OutgoingState.CANCELLED,
    UploadState.REPLACED: OutgoingState.CANCELLED,
}


class _Ready(msgspec.Struct, frozen=True):
    """A file that can be queued."""

    upload: OutgoingUpload
    size_bytes: int
    checksums: tuple[Checksum, ...]


class _Pause(msgspec.Struct):
    """An upload that could not be made ready."""

    failures: int
    until: float
    reason: str


class BoundUploads:
    def __init__(
        self, *, namespace: Namespace, local: LocalFiles, stage_out: StageOut, settle_s: float
    ) -> None:
        self._namespace = namespace
        self._local = local
        self._stage_out = stage_out
        self._settle_ns = int(settle_s * 1e9)
        self._prefix = f"bound-{stage_out.owner}-"
        self._looking = trio.Lock()
        self._seen_edits = -1
        self._look_at = 0.0
        self._pauses: dict[int, _Pause] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """``begin`` must have been called."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look_again)
            nursery.start_soon(self._listen)
            yield
            nursery.cancel_scope.cancel()

    @property
    def due(self) -> int:
        """How many uploads and removals the queue does not have yet."""
        return self._namespace.due_count()

    @property
    def trouble(self) -> str | None:
        """What keeps some of them from the queue, or None."""
        return next((pause.reason for pause in self._pauses.values()), None)

    # What an earlier daemon left

    async def begin(self) -> None:
        """Once, while the queue runs: find out what became of what was on its way."""
        await self._end_leaving()
        after = 0
        while page := self._namespace.open_uploads(PAGE_ROWS, after=after):
            after = page[-1].id
            for commit in {one.commit for one in page if one.commit is not None}:
                self._keep_account(await self._stage_out.of_commit(commit))

    async def _end_leaving(self) -> None:
        """Of what was being handed over, the queue has all or nothing."""
        for commit in self._namespace.leaving_commits():
            if await self._stage_out.of_commit(commit):
                self._namespace.has_left(commit)
            else:
                self._namespace.still_due(commit)

    # Rounds

    async def _look_again(self) -> None:
        while True:
            try:
                if self._is_time():
                    await self.hand_over()
            except StageFSError as error:
                log.error("what is due to writable bindings cannot be queued: %s", error)
                self._look_at = trio.current_time() + PAUSE_S
            except Exception:  # a bug here must not end the mount
                log.exception("what is due to writable bindings cannot be queued")
                self._look_at = trio.current_time() + PAUSE_S_MAX
            await trio.sleep(TICK_S)

    def _is_time(self) -> bool:
        if self._namespace.outgoing_edits != self._seen_edits or self._stage_out.is_urgent:
            return True
        return trio.current_time() >= self._look_at

    async def hand_over(self, *, hurry: bool = False) -> None:
        """Give the queue what is due now, or (in a hurry) all there is.  Raises NoSpace,
        StateFailed."""
        async with self._looking:
            if hurry:
                for pause in self._pauses.values():
                    pause.until = 0.0
            self._seen_edits = self._namespace.outgoing_edits
            self._look_at = float("inf")
            self._stage_out.expect(more=bool(self._namespace.due_uploads(1)))
            await self._end_leaving()
            after = 0
            seen: set[int] = set()
            while page := self._namespace.due_uploads(AT_ONCE, after=after):
                after = page[-1].id
                seen.update(one.id for one in page)
                chosen = self._chosen(page, settle=not (hurry or self._stage_out.is_urgent))
                if chosen:
                    await self._give([one for one in chosen if one.inode], chosen)
            for number in self._pauses.keys() - seen:  # taken back
                del self._pauses[number]
            self._stage_out.expect(more=bool(self._namespace.due_uploads(1)))

    def _chosen(self, page: Sequence[OutgoingUpload], *, settle: bool) -> list[OutgoingUpload]:
        """Those whose time has come, the first of each URL; notes when to look again.  Without
        ``settle`` what was just closed has its time already."""
        chosen: dict[str, OutgoingUpload] = {}
        waiting: set[str] = set()
        now, now_ns = trio.current_time(), time.time_ns()
        for one in page:
            pause = self._pauses.get(one.id)
            left_s = 0.0 if pause is None else pause.until - now
            age_ns = now_ns - one.since_ns
            # A clock that was set back makes nobody wait.
            if settle and 0 <= age_ns < self._settle_ns:
                left_s = max(left_s, (self._settle_ns - age_ns) / 1e9)
            later = one.url in waiting or one.url in chosen
            if later or left_s > 0:
                waiting.add(one.url)
                self._look_at = min(self._look_at, now + max(left_s, TICK_S))
            else:
                chosen[one.url] = one
        return list(chosen.values())

    async def _give(
        self, files: Sequence[OutgoingUpload], chosen: Sequence[OutgoingUpload]
    ) -> None:
        ready: dict[int, _Ready] = {}
        limit = trio.CapacityLimiter(FILES_AT_ONCE)
        async with trio.open_nursery() as nursery:
            for one in files:
                nursery.start_soon(self._make_ready, one, ready, limit)
        ids = [one.id for one in chosen if not one.inode or one.id in ready]
        if not ids:
            return
        commit = f"{self._prefix}{ids[0]}-{time.time_ns():x}"
        # What was taken back meanwhile is left out.
        leaving = set(self._namespace.begin_leaving(ids, commit))
        try:
            await self._queue(commit, [one for one in chosen if one.id in leaving], ready)
        except BaseException:
            with trio.CancelScope(shield=True):
                await self._give_up(commit)
            raise
        self._namespace.has_left(commit)

    async def _give_up(self, commit: str) -> None:
        if await self._stage_out.of_commit(commit):
            return
        directory = self._stage_out.directory_of(commit)
        remove = functools.partial(shutil.rmtree, directory, ignore_errors=True)
        await trio.to_thread.run_sync(remove)
        self._namespace.still_due(commit)

    async def _make_ready(
        self, upload: OutgoingUpload, ready: dict[int, _Ready], limit: trio.CapacityLimiter
    ) -> None:
        async with limit:
            try:
                ready[upload.id] = await self._made_ready(upload)
                self._pauses.pop(upload.id, None)
            except StageFSError as error:
                self._pause(upload, error)

    def _pause(self, upload: OutgoingUpload, error: StageFSError) -> None:
        before = self._pauses.get(upload.id)
        failures = 1 if before is None else before.failures + 1
        longest_s = PAUSE_S if self._stage_out.is_urgent else PAUSE_S_MAX
        pause_s = min(PAUSE_S * 2.0 ** min(failures - 1, 16), longest_s)
        until = trio.current_time() + pause_s
        self._pauses[upload.id] = _Pause(failures, until, str(error))
        self._look_at = min(self._look_at, until)
        log.log(error.log_level, "%s cannot be queued yet: %s", upload.url, error)

    async def _made_ready(self, upload: OutgoingUpload) -> _Ready:
        """Raises what reading a base raises; NoSpace, StateFailed."""
        inode = upload.inode
        await self._local.complete(self._namespace.node(inode), lambda _done: None)
        await self._local.sync(self._namespace.node(inode), data_only=False)
        kinds = [ChecksumKind.XXH3, ChecksumKind.SHA256]
        if parse(upload.url).scheme == "s3":
            kinds.append(ChecksumKind.MD5)
        fd = self._local.open_whole(self._namespace.node(inode))
        try:
            size_bytes, checksums = await trio.to_thread.run_sync(
                digests, fd, kinds, lambda _count: None
            )
        finally:
            os.close(fd)
        return _Ready(upload, size_bytes, tuple(checksums))

    async def _queue(
        self, commit: str, leaving: Sequence[OutgoingUpload], ready: dict[int, _Ready]
    ) -> None:
        items = []
        if any(one.inode for one in leaving):
            directory = await self._stage_out.make_directory_of(commit)
        for one in leaving:
            if not one.inode:
                items.append(QueueItem(url=one.url, file=str(one.id), size_bytes=0, removes=True))
                continue
            fd = self._local.open_whole(self._namespace.node(one.inode))
            try:
                link = functools.partial(keep, fd, directory / str(one.id))
                await trio.to_thread.run_sync(link)
            finally:
                os.close(fd)
            items.append(self._item(ready[one.id]))
        if items:
            await self._stage_out.add(commit, items)

    def _item(self, ready: _Ready) -> QueueItem:
        upload = ready.upload
        node = self._local.live(self._namespace.node(upload.inode))
        return QueueItem(
            url=upload.url,
            file=str(upload.id),
            size_bytes=ready.size_bytes,
            checksums=ready.checksums,
            mode=node.mode & 0o777,
            mtime_ns=node.mtime_ns,
            overwrite=upload.overwrite,
            label=self._label(upload.inode) or last_name(upload.url),
        )

    def _label(self, inode: Inode) -> str | None:
        try:
            self._namespace.parent(inode)
        except NotFound:
            return None
        return self._namespace.path(inode)

    # What the queue tells

    async def _listen(self) -> None:
        async for upload in self._stage_out.news:
            told = [upload]
            try:
                while len(told) < PAGE_ROWS:
                    told.append(self._stage_out.news.receive_nowait())
            except trio.WouldBlock:
                pass
            try:
                self._keep_account(told)
            except StageFSError as error:
                # The next daemon asks again.
                log.error("what became of uploads cannot be noted: %s", error)

    def _keep_account(self, uploads: Sequence[Upload]) -> None:
        told = [
            (int(upload.item.file), _STATES[upload.state], upload.reason)
            for upload in uploads
            if upload.commit.startswith(self._prefix)
            and upload.state in _STATES
            and not upload.item.removes
        ]
        if told:
            self._namespace.settle_uploads(told)
