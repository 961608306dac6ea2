"""Which remote serves a URL.

``Remotes`` makes one driver per scheme and host when it is first needed, wrapped as
RetryingRemote(GuardedRemote(LimitedRemote(MeasuredRemote(driver)))), so that an attempt that
waits for the next one holds no place, and a remote that is down needs none to say so.  Drivers
are imported when they are first used: obstore alone costs more memory than the rest of the
daemon, and must not be touched before the daemon has forked.  Beyond ``remotes_max`` hosts the
least recently used idle ones are closed.

Lives in the trio thread, one instance per daemon.
"""

import importlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, TypeAlias, cast, runtime_checkable

import msgspec
import trio

from stagefs.errors import InvalidUrl, StageFSError
from stagefs.remote import plugins
from stagefs.remote.access import Access, checked
from stagefs.remote.base import Remote
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.guard import GuardedRemote, MeasuredRemote
from stagefs.remote.health import Health, RemoteStatus
from stagefs.remote.limit import BATCHES, LimitedRemote
from stagefs.remote.retry import Retries, RetryingRemote
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.url import FSSPEC, SCHEMES, parse

_KEYS_MAX = 256
# Protocols have 32 bits for a time.
TIME_S_MAX = (1 << 32) - 1

log = logging.getLogger(__name__)

Driver: TypeAlias = Callable[[str, RemoteSettings, CredentialStore], Remote]

_DRIVERS = {
    "az": ("stagefs.remote.cloud", "CloudRemote"),
    "command": ("stagefs.remote.command", "CommandRemote"),
    "file": ("stagefs.remote.file", "FileRemote"),
    FSSPEC: ("stagefs.remote.fsspec", "FsspecRemote"),
    "gs": ("stagefs.remote.cloud", "CloudRemote"),
    "http": ("stagefs.remote.http", "HttpRemote"),
    "https": ("stagefs.remote.http", "HttpRemote"),
    "irods": ("stagefs.remote.irods", "IrodsRemote"),
    "memory": ("stagefs.remote.memory", "MemoryRemote"),
    "s3": ("stagefs.remote.store", "StoreRemote"),
    "sftp": ("stagefs.remote.ssh", "SshRemote"),
    "ssh": ("stagefs.remote.ssh", "SshRemote"),
    "webdav": ("stagefs.remote.webdav", "WebDavRemote"),
    "webdavs": ("stagefs.remote.webdav", "WebDavRemote"),
}


@runtime_checkable
class Connecting(Protocol):
    """A driver whose protocol logs in once and then keeps the connection."""

    async def connect(self) -> None:
        """Log in, if that is not done yet.  Raises StageFSError."""
        ...


@runtime_checkable
class KeepingTimes(Protocol):
    """A driver whose objects have times of modification that can be set."""

    async def set_mtime(self, url: str, mtime_s: int) -> None:
        """Raises StageFSError."""
        ...


class _Served(msgspec.Struct):
    """One host's remote in its wrappers, and how it fares."""

    driver: Remote
    health: Health
    limited: LimitedRemote
    guarded: Remote
    whole: Remote


