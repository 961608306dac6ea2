"""The capacity that an administrator set at run time, kept for the next daemon.

``capacity`` in the cache directory: the bytes, and the configured capacity that they were set
instead of.  A mount whose configuration says something else since then is believed, not this.
"""

import contextlib
import os
from pathlib import Path

import msgspec

from stagefs.errors import CacheFailed

_NAME = "capacity"


class _Kept(msgspec.Struct, frozen=True):
    capacity_bytes: int
    configured_bytes: int | None


def keep_capacity(directory: Path, capacity_bytes: int | None, *, configured: int | None) -> None:
    """None forgets it.  Blocking.  Raises CacheFailed."""
    path = directory / _NAME
    try:
        if capacity_bytes is None:
            path.unlink(missing_ok=True)
            return
        made = directory / f".{_NAME}.{os.getpid()}"
        made.write_bytes(msgspec.json.encode(_Kept(capacity_bytes, configured)))
        os.replace(made, path)
    except OSError as exc:
        raise CacheFailed(f"the capacity cannot be kept in {path}: {exc.strerror}") from exc


def kept_capacity(directory: Path, *, configured: int | None) -> int | None:
    """What was set, if the configuration is the same as it was then."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        kept = msgspec.json.decode((directory / _NAME).read_bytes(), type=_Kept)
        if kept.configured_bytes == configured and kept.capacity_bytes >= 0:
            return kept.capacity_bytes
    return None
