"""Objects on real servers, the same few verbs for each protocol.

What a test on a mount needs of a server: put an object there, its URL, what the server itself
counted, and to make it silent.  Anything finer belongs to the tests of one remote.
"""

import abc
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from tests.support.identity import Identity
from tests.support.sshd import Sshd, running_sshd
from tests.support.waiting import wait_until

_NGINX_CONF = """
daemon off;
master_process off;
{user}
pid {top}/nginx.pid;
error_log {top}/error.log;
worker_rlimit_nofile 4096;
events {{ worker_connections 2048; }}
http {{
    log_format counted '$request_method $request_uri $status $body_bytes_sent';
    access_log {top}/access.log counted;
    client_body_temp_path {top}/t1;
    proxy_temp_path {top}/t2;
    fastcgi_temp_path {top}/t3;
    uwsgi_temp_path {top}/t4;
    scgi_temp_path {top}/t5;
    keepalive_requests 100000;
    server {{
        listen 127.0.0.1:{port} backlog=1024;
        root {top}/objects;
        location / {{ autoindex on; autoindex_exact_size on; }}
        location /private/ {{ auth_basic staged; auth_basic_user_file {top}/passwords; }}
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

    def __init__(self, top: Path) -> None:
        self.top = top
        self.objects = top / "objects"
        self.objects.mkdir()

    def put(self, name: str, data: bytes) -> str:
        path = self.objects / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # A new file under the old name, as a publisher would do it: readers of the old one
        # keep it, and its modification time is another one.
        fresh = path.with_name(path.name + ".new")
        fresh.write_bytes(data)
        fresh.rename(path)
        return self.url(name)

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
    """nginx.  Below ``private/`` it wants the user ``ada`` with the password ``s3cr3t-w0rd``."""

    scheme = "http"

    def __init__(self, top: Path) -> None:
        super().__init__(top)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        user = "user root;" if os.geteuid() == 0 else ""
        conf = top / "nginx.conf"
        conf.write_text(_NGINX_CONF.format(top=top, port=self.port, user=user))
        (top / "passwords").write_text("ada:{PLAIN}s3cr3t-w0rd\n")
        program = shutil.which("nginx", path="/usr/sbin:/usr/bin") or "nginx"
        self._child = subprocess.Popen(
            [program, "-e", str(top / "error.log"), "-c", str(conf)], stdin=subprocess.DEVNULL
        )
        wait_until(self._answers, "nginx")

    def _answers(self) -> bool:
        assert self._child.poll() is None, (self.top / "error.log").read_text()
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def environment(self, identity: Identity) -> Mapping[str, str]:
        return {}

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{quote(name)}"

    def _log(self) -> list[list[str]]:
        lines = (self.top / "access.log").read_text().splitlines()
        return [line.split(" ") for line in lines]

    def bytes_sent(self) -> int:
        return sum(int(sent) for method, _, _, sent in self._log() if method == "GET")

    def requests_for(self, name: str) -> int:
        return sum(uri == f"/{quote(name)}" for _, uri, _, _ in self._log())

    def freeze(self) -> None:
        os.kill(self._child.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self._child.pid, signal.SIGCONT)

    def stop(self) -> None:
        self.thaw()
        self._child.terminate()
        self._child.wait(10)


class SshServed(ServedFiles):
    """OpenSSH's sshd; its SFTP server logs what it is asked."""

    scheme = "ssh"

    def __init__(self, top: Path, server: Sshd) -> None:
        super().__init__(top)
        self._server = server

    def environment(self, identity: Identity) -> Mapping[str, str]:
        """Its own copy of key and configuration: ssh wants a key that nobody else can read."""
        own = self.top / f"client-{identity.name}"
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
        http = HttpServed(top)
        try:
            yield http
        finally:
            http.stop()
    elif scheme == "ssh":
        (top / "sshd").mkdir()
        with running_sshd(top / "sshd", counted=True) as server:
            yield SshServed(top, server)
    else:
        raise ValueError(scheme)
