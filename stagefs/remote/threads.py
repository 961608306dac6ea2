"""Blocking clients under trio: one call in one worker thread, which the trio side can end.

``trio.to_thread.run_sync`` knows two ways to cancel: to wait for the thread, which a stalled
server makes endless, or to abandon it, after which it could still write into a file that
somebody else owns by then.  Here the trio side tells the thread to stop, wakes it when it can be
woken (``Call.interruptible``), and returns when the thread has ended or at least can no longer
touch the sink: every write happens under a lock together with the question whether the call
still stands.  A thread that cannot be woken ends by its own time limits and keeps its place in
the limiter until then.

Methods that say so run in the worker thread, all others in the trio thread.
"""

import contextlib
import errno
import math
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Generic, TypeVar

import trio

from stagefs.errors import CacheFailed, DeadlineExceeded, RemoteUnavailable, StateFailed
from stagefs.model import MIB, ObjectInfo, Span
from stagefs.remote.base import Sink, WatchingSink

if TYPE_CHECKING:
    from outcome import Outcome

T = TypeVar("T")

PIECE_BYTES = 256 << 10
REPORT_INTERVAL_S = 0.5
PUT_REPORT_INTERVAL_S = 0.1
# A woken thread needs a few microseconds to end; a busy machine is given more.
WOKEN_GRACE_S = 1.0


class CallStopped(Exception):
    """Raised in the worker thread when nobody waits for its call any more."""


class Call(Generic[T]):
    """One blocking call.  ``work`` gets this object and runs in a worker thread."""

    def __init__(
        self,
        work: "Callable[[Call[T]], T]",
        *,
        url: str,
        answer_timeout_s: float,
        progress_timeout_s: float = math.inf,
    ) -> None:
        self._work = work
        self._url = url
        self._answer_timeout_s = answer_timeout_s
        self._progress_timeout_s = progress_timeout_s
        self._token = trio.lowlevel.current_trio_token()
        # Held while the thread starts and while it writes: with it, "stopped" cannot change
        # between the question and the deed.
        self._lock = threading.Lock()
        self._stopped = False
        self._answered = False
        self._wake: Callable[[], bool] | None = None
        self._outcome: Outcome[T] | None = None
        self._news = trio.Event()
        self._ended = trio.Event()

    async def run(self, limiter: trio.CapacityLimiter) -> T:
        """The result of ``work``.  Raises what it raises; DeadlineExceeded when the remote has
        not answered in time, or does not go on (see ``answered`` and SinkCall)."""
        await limiter.acquire_on_behalf_of(self)

        def deliver(outcome: "Outcome[T]") -> None:
            self._outcome = outcome
            self._tell(self._thread_ended, limiter)

        try:
            trio.lowlevel.start_thread_soon(self._in_thread, deliver, f"stagefs {self._url}")
        except RuntimeError as exc:
            limiter.release_on_behalf_of(self)
            raise RemoteUnavailable(
                f"No thread can be started for {self._url}: the limit of processes is reached."
            ) from exc
        try:
            return await self._follow()
        finally:
            if not self._ended.is_set():
                await self._stop()

    # In the worker thread.

    def checkpoint(self) -> None:
        """Raises CallStopped when nobody waits any more."""
        if self._stopped:
            raise CallStopped

    def interruptible(self, wake: Callable[[], bool]) -> None:
        """From now on ``wake``, called in the trio thread, ends whatever blocks this thread, or
        returns False when it cannot."""
        self._wake = wake
        self.checkpoint()

    def answered(self) -> None:
        """The remote has begun to answer: from here on the progress limit holds."""
        self._answered = True
        self._tell(self._wake_trio)

    def _in_thread(self) -> T:
        with self._lock:
            self.checkpoint()
            self._open()
        try:
            return self._work(self)
        finally:
            self._close()

    def _open(self) -> None:
        """Hook of SinkCall and SourceCall, under the lock."""

    def _close(self) -> None:
        """Hook of SinkCall and SourceCall."""

    def _tell(self, tell: Callable[..., object], *args: object) -> None:
        # The loop may be gone when a thread that was left behind ends.
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(tell, *args)

    # In the trio thread.

    def _wake_trio(self) -> None:
        self._news.set()

    def _thread_ended(self, limiter: trio.CapacityLimiter) -> None:
        limiter.release_on_behalf_of(self)
        self._ended.set()
        self._news.set()

    async def _follow(self) -> T:
        deadline = trio.current_time() + self._answer_timeout_s
        while True:
            with trio.move_on_at(deadline):
                await self._news.wait()
            # No await from here to the next wait: news that come meanwhile are seen then.
            came = self._news.is_set()
            self._news = trio.Event()
            self._report()
            if self._ended.is_set() and self._outcome is not None:
                return self._outcome.unwrap()
            if came and self._answered:
                deadline = trio.current_time() + self._progress_timeout_s
            elif trio.current_time() >= deadline:
                raise self._deadline_exceeded()

    def _deadline_exceeded(self) -> DeadlineExceeded:
        if self._answered:
            lack = f"{self._lack()} for {self._progress_timeout_s:g} s"
        else:
            lack = f"gave no answer within {self._answer_timeout_s:g} s"
        return DeadlineExceeded(
            f"{self._url} {lack}: the server or the way to it is stalled; try again later."
        )

    def _report(self) -> None:
        """Hook of SinkCall and SourceCall."""

    def _lack(self) -> str:
        return "sent no byte"

    async def _stop(self) -> None:
        self._stopped = True
        with trio.CancelScope(shield=True):
            if self._wake is not None and self._wake():
                with trio.move_on_after(WOKEN_GRACE_S):
                    await self._ended.wait()
            if self._lock.acquire(blocking=False):
                self._lock.release()
            else:
                # A limiter of its own: others may be waiting out a dead disk.
                await trio.to_thread.run_sync(self._settle, limiter=trio.CapacityLimiter(1))

    def _settle(self) -> None:
        """Wait out a write that has begun; the next one finds the call stopped."""
        with self._lock:
            pass


