"""A daemon that is killed between two system calls, or in the middle of a write.

The modules under test see this in place of ``os``.  Every call that changes the disk is a step;
at the step that was chosen the daemon dies: that call does nothing or half of its work, and
none after it does anything, whatever clean-up code would like to do.  Nothing is buffered in
the daemon, so the disk is then as after a kill -9.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest

from stagefs.cache import file_system
from stagefs.outputs import local, local_directory, local_filling, local_map

STEPS = frozenset({"pwrite", "ftruncate", "rename", "utime", "unlink", "mkdir", "fsync"})
MODULES = (file_system, local, local_directory, local_filling, local_map)


class Killed(BaseException):
    """The daemon is dead."""


class MortalOs:
    """``steps`` are the calls that were made, by name; it dies at number ``dies_at`` (from 0)."""

    def __init__(self, dies_at: int, *, half: bool) -> None:
        self._dies_at = dies_at
        self._half = half
        self.steps: list[str] = []

    @property
    def dead(self) -> bool:
        return len(self.steps) > self._dies_at

    def step(self, name: str) -> None:
        """Raises Killed at the chosen step, and ever after."""
        if not self.dead:
            self.steps.append(name)
        if self.dead:
            raise Killed(name)

    def __getattr__(self, name: str) -> Any:
        function = getattr(os, name)
        return self._mortal(name, function) if name in STEPS else function

    def _mortal(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            try:
                self.step(name)
            except Killed:
                if self._half and name == "pwrite" and len(self.steps) == self._dies_at + 1:
                    self._half = False
                    fd, data, offset = args
                    os.pwrite(fd, memoryview(data)[: len(data) // 2], offset)
                raise
            return function(*args, **kwargs)

        return called

    def open(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT:
            self.step("open")
        return os.open(path, flags, *args, **kwargs)


def born(monkeypatch: pytest.MonkeyPatch, dies_at: int, *, half: bool = False) -> MortalOs:
    """From now on the modules under test live in this daemon."""
    mortal = MortalOs(dies_at, half=half)
    for module in MODULES:
        monkeypatch.setattr(module, "os", mortal)
    return mortal
