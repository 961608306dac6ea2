"""Word for the next daemon: which entries changed since the index was last written.

A commit must cost the event loop next to nothing and must not wait for SQLite, yet a daemon
that is killed must not leave files that nobody knows of.  So a commit appends the entry's key
here (once between two flushes), and the next open looks at these files, and at no others.

``growing.<n>`` holds 20 bytes per key.  A flush begins a new file, writes the index, and only
then removes the old ones.  Concurrency: the caller's lock.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from stagefs.cache.file_system import write_fully
from stagefs.cache.layout import open_file

_PREFIX = "growing."
_KEY_BYTES = 20


class GrowthJournal:
    def __init__(self, directory: Path) -> None:
        """Raises OSError."""
        self._directory = directory
        self._written = [int(path.name[len(_PREFIX) :]) for path in _files(directory)]
        self._number = max(self._written, default=0)
        self._fd = -1
        self._end = 0
        self.begin()

    def begin(self) -> list[int]:
        """Go on in a new file; returns those that are finished.  When the disk has no room the
        old one goes on and nothing is finished."""
        number = self._number + 1
        try:
            fd = open_file(self._path(number), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except OSError:
            if self._fd < 0:
                raise
            return []
        if self._fd >= 0:
            os.close(self._fd)
            self._written.append(self._number)
        self._number, self._fd, self._end = number, fd, 0
        return list(self._written)

    def note(self, key: str) -> None:
        """Raises OSError."""
        write_fully(self._fd, bytes.fromhex(key), self._end)
        self._end += _KEY_BYTES

    @property
    def is_empty(self) -> bool:
        return self._end == 0

    def forget(self, finished: list[int]) -> None:
        """The index knows what these files say."""
        for number in finished:
            with contextlib.suppress(OSError):
                os.unlink(self._path(number))
        self._written = [number for number in self._written if number not in finished]

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if self.is_empty:
                self.forget([self._number])

    def _path(self, number: int) -> Path:
        return self._directory / f"{_PREFIX}{number}"


def keys_noted(directory: Path) -> set[str]:
    """What an earlier daemon left word of.  Raises OSError."""
    noted: set[str] = set()
    for path in _files(directory):
        data = path.read_bytes()
        whole = len(data) - len(data) % _KEY_BYTES
        noted.update(data[at : at + _KEY_BYTES].hex() for at in range(0, whole, _KEY_BYTES))
    return noted


def forget_noted(directory: Path) -> None:
    for path in _files(directory):
        with contextlib.suppress(OSError):
            path.unlink()


def _files(directory: Path) -> Iterator[Path]:
    for path in directory.glob(f"{_PREFIX}*"):
        if path.name[len(_PREFIX) :].isdecimal():
            yield path
