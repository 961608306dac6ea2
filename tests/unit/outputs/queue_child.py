"""Runs a scenario again and again, each time killed (SIGKILL) one durable step later.

    python -m tests.unit.outputs.queue_child DIRECTORY

A step is whatever Python tells its audit hooks of changes of the file system, and the beginning
of every SQL statement: the process dies before it takes effect.  Run number N lives in
DIRECTORY/N, in a forked process that writes what was acknowledged to it, line by line, into
DIRECTORY/N.log.  Ends with the first run that was not killed.
"""

import os
import signal
import sqlite3
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from stagefs.outputs.queue import Queue
from stagefs.outputs.queued import Done, NotDone
from tests.unit.outputs.queue_rig import OWNER, put_files

EVENTS = frozenset(
    {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.truncate", "os.chmod"}
)
STEPS_MAX = 1000


class Steps:
    """Kills this process at step number ``dies_at`` (from 1)."""

    def __init__(self, dies_at: int) -> None:
        self._left = dies_at

    def step(self, *_arguments: object) -> None:
        self._left -= 1
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS or (event == "open" and isinstance(arguments[2], int) and (
            arguments[2] & (os.O_CREAT | os.O_TRUNC)
        )):  # fmt: skip
            self.step()


class Traced(sqlite3.Connection):
    steps: Steps

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.set_trace_callback(self.steps.step)


def begin_counting(dies_at: int) -> None:
    """From here on everything counts."""
    Traced.steps = Steps(dies_at)
    connect = sqlite3.connect

    def traced(*arguments: Any, **keywords: Any) -> sqlite3.Connection:
        return connect(*arguments, factory=Traced, **keywords)

    sqlite3.connect = traced  # type: ignore[assignment]
    sys.addaudithook(Traced.steps.hear)


def run_all(
    directory: Path,
    scenario: Callable[[Path, Callable[[str], None]], None],
    prepared: Callable[[Path], None] = lambda _directory: None,
) -> None:
    for number in range(1, STEPS_MAX):
        prepared(directory / str(number))
        log = os.open(directory / f"{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                begin_counting(number)
                scenario(directory / str(number), partial(_write, log))
                code = 0
            finally:
                os._exit(code)
        os.close(log)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, f"run {number} failed"
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
    raise AssertionError(f"more than {STEPS_MAX} steps")


def _write(log: int, text: str) -> None:
    os.write(log, f"{text}\n".encode())


def scenario(directory: Path, tell: Callable[[str], None]) -> None:
    """One of each change.  Numbers of uploads: 1-3 are c1's, 4 is c2's (discarded), 5 c3's."""
    queue = Queue.open(directory, owner=OWNER, origin="here:/state-a")
    queue.sweep()
    tell("open")
    queue.prepare("c1", put_files(queue, "c1", ["a", "b", "c"]))
    tell("prepare c1")
    queue.activate("c1")
    tell("activate c1")
    queue.prepare("c2", put_files(queue, "c2", ["a", "d"]))
    tell("prepare c2")
    queue.discard("c2")
    tell("discard c2")
    queue.settle([Done(1, "v"), NotDone(2, "No.", final=True)])
    tell("settle")
    queue.add("c3", put_files(queue, "c3", ["b", "e"], overwrite=True))
    tell("add c3")
    queue.cancel([3], discard=True)
    tell("cancel")
    queue.close()


if __name__ == "__main__":
    run_all(Path(sys.argv[1]), scenario)