class Remotes:
    """The remotes of one mount.  ``drivers`` replaces or adds drivers by scheme (tests)."""

    def __init__(
        self,
        settings: RemoteSettings,
        credentials: CredentialStore,
        *,
        drivers: Mapping[str, Driver] | None = None,
    ) -> None:
        self._settings = settings
        self._credentials = credentials
        self._drivers = dict(drivers or {})
        self.retries = Retries()
        # In order of use, the latest last.
        self._served: dict[str, _Served] = {}
        # Of URLs up to the path: thousands of small files have one host.
        self._keys: dict[str, str] = {}

    def for_url(self, url: str) -> Remote:
        """The remote that serves a public URL.  Raises InvalidUrl.

        Ask anew for each operation: what is idle may be closed when many hosts are in use.
        """
        return self._serving(url).whole

    def once_for_url(self, url: str) -> Remote:
        """As ``for_url``, without asking again: for who has somebody else to ask."""
        return self._serving(url).guarded

    def connect_soon(self, url: str) -> None:
        """Names have come that lead to the URL's host: have a connection when they are used.

        Nobody waits for it.  That it fails is no error: who reads is told.  Raises InvalidUrl.
        """
        driver = self._serving(url).driver
        if isinstance(driver, Connecting):
            trio.lowlevel.spawn_system_task(_connect, driver, url)

    async def set_mtime(self, url: str, mtime_ns: int) -> None:
        """Give an object its time of modification, where the protocol has such a thing.  Raises
        StageFSError."""
        driver = self._serving(url).driver
        if isinstance(driver, KeepingTimes):
            await driver.set_mtime(url, min(max(0, mtime_ns // 10**9), TIME_S_MAX))

    def _serving(self, url: str) -> _Served:
        begin = url[: url.find("/", url.find("://") + 3) + 1]
        key = self._keys.get(begin)
        if key is None:
            key = parse(url).host_url
            if begin:
                if len(self._keys) >= _KEYS_MAX:
                    self._keys.clear()
                self._keys[begin] = key
        served = self._served.pop(key, None)
        if served is None:
            served = self._made(parse(url).scheme, key)
        self._served[key] = served
        return served

    def public(self, url: str) -> str:
        """The URL normalized and without secrets, which are remembered.  Raises InvalidUrl."""
        return self._credentials.public(url)

    def public_many(self, urls: Iterable[str]) -> list[str]:
        """As ``public``, for many at once (catalogs)."""
        return self._credentials.public_many(urls)

    def set_access(self, url: str, access: Access) -> None:
        """How the host of the URL is reached from now on.  Raises InvalidUrl."""
        host_url = checked(url, access)
        if not self._credentials.keep_access(host_url, access):
            return
        served = self._served.pop(host_url, None)
        if served is not None:
            # What it is asked now fails with it, as when a server breaks a connection.
            trio.lowlevel.spawn_system_task(served.whole.aclose)

    def statuses(self) -> list[RemoteStatus]:
        """How each remote fares that is in use, by URL."""
        now_s = trio.current_time()
        return [one.health.status(key, now_s) for key, one in sorted(self._served.items())]

    async def aclose(self) -> None:
        """Close every remote.  Idempotent."""
        served, self._served = self._served, {}
        for one in served.values():
            await one.whole.aclose()

    def _made(self, scheme: str, host_url: str) -> _Served:
        make = self._drivers.get(scheme) or _imported(scheme, host_url)
        self._make_room()
        settings = self._credentials.access(host_url).applied(self._settings.for_scheme(scheme))
        driver = make(host_url, settings, self._credentials)
        health = Health(settings.concurrency * 2 + settings.lookups + BATCHES)
        limited = LimitedRemote(MeasuredRemote(driver, health), settings)
        guarded = GuardedRemote(limited, health, settings)
        retrying = RetryingRemote(guarded, settings, retries=self.retries)
        return _Served(driver, health, limited, guarded, retrying)

    def _make_room(self) -> None:
        """Close the least recently used idle remote when there are too many."""
        if len(self._served) < self._settings.remotes_max:
            return
        for key, served in self._served.items():
            if served.limited.idle:
                del self._served[key]
                trio.lowlevel.spawn_system_task(served.whole.aclose)
                return


async def _connect(driver: Connecting, url: str) -> None:
    """A system task: an exception would end the daemon."""
    try:
        await driver.connect()
    except StageFSError as error:
        log.info("not connected ahead of use: %s", error)
    except Exception:
        log.exception("connecting for %s failed unexpectedly", url)


def _imported(scheme: str, host_url: str) -> Driver:
    if scheme.startswith(FSSPEC):
        scheme = FSSPEC
    elif scheme in plugins.schemes() and scheme not in SCHEMES:
        return plugins.driver(scheme)
    if scheme not in _DRIVERS:
        raise InvalidUrl(f"{host_url} names no remote: a {scheme} URL is not fetched from one.")
    module, name = _DRIVERS[scheme]
    return cast("Driver", getattr(importlib.import_module(module), name))
