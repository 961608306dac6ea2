"""The SQLite file: making, checking and opening it, and taking turns in writing.

WAL with synchronous=NORMAL: a commit costs microseconds and survives kill -9; after a power
loss the last changes may be missing, never half of one.  Checkpoints sync the disk, so they
are left to ``checkpoint``, on a connection of its own in a worker thread.

Two programs write: the daemon, and an import in a process of its own.  SQLite lets whoever
asks first go first only by polling, so the daemon holds a lock on a file beside the database
while it waits or writes, and the import steps back before each of its short transactions.
"""

import errno
import fcntl
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

from stagefs.errors import NewerFormat, NoSpace, StageFSError, StateFailed, UnsuitableState
from stagefs.namespace.formats import FORMAT_VERSION, bring_along, format_of

APPLICATION_ID = int.from_bytes(b"STFS", "big")

BUSY_TIMEOUT_S = 20.0
_MAGIC = b"SQLite format 3\0"
_PAGE_CACHE_KIB = 8 << 10
# A daemon checkpoints long before; this only bounds the log of one that never does.
_WAL_PAGES_MAX = 1 << 17
_WAL_PAGES_LARGE = 1 << 15
_WAL_KEPT_BYTES = 32 << 20
_TURN_TRIES = 3


def translated(exc: sqlite3.Error, path: Path) -> StageFSError:
    if _is_full(exc):
        return NoSpace(
            f"The disk of the namespace {path} is full: free space there, "
            "nothing that was acknowledged is lost."
        )
    return StateFailed(
        f"The namespace {path} cannot be used ({exc}): check its disk, "
        "then restart the mount or begin with another state directory."
    )


def _is_full(exc: sqlite3.Error) -> bool:
    code = getattr(exc, "sqlite_errorcode", None)
    return code is not None and code & 0xFF == sqlite3.SQLITE_FULL


def open_database(path: Path) -> sqlite3.Connection:
    """Open the file, making it when it is absent, and bringing it along when it is old.

    Raises NewerFormat, UnsuitableState, NoSpace.  A file that is not ours is left as it is.
    """
    try:
        if not path.is_symlink() and (not path.exists() or not path.stat().st_size):
            _make(path)
        _check_file(path)
        connection = connect(path)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            _check_format(connection, path)
            _check_content(connection, path)
        except (sqlite3.Error, UnsuitableState, NewerFormat):
            connection.close()
            raise
    except OSError as exc:
        raise UnsuitableState(
            f"The namespace {path} cannot be opened ({exc.strerror}): mend its permissions."
        ) from exc
    except sqlite3.Error as exc:
        if _is_full(exc):
            raise translated(exc, path) from exc
        raise _damaged(path, str(exc)) from exc
    return connection


