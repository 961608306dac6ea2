"""Where a verify of a mount's whole cache has come to, so that one that was stopped can go on.

Kept in the cache directory, beside what it speaks of, and by key: entries that come and go between
the two do not matter.  A verify of one subject keeps nothing.  Synchronous; small writes.
"""

import contextlib
import os
import time
from pathlib import Path

import msgspec

NAME = "verify.live.position"
# A verify whose daemon is killed loses at most so much of its work.
WRITTEN_EVERY_S = 2.0


class Position(msgspec.Struct, frozen=True):
    """Everything up to the entry ``after`` was verified, with these results."""

    after: str = ""
    entries: int = 0
    chunks: int = 0
    bytes_read: int = 0
    damaged: list[str] = []


class PositionFile:
    """``directory`` None: nothing is kept."""

    def __init__(self, directory: Path | None) -> None:
        self._path = None if directory is None else directory / NAME
        self._written_s = time.monotonic()

    def read(self) -> Position:
        """The beginning, where there is none, or none that can be read."""
        if self._path is None:
            return Position()
        with contextlib.suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode(self._path.read_bytes(), type=Position)
        return Position()

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._written_s >= WRITTEN_EVERY_S

    def write(self, position: Position) -> None:
        """Where the disk takes nothing, a verify begins anew the next time."""
        if self._path is None:
            return
        self._written_s = time.monotonic()
        made = self._path.with_name(f".{NAME}.{os.getpid()}")
        with contextlib.suppress(OSError):
            made.write_bytes(msgspec.json.encode(position))
            made.replace(self._path)

    def remove(self) -> None:
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
