"""What is asked of the stage-out queue, and what it answers: values of the control API.

As ``values``, of which they are a part: frozen, free of trio, URLs without credentials.
"""

import msgspec

UPLOADS_PAGE_MAX = 1000


class UploadStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """One upload.  ``state``: prepared (its commit may still be undone), queued, uploading, done,
    replaced (by a later output for the same URL), failed or cancelled.  ``attempts`` so far that
    failed, ``reason`` of the last one; ``next_try_ns``: 0, as soon as there is a place.
    ``label`` is the output's name where it was made, ``file`` where its bytes are; with ``removes``
    the object is to be removed, and there are none.
    ``origin``: which other mount left it prepared (host and state directory).
    """

    id: int
    commit: str
    state: str
    url: str
    size_bytes: int
    label: str = ""
    file: str = ""
    overwrite: bool = False
    removes: bool = False
    sent_bytes: int = 0
    attempts: int = 0
    reason: str | None = None
    next_try_ns: int = 0
    added_ns: int = 0
    changed_ns: int = 0
    origin: str | None = None


class ListUploads(msgspec.Struct, frozen=True):
    """In the order of their numbers, those behind ``after``; of all states or these."""

    states: list[str] | None = None
    after: int = 0
    limit: int = UPLOADS_PAGE_MAX


class UploadPage(msgspec.Struct, frozen=True):
    """``after`` continues the listing; None: that was all."""

    uploads: list[UploadStatus]
    after: int | None = None


class RetryUploads(msgspec.Struct, frozen=True):
    """Try again now: these, or (``all``) everything that waits or failed."""

    ids: list[int] = []
    all: bool = False


class CancelUploads(msgspec.Struct, frozen=True):
    """Give up these, or (``all``) everything that waits or failed.  With ``discard`` their files
    go at once, else they can be retried for a while."""

    ids: list[int] = []
    all: bool = False
    discard: bool = False


class UploadsChanged(msgspec.Struct, frozen=True):
    uploads: int


class Flush(msgspec.Struct, frozen=True):
    """Upload what is queued now, and answer when nothing waits any more, or at the deadline, or
    (without one) when nothing has moved for a while."""

    deadline_s: float | None = None


class QueueTotals(msgspec.Struct, frozen=True):
    """``waiting`` counts what is uploading, too, and what is ``due`` (closed in a writable binding
    and not queued yet).  ``prepared`` are of commits that are being made, or that another mount
    did not finish."""

    waiting: int = 0
    due: int = 0
    waiting_bytes: int = 0
    uploading: int = 0
    failed: int = 0
    failed_bytes: int = 0
    prepared: int = 0
    directory: str = ""
    trouble: str | None = None


class Flushed(msgspec.Struct, frozen=True):
    """What a flush uploaded, what is left, and some of those that are left.  ``before``: what the
    daemon, which waits for no flush, had uploaded when it began, and still lists as done."""

    uploads: int
    bytes_sent: int
    left: QueueTotals
    examples: list[UploadStatus] = []
    before: int = 0
    before_bytes: int = 0