def _make(path: Path) -> None:
    """Under another name first: the file appears only when it has everything."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    new.with_name(new.name + "-journal").unlink(missing_ok=True)
    # SQLite gives its log and index the mode of the file.
    os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    connection = sqlite3.connect(new, isolation_level=None)
    try:
        connection.executescript(files(__package__).joinpath("schema.sql").read_text("utf-8"))
    finally:
        connection.close()
    new.rename(path)


def connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, isolation_level=None, timeout=BUSY_TIMEOUT_S, cached_statements=200
    )
    for pragma in (
        "synchronous = NORMAL",
        f"cache_size = -{_PAGE_CACHE_KIB}",
        f"wal_autocheckpoint = {_WAL_PAGES_MAX}",
        f"journal_size_limit = {_WAL_KEPT_BYTES}",
        "secure_delete = OFF",
        "temp_store = MEMORY",
    ):
        connection.execute(f"PRAGMA {pragma}")
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Committed at the end, undone by any exception."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def checkpoint(path: Path) -> bool:
    """Move the log into the file.  Blocks and syncs; may run beside readers and writers.

    True when all of it was moved, so that the next change begins the log anew.
    """
    try:
        connection = sqlite3.connect(path, isolation_level=None, timeout=BUSY_TIMEOUT_S)
        try:
            return move_log(connection)
        finally:
            connection.close()
    except sqlite3.Error as exc:
        raise translated(exc, path) from exc


def sync(path: Path) -> None:
    """Make what was committed durable.  Blocks; may run beside everything else.

    What is no longer in the log was moved by a checkpoint, which syncs both before it lets the
    log begin anew.
    """
    try:
        for file, flags in (
            (path.with_name(path.name + "-wal"), os.O_RDONLY),
            (path.parent, os.O_RDONLY | os.O_DIRECTORY),
        ):
            fd = os.open(file, flags | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
    except OSError as exc:
        if exc.errno == errno.ENOSPC:
            raise NoSpace(f"The disk of the namespace {path} is full: free space there.") from exc
        raise StateFailed(
            f"The namespace {path} cannot be made durable ({exc.strerror}): check its disk."
        ) from exc


def move_log(connection: sqlite3.Connection) -> bool:
    """Move the log until nothing was added to it meanwhile, for only then it begins anew.

    SQLite reports the log as it was when the move began, so a second look tells.  When
    changes come too fast and the log is large, the last pages are moved while writers wait.
    """
    before = -1
    for mode in ("PASSIVE", "PASSIVE", "PASSIVE", "RESTART"):
        if mode == "RESTART" and before < _WAL_PAGES_LARGE:
            return False
        busy, logged, moved = connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
        if busy or moved < logged:
            return False
        if logged == before:
            return True
        before = logged
    return True


def _check_file(path: Path) -> None:
    """Look before SQLite does: opening a file would already recover its log."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise _damaged(path, "it is not a file")
        header = file.read(100)
    if header[:16] != _MAGIC or len(header) < 100:
        raise _damaged(path, "it is not an SQLite file")
    version, application = (int.from_bytes(header[at : at + 4], "big") for at in (60, 68))
    if application != APPLICATION_ID:
        raise _damaged(path, "it belongs to another program")
    _refuse_newer(version, path)


def _refuse_newer(version: int, path: Path) -> None:
    if version > FORMAT_VERSION:
        raise NewerFormat(
            f"The namespace {path} has format {version}, this StageFS knows {FORMAT_VERSION}: "
            "use the newer StageFS, or another state directory."
        )


def _check_format(connection: sqlite3.Connection, path: Path) -> None:
    """The log may hold a later header than the file."""
    version = format_of(connection)
    _refuse_newer(version, path)
    if version < 1:
        raise _damaged(path, "it has no format")
    if version < FORMAT_VERSION:
        with transaction(connection):
            bring_along(connection)
        # An older StageFS looks at the file's own header.
        move_log(connection)


def _check_content(connection: sqlite3.Connection, path: Path) -> None:
    expected = {
        "nodes", "names", "xattrs", "doomed", "templates", "sandboxes", "commits", "changes",
        "operations", "counters", "opened", "outgoing", "replicas",
    }  # fmt: skip
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    if missing := expected - {name for (name,) in tables}:
        raise _damaged(path, f"the table {min(missing)} is missing")
    fixed = connection.execute("SELECT count(*) FROM nodes WHERE inode <= 4 AND kind = 1")
    if fixed.fetchone()[0] != 4:
        raise _damaged(path, "its root is missing")


def _damaged(path: Path, why: str) -> UnsuitableState:
    return UnsuitableState(
        f"The namespace {path} is damaged or not ours ({why}): "
        "move it away, or begin with another state directory."
    )


class Turn:
    """Whose turn it is to write; see the module's docstring.

    The lock only makes waiting short.  Nothing depends on it: SQLite keeps writers apart.
    """

    def __init__(self, path: Path) -> None:
        turn = path.with_name(path.name + "-turn")
        try:
            self._fd = os.open(turn, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as exc:
            raise UnsuitableState(f"{turn} cannot be opened ({exc.strerror}).") from exc

    def take(self) -> None:
        """Never waits: an import holds the lock for microseconds, or was stopped while it did."""
        for _ in range(_TURN_TRIES):
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            return

    def give(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def step_back(self) -> None:
        """Wait until nobody else wants to write."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        os.close(self._fd)