class SinkCall(Call[T]):
    """A call whose thread writes a span into a sink, in order."""

    def __init__(
        self,
        work: "Callable[[SinkCall[T]], T]",
        *,
        url: str,
        span: Span,
        sink: Sink,
        answer_timeout_s: float,
        progress_timeout_s: float,
    ) -> None:
        super().__init__(
            lambda _: work(self),
            url=url,
            answer_timeout_s=answer_timeout_s,
            progress_timeout_s=progress_timeout_s,
        )
        self._span = span
        self._sink = sink
        self._shift = sink.shift
        self._watching = sink if isinstance(sink, WatchingSink) else None
        self._fd = -1
        self._written = 0
        self._told = 0
        self._told_at = 0.0
        self._reported = 0

    # In the worker thread.

    @property
    def missing_bytes(self) -> int:
        return self._span.length - self._written

    def found(self, info: ObjectInfo) -> None:
        """The remote has said which version it is about to send."""
        if isinstance(self._sink, VersionSink):
            self._sink.found = info
        self.answered()

    def write(self, data: bytes | memoryview) -> None:
        """Put the next bytes into the sink.  Raises CallStopped and CacheFailed."""
        view = memoryview(data)[: self.missing_bytes]

        def put(fd: int, offset: int) -> int:
            count = os.pwrite(fd, view, offset)
            if self._watching is not None:
                self._watching.passed(offset + self._shift, view[:count])
            return count

        while view:
            view = view[self.move(put) :]
            if self._watching is not None:
                self._watching.between_pieces()

    def move(self, mover: Callable[[int, int], int]) -> int:
        """Let ``mover(fd, offset)`` put bytes into the sink; it returns how many."""
        with self._lock:
            self.checkpoint()
            try:
                count = mover(self._fd, self._span.start + self._written - self._shift)
            except OSError as exc:
                if exc.errno not in _SINK_ERRORS:
                    raise
                raise CacheFailed(
                    f"Bytes of {self._url} cannot be written into the cache ({exc.strerror})."
                ) from exc
            self._written += count
        now = time.monotonic()
        if self._written - self._told >= MIB or now - self._told_at >= REPORT_INTERVAL_S:
            self._told, self._told_at = self._written, now
            self._tell(self._wake_trio)
        return count

    def _open(self) -> None:
        # Of its own, so that the owner may close the sink while a thread that cannot be woken
        # still lives.
        try:
            self._fd = os.dup(self._sink.fd)
        except OSError as exc:
            raise CacheFailed(
                f"Bytes of {self._url} cannot be written into the cache ({exc.strerror})."
            ) from exc

    def _close(self) -> None:
        os.close(self._fd)

    # In the trio thread.

    def _report(self) -> None:
        written = self._written
        if written > self._reported:
            span = Span(self._span.start + self._reported, written - self._reported)
            self._reported = written
            self._sink.landed(span)


class SourceCall(Call[T]):
    """A call whose thread sends a file.  It reads through a descriptor of its own (``source``),
    so that the owner may close his while a thread that cannot be woken still lives."""

    def __init__(
        self,
        work: "Callable[[SourceCall[T]], T]",
        *,
        url: str,
        source: int,
        progress: Callable[[int], None],
        answer_timeout_s: float,
        progress_timeout_s: float,
    ) -> None:
        super().__init__(
            lambda _: work(self),
            url=url,
            answer_timeout_s=answer_timeout_s,
            progress_timeout_s=progress_timeout_s,
        )
        self._given = source
        self._progress = progress
        self._moved = 0
        self._moved_lock = threading.Lock()
        self._told_at = 0.0
        self._reported = 0
        self.source = -1

    # In the worker thread, and in threads that help it.

    def moved(self, count: int = 0) -> None:
        """So many further bytes went out; with 0, something else went on.  Raises CallStopped."""
        self.checkpoint()
        with self._moved_lock:
            self._moved += count
        now = time.monotonic()
        if not self._answered or now - self._told_at >= PUT_REPORT_INTERVAL_S:
            self._told_at = now
            self.answered()

    def moved_anew(self) -> None:
        """The file is sent once more, from its beginning."""
        with self._moved_lock:
            self._moved = 0

    def _open(self) -> None:
        try:
            self.source = os.dup(self._given)
        except OSError as exc:
            raise StateFailed(
                f"The output for {self._url} cannot be read here ({exc.strerror})."
            ) from exc

    def _close(self) -> None:
        os.close(self.source)

    # In the trio thread.

    def _report(self) -> None:
        moved = self._moved
        if moved > self._reported:
            self._reported = moved
            self._progress(moved)

    def _lack(self) -> str:
        return "took no byte"


class VersionSink:
    """A sink that wants to know the version as soon as the remote has told it, so that a
    transfer that breaks can go on with the same one (see ``retry``)."""

    found: ObjectInfo | None = None


_SINK_ERRORS = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EBADF, errno.ENODEV}
)
