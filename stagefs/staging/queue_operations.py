"""The operations on the stage-out queue: list, retry, cancel, flush, and its totals for `status`.

Turns requests into calls of StageOut and uploads into what the API shows.  Trio thread.
"""

import time
from typing import Protocol

import trio

from stagefs.errors import InvalidName
from stagefs.outputs.queued import Total, Upload, UploadState
from stagefs.staging import queue_values as values
from stagefs.staging.stageout import StageOut
from stagefs.staging.values import Progress, ProgressCallback

# A flush without a deadline gives up when nothing has moved for so long.
STALL_S = 120.0
EXAMPLES_MAX = 10
_LEFT = (UploadState.QUEUED, UploadState.FAILED, UploadState.PREPARED)


class Due(Protocol):
    """What is to be queued as soon as it can be: ``BoundUploads``."""

    @property
    def due(self) -> int: ...

    @property
    def trouble(self) -> str | None: ...

    async def hand_over(self, *, hurry: bool = False) -> None: ...


class QueueOperations:
    def __init__(self, stage_out: StageOut, bound: Due) -> None:
        self._stage_out = stage_out
        self._bound = bound

    def totals(self) -> values.QueueTotals:
        known = self._stage_out.totals
        due = self._bound.due
        waiting = known.get(UploadState.QUEUED, Total())
        failed = known.get(UploadState.FAILED, Total())
        return values.QueueTotals(
            waiting=waiting.uploads + due,
            due=due,
            waiting_bytes=waiting.size_bytes,
            uploading=len(self._stage_out.under_way),
            failed=failed.uploads,
            failed_bytes=failed.size_bytes,
            prepared=known.get(UploadState.PREPARED, Total()).uploads,
            directory=str(self._stage_out.directory),
            trouble=self._stage_out.trouble or self._bound.trouble,
        )

    async def oldest_age_s(self) -> float:
        """How long the upload that has waited longest has been in the queue; 0 when it is empty."""
        found = await self._stage_out.uploads(states={UploadState.QUEUED}, limit=1)
        return max(time.time() - found[0].added_ns / 1e9, 0.0) if found else 0.0

    async def list_uploads(self, request: values.ListUploads) -> values.UploadPage:
        """Raises InvalidName for a state there is not."""
        shown = None if request.states is None else {_state(word) for word in request.states}
        # What is uploading is queued as far as the queue knows.
        asked = None if shown is None else shown | {UploadState.QUEUED}
        limit = max(1, min(request.limit, values.UPLOADS_PAGE_MAX))
        found = await self._stage_out.uploads(states=asked, after=request.after, limit=limit)
        listed = [self._status(upload) for upload in found]
        return values.UploadPage(
            [status for status in listed if shown is None or status.state in shown],
            after=found[-1].id if len(found) == limit else None,
        )

    async def retry(self, request: values.RetryUploads) -> values.UploadsChanged:
        ids = _ids(request.ids, everything=request.all)
        return values.UploadsChanged(await self._stage_out.retry(ids))

    async def cancel(self, request: values.CancelUploads) -> values.UploadsChanged:
        ids = _ids(request.ids, everything=request.all)
        cancelled = await self._stage_out.cancel(ids, discard=request.discard)
        return values.UploadsChanged(cancelled)

    async def flush(self, request: values.Flush, progress: ProgressCallback) -> values.Flushed:
        """Upload what waits; see ``values.Flush``.  Failures stay, and are told."""
        out = self._stage_out
        uploads, begun_bytes, at_most = out.uploaded, out.uploaded_bytes, request.deadline_s

        def tell() -> None:
            totals = self.totals()
            done = out.sent_bytes - begun_bytes
            total = out.uploaded_bytes - begun_bytes + totals.waiting_bytes
            progress(Progress(f"uploading, {totals.waiting} left", done, max(total, done)))

        with trio.move_on_after(float("inf") if at_most is None else max(at_most, 0)):
            async with out.hurry():
                await self._bound.hand_over(hurry=True)
                await out.until_empty(stall_s=STALL_S if at_most is None else None, tell=tell)
        done = out.totals.get(UploadState.DONE, Total())
        sent, sent_bytes = out.uploaded - uploads, out.uploaded_bytes - begun_bytes
        return values.Flushed(
            uploads=sent,
            bytes_sent=sent_bytes,
            left=self.totals(),
            examples=await self._examples(),
            # At a deadline what has just ended may not be counted as done yet.
            before=max(done.uploads - sent, 0),
            before_bytes=max(done.size_bytes - sent_bytes, 0),
        )

    async def _examples(self) -> list[values.UploadStatus]:
        found = await self._stage_out.uploads(states=_LEFT, limit=EXAMPLES_MAX)
        return [self._status(upload) for upload in found]

    def _status(self, upload: Upload) -> values.UploadStatus:
        item, state, sent_bytes = upload.item, upload.state, 0
        for one in self._stage_out.under_way:
            if one.upload.id == upload.id and state is UploadState.QUEUED:
                state, sent_bytes = UploadState.UPLOADING, one.sent_bytes
        return values.UploadStatus(
            id=upload.id,
            commit=upload.commit,
            state=state.value,
            url=item.url,
            size_bytes=item.size_bytes,
            label=item.label,
            file=str(self._stage_out.file_of(upload)),
            overwrite=item.overwrite,
            removes=item.removes,
            sent_bytes=sent_bytes,
            attempts=upload.attempts,
            reason=upload.reason,
            next_try_ns=upload.next_try_ns,
            added_ns=upload.added_ns,
            changed_ns=upload.changed_ns,
            origin=None if upload.own else upload.origin,
        )


def _state(word: str) -> UploadState:
    try:
        return UploadState(word)
    except ValueError as exc:
        known = ", ".join(state.value for state in UploadState)
        raise InvalidName(f"{word!r} is no state of an upload: there are {known}.") from exc


def _ids(ids: list[int], *, everything: bool) -> list[int] | None:
    if everything == bool(ids):
        raise InvalidName("Say which uploads are meant: their numbers, or all.")
    return None if everything else ids
