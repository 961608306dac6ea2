"""STATE/supervisor.log: the supervisor's own words, and the standard output of its daemons.

A daemon holds the file open, so it cannot be renamed away under it: it is copied and emptied.
All who write to it append.
"""

import os
import shutil
from pathlib import Path

NAME = "supervisor.log"
BYTES_MAX = 8 << 20


def open_log(state: Path) -> int:
    path = state / NAME
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)


def is_full(output: int) -> bool:
    return os.fstat(output).st_size > BYTES_MAX


def rotate(state: Path, output: int) -> None:
    """What it holds becomes supervisor.log.1, in place of an earlier one.  Raises OSError."""
    path = state / NAME
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    kept = os.open(path.with_name(f"{NAME}.1"), flags, 0o600)
    with (
        os.fdopen(kept, "wb") as target,
        os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as source,
    ):
        shutil.copyfileobj(source, target)
    os.ftruncate(output, 0)
