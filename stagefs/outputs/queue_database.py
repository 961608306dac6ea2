"""The queue's SQLite file: making, checking, opening it.

WAL with synchronous=FULL: what was answered outlives a power loss.  Opened in SQLite's exclusive
mode, in which the log needs no shared memory and so works on network file systems; the lock of
``queue_directory`` has already made sure that there is one user.  One thread at a time.
"""

import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from stagefs.errors import NewerFormat, NoSpace, StageFSError, StateFailed, UnsuitableState
from stagefs.outputs.queue_directory import sync_directory

FORMAT_VERSION = 1
APPLICATION_ID = int.from_bytes(b"STFQ", "big")
_MAGIC = b"SQLite format 3\0"
_TABLES = {"uploads", "totals", "counters"}
# The log is moved in the middle of a commit; this bounds what one of them pays.
_WAL_PAGES_MAX = 1000


def open_database(path: Path) -> sqlite3.Connection:
    """Open the file, making it when it is absent.  May be used from another thread afterwards.

    Raises NewerFormat, UnsuitableState, NoSpace, StateFailed.  A file that is not ours is left as
    it is.
    """
    try:
        if not path.is_symlink() and (not path.exists() or not path.stat().st_size):
            _make(path)
        _check_file(path)
        connection = _connect(path)
        try:
            _check_content(connection, path)
        except (sqlite3.Error, StageFSError):
            connection.close()
            raise
    except OSError as exc:
        raise UnsuitableState(
            f"The stage-out queue {path} cannot be opened ({exc.strerror}): mend its permissions."
        ) from exc
    except sqlite3.Error as exc:
        raise translated(exc, path) from exc
    return connection


def _make(path: Path) -> None:
    """Under another name first: the file appears only when it has everything."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    new.with_name(new.name + "-journal").unlink(missing_ok=True)
    # SQLite gives its log the mode of the file.
    os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    connection = sqlite3.connect(new, isolation_level=None)
    try:
        connection.execute("PRAGMA synchronous = FULL")
        schema = files(__package__).joinpath("queue.sql").read_text("utf-8")
        connection.executescript(f"BEGIN; {schema} COMMIT;")
    finally:
        connection.close()
    new.rename(path)
    sync_directory(path.parent)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        for pragma in (
            "locking_mode = EXCLUSIVE",  # before the log is looked at, see above
            "journal_mode = WAL",
            "synchronous = FULL",
            f"wal_autocheckpoint = {_WAL_PAGES_MAX}",
            "temp_store = MEMORY",
        ):
            connection.execute(f"PRAGMA {pragma}")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _check_file(path: Path) -> None:
    """Look before SQLite does: opening a file would already recover its log."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise _damaged(path, "it is not a file of ours")
        header = file.read(100)
    if header[:16] != _MAGIC or len(header) < 100:
        raise _damaged(path, "it is not an SQLite file")
    version, application = (int.from_bytes(header[at : at + 4], "big") for at in (60, 68))
    if application != APPLICATION_ID:
        raise _damaged(path, "it belongs to another program")
    if version > FORMAT_VERSION:
        raise NewerFormat(
            f"The stage-out queue {path} has format {version}, this StageFS knows"
            f" {FORMAT_VERSION}: use the newer StageFS, or another outputs directory."
        )


def _check_content(connection: sqlite3.Connection, path: Path) -> None:
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    if missing := _TABLES - {name for (name,) in tables}:
        raise _damaged(path, f"the table {min(missing)} is missing")


def _damaged(path: Path, why: str) -> UnsuitableState:
    return UnsuitableState(
        f"The stage-out queue {path} is damaged or not ours ({why}): the files beside it are whole;"
        " move both away, or name another directory with --outputs."
    )


@contextmanager
def transaction(connection: sqlite3.Connection, path: Path) -> Iterator[None]:
    """Durable at the end, undone by any exception.  Raises NoSpace, StateFailed."""
    try:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
    except sqlite3.Error as exc:
        raise translated(exc, path) from exc


def translated(exc: sqlite3.Error, path: Path) -> StageFSError:
    code = (getattr(exc, "sqlite_errorcode", None) or 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return NoSpace(
            f"The disk of the stage-out queue {path} is full: free space there; nothing that was"
            " acknowledged is lost."
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return _damaged(path, str(exc))
    return StateFailed(f"The stage-out queue {path} cannot be used ({exc}): check its disk.")
