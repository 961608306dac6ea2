"""Whether the cache's file system can be read from the event loop without ever blocking it."""

import errno
import os
import tempfile
from pathlib import Path

_TMPFS_MAGIC = 0x01021994


def inline_read_flags(directory: Path) -> int | None:
    """The flags for ``os.preadv`` in the event loop; None: such reads must go to a thread.

    ext4, xfs and btrfs know RWF_NOWAIT.  tmpfs refuses it but never blocks; overlay refuses it
    and may block (measured, DESIGN section 5).
    """
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"x")
            file.flush()
            os.preadv(file.fileno(), (bytearray(1),), 0, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP and _file_system_magic(directory) == _TMPFS_MAGIC:
            return 0
        if error.errno != errno.EAGAIN:
            return None
    return os.RWF_NOWAIT


def _file_system_magic(directory: Path) -> int:
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        before, _, after = line.partition(" - ")
        mounted_at = before.split()[4].encode().decode("unicode_escape")
        real = os.path.realpath(directory)
        if real == mounted_at or real.startswith(mounted_at.rstrip("/") + "/"):
            return _TMPFS_MAGIC if after.split()[0] == "tmpfs" else 0
    return 0
