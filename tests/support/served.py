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
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import obstore

from stagefs.remote.url import quote_path
from tests.support.identity import Identity
from tests.support.nginx import Nginx, running_nginx
from tests.support.ports import free_ports
from tests.support.rgw import Rgw, running_rgw
from tests.support.sshd import Sshd, running_sshd
from tests.support.waiting import wait_until

FIRST_PUBLICATION_S = 1_750_000_000
LARGE_FILE_BYTES = 10 << 30
# Ceph keeps them in memory, up to 4 GiB.
LARGE_OBJECT_BYTES = 512 << 20
GATEWAY_BYTES_MAX = 2 << 30
_FRONT_CONF = """
daemon off;
master_process off;
{user}
pid {top}/nginx.pid;
error_log {top}/error.log;
events {{ worker_connections 1024; }}
http {{
    log_format counted '$request_method $request_uri $body_bytes_sent';
    access_log {top}/access.log counted;
    client_body_temp_path {top}/t1;
    proxy_temp_path {top}/t2;
    fastcgi_temp_path {top}/t3;
    uwsgi_temp_path {top}/t4;
    scgi_temp_path {top}/t5;
    keepalive_requests 100000;
    client_max_body_size 0;
    server {{
        listen 127.0.0.1:{port} backlog=512;
        location / {{
            proxy_pass {endpoint};
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_buffering off;
            proxy_read_timeout 1h;
        }}
    }}
}}
"""


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

    def put_large(self, name: str, tail: bytes) -> tuple[str, int]:
        """An object of zeros, as large as this server can hold easily, that ends with ``tail``;
        returns its URL and size."""
        ...

    def publish(self, directory: Path, prefix: str) -> None:
        """Every file below ``directory`` becomes an object below ``prefix``."""
        ...

    def get(self, name: str) -> bytes:
        """What the server has.  Raises FileNotFoundError."""
        ...

    def names(self) -> list[str]:
        """Of every object, and of whatever else lies there."""
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

    def get(self, name: str) -> bytes:
        """What the server has.  Raises FileNotFoundError."""
        return (self.objects / name).read_bytes()

    def names(self) -> list[str]:
        """Of every object, and of whatever else lies there."""
        found = (path for path in self.objects.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self.objects)) for path in found)

    def remove(self, name: str) -> None:
        (self.objects / name).unlink()

    def put_large(self, name: str, tail: bytes) -> tuple[str, int]:
        with (self.objects / name).open("wb") as file:
            file.truncate(LARGE_FILE_BYTES - len(tail))  # takes no room
            file.seek(0, os.SEEK_END)
            file.write(tail)
        return self.url(name), LARGE_FILE_BYTES

    def publish(self, directory: Path, prefix: str) -> None:
        (self.objects / prefix).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(directory, self.objects / prefix, symlinks=True, dirs_exist_ok=True)

    @abc.abstractmethod
    def environment(self, identity: Identity) -> Mapping[str, str]: ...

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


class SharedGateway:
    """Ceph's gateway, which takes seconds to start and so serves many tests, each with a bucket of
    its own.  It keeps objects in memory and never forgets them: after some gibibytes the next
    test gets a fresh one.
    """

    def __init__(self, top: Path) -> None:
        self._top = top
        self._stack = contextlib.ExitStack()
        self._gateway: Rgw | None = None
        self._buckets = itertools.count()
        self.stored_bytes = 0

    def fresh_bucket(self) -> tuple[Rgw, str]:
        if self._gateway is None or self.stored_bytes > GATEWAY_BYTES_MAX:
            self.stop()
            self.stored_bytes = 0
            place = self._top / f"g{next(self._buckets)}"
            self._gateway = self._stack.enter_context(running_rgw(place))
        bucket = f"staged-{next(self._buckets)}"
        self._gateway.make_bucket(bucket)
        return self._gateway, bucket

    def stop(self) -> None:
        self._stack.close()
        self._gateway = None


class S3Served:
    """A bucket behind an nginx that counts what it sends and that can be made silent."""

    scheme = "s3"

    def __init__(self, top: Path, shared: SharedGateway) -> None:
        self._shared = shared
        gateway, self._bucket = shared.fresh_bucket()
        self._gateway = gateway
        self._gateway_environment = gateway.environment
        self._store = gateway.bucket(self._bucket)
        self._top = top
        (self.port,) = free_ports(1)
        conf = top / "nginx.conf"
        user = "user root;" if os.geteuid() == 0 else ""
        conf.write_text(
            _FRONT_CONF.format(top=top, port=self.port, endpoint=gateway.endpoint, user=user)
        )
        program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin")
        assert program is not None, "nginx is not installed (apt-get install nginx-light)"
        words = [program, "-e", str(top / "error.log"), "-c", str(conf), "-p", str(top)]
        self._front = subprocess.Popen(words, stdin=subprocess.DEVNULL)
        wait_until(self._answers, "nginx before the gateway")

    def _answers(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def environment(self, identity: Identity) -> Mapping[str, str]:
        endpoint = f"http://127.0.0.1:{self.port}"
        return {**self._gateway_environment, "AWS_ENDPOINT_URL": endpoint}

    def put(self, name: str, data: bytes) -> str:
        self._shared.stored_bytes += len(data)
        obstore.put(self._store, name, data)
        return self.url(name)

    def session_keys(self, duration_s: int) -> Mapping[str, str]:
        """Temporary keys, as the lines of an AWS profile."""
        return self._gateway.session_keys(duration_s)

    def takes(self, keys: Mapping[str, str]) -> bool:
        """Whether the server takes these keys now."""
        return self._gateway.takes(self._bucket, keys)

    def put_raw(self, encoded_key: str, data: bytes) -> None:
        """Under a key that clients would clean up.  Raises AssertionError if it is refused."""
        self._gateway.put_raw(self._bucket, encoded_key, data)

    def put_large(self, name: str, tail: bytes) -> tuple[str, int]:
        return self.put(name, bytes(LARGE_OBJECT_BYTES - len(tail)) + tail), LARGE_OBJECT_BYTES

    def publish(self, directory: Path, prefix: str) -> None:
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(directory)}", path.read_bytes())

    def get(self, name: str) -> bytes:
        return bytes(obstore.get(self._store, name).bytes())

    def names(self) -> list[str]:
        return sorted(entry["path"] for page in obstore.list(self._store) for entry in page)

    def remove(self, name: str) -> None:
        obstore.delete(self._store, name)

    def url(self, name: str) -> str:
        return f"s3://{self._bucket}/{name}"

    def _log(self) -> list[list[str]]:
        lines = (self._top / "access.log").read_text().splitlines()
        return [line.split(" ") for line in lines]

    def bytes_sent(self) -> int:
        """Listings, which ask the bucket itself, left out.  An object's URL may have a query: its
        signature."""
        return sum(
            int(sent)
            for method, uri, sent in self._log()
            if method == "GET" and uri.partition("?")[0].strip("/") != self._bucket
        )

    def requests_for(self, name: str) -> int:
        path = f"/{self._bucket}/{quote_path(name)}"
        return sum(uri.partition("?")[0] == path for _, uri, _ in self._log())

    def freeze(self) -> None:
        self._front.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._front.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self.thaw()
        self._front.terminate()
        self._front.wait(10)


@contextlib.contextmanager
def serving_s3(top: Path, shared: SharedGateway) -> Iterator[S3Served]:
    server = S3Served(top, shared)
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def serving(scheme: str, top: Path) -> Iterator["HttpServed | SshServed"]:
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
