"""Calls that may block in the kernel, made in a forked child and given a deadline.

A child stuck in the kernel cannot be waited for: it is left behind and reaped by
``reap_late`` once it could end.  Only for a single-threaded caller, as fork demands.
"""

import errno
import os
import select
from collections.abc import Callable

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


def _run_and_exit(action: Callable[[], None], writer: int | None) -> None:
    # A child that gets stuck must not keep the device, and with it the mount, alive.
    code = 0
    try:
        os.closerange(3, writer or 3)
        os.closerange((writer or 2) + 1, os.sysconf("SC_OPEN_MAX"))
        action()
    except OSError as exc:
        code = exc.errno or errno.EIO
    finally:
        if writer is not None:
            os.write(writer, code.to_bytes(4, "little"))
        os._exit(0)
