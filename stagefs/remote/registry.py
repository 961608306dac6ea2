"""Which remote serves a URL.

``Remotes`` makes one driver per scheme and host when it is first needed, wrapped as
RetryingRemote(LimitedRemote(driver)), so that an attempt that waits for the next one holds no
place.  Drivers are imported when they are first used: obstore alone costs more memory than
the rest of the daemon, and must not be touched before the daemon has forked.  Beyond
``remotes_max`` hosts the least recently used idle ones are closed.

Lives in the trio thread, one instance per daemon.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias, cast

import msgspec
import trio

from stagefs.errors import InvalidUrl
from stagefs.remote.base import Remote
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.limit import LimitedRemote
from stagefs.remote.retry import RetryingRemote
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.url import parse

Driver: TypeAlias = Callable[[str, RemoteSettings, CredentialStore], Remote]

_DRIVERS = {
    "file": ("stagefs.remote.file", "FileRemote"),
    "http": ("stagefs.remote.http", "HttpRemote"),
    "https": ("stagefs.remote.http", "HttpRemote"),
    "memory": ("stagefs.remote.memory", "MemoryRemote"),
    "s3": ("stagefs.remote.store", "StoreRemote"),
    "sftp": ("stagefs.remote.ssh", "SshRemote"),
    "ssh": ("stagefs.remote.ssh", "SshRemote"),
}


class _Served(msgspec.Struct):
    """One host's remote and its two wrappers."""

    limited: LimitedRemote
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
        # In order of use, the latest last.
        self._served: dict[str, _Served] = {}

    def for_url(self, url: str) -> Remote:
        """The remote that serves a public URL.  Raises InvalidUrl.

        Ask anew for each operation: what is idle may be closed when many hosts are in use.
        """
        parts = parse(url)
        key = parts.host_url
        served = self._served.pop(key, None)
        if served is None:
            served = self._made(parts.scheme, key)
        self._served[key] = served
        return served.whole

    def public(self, url: str) -> str:
        """The URL normalized and without secrets, which are remembered.  Raises InvalidUrl."""
        return self._credentials.public(url)

    def public_many(self, urls: Iterable[str]) -> list[str]:
        """As ``public``, for many at once (catalogs)."""
        return self._credentials.public_many(urls)

    async def aclose(self) -> None:
        """Close every remote.  Idempotent."""
        served, self._served = self._served, {}
        for one in served.values():
            await one.whole.aclose()

    def _made(self, scheme: str, host_url: str) -> _Served:
        driver = self._drivers.get(scheme) or _imported(scheme, host_url)
        self._make_room()
        settings = self._settings.for_scheme(scheme)
        limited = LimitedRemote(driver(host_url, settings, self._credentials), settings)
        return _Served(limited, RetryingRemote(limited, settings))

    def _make_room(self) -> None:
        """Close the least recently used idle remote when there are too many."""
        if len(self._served) < self._settings.remotes_max:
            return
        for key, served in self._served.items():
            if served.limited.idle:
                del self._served[key]
                trio.lowlevel.spawn_system_task(served.whole.aclose)
                return


def _imported(scheme: str, host_url: str) -> Driver:
    if scheme not in _DRIVERS:
        raise InvalidUrl(f"{host_url} names no remote: a {scheme} URL is not fetched from one.")
    module, name = _DRIVERS[scheme]
    return cast("Driver", getattr(importlib.import_module(module), name))
