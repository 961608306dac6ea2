"""What the contract suite needs of a remote: its driver, and hands on the server behind it.

To add a remote, write a Subject (put, get, names, remove, forbidden, urls) and its fixture in
``conftest.py``; every test of ``test_remote_contract.py`` then runs on it.
"""

import abc
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import obstore

from stagefs.config import CommandSettings, SshSettings
from stagefs.errors import AccessDenied
from stagefs.model import GIB, MIB
from stagefs.remote.base import Remote
from stagefs.remote.cloud import CloudRemote
from stagefs.remote.command import CommandRemote
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.file import FileRemote
from stagefs.remote.fsspec import FsspecRemote
from stagefs.remote.http import HttpRemote
from stagefs.remote.memory import MemoryRemote
from stagefs.remote.settings import Environment, RemoteSettings
from stagefs.remote.ssh import SshRemote
from stagefs.remote.store import StoreRemote
from stagefs.remote.url import parse, quote_path
from stagefs.remote.webdav import WebDavRemote
from tests.support.azurite import ACCOUNT, Azurite
from tests.support.ftp_server import Ftp
from tests.support.nginx import Nginx
from tests.support.rgw import Rgw
from tests.support.sshd import Sshd
from tests.support.webdav import WebDav

# Short enough for tests that wait for them, long enough for a busy machine.
SETTINGS = RemoteSettings(
    connect_timeout_s=10.0, answer_timeout_s=10.0, progress_timeout_s=10.0, backoff_s=0.01
)

BUCKET = "contract"
_places = itertools.count()

ODD_NAMES = (
    "a blank",
    "per%20cent",
    "100%",
    "hash#tag",
    "question?mark=1",
    "plus+plus",
    "semi;colon,comma&and",
    "'quote\"",
    "back\\slash",
    "[brackets]{braces}",
    "Žluťoučký-kůň",
    "日本語",
    "-dash",
    "..twodots",
    "x" * 255,
)


def new_place() -> str:
    """The name of a directory that no other test uses."""
    return f"place{next(_places)}"


class Subject(Protocol):
    """One remote under test, with an empty directory on its server."""

    @property
    def remote(self) -> Remote: ...

    @property
    def directory(self) -> str:
        """The URL of the empty directory."""
        ...

    @property
    def large_bytes(self) -> int:
        """How large an object can be made with little cost."""
        ...

    @property
    def odd_names(self) -> tuple[str, ...]:
        """The odd names that the protocol can express."""
        ...

    @property
    def misplaced_names(self) -> frozenset[str]:
        """Odd names that the server itself, by a fault of its own, writes elsewhere."""
        ...

    @property
    def directories_have_errors(self) -> bool:
        """Whether a stat of a directory can be told from that of a missing object."""
        ...

    def put(self, name: str, data: bytes) -> str:
        """Store or replace an object below the directory; its URL."""
        ...

    def put_large(self, name: str, tail: bytes) -> str:
        """An object of ``large_bytes`` that ends in ``tail``."""
        ...

    def get(self, name: str) -> bytes:
        """The object's content, as the server has it."""
        ...

    def names(self) -> set[str]:
        """Everything that lies in the directory at the server, hidden files too."""
        ...

    def remove(self, name: str) -> None: ...

    def forbidden(self, name: str, data: bytes) -> tuple[Remote, str]:
        """A remote, and the URL of an existing object that it may not read."""
        ...


