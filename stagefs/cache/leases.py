"""Pins and leases: which entries stay in the cache, for whom, until when.

A pin is a lease without an end.  A key may be pinned before anything of it is cached.
Leases are not derived from anything, so they have a SQLite file of their own; it is as
durable as the cache (kill -9, not a power cut).

Concurrency: any thread; writes take a lock and SQLite, ``covers`` reads a dict.
"""

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from stagefs.cache.layout import open_file
from stagefs.errors import CacheFailed

logger = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS leases (
    key TEXT NOT NULL,
    owner TEXT NOT NULL,
    url BLOB NOT NULL,
    since REAL NOT NULL,
    expires REAL,
    PRIMARY KEY (key, owner)
) WITHOUT ROWID;
PRAGMA user_version = 1;
"""


class Lease(msgspec.Struct, frozen=True):
    """``expires`` and ``since`` are seconds since 1970; ``expires`` None is a pin: no end."""

    key: str
    owner: str
    url: str
    since: float
    expires: float | None = None

    def has_ended(self, now: float) -> bool:
        return self.expires is not None and self.expires <= now


class Leases:
    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Reads all leases.  A damaged file is put aside, with a log line: its pins are lost.
        Raises CacheFailed."""
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._leases: dict[str, dict[str, Lease]] = {}
        # A sandbox that ends must not look at the leases of all others.
        self._keys_of: dict[str, set[str]] = {}
        try:
            self._connection = self._connect()
        except sqlite3.DatabaseError as exc:
            aside = path.with_suffix(".damaged")
            logger.error("pins and leases are lost: %s is damaged, kept as %s", path, aside)
            try:
                os.replace(path, aside)
                self._connection = self._connect()
            except (OSError, sqlite3.Error):
                raise CacheFailed(f"the cache's leases {path} cannot be opened: {exc}") from exc
        except OSError as exc:
            raise CacheFailed(f"the cache's leases {path} cannot be opened: {exc}") from exc

    def _connect(self) -> sqlite3.Connection:
        os.close(open_file(self._path, os.O_RDWR | os.O_CREAT))
        connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = OFF")
            connection.executescript(_SCHEMA)
            for lease in _read(connection):
                self._leases.setdefault(lease.key, {})[lease.owner] = lease
                self._keys_of.setdefault(lease.owner, set()).add(lease.key)
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def pin(
        self, items: Iterable[tuple[str, str]], *, owner: str, expires: float | None = None
    ) -> None:
        """Keep these (key, URL) for ``owner``; the same owner's earlier lease is replaced.
        Blocking.  Raises CacheFailed."""
        now = self._clock()
        leases = [
            Lease(key=key, owner=owner, url=url, since=now, expires=expires) for key, url in items
        ]
        with self._writing() as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?)",
                [(each.key, _kept(owner), _encoded(each.url), now, expires) for each in leases],
            )
            for lease in leases:
                # A new dict each time: covers() reads without the lock.
                before = self._leases.get(lease.key, {})
                self._leases[lease.key] = {**before, owner: lease}
                self._keys_of.setdefault(owner, set()).add(lease.key)

    def unpin(self, keys: Iterable[str] | None, *, owner: str | None = None) -> int:
        """End the leases on ``keys`` (None: on all keys) of ``owner`` (None: of everybody);
        returns how many.  Blocking.  Raises CacheFailed."""
        with self._lock:
            wanted = self._leases.keys() if keys is None else set(keys)
            if owner is not None:
                wanted = self._keys_of.get(owner, set()) & wanted
            ended = [
                lease
                for key in wanted
                for lease in self._leases.get(key, {}).values()
                if owner in (None, lease.owner)
            ]
        return self._end(ended)

    def expire(self) -> int:
        """Forget the leases that have ended; returns how many.  Blocking.  Raises CacheFailed."""
        now = self._clock()
        with self._lock:
            ended = [lease for lease in self._all() if lease.has_ended(now)]
        return self._end(ended)

    def _end(self, ended: Sequence[Lease]) -> int:
        if not ended:
            return 0
        with self._writing() as connection:
            connection.executemany(
                "DELETE FROM leases WHERE key = ? AND owner = ?",
                [(lease.key, _kept(lease.owner)) for lease in ended],
            )
            for lease in ended:
                left = dict(self._leases.get(lease.key, {}))
                left.pop(lease.owner, None)
                if left:
                    self._leases[lease.key] = left
                else:
                    self._leases.pop(lease.key, None)
                keys = self._keys_of.get(lease.owner, set())
                keys.discard(lease.key)
                if not keys:
                    self._keys_of.pop(lease.owner, None)
        return len(ended)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                with self._connection:
                    self._connection.execute("BEGIN IMMEDIATE")
                    yield self._connection
            except sqlite3.Error as exc:
                raise CacheFailed(f"the cache's leases cannot be written: {exc}") from exc

    def covers(self, key: str) -> bool:
        """Whether anybody wants ``key`` kept now.  Any thread; never waits."""
        owners = self._leases.get(key)
        if not owners:
            return False
        now = self._clock()
        return not all(lease.has_ended(now) for lease in owners.values())

    def of(self, key: str) -> list[Lease]:
        now = self._clock()
        owners = self._leases.get(key, {})
        return [lease for lease in owners.values() if not lease.has_ended(now)]

    def owners(self) -> "list[str]":
        """Everybody who has leases.  Any thread."""
        with self._lock:
            return [*self._keys_of]

    def count_of(self, owner: str) -> int:
        """Leases of one owner.  Any thread."""
        return len(self._keys_of.get(owner, ()))

    def count(self) -> int:
        """Leases, those included that ended since the last ``expire``.  Any thread."""
        return sum(map(len, list(self._leases.values())))

    def list(self) -> list[Lease]:
        """All leases that have not ended, by key and owner."""
        now = self._clock()
        with self._lock:
            return sorted(
                (lease for lease in self._all() if not lease.has_ended(now)),
                key=lambda lease: (lease.key, lease.owner),
            )

    def _all(self) -> Iterator[Lease]:
        for owners in self._leases.values():
            yield from owners.values()


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _kept(owner: str) -> str | bytes:
    """As the column has it: bytes where a name in it is no UTF-8."""
    encoded = _encoded(owner)
    try:
        return encoded.decode("utf-8")
    except UnicodeDecodeError:
        return encoded


def _read(connection: sqlite3.Connection) -> Iterator[Lease]:
    found = connection.execute("SELECT key, owner, url, since, expires FROM leases")
    for key, owner, url, since, expires in found:
        yield Lease(
            key=key,
            owner=owner if isinstance(owner, str) else owner.decode("utf-8", "surrogateescape"),
            url=url.decode("utf-8", "surrogateescape"),
            since=since,
            expires=expires,
        )


def read_leases(path: Path) -> "list[Lease]":
    """The leases of a cache directory, read without a daemon and without changing anything;
    none when there is no file that can be read."""
    if not path.exists():
        return []
    mode = "mode=ro" if Path(f"{path}-wal").exists() else "immutable=1"
    try:
        uri = f"{path.absolute().as_uri()}?{mode}"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as db:
            now = time.time()
            return [lease for lease in _read(db) if not lease.has_ended(now)]
    except sqlite3.Error:
        return []
