"""What to do with the requests of a daemon that died, before the next one starts.

With FUSE_NOTIFY_RESEND (kernel 6.9) the kernel sends them again, and the next daemon is
told which threads asked.  Without it they are answered with ESTALE: the kernel repeats
those that have a path, and pages that were read ahead are read again.

Only while no daemon lives: a request that was sent again to a living one runs twice.
"""

import contextlib
import ctypes
import errno
import logging
import os
import select
from collections.abc import Callable
from pathlib import Path

from stagefs.supervisor import wire

log = logging.getLogger("stagefs.supervisor")

FORGET, INTERRUPT, BATCH_FORGET = 2, 36, 42
STATFS = 17
NO_REPLY = {FORGET, INTERRUPT, BATCH_FORGET}
# Request ids are even numbers counted up by the kernel.
ID_STEP = 2
IDS_AT_ONCE = 1 << 17
# How far back an unanswered request may lie: beyond any deadline at 100,000 requests/s.
IDS_MAX = 1 << 23
IDS_BLIND = 1 << 21
PROVOKED_WAIT_S = 2.0
PROVOKED_MAX = 5


class Disconnected(Exception):
    """The mount is gone: unmounted, or its connection aborted."""


def is_disconnected(device: int) -> bool:
    """The kernel reports POLLERR on the device once the connection has ended."""
    poll = select.poll()
    poll.register(device, 0)
    return bool(poll.poll(0))


def _read(device: int, buffer: bytearray) -> wire.Request | None:
    """The next queued request, or None when there is none.  The device must not block."""
    while True:
        try:
            length = os.readv(device, [buffer])
        except BlockingIOError:
            return None
        except OSError as exc:
            if exc.errno == errno.ENOENT:  # that request was withdrawn meanwhile
                continue
            if exc.errno in {errno.ENODEV, errno.ECONNABORTED}:
                raise Disconnected from exc
            raise
        return wire.parse_request(memoryview(buffer)[:length])


def resend(device: int) -> list[wire.Request]:
    """Have the kernel queue again what the dead daemon had read; returns those requests."""
    _notify_resend(device)
    resent: list[wire.Request] = []
    buffer = bytearray(wire.REQUEST_BYTES_MAX)
    os.set_blocking(device, False)
    try:
        while (request := _read(device, buffer)) is not None:
            if request.resent:
                resent.append(request)
    finally:
        # libfuse expects a device that blocks: EAGAIN would end its loop.
        os.set_blocking(device, True)
    _notify_resend(device)
    return resent


def _notify_resend(device: int) -> None:
    try:
        os.write(device, wire.resend_notice())
    except OSError as exc:
        if exc.errno in {errno.ENODEV, errno.ENOTCONN, errno.EPERM} and is_disconnected(device):
            raise Disconnected from exc
        raise


def abort(connection: int) -> bool:
    """End the connection for everybody.  False where the control file system is not mounted."""
    try:
        Path(f"/sys/fs/fuse/connections/{connection}/abort").write_text("1", encoding="ascii")
    except OSError:
        return False
    return True


def refuse_all(device: int, *, resend_first: bool) -> None:
    """Answer everything that is queued (and what was in flight) with ENOTCONN."""
    buffer = bytearray(wire.REQUEST_BYTES_MAX)
    os.set_blocking(device, False)
    try:
        if resend_first:
            _notify_resend(device)
        while (request := _read(device, buffer)) is not None:
            if request.opcode not in NO_REPLY:
                with contextlib.suppress(FileNotFoundError):  # withdrawn meanwhile
                    os.write(device, wire.error_reply(request.unique, errno.ENOTCONN))
    except Disconnected:
        return
    finally:
        os.set_blocking(device, True)


class StaleSweep:
    """Answers the requests of a dead daemon with ESTALE, newest id first.

    The kernel hands requests out in the order of their ids.  So every id below that of a
    request that is still queued belongs to the dead daemon, even when the next one
    already runs, and answering an id that is not waiting merely fails.
    """

    def __init__(self, device: int, connection: int) -> None:
        self._device = device
        self._waiting = Path(f"/sys/fs/fuse/connections/{connection}/waiting")
        self._done_below = 0
        self._next = 0
        self._last = 0
        self._answered = 0

    @property
    def pending(self) -> bool:
        return self._next > self._last

    def begin(self, provoke: Callable[[], None]) -> None:
        """Find the range of ids and answer the newest of them.

        ``provoke`` makes any request on the mount without waiting for its answer; it is
        needed when nothing is queued that would tell how far the ids have come.
        """
        self._answered = 0
        if self._nobody_waits():
            self._next = self._last = 0
            return
        bound = self._newest_id(provoke)
        if bound is None:
            # No request can be made on this mount.  While no daemon lives, answering ids
            # that the kernel has not given out yet does no harm.
            self._last, self._next = self._done_below, self._done_below + IDS_BLIND * ID_STEP
            while self.pending:
                self.advance()
            return
        self._last = max(self._done_below, bound - IDS_MAX * ID_STEP)
        self._done_below = self._next = bound
        self.advance()

    def advance(self) -> None:
        """Answer the next IDS_AT_ONCE ids."""
        write = ctypes.CDLL(None).write
        reply = ctypes.create_string_buffer(wire.stale_reply(0), 16)
        unique = ctypes.c_uint64.from_buffer(reply, 8)
        stop = max(self._last, self._next - IDS_AT_ONCE * ID_STEP)
        for number in range(self._next, stop, -ID_STEP):
            unique.value = number
            self._answered += write(self._device, reply, 16) == len(reply)
        self._next = stop
        if self._nobody_waits():
            self._next = self._last
        if not self.pending:
            log.info("ESTALE went to %d requests that were in flight", self._answered)

    def _nobody_waits(self) -> bool:
        """False as well when nobody can say: the control file system may not be mounted."""
        try:
            return int(self._waiting.read_text(encoding="ascii")) == 0
        except OSError:
            return False

    def _newest_id(self, provoke: Callable[[], None]) -> int | None:
        """The id of the first request in the queue: everything below it was the dead daemon's."""
        poll = select.poll()
        poll.register(self._device, select.POLLIN)
        os.set_blocking(self._device, False)
        try:
            for _ in range(PROVOKED_MAX):
                found = self._first_queued()
                if found is not None:
                    return found
                provoke()
                poll.poll(PROVOKED_WAIT_S * 1000)
        finally:
            os.set_blocking(self._device, True)
        return None

    def _first_queued(self) -> int | None:
        buffer = bytearray(wire.REQUEST_BYTES_MAX)
        while (request := _read(self._device, buffer)) is not None:
            # A forget gets its id when it is read, so it says nothing about the queue.
            if request.opcode not in NO_REPLY:
                # What was provoked is nobody's.
                self._answered -= request.opcode == STATFS
                return request.unique
        return None
