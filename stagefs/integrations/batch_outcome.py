"""Whether what went wrong may pass by itself, as a batch system wants to know it."""

import errno

from stagefs.control.client import Refused
from stagefs.errors import (
    InvalidConfig,
    InvalidManifest,
    InvalidName,
    InvalidUrl,
    NotFound,
    StageFSError,
)

# What only another submission, or the administrator, can mend.
LASTING = (InvalidConfig, InvalidManifest, InvalidName, InvalidUrl, NotFound)
PASSING_NUMBERS = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.EIO,
        errno.ENOSPC,
        errno.ENOTCONN,
        errno.ETIMEDOUT,
    }
)


def is_transient(error: Exception) -> bool:
    """A server that is away, a full disk, a daemon that died: running the job again may help.  A
    missing object, a refused login or a wrong declaration stay as they are."""
    if isinstance(error, Refused):
        return error.errno in PASSING_NUMBERS
    return isinstance(error, StageFSError | OSError) and not isinstance(error, LASTING)
