"""Objects on real servers, the same few verbs for each protocol.

What a test on a mount needs of a server: put an object there, its URL, what the server itself
counted, and to make it silent.  Anything finer belongs to the tests of one remote.
"""

import abc
import contextlib
import itertools
import os
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from stagefs.remote.url import quote_path
from tests.support.identity import Identity
from tests.support.nginx import Nginx, running_nginx
from tests.support.sshd import Sshd, running_sshd


FIRST_PUBLICATION_S = 1_750_000_000


def content(size_bytes: int, seed: str = "") -> bytes:
    """Bytes without repetition, the same for the same seed."""
    return random.Random(f"{seed}:{size_bytes}").randbytes(size_bytes)


class Served(Protocol):
    """One running server with an empty place for objects."""

    @property
    def scheme(self) -> str: ...

    def environment(self, identity: Identity) -> Mapping[str, str]:
        """What this user's commands need to reach the server."""
        ...

    def put(self, name: str, data: bytes) -> str:
        """Store (or replace) an object; returns its URL."""
        ...

    def remove(self, name: str) -> None: ...

    def url(self, name: str) -> str: ...

    def bytes_sent(self) -> int:
        """Content bytes the server has sent, by its own count, in requests that have ended."""
        ...

    def requests_for(self, name: str) -> int:
        """Requests of any kind that named the object."""
        ...

    def freeze(self) -> None:
        """It neither answers nor closes connections until ``thaw``."""
        ...

    def thaw(self) -> None: ...


class ServedFiles(abc.ABC):
    """What http and ssh have in common: objects are files of a directory."""

    def __init__(self, objects: Path) -> None:
        self.objects = objects
        self._publications = itertools.count(1)

    def put(self, name: str, data: bytes) -> str:
        path = self.objects / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # A new file under the old name, as a publisher would do it: readers of the old one
        # keep it.  Its time differs by seconds, because nginx's ETag and SFTP know no less.
        fresh = path.with_name("fresh")
        fresh.write_bytes(data)
        published_s = FIRST_PUBLICATION_S + 10 * next(self._publications)
        os.utime(fresh, (published_s, published_s))
        fresh.rename(path)
        return self.url(name)

    def remove(self, name: str) -> None:
        (self.objects / name).unlink()

    def put_sparse(self, name: str, size_bytes: int, tail: bytes) -> str:
        """Zeros that take no room, and then ``tail``."""
        with (self.objects / name).open("wb") as file:
            file.truncate(size_bytes - len(tail))
            file.seek(0, os.SEEK_END)
            file.write(tail)
        return self.url(name)

    @abc.abstractmethod
    def url(self, name: str) -> str: ...


class HttpServed(ServedFiles):
    """nginx."""

    scheme = "http"

    def __init__(self, server: Nginx) -> None:
        super().__init__(server.root)
        self._server = server

    def environment(self, identity: Identity) -> Mapping[str, str]:
        return {}

    def url(self, name: str) -> str:
        return self._server.url(name)

    def private_url(self, name: str) -> str:
        """The same object where nginx wants a user and a password."""
        return self._server.url(name, location="private")

    def bytes_sent(self) -> int:
        return sum(asked.sent_bytes for asked in self._server.asked() if asked.method == "GET")

    def requests_for(self, name: str) -> int:
        path = f"/plain/{quote_path(name)}"
        return sum(asked.uri == path for asked in self._server.asked())

    def freeze(self) -> None:
        self._server.freeze()

    def thaw(self) -> None:
        self._server.thaw()


class SshServed(ServedFiles):
    """OpenSSH's sshd; its SFTP server logs what it is asked."""

    scheme = "ssh"

    def __init__(self, top: Path, server: Sshd) -> None:
        super().__init__(top / "objects")
        self.objects.mkdir()
        self._top = top
        self._server = server

    def environment(self, identity: Identity) -> Mapping[str, str]:
        """Its own copy of key and configuration: ssh wants a key that nobody else can read."""
        own = self._top / f"client-{identity.name}"
        if not own.exists():
            identity.directory(own)
            own.chmod(0o700)
            text = self._server.ssh_config.read_text()
            for path in (self._server.identity, self._server.known_hosts):
                copied = own / path.name
                shutil.copy(path, copied)
                copied.chmod(0o600)
                os.chown(copied, identity.uid, identity.gid)
                text = text.replace(str(path), str(copied))
            (own / "ssh_config").write_text(text)
        return {"STAGEFS_SSH_CONFIG": str(own / "ssh_config")}

    def url(self, name: str) -> str:
        return self._server.url_of(self.objects / name)

    def bytes_sent(self) -> int:
        return self._server.bytes_read()

    def requests_for(self, name: str) -> int:
        log = self._server.sftp_log
        return log.read_text().count(f'"{self.objects / name}"') if log.exists() else 0

    def freeze(self) -> None:
        self._server.freeze()

    def thaw(self) -> None:
        self._server.thaw()


@contextlib.contextmanager
def serving(scheme: str, top: Path) -> Iterator[Served]:
    """A server of the suite's own; ``top`` is an empty directory that everybody can enter."""
    if scheme == "http":
        with running_nginx(top) as nginx:
            yield HttpServed(nginx)
    elif scheme == "ssh":
        (top / "sshd").mkdir()
        with running_sshd(top / "sshd", counted=True) as sshd:
            yield SshServed(top, sshd)
    else:
        raise ValueError(scheme)