class _Files(abc.ABC):
    """What remotes have in common whose objects are files of a directory here."""

    misplaced_names: frozenset[str] = frozenset()
    large_bytes = 5 * GIB
    odd_names: tuple[str, ...] = (*ODD_NAMES, "new\nline", "tab\tstop", "latin-\udce9", "\x01ctrl")
    directories_have_errors = True

    def __init__(self, top: Path) -> None:
        self.top = top

    def put(self, name: str, data: bytes) -> str:
        path = self.top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.top / ".fresh"
        fresh.write_bytes(data)
        # As a publisher would do it; the time moves on even when both writes fall into one tick.
        before = path.stat().st_mtime_ns if path.exists() else 0
        fresh.rename(path)
        if before:
            os.utime(path, ns=(before, before + 2_000_000_000))
        return self.url(name)

    def put_large(self, name: str, tail: bytes) -> str:
        with (self.top / name).open("wb") as file:
            file.truncate(self.large_bytes - len(tail))
            file.seek(0, os.SEEK_END)
            file.write(tail)
        return self.url(name)

    def get(self, name: str) -> bytes:
        return (self.top / name).read_bytes()

    def names(self) -> set[str]:
        return set(os.listdir(self.top))

    def remove(self, name: str) -> None:
        (self.top / name).unlink()

    @abc.abstractmethod
    def url(self, name: str) -> str: ...


class FileSubject(_Files):
    def __init__(self, top: Path) -> None:
        super().__init__(top)
        self.remote = FileRemote("file://", SETTINGS, CredentialStore(None))
        self.directory = f"file://{quote_path(str(top))}"

    def url(self, name: str) -> str:
        return f"{self.directory}/{quote_path(name)}"

    def forbidden(self, name: str, data: bytes) -> tuple[Remote, str]:
        """Root may read everything, except settings that the kernel lets nobody read."""
        if os.geteuid() == 0:
            return self.remote, "file:///proc/sys/net/ipv4/route/flush"
        url = self.put(name, data)
        (self.top / name).chmod(0)
        return self.remote, url


class HttpSubject(_Files):
    # nginx lists no name that begins with a dot.
    odd_names = tuple(name for name in _Files.odd_names if not name.startswith("."))

    def __init__(
        self,
        server: Nginx,
        place: str,
        *,
        location: str = "plain",
        port: int | None = None,
        settings: RemoteSettings = SETTINGS,
    ) -> None:
        top = server.root / place
        top.mkdir(exist_ok=True)
        super().__init__(top)
        self._server, self._place, self._location = server, place, location
        self._port = port or server.port
        self.directory = self.url("").rstrip("/")
        self.remote = HttpRemote(parse(self.directory).host_url, settings, CredentialStore(None))

    def url(self, name: str) -> str:
        path = quote_path(f"{self._location}/{self._place}/{name}")
        return f"http://127.0.0.1:{self._port}/{path}"

    def forbidden(self, name: str, data: bytes) -> tuple[Remote, str]:
        self.put(name, data)
        return self.remote, self._server.url(f"{self._place}/{name}", location="private")


class S3Subject:
    """A bucket of Ceph's gateway; the directory is a prefix."""

    misplaced_names: frozenset[str] = frozenset()
    large_bytes = 48 * MIB
    odd_names = ODD_NAMES
    # What is no key is missing; S3 has no directories.
    directories_have_errors = False

    def __init__(
        self,
        server: Rgw,
        bucket: str,
        place: str,
        *,
        port: int | None = None,
        settings: RemoteSettings = SETTINGS,
    ) -> None:
        self._server, self._bucket, self._place = server, bucket, place
        self._endpoint = f"http://127.0.0.1:{port or server.port}"
        self._settings = settings
        self._objects = server.bucket(bucket)
        self.directory = f"s3://{bucket}/{place}"
        self.remote = self._remote(server.environment)

    def put(self, name: str, data: bytes) -> str:
        obstore.put(self._objects, f"{self._place}/{name}", data)
        return f"{self.directory}/{name}"

    def put_large(self, name: str, tail: bytes) -> str:
        return self.put(name, bytes(self.large_bytes - len(tail)) + tail)

    def get(self, name: str) -> bytes:
        return bytes(obstore.get(self._objects, f"{self._place}/{name}").bytes())

    def names(self) -> set[str]:
        found = obstore.list_with_delimiter(self._objects, self._place)
        paths = [one["path"] for one in found["objects"]] + list(found["common_prefixes"])
        return {path.removeprefix(f"{self._place}/") for path in paths}

    def remove(self, name: str) -> None:
        obstore.delete(self._objects, f"{self._place}/{name}")

    def forbidden(self, name: str, data: bytes) -> tuple[Remote, str]:
        wrong = {**self._server.environment, "AWS_SECRET_ACCESS_KEY": "another"}
        return self._remote(wrong), self.put(name, data)

    def _remote(self, environment: Mapping[str, str]) -> Remote:
        environment = {**environment, "AWS_ENDPOINT_URL": self._endpoint}
        settings = msgspec.structs.replace(self._settings, environment=Environment(environment))
        return StoreRemote(f"s3://{self._bucket}", settings, CredentialStore(None))


