"""The one tree of errors.

Each class fixes three things once: the errno a task sees, the exit code a command ends
with, and the level it is logged at.  A message is one sentence a user can act on: what
failed, on which name, why, what to do.  Messages never hold credentials.

``transient`` says whether asking again can help; only ``remote.retry`` looks at it.
"""

import errno
import logging


class StageFSError(Exception):
    """Anything StageFS tells a user.  Never raised bare: pick or add a subclass."""

    errno: int = errno.EIO
    exit_code: int = 1
    log_level: int = logging.ERROR
    transient: bool = False


# What a name or a tree can get wrong.


class NotFound(StageFSError):
    errno = errno.ENOENT
    log_level = logging.INFO


class NameExists(StageFSError):
    errno = errno.EEXIST
    log_level = logging.INFO


class NotADirectory(StageFSError):
    errno = errno.ENOTDIR
    log_level = logging.INFO


class IsADirectory(StageFSError):
    errno = errno.EISDIR
    log_level = logging.INFO


class NotEmpty(StageFSError):
    errno = errno.ENOTEMPTY
    log_level = logging.INFO


class InvalidName(StageFSError):
    """A name or argument that can never be right (``..``, NUL, a directory moved into itself)."""

    errno = errno.EINVAL
    exit_code = 2
    log_level = logging.INFO


class NameTooLong(InvalidName):
    errno = errno.ENAMETOOLONG


class NotPermitted(StageFSError):
    errno = errno.EPERM
    log_level = logging.INFO


class ReadOnly(StageFSError):
    errno = errno.EROFS
    log_level = logging.INFO


class NoOverwrite(ReadOnly):
    """An object of a writable binding that replaces none.  Logged: a task sees only EROFS."""

    log_level = logging.WARNING


class Busy(StageFSError):
    errno = errno.EBUSY
    log_level = logging.INFO


class CrossesMounts(StageFSError):
    errno = errno.EXDEV
    log_level = logging.INFO


class NoAttribute(StageFSError):
    errno = errno.ENODATA
    log_level = logging.DEBUG


class NotSupported(StageFSError):
    errno = errno.EOPNOTSUPP
    log_level = logging.INFO


class RepeatLookup(StageFSError):
    """Makes the kernel walk the path again (ESTALE on an operation that has a path)."""

    errno = errno.ESTALE
    log_level = logging.DEBUG


# What a remote can get wrong.


class RemoteError(StageFSError):
    """A remote refused, or answered with something that cannot be right."""


class RemoteUnavailable(RemoteError):
    """No connection, a broken one, or a server that says it is overloaded.

    ``retry_after_s`` is the server's own wish (HTTP Retry-After), in seconds.  ``busy``: it said
    that it is asked too much (HTTP 429, 503).
    """

    transient = True

    def __init__(
        self, message: str, *, retry_after_s: float | None = None, busy: bool = False
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.busy = busy


class RemoteAway(RemoteUnavailable):
    """It answered a moment ago, or lives and takes no further login now: as when a server is
    restarted.  Worth more patience than a server that was never there."""


class RemoteDown(RemoteUnavailable):
    """It has failed so often that it is not asked for a while.  Asking again at once cannot help,
    later it can."""


class DeadlineExceeded(RemoteError):
    errno = errno.ETIMEDOUT
    transient = True


class ObjectMissing(RemoteError):
    """The remote says that there is no such object."""

    errno = errno.ENOENT


class AccessDenied(RemoteError):
    """Credentials are missing, wrong or expired, or the host key is not the known one."""

    errno = errno.EACCES


class CredentialsExpired(AccessDenied):
    """Credentials that are replaced from time to time (a session or bearer token) are refused.
    They have expired, as a rule, so it can help to ask again when they were renewed."""


class ObjectChanged(RemoteError):
    """The object at the URL is not the version that was asked for."""

    errno = errno.ESTALE
    log_level = logging.WARNING


class RangesRefused(RemoteError):
    """The server sends whole objects only.  Internal: the reader falls back to one stream."""


class ChecksumMismatch(RemoteError):
    """Every byte arrived and the whole is not what was declared."""


# What a set-up can get wrong.


class SetupError(StageFSError):
    exit_code = 2


class InvalidUrl(SetupError):
    errno = errno.EINVAL
    log_level = logging.INFO


class InvalidCatalog(SetupError):
    errno = errno.EINVAL
    log_level = logging.INFO


class InvalidConfig(SetupError):
    errno = errno.EINVAL


class InvalidManifest(SetupError):
    errno = errno.EINVAL
    log_level = logging.INFO


class MountFailed(SetupError):
    pass


class StateInUse(SetupError):
    errno = errno.EBUSY


class UnsuitableState(SetupError):
    """A state or cache directory on a network file system, of another owner, or not ours."""


class NewerFormat(SetupError):
    """Written by a later StageFS.  Never touched."""


class StateFailed(StageFSError):
    """The state directory's disk is read-only or broken, or its content damaged."""


class NoSpace(StageFSError):
    """The disk of the state or scratch directory is full."""

    errno = errno.ENOSPC


class TooLarge(StageFSError):
    """A size or offset that the file system below cannot have."""

    errno = errno.EFBIG
    log_level = logging.INFO


class NoDaemon(StageFSError):
    """No daemon answers for the mount that a command was pointed at."""

    errno = errno.ENOTCONN
    exit_code = 3


# What the cache can get wrong.  Readers never see these: reading goes on without the cache.


class CacheFailed(StageFSError):
    """The cache disk is full, read-only or broken."""


class DamagedEntry(StageFSError):
    """A cache file, map or chunk that is not what it says it is."""

    log_level = logging.WARNING
