"""The servers of one run, each started when the first point needs it, all on loopback.

They run as whoever runs the bench, serve the same files, and keep them in memory or in the
page cache: no peer pays for a cold server.
"""

import contextlib
import dataclasses
import datetime
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
from tests.support.far_away import FarAway, running_far_away
from tests.support.nginx import Nginx, running_nginx
from tests.support.waiting import wait_until

FAST_CIPHER = "aes128-gcm@openssh.com"
BUCKET, TREE_BUCKET = "bench", "bench-tree"
# Parts of a multipart upload are there twice for a moment.
S3_ROOM_FACTOR = 2
GIB = 1 << 30
# How far away a server is whose name here begins with ``far``.
ROUND_TRIP_S = 0.020
TREE_DIRECTORY_FILES = 10
TREE_FILE_BYTES = 100 << 10
SIGNED_LIFETIME = datetime.timedelta(days=1)
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
    """A bucket that holds the big file, or the tree, under its name."""

    endpoint: str
    bucket: str
    environment: Mapping[str, str]
    key_id: str
    secret: str

    def url(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"


class Servers:
    """``big``, ``small`` and ``tree`` are the data, below ``data``."""

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
    def tree(self) -> Path:
        """Directories of TREE_DIRECTORY_FILES files each."""
        top = self.data / "tree"
        for number in range(self._bench.amounts.tree_directories):
            directory = top / f"sample-{number:03d}"
            directory.mkdir(parents=True)
            for part in range(TREE_DIRECTORY_FILES):
                (directory / f"part-{part}.dat").write_bytes(os.urandom(TREE_FILE_BYTES))
        return top

    @property
    def tree_files(self) -> int:
        return self._bench.amounts.tree_directories * TREE_DIRECTORY_FILES

    @functools.cached_property
    def _sshd(self) -> sshd.Sshd:
        if not sshd.available():
            raise Unavailable("sshd is not installed, so what needs ssh is left out.")
        root = self._bench.directory / "sshd"
        root.mkdir()
        return self._stack.enter_context(sshd.running_sshd(root))

    def _far(self, port: int) -> FarAway:
        return self._stack.enter_context(running_far_away(port, round_trip_s=ROUND_TRIP_S))

    @functools.cached_property
    def ssh(self) -> SshAccess:
        """Raises Unavailable."""
        return self._access(self._sshd, self._sshd.port)

    @functools.cached_property
    def far_ssh(self) -> SshAccess:
        """The same server.  Raises Unavailable."""
        port = self._far(self._sshd.port).port
        self._sshd.trust_port(port)
        return self._access(self._sshd, port)

    def _access(self, server: sshd.Sshd, port: int) -> SshAccess:
        """The measuring user's own copy of key and configuration: ssh wants a private key."""
        own = self._bench.fresh("ssh-client")
        text = server.ssh_config.read_text().replace(f"Port {server.port}\n", f"Port {port}\n")
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
            port=port,
            user=server.login.name,
            key=copies[server.identity],
            known_hosts=copies[server.known_hosts],
        )

    @functools.cached_property
    def ssh_master(self) -> Path:
        """The socket of an open connection, so that `ssh cat` is timed without its handshake."""
        return self._master(self.ssh)

    @functools.cached_property
    def far_ssh_master(self) -> Path:
        return self._master(self.far_ssh)

    def _master(self, access: SshAccess) -> Path:
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

    def far_http_url(self, path: Path) -> str:
        near = self.http_url(path)
        return near.replace(f":{self.http.port}/", f":{self._far_http.port}/", 1)

    @functools.cached_property
    def _far_http(self) -> FarAway:
        return self._far(self.http.port)

    def http_directory(self) -> str:
        """What lists its files as HTML, which is what others than StageFS read."""
        return self.http.url("", location="html")

    @functools.cached_property
    def _gateway(self) -> rgw.Rgw:
        if not rgw.available():
            raise Unavailable("radosgw, ceph-mon or ceph-osd is not installed: no S3 here.")
        server = rgw.Rgw(
            self._bench.directory / "rgw", memory_bytes=S3_ROOM_FACTOR * self.size_bytes + GIB
        )
        self._stack.callback(server.stop)
        server.start()
        return server

    @functools.cached_property
    def s3(self) -> S3Access:
        """With the big file.  Raises Unavailable."""
        return self._s3_access(self._big_bucket, self._gateway.port)

    @functools.cached_property
    def far_s3(self) -> S3Access:
        """The same.  Raises Unavailable."""
        return self._s3_access(self._big_bucket, self._far_gateway.port)

    @functools.cached_property
    def s3_tree(self) -> S3Access:
        """With the tree.  Raises Unavailable."""
        return self._s3_access(self._tree_bucket, self._gateway.port)

    @functools.cached_property
    def far_s3_tree(self) -> S3Access:
        """The same.  Raises Unavailable."""
        return self._s3_access(self._tree_bucket, self._far_gateway.port)

    @functools.cached_property
    def _far_gateway(self) -> FarAway:
        return self._far(self._gateway.port)

    @functools.cached_property
    def _big_bucket(self) -> str:
        self._gateway.make_bucket(BUCKET)
        self._bench.say("uploading the big file")
        with self.big.open("rb") as file:
            obstore.put(self._gateway.bucket(BUCKET), self.big.name, file)
        return BUCKET

    @functools.cached_property
    def _tree_bucket(self) -> str:
        self._gateway.make_bucket(TREE_BUCKET)
        store = self._gateway.bucket(TREE_BUCKET)
        self._bench.say("uploading the tree")
        for path in sorted(self.tree.glob("*/*")):
            obstore.put(store, str(path.relative_to(self.data)), path)
        return TREE_BUCKET

    def signed(self, access: S3Access, key: str) -> str:
        """A URL of the object that needs no further credentials."""
        store = self._gateway.bucket(access.bucket, endpoint=access.endpoint)
        return obstore.sign(store, "GET", key, SIGNED_LIFETIME)

    def _s3_access(self, bucket: str, port: int) -> S3Access:
        endpoint = f"http://127.0.0.1:{port}"
        return S3Access(
            endpoint=endpoint,
            bucket=bucket,
            environment={**self._gateway.environment, "AWS_ENDPOINT_URL": endpoint},
            key_id=rgw.ACCESS_KEY_ID,
            secret=rgw.SECRET_ACCESS_KEY,
        )
