"""STATE/supervisor.json: who holds this mount, or why nobody does any more."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from stagefs.supervisor.lifetime import read_process

NAME = "supervisor.json"


class Record:
    """``as_owner`` runs a call as the user who owns the state directory."""

    def __init__(self, state: Path, as_owner: Callable[[Callable[[], None]], None]) -> None:
        self._path = state / NAME
        self._as_owner = as_owner

    def write(self, facts: Mapping[str, object]) -> None:
        this = read_process(os.getpid())
        who = {
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "start_time": this.start_time if this else 0,
        }
        self._write({**facts, **who})

    def fail(self, sentence: str) -> None:
        """Nobody holds the mount, and this is why; until the next mount."""
        self._write({"failed": sentence, "at": time.time(), "host": os.uname().nodename})

    def remove(self) -> None:
        self._as_owner(lambda: self._path.unlink(missing_ok=True))

    def _write(self, record: Mapping[str, object]) -> None:
        def write() -> None:
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
            partial.replace(self._path)

        self._as_owner(write)
