"""Taking possession of a cache directory: is it suitable, is it ours, is it free.

Creates what is missing, checks the format, and holds the lock that makes one daemon the
owner.  Reads nothing of what is cached.  Blocking, at start only.
"""

import contextlib
import errno
import fcntl
import os
import re
import socket
import time
from pathlib import Path

import msgspec

from stagefs.cache import layout
from stagefs.cache.file_system import write_fully
from stagefs.errors import CacheFailed, NewerFormat, StateInUse, UnsuitableState
from stagefs.state_directory import refuse_network

# What a fresh file system may hold before anybody has used it.
_HARMLESS_NAMES = {"lost+found"}


class Owner(msgspec.Struct, frozen=True):
    """What the lock file says.  ``started`` is seconds since 1970."""

    host: str
    pid: int
    started: float


class LockedDirectory:
    """The lock is held until ``close``; the kernel drops it when the process dies."""

    def __init__(self, paths: layout.Paths, lock_fd: int) -> None:
        self.paths = paths
        self._lock_fd = lock_fd

    def close(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def take(directory: Path) -> LockedDirectory:
    """Raises StateInUse, NewerFormat, UnsuitableState; CacheFailed when the disk refuses."""
    refuse_network(directory, what="cache")
    paths = layout.Paths(directory)
    try:
        _check_ours(paths)
        locked = LockedDirectory(paths, _lock(paths))
    except OSError as exc:
        raise _refused(directory, exc) from exc
    try:
        _fill(paths)
    except OSError as exc:
        locked.close()
        raise _refused(directory, exc) from exc
    return locked


def _refused(directory: Path, exc: OSError) -> UnsuitableState | CacheFailed:
    message = f"the cache directory {directory} cannot be used: {exc.strerror}"
    if exc.errno in (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ELOOP):
        return UnsuitableState(f"{message}; choose another one")
    return CacheFailed(message)


def _check_ours(paths: layout.Paths) -> None:
    directory = paths.directory
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.geteuid():
        raise UnsuitableState(
            f"the cache directory {directory} belongs to user {status.st_uid},"
            f" not to user {os.geteuid()} who runs this: choose another one"
        )
    check_format(directory)
    if not paths.tag.exists():
        strangers = {each.name for each in directory.iterdir()} - _HARMLESS_NAMES
        if strangers - {paths.lock.name, paths.version.name}:
            raise UnsuitableState(
                f"the directory {directory} is not empty and not a cache of StageFS:"
                " choose an empty or new directory"
            )
    if status.st_mode & 0o077:
        directory.chmod(0o700)


def check_format(directory: Path) -> None:
    """Raises NewerFormat, UnsuitableState; content with a directory that has no version yet."""
    version = layout.Paths(directory).version
    try:
        text = version.read_text("ascii", "replace")
    except FileNotFoundError:
        return
    found = re.fullmatch(r"stagefs cache format (\d+)\n?", text)
    if found is None:
        if not text:
            return  # a first start that was cut short
        raise UnsuitableState(
            f"the file {version} does not name a cache format: choose another directory"
        )
    if int(found[1]) > layout.FORMAT:
        raise NewerFormat(
            f"the cache {directory} was written by a later StageFS (format {found[1]}, this one"
            f" knows {layout.FORMAT}): use that release, or another directory"
        )


def _lock(paths: layout.Paths) -> int:
    fd = layout.open_file(paths.lock, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = read_owner(paths)
        os.close(fd)
        raise StateInUse(_in_use(paths.directory, owner)) from None
    except OSError:
        os.close(fd)
        raise
    owner = Owner(host=socket.gethostname(), pid=os.getpid(), started=time.time())
    try:
        os.ftruncate(fd, 0)
        write_fully(fd, msgspec.json.encode(owner), 0)
    except OSError:
        os.close(fd)
        raise
    return fd


def read_owner(paths: layout.Paths) -> Owner | None:
    """Who took the lock last, whether or not it is held still; None when that is not told."""
    try:
        return msgspec.json.decode(paths.lock.read_bytes(), type=Owner)
    except (OSError, msgspec.MsgspecError):
        return None


def _in_use(directory: Path, owner: Owner | None) -> str:
    who = "another daemon"
    if owner is not None:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.started))
        who = f"process {owner.pid} on {owner.host} (since {since})"
    return (
        f"the cache directory {directory} is in use by {who}: unmount that staging area,"
        " or choose another directory"
    )


def _fill(paths: layout.Paths) -> None:
    for each in (paths.objects, paths.incoming, paths.segments):
        each.mkdir(mode=0o700, exist_ok=True)
    # What was never committed: at most what an earlier daemon was fetching when it died.
    with os.scandir(paths.incoming) as leftovers:
        for leftover in leftovers:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(leftover.path)
    _write_once(paths.version, layout.VERSION_TEXT.format(layout.FORMAT))
    _write_once(paths.tag, layout.CACHEDIR_TAG)


def _write_once(path: Path, text: str) -> None:
    if path.exists() and path.stat().st_size:
        return
    fd = layout.open_file(path, os.O_WRONLY | os.O_CREAT)
    try:
        write_fully(fd, text.encode("ascii"), 0)
    finally:
        os.close(fd)
