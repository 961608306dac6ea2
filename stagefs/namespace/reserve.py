"""Room on the disk that is kept for removing names when there is no other.

What tasks write usually lies on the namespace's disk.  When that is full, even taking a name
away, which is what would make room, needs some for the log of the change.  So a file beside
the database takes some mebibytes, and gives them up piece by piece.
"""

import contextlib
import os
from pathlib import Path

RESERVE_BYTES = 8 << 20
# Enough for a removal, and small enough that a task that goes on writing does not get it all.
STEP_BYTES = 512 << 10
# On a disk with less than this free nothing is taken.
FREE_BYTES_MIN = 4 * RESERVE_BYTES


class Reserve:
    def __init__(self, database: Path) -> None:
        self._path = database.with_name(f"{database.name}.reserve")

    def keep(self) -> None:
        """Take the room again, if the disk has enough.  Any thread; a disk that does not give it,
        or a file system that cannot, is no error."""
        with contextlib.suppress(OSError):
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                disk = os.fstatvfs(fd)
                is_whole = os.fstat(fd).st_size >= RESERVE_BYTES
                if not is_whole and disk.f_bavail * disk.f_frsize >= FREE_BYTES_MIN:
                    os.posix_fallocate(fd, 0, RESERVE_BYTES)
            finally:
                os.close(fd)

    def give_up(self) -> bool:
        """Make room for a removal.  False when there is nothing left to give."""
        try:
            left = self._path.stat().st_size
            if not left:
                return False
            os.truncate(self._path, max(0, left - STEP_BYTES))
        except OSError:
            return False
        return True
