"""Staging for one batch job: its sandboxes on the user's mount, and its outputs to where they shall
be.  What the batch systems have in common; exit codes and words are each one's own.

One thread.  Every step can be repeated.
"""

import math
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

from stagefs.config import BatchSettings
from stagefs.control.client import Refused
from stagefs.errors import RemoteError
from stagefs.integrations.batch_mount import JobMount, Owner, ending_within
from stagefs.integrations.batch_outcome import is_transient
from stagefs.staging.manifest import Manifest
from stagefs.staging.queue_values import UploadStatus

# The rest is for what comes after the uploads.
FLUSH_SHARE = 0.8
# A flush waits for other jobs' uploads, too: between two it is seen whether this job's are done.
FLUSH_SLICE_S, FLUSH_SLICE_S_MAX = 1.0, 30.0
ASK_AGAIN_S = 1.0


def _nothing() -> None:
    """Where a batch system has nothing to add."""


class JobStaging:
    def __init__(self, mount: JobMount, owner: Owner, settings: BatchSettings) -> None:
        self.mount = mount
        self._owner = owner
        self._settings = settings
        self._ends_s = math.inf

    def begin(self, wanted: Mapping[str, Manifest], *, then: Callable[[], None] = _nothing) -> None:
        """Mount, make the sandboxes, and do what comes ``then``; all of it, or nothing is left."""
        try:
            with self._within(self._settings.prolog_deadline_s, "The prolog"):
                self.mount.start()
                wait_until_s = time.monotonic() + self._settings.wait_s
                for name, manifest in wanted.items():
                    self._create(name, manifest, wait_until_s)
                then()
        except BaseException:
            for name in wanted:
                self.mount.remove_sandbox(name)
            self.mount.leave()
            raise

    def _within(self, deadline_s: float, what: str) -> AbstractContextManager[None]:
        """Raises DeadlineExceeded: batch systems wait for ever, or lose patience with the node."""
        self._ends_s = time.monotonic() + deadline_s
        return ending_within(deadline_s, what)

    def _create(self, name: str, manifest: Manifest, wait_until_s: float) -> None:
        pause = threading.Event()
        while True:
            try:
                with self._owner.acting():
                    self.mount.client.sandbox_create(name, manifest)
            except Refused as refused:
                if not is_transient(refused) or time.monotonic() > wait_until_s:
                    raise
                pause.wait(ASK_AGAIN_S)
            else:
                return

    def finish_earlier(self) -> None:
        """The job ran here before, and not all of it could be brought away: that comes first."""
        with self._within(self._settings.epilog_deadline_s, "The end of the job's earlier run"):
            try:
                self.mount.start()
                has_run = any(map(self.mount.has_sandbox, (self.mount.sandbox, self.mount.streams)))
            except BaseException:
                self.mount.leave()
                raise
        if has_run:
            self.finish()

    def finish(self, *, first: Callable[[], None] = _nothing) -> None:
        """Outputs to where they shall be; then the job is off the mount.  Raises when some are not:
        they stay in the state directory, and this can be repeated."""
        try:
            with self._within(self._settings.epilog_deadline_s, "The epilog"):
                self.mount.start()  # it may have died; what is in its state directory did not
                first()
                left = self._stage_out()
        finally:
            self.mount.leave()
        if left:
            reasons = [upload.reason for upload in left if upload.reason]
            raise RemoteError(
                f"{len(left)} outputs of job {self.mount.name} are not uploaded"
                f" ({(reasons or ['the servers did not take them in time'])[0].rstrip('.')}): they"
                f" are kept in {self.mount.state} on {socket.gethostname()}, and the next job of"
                f" {self._owner.name} there, or `stagefs mount --state` of it, goes on."
            )

    def _stage_out(self) -> list[UploadStatus]:
        """What is left of this job's uploads after all that were possible."""
        commits = set()
        for name in (self.mount.sandbox, self.mount.streams):
            if self.mount.has_sandbox(name):
                with self._owner.acting():
                    commits.add(self.mount.client.sandbox_commit(name).id)
        self.mount.commit_orphans()
        until_s = time.monotonic() + (self._ends_s - time.monotonic()) * FLUSH_SHARE
        slice_s = FLUSH_SLICE_S
        while True:
            left_s = until_s - time.monotonic()
            with self._owner.acting():
                self.mount.client.flush(max(0.0, min(left_s, slice_s)))
            left = [upload for upload in self.mount.uploads_left() if upload.commit in commits]
            if left_s <= 0 or all(upload.state == "failed" for upload in left):
                return left
            slice_s = min(2 * slice_s, FLUSH_SLICE_S_MAX)
