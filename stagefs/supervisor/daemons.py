"""One daemon: its start with the handed descriptors, its work, its first words, its end.

What it is handed, and how, is the contract in the docstring of ``stagefs/fuse/session.py``.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from stagefs.supervisor.lifetime import is_stuck_zombie

STATUS_BYTES_MAX = 65536
STUCK_AFTER_S = 3.0


@dataclass(frozen=True)
class Credentials:
    """Whom a daemon started by root runs as."""

    uid: int
    gid: int
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Status:
    """The daemon's one line: ready (with what it wants the user told), or why not."""

    ready: dict[str, object] | None
    error: str = ""
    exit_code: int = 1


class Daemon:
    """A started daemon, which waits for ``go``.  ``status_fd`` is readable when it has spoken or
    ended."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        device: int,
        memory: int,
        output: int,
        credentials: Credentials | None,
        kept_open: Sequence[int] = (),
    ) -> None:
        """``kept_open``: descriptors that are closed only when both the daemon and we are gone."""
        self._session, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.status_fd, status = os.pipe()
        os.set_blocking(self.status_fd, False)
        self._said = b""
        self._zombie_since_s: float | None = None
        self.started_s = time.monotonic()
        with theirs:
            handed = (
                f"device={device},session={theirs.fileno()},memory={memory},status={status},"
                f"supervisor={os.getpid()}"
            )
            # A process group of its own: Ctrl-C on --foreground is for the supervisor only.
            self._child = subprocess.Popen(
                [*argv, "--supervised", handed],
                pass_fds=[device, theirs.fileno(), memory, status, *kept_open],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
                user=credentials.uid if credentials else None,
                group=credentials.gid if credentials else None,
                extra_groups=credentials.groups if credentials else None,
            )
            os.close(status)

    def go(self, init: bytes) -> None:
        """It is to serve from now on.  If it has ended, its status says so."""
        self.started_s = time.monotonic()
        with self._session, contextlib.suppress(OSError):
            self._session.send(init)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def lived_s(self) -> float:
        """Since it was started or, from ``go`` on, since then."""
        return time.monotonic() - self.started_s

    def read_status(self) -> Status | None:
        """What the daemon said; None while it has said nothing.  Raises EOFError at its end."""
        try:
            piece = os.read(self.status_fd, STATUS_BYTES_MAX)
        except BlockingIOError:
            return None
        self._said += piece
        line, newline, _ = self._said.partition(b"\n")
        if newline:
            return _parse_status(line)
        if not piece or len(self._said) > STATUS_BYTES_MAX:
            raise EOFError
        return None

    def exit_status(self) -> int | None:
        """As Popen.returncode.  None while it lives."""
        return self._child.poll()

    def is_stuck(self) -> bool:
        """Dead for a while and still not to be reaped: a thread of it waits in the kernel.

        That happens when it died while it told the kernel to forget a name whose
        directory is locked by a request that nobody answers any more.
        """
        if self._child.poll() is not None or not is_stuck_zombie(self.pid):
            self._zombie_since_s = None
            return False
        now = time.monotonic()
        if self._zombie_since_s is None:
            self._zombie_since_s = now
        return now - self._zombie_since_s > STUCK_AFTER_S

    def send(self, number: signal.Signals) -> None:
        self._child.send_signal(number)

    def wait(self, timeout_s: float) -> None:
        """Give it that long to do something or to end."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout_s)

    def close(self) -> None:
        self._session.close()
        if self.status_fd >= 0:
            os.close(self.status_fd)
            self.status_fd = -1


def _parse_status(line: bytes) -> Status:
    try:
        said = json.loads(line)
    except ValueError:
        said = {}
    ready, error, code = said.get("ready"), said.get("error"), said.get("exit_code")
    if isinstance(ready, dict):
        return Status(ready)
    if not isinstance(error, str):
        return Status(None, "The daemon said something that is not a status.")
    return Status(None, error, code if isinstance(code, int) and code else 1)


def describe_exit(status: int) -> str:
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"