class CommandSubject(_Files):
    def __init__(self, programs: Path, top: Path) -> None:
        super().__init__(top)
        self.directory = self.url("").rstrip("/")
        command = CommandSettings(programs=str(programs))
        settings = msgspec.structs.replace(SETTINGS, command=command)
        self.remote = CommandRemote("command://mover", settings, CredentialStore(None))

    def url(self, name: str) -> str:
        return f"command://mover{quote_path(str(self.top / name))}"

    def forbidden(self, name: str, data: bytes) -> tuple[Remote, str]:
        return self.remote, self.put(name, data)


class FtpSubject(_Files):
    """By fsspec."""

    # FTP ends a command with a line break, and its names are UTF-8.
    odd_names = tuple(name for name in _Files.odd_names if "\n" not in name and name.isprintable())

    def __init__(self, server: Ftp, place: str) -> None:
        top = server.root / place
        top.mkdir(exist_ok=True)
        super().__init__(top)
        host = f"fsspec+ftp://127.0.0.1:{server.port}"
        self.directory = f"{host}/{place}"
        self.remote = FsspecRemote(host, SETTINGS, CredentialStore(None))

    def url(self, name: str) -> str:
        return f"{self.directory}/{quote_path(name)}"

    def forbidden(self, name: str, data: bytes) -> tuple[Remote, str]:
        return self.remote, self.put(name, data)


class AzSubject:
    """A container of Azurite; the directory is a prefix."""

    misplaced_names: frozenset[str] = frozenset()
    large_bytes = 48 * MIB
    # Azure takes a backslash for a slash.
    odd_names = tuple(name for name in ODD_NAMES if "\\" not in name)
    directories_have_errors = False

    def __init__(
        self,
        server: Azurite,
        container: str,
        place: str,
        *,
        port: int | None = None,
        settings: RemoteSettings = SETTINGS,
    ) -> None:
        self._endpoint = f"http://127.0.0.1:{port or server.port}/{ACCOUNT}"
        self._settings = settings
        self._server, self._container, self._place = server, container, place
        self._objects = server.container(container)
        self.directory = f"az://{container}/{place}"
        self.remote = self._remote(server.environment)

    def put(self, name: str, data: bytes) -> str:
        obstore.put(self._objects, f"{self._place}/{name}", data)
        return f"{self.directory}/{name}"

    def put_large(self, name: str, tail: bytes) -> str:
        return self.put(name, bytes(self.large_bytes - len(tail)) + tail)

    def get(self, name: str) -> bytes:
        return bytes(obstore.get(self._objects, f"{self._place}/{name}").bytes())

    def names(self) -> set[str]:
        found = obstore.list_with_delimiter(self._objects, self._place)
        paths = [one["path"] for one in found["objects"]] + list(found["common_prefixes"])
        return {path.removeprefix(f"{self._place}/") for path in paths}

    def remove(self, name: str) -> None:
        obstore.delete(self._objects, f"{self._place}/{name}")

    def forbidden(self, name: str, data: bytes) -> tuple[Remote, str]:
        key = self._server.environment["AZURE_STORAGE_ACCOUNT_KEY"]
        wrong = {**self._server.environment, "AZURE_STORAGE_ACCOUNT_KEY": "AAAA" + key[4:]}
        return self._remote(wrong), self.put(name, data)

    def _remote(self, environment: Mapping[str, str]) -> Remote:
        environment = {**environment, "AZURE_STORAGE_ENDPOINT": self._endpoint}
        settings = msgspec.structs.replace(self._settings, environment=Environment(environment))
        return CloudRemote(f"az://{self._container}", settings, CredentialStore(None))


