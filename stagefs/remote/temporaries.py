"""Names of files that a put writes before it renames them, and finding those that were left.

``.<name>.stagefs-<token>-<random>``: the token is the same for every try to put the same local
file at the same URL, in whatever process, so that a later try may remove what an earlier one
left and nobody else's.  The random part is new for each try: a server that was thought dead
and still obeys an old rename must not find a newer try's half file under that name.

A directory is looked through once per process; what this process itself could not remove is
remembered.  ``Leftovers`` may be used from several threads.
"""

import hashlib
import os
import re
import secrets
import threading
from collections.abc import Iterable

from stagefs.remote.url import NAME_BYTES_MAX

MARK = ".stagefs-"
# Very large directories are not looked through to their end.
NAMES_MAX = 20_000
DIRECTORIES_MAX = 10_000
_SUFFIX_BYTES = len(MARK) + 12 + 1 + 8
_TEMPORARY = re.compile(r"\..*\.stagefs-([0-9a-f]{12})-[0-9a-f]{8}", re.DOTALL)


def token_of(url: str, source: int) -> str:
    """Names the attempts to put one local file at one URL."""
    status = os.fstat(source)
    text = f"{url}\0{status.st_ino}\0{status.st_size}\0{status.st_mtime_ns}"
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()


def temporary_name(name: str, token: str) -> str:
    """A new name for one try to make the file ``name``."""
    raw = name.encode("utf-8", "surrogateescape")
    room = NAME_BYTES_MAX - _SUFFIX_BYTES - 1
    if len(raw) > room:
        name = raw[:room].decode("utf-8", "ignore")
    return f".{name}{MARK}{token}-{secrets.token_hex(4)}"


class Leftovers:
    """Temporary files that earlier tries left, by directory and token."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Both in the order of insertion, the oldest first.
        self._looked_through: dict[str, None] = {}
        self._left: dict[tuple[str, str], set[str]] = {}

    def unknown(self, directory: str) -> bool:
        """Whether the directory is yet to be looked through."""
        with self._lock:
            return directory not in self._looked_through

    def looked_through(self, directory: str) -> None:
        """All of its names were added."""
        with self._lock:
            self._looked_through[directory] = None
            if len(self._looked_through) > DIRECTORIES_MAX:
                del self._looked_through[next(iter(self._looked_through))]

    def add(self, directory: str, names: Iterable[str]) -> None:
        """Of these names, those that are temporary files may be taken later."""
        for name in names:
            match = _TEMPORARY.fullmatch(name)
            if match is not None:
                with self._lock:
                    self._left.setdefault((directory, match[1]), set()).add(name)
                    if len(self._left) > DIRECTORIES_MAX:
                        del self._left[next(iter(self._left))]

    def take(self, directory: str, token: str) -> list[str]:
        """The files that earlier tries of this put left; they are forgotten here."""
        with self._lock:
            return sorted(self._left.pop((directory, token), ()))
