"""Files of this machine as sources and destinations of a copy.

A destination appears under its name when it is whole and on the disk: written beside it under a
hidden name, then renamed.  What is neither a file nor a directory (/dev/null, a FIFO) is written
to as it is.  Everything here blocks.
"""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import os
import stat
from collections.abc import Iterator

import msgspec

from stagefs.errors import (
    AccessDenied,
    InvalidName,
    IsADirectory,
    NoSpace,
    NotADirectory,
    NotFound,
    ReadOnly,
    StageFSError,
    StateFailed,
)
from stagefs.remote.temporaries import MARK, NAMES_MAX, temporary_name

# As a mount tells it of its files.
_ERROR_ATTRIBUTE = "user.stagefs.error"
_CLASSES: dict[int, type[StageFSError]] = {
    errno.ENOENT: NotFound,
    errno.ENOTDIR: NotADirectory,
    errno.EISDIR: IsADirectory,
    errno.EACCES: AccessDenied,
    errno.EPERM: AccessDenied,
    errno.EROFS: ReadOnly,
    errno.ENOSPC: NoSpace,
    errno.EDQUOT: NoSpace,
}


class Attributes(msgspec.Struct, frozen=True):
    """What is known of a source; None: nothing is."""

    mode: int | None = None
    mtime_ns: int | None = None
    atime_ns: int | None = None


def attributes_of(status: os.stat_result) -> Attributes:
    return Attributes(stat.S_IMODE(status.st_mode), status.st_mtime_ns, status.st_atime_ns)


@contextlib.contextmanager
def telling(path: str, verb: str) -> Iterator[None]:
    """What the system refuses becomes a sentence about ``path``."""
    try:
        yield
    except OSError as exc:
        raise refused(path, verb, exc) from exc


def refused(path: str, verb: str, exc: OSError) -> StageFSError:
    why = exc.strerror or str(exc)
    if verb == "read":
        with contextlib.suppress(OSError):
            why = os.fsdecode(os.getxattr(path, _ERROR_ATTRIBUTE)).rstrip(".") or why
    kind = _CLASSES.get(exc.errno or 0, StateFailed)
    return kind(f"{path} cannot be {verb}: {why}.")


def current_umask() -> int:
    """To be asked before there are threads."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


class Landing:
    """A file on its way to ``path``.  ``source`` is what it is a copy of, for the name of its
    temporary file.  End it with ``finish`` or ``abandon``."""

    def __init__(self, path: str, source: str, *, umask: int) -> None:
        self._umask = umask
        self._temporary: str | None = None
        self._before: os.stat_result | None = None
        with telling(path, "written"):
            # As scp, which writes into what a symbolic link leads to.
            self.path = os.path.realpath(path)
            with contextlib.suppress(FileNotFoundError):
                self._before = os.stat(self.path)
            self.fd = self._opened(source)

    def _opened(self, source: str) -> int:
        before = self._before
        if before is not None and stat.S_ISDIR(before.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if before is not None and not stat.S_ISREG(before.st_mode):
            return os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        if before is not None and not os.access(self.path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        directory, name = os.path.split(self.path)
        text = f"{source}\0{self.path}".encode("utf-8", "surrogateescape")
        token = hashlib.blake2b(text, digest_size=6).hexdigest()
        _sweep(directory, f"{MARK}{token}-")
        temporary = os.path.join(directory, temporary_name(name, token))
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o600)
        self._temporary = temporary
        # Says to others that it is not left over.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return fd

    def finish(self, attributes: Attributes, *, preserve: bool) -> None:
        """Whole, on the disk, and under its name."""
        with telling(self.path, "written"):
            temporary = self._temporary
            if temporary is not None:
                os.fchmod(self.fd, self._mode(attributes, preserve=preserve))
                if preserve and attributes.mtime_ns is not None:
                    atime_ns = attributes.atime_ns
                    times = (attributes.mtime_ns if atime_ns is None else atime_ns,)
                    os.utime(self.fd, ns=(*times, attributes.mtime_ns))
                os.fsync(self.fd)
                os.rename(temporary, self.path)
                self._temporary = None
            fd, self.fd = self.fd, -1
            os.close(fd)
            if temporary is not None:
                sync_directory(os.path.dirname(self.path))

    def _mode(self, attributes: Attributes, *, preserve: bool) -> int:
        """As scp has it; set-user-id bits are never copied."""
        if preserve and attributes.mode is not None:
            return attributes.mode & 0o777
        if self._before is not None:
            return stat.S_IMODE(self._before.st_mode)
        mode = 0o666 if attributes.mode is None else attributes.mode & 0o777
        return mode & ~self._umask

    def abandon(self) -> None:
        """Leave nothing behind; no harm after ``finish``."""
        with contextlib.suppress(OSError):
            if self.fd >= 0:
                os.close(self.fd)
        with contextlib.suppress(OSError):
            if self._temporary is not None:
                os.unlink(self._temporary)
        self.fd, self._temporary = -1, None


def _sweep(directory: str, mark: str) -> None:
    """Remove what a killed copy of the same to the same left."""
    with os.scandir(directory) as entries:
        names = [entry.name for entry in itertools.islice(entries, NAMES_MAX) if mark in entry.name]
    for name in names:
        path = os.path.join(directory, name)
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)
            finally:
                os.close(fd)


def sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def opened_source(path: str) -> int:
    """Raises InvalidName for what is no file."""
    with telling(path, "read"):
        # O_NONBLOCK: opening a FIFO without a writer must not block.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise InvalidName(f"{path} is not a regular file: it cannot be copied.")
        return fd


def write_all(fd: int, piece: bytes) -> None:
    view = memoryview(piece)
    while view:
        view = view[os.write(fd, view) :]