class WebDavSubject(_Files):
    # XML has no characters for the rest.
    odd_names = (*ODD_NAMES, "tab\tstop")
    # WsgiDAV decodes the destination of a MOVE before it looks for its parts.
    misplaced_names = frozenset(
        {"hash#tag", "question?mark=1", "semi;colon,comma&and", "tab\tstop"}
    )

    def __init__(
        self,
        server: WebDav,
        place: str,
        *,
        port: int | None = None,
        settings: RemoteSettings = SETTINGS,
    ) -> None:
        top = server.root / place
        top.mkdir(exist_ok=True)
        super().__init__(top)
        self._server, self._place = server, place
        host = f"webdav://127.0.0.1:{port or server.port}"
        self.directory = f"{host}/{place}"
        self.remote = WebDavRemote(host, settings, CredentialStore(None))

    def url(self, name: str) -> str:
        return f"{self.directory}/{quote_path(name)}"

    def forbidden(self, name: str, data: bytes) -> tuple[Remote, str]:
        return self.remote, self._server.forbid(name, data)


class SshSubject(_Files):
    """``port`` is that of a proxy before the server."""

    def __init__(
        self,
        server: Sshd,
        top: Path,
        *,
        client: Literal["openssh", "paramiko"] = "openssh",
        port: int | None = None,
        settings: RemoteSettings = SETTINGS,
    ) -> None:
        super().__init__(top)
        self._url = server.url
        if port is not None:
            server.trust_port(port)
            self._url = f"ssh://127.0.0.1:{port}"
        self.directory = self.url("").rstrip("/")
        ssh = SshSettings(config=str(server.ssh_config), client=client)
        settings = msgspec.structs.replace(settings, ssh=ssh)
        self.remote = SshRemote(self._url, settings, CredentialStore(None))

    def url(self, name: str) -> str:
        return self._url + quote_path(str(self.top / name))

    def forbidden(self, name: str, data: bytes) -> tuple[Remote, str]:
        """See FileSubject: the server runs as the same user."""
        if os.geteuid() == 0:
            return self.remote, f"{self._url}/proc/sys/net/ipv4/route/flush"
        url = self.put(name, data)
        (self.top / name).chmod(0)
        return self.remote, url


class MemorySubject:
    misplaced_names: frozenset[str] = frozenset()
    large_bytes = 8 * MIB
    odd_names = (*ODD_NAMES, "new\nline", "latin-\udce9")
    directories_have_errors = True

    def __init__(self) -> None:
        self.remote = MemoryRemote("memory://store")
        self.directory = "memory://store/top"

    def put(self, name: str, data: bytes) -> str:
        return self.remote.store(f"/top/{name}", data)

    def put_large(self, name: str, tail: bytes) -> str:
        return self.put(name, bytes(self.large_bytes - len(tail)) + tail)

    def get(self, name: str) -> bytes:
        return self.remote.content(f"/top/{name}")

    def names(self) -> set[str]:
        paths = [path.removeprefix("/top/") for path in self.remote.paths()]
        return {path.partition("/")[0] for path in paths}

    def remove(self, name: str) -> None:
        self.remote.remove(f"/top/{name}")

    def forbidden(self, name: str, data: bytes) -> tuple[Remote, str]:
        url = self.put(name, data)
        self.remote.forbid(f"/top/{name}", AccessDenied(f"{url} may not be read."))
        return self.remote, url
