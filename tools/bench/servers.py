"""The servers of one run, each started when the first point needs it, all on loopback.

They run as whoever runs the bench, serve the same files, and keep them in memory or in the
page cache: no peer pays for a cold server.
"""

import contextlib
import dataclasses
import functools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import obstore

from bench.measuring import Unavailable
from bench.workbench import Workbench, end, installed
from stagefs.remote.url import quote_path
from tests.support import rgw, sshd
from tests.support.nginx import Nginx, running_nginx
from tests.support.waiting import wait_until

FAST_CIPHER = "aes128-gcm@openssh.com"
BUCKET = "bench"
# Parts of a multipart upload are there twice for a moment.
S3_ROOM_FACTOR = 2
GIB = 1 << 30
_PIECE_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class SshAccess:
    """How the measuring user reaches the server: ``host`` is a name in ``config``.

    ``tuned_config`` asks for the cipher that is cheapest on machines with AES instructions,
    ``config`` leaves OpenSSH's choice.
    """

    config: Path
    tuned_config: Path
    host: str
    port: int
    user: str
    key: Path
    known_hosts: Path

    def url(self, path: Path) -> str:
        return f"ssh://{self.host}{quote_path(str(path))}"


@dataclasses.dataclass(frozen=True)
class S3Access:
    """A bucket that holds the big file under its name."""

    endpoint: str
    bucket: str
    environment: Mapping[str, str]
    key_id: str
    secret: str

    def url(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"


class Servers:
    """``big`` and ``small`` are the data, below ``data``."""

    def __init__(self, bench: Workbench, stack: contextlib.ExitStack) -> None:
        self._bench = bench
        self._stack = stack
        self.data = bench.directory / "data"
        self.data.mkdir()
        self.data.chmod(0o755)
        self.size_bytes = bench.amounts.size_bytes

    @functools.cached_property
    def big(self) -> Path:
        """The big file, written when it is first asked for."""
        path = self.data / "big.bin"
        self._bench.say(f"writing {self.size_bytes >> 20} MiB of random data")
        with path.open("wb") as file:
            for begin in range(0, self.size_bytes, _PIECE_BYTES):
                file.write(os.urandom(min(_PIECE_BYTES, self.size_bytes - begin)))
        return path

    @functools.cached_property
    def small(self) -> Path:
        """The directory of many small files."""
        directory = self.data / "small"
        directory.mkdir()
        for number in range(self._bench.amounts.small_files):
            path = directory / f"part-{number:05d}.dat"
            path.write_bytes(os.urandom(self._bench.amounts.small_bytes))
        return directory

    @functools.cached_property
    def ssh(self) -> SshAccess:
        """Raises Unavailable."""
        if not sshd.available():
            raise Unavailable("sshd is not installed, so what needs ssh is left out.")
        root = self._bench.directory / "sshd"
        root.mkdir()
        server = self._stack.enter_context(sshd.running_sshd(root))
        return self._access(server)

    def _access(self, server: sshd.Sshd) -> SshAccess:
        """The measuring user's own copy of key and configuration: ssh wants a private key."""
        own = self._bench.fresh("ssh-client")
        text = server.ssh_config.read_text()
        copies = {}
        for path in (server.identity, server.known_hosts):
            copies[path] = Path(shutil.copy(path, own / path.name))
            text = text.replace(str(path), str(copies[path]))
        (own / "ssh_config").write_text(text)
        (own / "ssh_config_tuned").write_text(f"{text}  Ciphers {FAST_CIPHER}\n")
        for path in own.iterdir():
            path.chmod(0o600)
            os.chown(path, self._bench.identity.uid, self._bench.identity.gid)
        return SshAccess(
            config=own / "ssh_config",
            tuned_config=own / "ssh_config_tuned",
            host="staged",
            port=server.port,
            user=server.login.name,
            key=copies[server.identity],
            known_hosts=copies[server.known_hosts],
        )

    @functools.cached_property
    def ssh_master(self) -> Path:
        """The socket of an open connection, so that `ssh cat` is timed without its handshake."""
        access = self.ssh
        socket = self._bench.fresh("ssh-master") / "s"
        child = self._bench.start(
            "ssh", "-F", access.tuned_config, "-M", "-N", "-S", socket, access.host
        )
        self._stack.callback(end, child)
        wait_until(socket.exists, "ssh's control socket")
        return socket

    @functools.cached_property
    def http(self) -> Nginx:
        """Raises Unavailable."""
        installed("nginx")
        return self._stack.enter_context(running_nginx(self._bench.directory / "nginx"))

    def http_url(self, path: Path, name: str | None = None) -> str:
        """The URL of a file of ours; another name makes it another object."""
        name = name or path.name
        place = self.http.root / name
        if not place.exists():
            place.hardlink_to(path)
        return self.http.url(name)

    def http_directory(self) -> str:
        """What lists its files as HTML, which is what others than StageFS read."""
        return self.http.url("", location="html")

    @functools.cached_property
    def s3(self) -> S3Access:
        """Raises Unavailable."""
        if not rgw.available():
            raise Unavailable("radosgw, ceph-mon or ceph-osd is not installed: no S3 here.")
        server = rgw.Rgw(
            self._bench.directory / "rgw", memory_bytes=S3_ROOM_FACTOR * self.size_bytes + GIB
        )
        self._stack.callback(server.stop)
        server.start()
        server.make_bucket(BUCKET)
        self._bench.say("uploading the big file")
        with self.big.open("rb") as file:
            obstore.put(server.bucket(BUCKET), self.big.name, file)
        return S3Access(
            endpoint=server.endpoint,
            bucket=BUCKET,
            environment=server.environment,
            key_id=rgw.ACCESS_KEY_ID,
            secret=rgw.SECRET_ACCESS_KEY,
        )
