"""Taking possession of an outputs directory, and the files that wait in it for their upload.

    OUTPUTS/queue.lock       held by the one daemon that owns the queue; names it
    OUTPUTS/queue.sqlite     the rows (queue_database)
    OUTPUTS/files/<commit>/  the files of one commit

The directory may lie on a network file system, to be adopted by a daemon on another node, where
that file system has locks.  All functions block; one thread at a time.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from stagefs.errors import NoSpace, StageFSError, StateFailed, StateInUse, UnsuitableState

LOCK_NAME = "queue.lock"
DATABASE_NAME = "queue.sqlite"
FILES_NAME = "files"
# In the state directory.
OWNER_NAME = "queue-owner"
_COMMIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class Owner(msgspec.Struct, frozen=True):
    """What the lock says.  ``started`` is seconds since 1970."""

    host: str
    pid: int
    started: float
    state: str


class OutputsDirectory:
    """The lock is held until ``close``; the kernel drops it when the process dies."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self._lock_fd = lock_fd

    @classmethod
    def take(cls, path: Path, *, state: str) -> "OutputsDirectory":
        """Raises StateInUse, UnsuitableState, NoSpace, StateFailed.  ``state`` is for people."""
        try:
            _check_ours(path)
            lock_fd = _lock(path, state)
            try:
                (path / FILES_NAME).mkdir(mode=0o700, exist_ok=True)
                sync_directory(path)
            except OSError:
                os.close(lock_fd)
                raise
        except OSError as exc:
            raise refused(path, exc) from exc
        return cls(path, lock_fd)

    def close(self) -> None:
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    # The files

    def directory_of(self, commit: str) -> Path:
        """Where the files of a commit lie.  Raises ValueError for what can be no commit."""
        if not _COMMIT.fullmatch(commit):
            raise ValueError(f"{commit!r} cannot be the name of a commit")
        return self.path / FILES_NAME / commit

    def make_directory_of(self, commit: str) -> Path:
        """Raises StageFSError."""
        directory = self.directory_of(commit)
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as exc:
            raise refused(self.path, exc) from exc
        return directory

    def sync_names(self, commit: str) -> None:
        """The names of a commit's files are durable afterwards.  Raises StageFSError."""
        try:
            sync_directory(self.directory_of(commit))
            sync_directory(self.path / FILES_NAME)
        except OSError as exc:
            raise refused(self.path, exc) from exc

    def size_of(self, commit: str, name: str) -> int | None:
        """None when there is no such file."""
        try:
            status = (self.directory_of(commit) / name).lstat()
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise refused(self.path, exc) from exc
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def remove_file(self, commit: str, name: str) -> None:
        """And the directory with the last one.  What is gone already is right."""
        directory = self.directory_of(commit)
        with contextlib.suppress(FileNotFoundError):
            (directory / name).unlink()
        with contextlib.suppress(OSError):
            directory.rmdir()

    def remove_all_but(self, wanted: Callable[[str], set[str]]) -> int:
        """Remove files that no row needs; ``wanted`` gives the names of one commit's.

        They are of a commit that never got as far as its rows, or of an upload that ended just
        when the daemon died.  Returns how many there were.
        """
        removed = 0
        with os.scandir(self.path / FILES_NAME) as commits:
            for commit in commits:
                if not _COMMIT.fullmatch(commit.name) or not commit.is_dir(follow_symlinks=False):
                    continue
                kept = wanted(commit.name)
                for name in set(os.listdir(commit.path)) - kept:
                    os.unlink(os.path.join(commit.path, name))
                    removed += 1
                if not kept:
                    os.rmdir(commit.path)
        return removed


def sync_directory(path: Path) -> None:
    """Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def refused(path: Path, exc: OSError) -> StageFSError:
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(
            f"The disk of the outputs directory {path} is full: free space there; nothing that was"
            " acknowledged is lost."
        )
    if exc.errno in _NO_LOCKS:
        return UnsuitableState(
            f"The file system of the outputs directory {path} has no locks, so two daemons could"
            " take it at once: name one with locks with --outputs."
        )
    message = f"The outputs directory {path} cannot be used: {exc.strerror}"
    if exc.errno in (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP, errno.ENOENT):
        return UnsuitableState(f"{message}; mend that, or name another one with --outputs.")
    return StateFailed(f"{message}; check its disk.")


def _check_ours(path: Path) -> None:
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
        sync_directory(path.parent)
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise UnsuitableState(
            f"The outputs directory {path} belongs to user {status.st_uid}, not to user"
            f" {os.geteuid()} who runs this: name another one with --outputs."
        )
    if status.st_mode & 0o002 and not status.st_mode & stat.S_ISVTX:
        raise UnsuitableState(
            f"Everybody may write in the outputs directory {path}: chmod o-w it, or name another"
            " one with --outputs."
        )


def _lock(path: Path, state: str) -> int:
    lock = path / LOCK_NAME
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = read_owner(path)
        os.close(fd)
        raise StateInUse(_in_use(path, owner)) from None
    except OSError:
        os.close(fd)
        raise
    owner = Owner(socket.gethostname(), os.getpid(), time.time(), state)
    # Only for the sentence above: a full disk must not keep anybody from what is queued.
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
        os.pwrite(fd, msgspec.json.encode(owner), 0)
    return fd


def read_owner(path: Path) -> Owner | None:
    """Who took the lock last; None when that is not told."""
    try:
        return msgspec.json.decode((path / LOCK_NAME).read_bytes(), type=Owner)
    except (OSError, msgspec.MsgspecError):
        return None


def _in_use(path: Path, owner: Owner | None) -> str:
    who = "another daemon"
    if owner is not None:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(owner.started))
        who = f"process {owner.pid} on {owner.host} (since {since}, state {owner.state})"
    return (
        f"The outputs directory {path} is in use by {who}: unmount that staging area, or name"
        " another directory with --outputs."
    )


def owner_name(state: Path) -> str:
    """The name of a state directory for ever, wherever it is moved: made at the first call.

    Raises StateFailed, NoSpace.
    """
    path = state / OWNER_NAME
    try:
        with contextlib.suppress(FileNotFoundError):
            return path.read_text("ascii").strip()
        name = secrets.token_hex(8)
        new = path.with_name(f"{path.name}.new")
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(f"{name}\n")
            file.flush()
            os.fsync(file.fileno())
        new.rename(path)
        sync_directory(state)
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"The disk of the state directory {state} is full.") from exc
        raise StateFailed(f"The file {path} cannot be used: {exc.strerror}.") from exc
    return name
