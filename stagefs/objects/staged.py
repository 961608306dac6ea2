"""From what a remote says to what the namespace keeps."""

import time

from stagefs.model import Checksum, ObjectInfo
from stagefs.namespace.node import StagedObject


def staged_from(
    answer: ObjectInfo, *, default_mode: int, checksum: Checksum | None = None
) -> StagedObject:
    """``default_mode``: permission bits for protocols that have none."""
    mode = answer.mode if answer.mode is not None else default_mode
    return StagedObject(
        url=answer.url,
        version=answer.validator,
        size_bytes=answer.size_bytes,
        mtime_ns=answer.mtime_ns if answer.mtime_ns is not None else time.time_ns(),
        mode=mode & 0o777,
        validator=answer.validator,
        checksum=checksum,
        ranges=answer.ranges,
        checked_ns=time.time_ns(),
    )
