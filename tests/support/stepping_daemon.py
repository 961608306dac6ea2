"""The daemon, but it can be told to kill itself before its N-th durable step.

Run in place of ``stagefs.daemon``, with its arguments (``Mounted.mount_otherwise``).  The test
writes ``N NAME`` into the file ``step`` of the state directory.  From then on each step is
counted: calls that change a file system or make it durable, commits of SQLite, and pieces of an
upload that leave for a server.  At the N-th the daemon takes the file away and ends by SIGKILL,
before the step takes effect; ``step`` that is still there at the end says that there were fewer.
With N 0 nobody dies, and ``step-reached`` has the number of steps instead of the last one's kind.
"""

import functools
import os
import signal
import socket
import sqlite3
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stagefs import daemon
from stagefs.remote import sftp_caller

PLAN_NAME = "step"
NOTE_NAME = "step-reached"
CALLS = (
    "write", "pwrite", "pwritev", "ftruncate", "fsync", "fdatasync", "copy_file_range", "utime",
    "posix_fallocate",
)  # fmt: skip
EVENTS = frozenset(
    {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.chmod"}
)


class Steps:
    """Counts while there is a plan."""

    def __init__(self, state: Path) -> None:
        self._plan = str(state / PLAN_NAME)
        self._note = str(state / NOTE_NAME)
        self._lock = threading.Lock()
        self._counted: dict[str, int] = {}
        self._inside = threading.local()

    def step(self, what: str) -> None:
        if not what or getattr(self._inside, "it", False):
            return
        self._inside.it = True
        try:
            self._step(what)
        finally:
            self._inside.it = False

    def _step(self, what: str) -> None:
        try:
            fd = os.open(self._plan, os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            # "N NONCE": a new plan begins to count anew.
            plan = os.read(fd, 100).decode()
        finally:
            os.close(fd)
        if not plan.endswith("\n"):
            return
        with self._lock:
            count = self._counted[plan] = self._counted.get(plan, 0) + 1
            dies_at = int(plan.split()[0])
            if not dies_at:
                Path(self._note).write_text(str(count))
            elif count == dies_at:
                Path(self._note).write_text(what)
                os.unlink(self._plan)
                os.kill(os.getpid(), signal.SIGKILL)

    # What calls it

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def called(*arguments: Any, **options: Any) -> Any:
            self.step(name)
            return function(*arguments, **options)

        return called

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS:
            self.step(event)
        elif event == "open" and isinstance(flags := arguments[2], int):
            self.step("open" if flags & (os.O_CREAT | os.O_TRUNC) else "")

    def statement(self, text: str) -> None:
        if text == "COMMIT":
            self.step(text)


def count_everything(steps: Steps) -> None:
    for name in CALLS:
        setattr(os, name, steps.wrapped(name, getattr(os, name)))

    class Traced(sqlite3.Connection):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.set_trace_callback(steps.statement)

    connect = sqlite3.connect

    def traced(*arguments: Any, **options: Any) -> sqlite3.Connection:
        return connect(*arguments, factory=Traced, **options)

    sqlite3.connect = traced  # type: ignore[assignment]
    # S3: what is sent; ssh: what the process that sends it tells.
    setattr(socket.socket, "sendall", steps.wrapped("sendall", socket.socket.sendall))  # noqa: B010
    deliver = steps.wrapped("deliver", sftp_caller.Exchange.deliver)
    setattr(sftp_caller.Exchange, "deliver", deliver)  # noqa: B010
    sys.addaudithook(steps.hear)


def main() -> int:
    state = Path(sys.argv[sys.argv.index("--state") + 1])
    count_everything(Steps(state))
    return daemon.main()


if __name__ == "__main__":
    sys.exit(main())
