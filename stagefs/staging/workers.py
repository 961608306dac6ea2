"""The program that works in a sandbox, told from every other one of this machine and all its boots.

A number alone is given to another program later; the number with the time at which it began, on one
boot of the machine, is not.  What cannot be seen from here counts as running: a program of
another PID namespace.  Blocking, but for /proc only.
"""

import contextlib
import os
from pathlib import Path

import msgspec

from stagefs.errors import NotFound

PROC = Path("/proc")
_BOOT_ID = "sys/kernel/random/boot_id"
# Of /proc/PID/stat, counted behind the command's name: field 3 and field 22 of proc(5).
_STATE, _START = 0, 19
_OVER = frozenset({"Z", "X", "x"})


class Worker(msgspec.Struct, frozen=True):
    """``start_ticks``: when it began, in clock ticks after the boot."""

    pid: int
    start_ticks: int
    boot_id: str
    pid_namespace: str


def worker_of(pid: int, proc: Path = PROC) -> Worker:
    """A program that runs now.  Raises NotFound."""
    start_ticks = _start_ticks(pid, proc)
    if start_ticks is None:
        raise NotFound(
            f"There is no program {pid} that could work in a sandbox: name a running one."
        )
    return Worker(pid, start_ticks, _boot_id(proc), _pid_namespace(proc))


def has_ended(worker: Worker, proc: Path = PROC) -> bool:
    if worker.boot_id != _boot_id(proc):
        return True
    if worker.pid_namespace != _pid_namespace(proc):
        return False
    return _start_ticks(worker.pid, proc) != worker.start_ticks


def _start_ticks(pid: int, proc: Path) -> int | None:
    """None when no program with that number runs."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return None if fields[_STATE] in _OVER else int(fields[_START])
    return None


def _boot_id(proc: Path) -> str:
    return (proc / _BOOT_ID).read_text().strip()


def _pid_namespace(proc: Path) -> str:
    return os.readlink(proc / "self/ns/pid")
