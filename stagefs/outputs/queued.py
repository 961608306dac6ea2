"""The values of the stage-out queue: what shall be uploaded, and how far that is.

Frozen, without behaviour; safe to use from any thread.
"""

import enum

import msgspec

from stagefs.model import Checksum


class UploadState(enum.StrEnum):
    """``prepared``: part of a commit that may still be undone.  ``uploading`` is told by who
    uploads, the queue itself says ``queued``: a daemon that dies leaves nothing to put right.
    ``replaced``: a later output for the same URL made it needless.  What ``failed`` stays, with its
    file and its reason, until somebody retries or cancels it."""

    PREPARED = "prepared"
    QUEUED = "queued"
    UPLOADING = "uploading"
    DONE = "done"
    REPLACED = "replaced"
    FAILED = "failed"
    CANCELLED = "cancelled"


# An upload in one of these needs its file.
WITH_FILE = (
    UploadState.PREPARED,
    UploadState.QUEUED,
    UploadState.FAILED,
    UploadState.CANCELLED,
)


class QueueItem(msgspec.Struct, frozen=True, kw_only=True):
    """One file to be uploaded, or (``removes``) one object to be removed, which has no file.

    ``url`` is a public one.  ``file`` is the name of the file in ``Queue.directory_of(commit)``:
    whole, immutable and synced by whoever queues it.  ``label`` tells people what it is (its name
    in the sandbox).  Without ``overwrite`` an object that exists is never replaced.
    """

    url: str
    file: str
    size_bytes: int
    checksums: tuple[Checksum, ...] = ()
    mode: int | None = None
    mtime_ns: int = 0
    overwrite: bool = False
    label: str = ""
    removes: bool = False


class Upload(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the queue.

    ``attempts`` that failed, ``reason`` of the last failure.  Times are of the wall clock, 0 where
    there is none.  ``validator`` is what the remote said of the object when it was done.
    ``origin`` is where the mount that queued it kept its state, ``own`` whether that is ours.
    """

    id: int
    commit: str
    state: UploadState
    item: QueueItem
    attempts: int = 0
    reason: str | None = None
    next_try_ns: int = 0
    added_ns: int = 0
    changed_ns: int = 0
    validator: str | None = None
    origin: str = ""
    own: bool = True


class Done(msgspec.Struct, frozen=True):
    """An upload that ended well."""

    id: int
    validator: str


class NotDone(msgspec.Struct, frozen=True):
    """One that did not; ``final``: it is not tried again by itself, else at about
    ``next_try_ns``."""

    id: int
    reason: str
    final: bool
    next_try_ns: int = 0


Outcome = Done | NotDone


class Total(msgspec.Struct, frozen=True):
    uploads: int = 0
    size_bytes: int = 0


Totals = dict[UploadState, Total]
