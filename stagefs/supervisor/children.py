"""Calls that may block in the kernel, made in a forked child and given a deadline.

A child stuck in the kernel cannot be waited for: it is left behind and reaped by
``reap_late`` once it could end.  Only for a single-threaded caller, as fork demands.
"""

import ctypes
import errno
import os
import select
from collections.abc import Callable
from pathlib import Path

NAME = b"stagefs-call"
NO_ANSWER = errno.ETIMEDOUT
_late: list[int] = []


def run_in_child(action: Callable[[], None], *, timeout_s: float) -> int:
    """Run ``action`` in a child.  Returns 0, the errno of its OSError, or NO_ANSWER."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        _run_and_exit(action, writer)
    os.close(writer)
    try:
        waiter = select.poll()
        waiter.register(reader, select.POLLIN)
        if not waiter.poll(timeout_s * 1000):
            _late.append(pid)
            return NO_ANSWER
        answer = os.read(reader, 4)
    finally:
        os.close(reader)
    os.waitpid(pid, 0)
    return int.from_bytes(answer, "little") if len(answer) == 4 else errno.EIO


class Errand:
    """``action`` in a child that is asked for its answer now and then."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._reader, writer = os.pipe()
        os.set_blocking(self._reader, False)
        self._pid = os.fork()
        if self._pid == 0:
            _run_and_exit(action, writer)
        os.close(writer)

    def answer(self) -> int | None:
        """0 or the errno of its OSError; None while there is no answer.  Asked no more after it."""
        try:
            answer = os.read(self._reader, 4)
        except BlockingIOError:
            return None
        self.leave()
        return int.from_bytes(answer, "little") if len(answer) == 4 else errno.EIO

    def leave(self) -> None:
        """Its answer is wanted no more; it may be stuck for as long as it likes."""
        os.close(self._reader)
        _late.append(self._pid)


def start_child(action: Callable[[], None]) -> None:
    """Run ``action`` in a child that nobody waits for."""
    pid = os.fork()
    if pid == 0:
        _run_and_exit(action, None)
    _late.append(pid)


def reap_late() -> None:
    for pid in list(_late):
        if os.waitpid(pid, os.WNOHANG)[0]:
            _late.remove(pid)


def _rename() -> None:
    """Be told from the supervisor in ``ps``, by a command line of one's own.

    The kernel shows the memory in which the arguments were; /proc/self/stat says where (fields 48
    and 49).
    """
    fields = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace")
    numbers = fields[fields.rindex(")") + 2 :].split()
    start, end = int(numbers[45]), int(numbers[46])
    if end > start:
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, NAME, min(len(NAME), end - start))


def _run_and_exit(action: Callable[[], None], writer: int | None) -> None:
    """Whatever happens the child ends here: it must never return into the supervisor's work."""
    code = 0
    try:
        _rename()
        # A child that gets stuck must not keep the device, and with it the mount, alive.
        os.closerange(3, writer or 3)
        os.closerange((writer or 2) + 1, os.sysconf("SC_OPEN_MAX"))
        action()
    except OSError as exc:
        code = exc.errno or errno.EIO
    except BaseException:  # noqa: BLE001 - the supervisor's handlers are not for a child's errors
        code = errno.EIO
    try:
        if writer is not None:
            os.write(writer, code.to_bytes(4, "little"))
    finally:  # nobody may wait for the answer any more
        os._exit(0)
