"""Ceph's RADOS gateway, the real S3 server: one monitor, one OSD in memory, one gateway.

Started as the calling user on free loopback ports in about a second, from Debian's radosgw,
ceph-mon and ceph-osd.  Objects are put through obstore, as any client would.
"""

import contextlib
import datetime
import hashlib
import hmac
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from tests.support.ports import free_ports
from tests.support.waiting import wait_until

ACCESS_KEY_ID, SECRET_ACCESS_KEY = "testkey", "testsecret"
REGION = "us-east-1"
PROGRAMS = ("ceph-mon", "ceph-osd", "radosgw", "radosgw-admin", "ceph-authtool", "monmaptool")

_CONF = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{monitor_port}/0]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
auth supported = none
run dir = {top}/run
admin socket = {top}/run/$name.asok
log file = {top}/log/$name.log
pid file = {top}/run/$name.pid
crash dir = {top}/log
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 1000
mon pg warn min per osd = 0
mon data avail crit = 1
mon data avail warn = 1
paxos propose interval = 0.05
paxos min wait = 0.01
osd class dir = /usr/lib/x86_64-linux-gnu/rados-classes
plugin dir = /usr/lib/x86_64-linux-gnu/ceph
erasure code dir = /usr/lib/x86_64-linux-gnu/ceph/erasure-code
keyring = {top}/keyring
[mon.a]
host = localhost
mon data = {top}/mon.a
mon cluster log file = {top}/log/cluster.log
[osd]
osd data = {top}/osd.0
osd objectstore = memstore
memstore device bytes = {memory_bytes}
osd crush update on start = true
osd crush initial weight = 1
osd check max object name len on startup = false
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port} tcp_nodelay=1
ms mon client mode = crc
rgw data = {top}/rgw
rgw rados pool pg num min = 1
rgw enable usage log = false
rgw enable gc threads = false
rgw enable lc threads = false
rgw run sync thread = false
rgw enable quota threads = false
rgw enable ops log = false
rgw dns name = localhost
rgw s3 auth use sts = true
rgw sts key = {sts_key}
rgw sts min session duration = 1
"""
ROLE = "pilots"


def available() -> bool:
    return all(_program(name) for name in PROGRAMS)


class Rgw:
    """A running gateway.  Made by ``running_rgw``, which also ends it."""

    def __init__(self, top: Path, *, memory_bytes: int = 4 << 30) -> None:
        self.top = top
        for name in ("run", "log", "rgw", "mon.a", "osd.0"):
            (top / name).mkdir(parents=True)
        self.port, monitor_port = free_ports(2)
        self._fsid = str(uuid.uuid4())
        self._monitor_port = monitor_port
        self._children: list[subprocess.Popen[bytes]] = []
        self._has_role = False
        (top / "ceph.conf").write_text(
            _CONF.format(
                top=top,
                fsid=self._fsid,
                port=self.port,
                monitor_port=monitor_port,
                memory_bytes=memory_bytes,
                sts_key=uuid.uuid4().hex[:16],
            )
        )

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> Mapping[str, str]:
        """What any S3 client needs to reach it."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET_ACCESS_KEY,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": REGION,
        }

    def start(self) -> None:
        self._make_monitor()
        self._serve("ceph-mon", "-i", "a", "-f")
        osd = str(uuid.uuid4())
        self._run("ceph", "osd", "new", osd, "0")
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
        self._serve("ceph-osd", "-i", "0", "-f")
        self._serve("radosgw", "-n", "client.rgw", "-f")
        wait_until(self._answers, "radosgw", deadline_s=60.0)
        self._run(
            *("radosgw-admin", "-n", "client.rgw", "user", "create", "--uid=test"),
            *("--display-name=test", f"--access-key={ACCESS_KEY_ID}"),
            f"--secret={SECRET_ACCESS_KEY}",
        )

    def stop(self) -> None:
        for child in reversed(self._children):
            child.kill()
            child.wait(10)

    def freeze(self) -> None:
        """The gateway neither answers nor closes connections until ``thaw``."""
        self._children[-1].send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._children[-1].send_signal(signal.SIGCONT)

    def make_bucket(self, name: str) -> None:
        status, body = self._signed("PUT", f"/{name}")
        assert status == 200, body

    def bucket(
        self, name: str, *, endpoint: str | None = None, profile: Mapping[str, str] | None = None
    ) -> S3Store:
        """A client of its own for putting and removing objects, with other keys if given."""
        own = {"aws_access_key_id": ACCESS_KEY_ID, "aws_secret_access_key": SECRET_ACCESS_KEY}
        keys: dict[str, Any] = {
            name.removeprefix("aws_"): value for name, value in (profile or own).items()
        }
        return S3Store(
            name,
            **keys,
            endpoint=endpoint or self.endpoint,
            region=REGION,
            virtual_hosted_style_request=False,
            client_options={"allow_http": True},
        )

    def put(self, bucket: str, key: str, data: bytes) -> None:
        obstore.put(self.bucket(bucket), key, data)

    def put_raw(self, bucket: str, encoded_key: str, data: bytes) -> None:
        """Put a key that obstore would refuse, percent-encoded by the caller."""
        status, body = self._signed("PUT", f"/{bucket}/{encoded_key}", data)
        assert status == 200, body

    def limit_bucket(self, name: str, max_bytes: int) -> None:
        """From now on the bucket is full when it holds so much."""
        scope = ("--quota-scope=bucket", f"--bucket={name}")
        for command in (("set", f"--max-size={max_bytes}"), ("enable",)):
            self._run("radosgw-admin", "-n", "client.rgw", "quota", *command, *scope)

    def session_keys(self, duration_s: int) -> Mapping[str, str]:
        """Temporary keys with a session token, which the gateway refuses after so long: as the
        lines of an AWS profile."""
        if not self._has_role:
            self._make_role()
        query = "&".join(
            (
                "Action=AssumeRole",
                f"DurationSeconds={duration_s}",
                f"RoleArn=arn%3Aaws%3Aiam%3A%3A%3Arole%2F{ROLE}",
                "RoleSessionName=pilot",
            )
        )
        status, body = self._signed("POST", "/", query=query)
        assert status == 200, body
        names = {
            "AccessKeyId": "aws_access_key_id",
            "SecretAccessKey": "aws_secret_access_key",
            "SessionToken": "aws_session_token",
        }
        found = dict(re.findall(r"<(\w+)>([^<]*)</", body.decode()))
        return {ours: found[theirs] for theirs, ours in names.items()}

    def takes(self, bucket: str, keys: Mapping[str, str]) -> bool:
        """Whether these keys of a profile may list the bucket now."""
        try:
            next(iter(obstore.list(self.bucket(bucket, profile=keys), "none")), None)
        except BaseError as exc:
            if "status code: 403" not in str(exc):
                raise
            return False
        return True

    def _make_role(self) -> None:
        def document(resource: Mapping[str, object], action: str) -> str:
            statement = {"Effect": "Allow", "Action": [action], **resource}
            return json.dumps({"Version": "2012-10-17", "Statement": [statement]})

        trust = document({"Principal": {"AWS": ["arn:aws:iam:::user/test"]}}, "sts:AssumeRole")
        policy = document({"Resource": ["arn:aws:s3:::*"]}, "s3:*")
        admin = ("radosgw-admin", "-n", "client.rgw")
        name = f"--role-name={ROLE}"
        self._run(*admin, "role", "create", name, f"--assume-role-policy-doc={trust}")
        self._run(
            *(*admin, "role-policy", "put", name, "--policy-name=all", f"--policy-doc={policy}")
        )
        self._has_role = True

    def deny_writes(self, bucket: str) -> None:
        """Nobody may write objects from now on, the owner neither."""
        statement = {
            "Effect": "Deny",
            "Principal": "*",
            "Action": ["s3:PutObject", "s3:DeleteObject"],
            "Resource": [f"arn:aws:s3:::{bucket}/*"],
        }
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]}).encode()
        status, body = self._signed("PUT", f"/{bucket}", policy, query="policy=")
        assert status in (200, 204), body

    def allow_writes(self, bucket: str) -> None:
        status, body = self._signed("DELETE", f"/{bucket}", query="policy=")
        assert status in (200, 204), body

    def begin_upload(self, bucket: str, key: str) -> None:
        """A multipart upload that nobody goes on with."""
        status, body = self._signed("POST", f"/{bucket}/{key}", query="uploads=")
        assert status == 200, body

    def unfinished_uploads(self, bucket: str) -> list[str]:
        """The keys of all uploads that were neither completed nor aborted."""
        status, body = self._signed("GET", f"/{bucket}", query="uploads=")
        assert status == 200, body
        return re.findall(r"<Key>([^<]*)</Key>", body.decode())

    def _make_monitor(self) -> None:
        top = self.top
        (top / "keyring").touch()
        monitor_keys = top / "mon.keyring"
        tool = "ceph-authtool"
        self._run(tool, "--create-keyring", monitor_keys, "--gen-key", "-n", "mon.", *_allow("mon"))
        self._run(
            *(tool, monitor_keys, "--gen-key", "-n", "client.admin"),
            *(*_allow("mon"), *_allow("osd")),
        )
        shutil.copy(monitor_keys, top / "keyring")
        monitor_map = top / "monmap"
        self._run(
            *("monmaptool", "--create", "--fsid", self._fsid, "--addv", "a"),
            *(f"[v2:127.0.0.1:{self._monitor_port}]", monitor_map),
        )
        self._run(
            *("ceph-mon", "-i", "a", "--mkfs", "--monmap", monitor_map, "--keyring", monitor_keys)
        )

    def _answers(self) -> bool:
        assert self._children[-1].poll() is None, self._log("radosgw")
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self._request("GET", "/", {}, b"")[0] == 200
        return False

    def _run(self, name: str, *arguments: str | Path) -> None:
        done = subprocess.run(
            [_program(name) or name, *map(str, arguments)],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{name}: {os.fsdecode(done.stderr[-2000:])}"

    def _serve(self, name: str, *arguments: str) -> None:
        with (self.top / "log" / f"{name}.out").open("wb") as output:
            self._children.append(
                subprocess.Popen(
                    [_program(name) or name, *arguments],
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            )

    def _environment(self) -> dict[str, str]:
        return {"PATH": "/usr/bin:/usr/sbin:/bin:/sbin", "CEPH_CONF": str(self.top / "ceph.conf")}

    def _log(self, name: str) -> str:
        return (self.top / "log" / f"{name}.out").read_text(errors="replace")[-2000:]

    def _request(
        self, method: str, path: str, headers: Mapping[str, str], data: bytes
    ) -> tuple[int, bytes]:
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            client.request(method, path, body=data, headers=dict(headers))
            answer = client.getresponse()
            return answer.status, answer.read()
        finally:
            client.close()

    def _signed(
        self, method: str, path: str, data: bytes = b"", *, query: str = ""
    ) -> tuple[int, bytes]:
        """A request with an AWS signature, version 4."""
        now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        digest = hashlib.sha256(data).hexdigest()
        headers = {
            "host": f"127.0.0.1:{self.port}",
            "x-amz-content-sha256": digest,
            "x-amz-date": now,
        }
        names = ";".join(headers)
        lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
        canonical = f"{method}\n{path}\n{query}\n{lines}\n{names}\n{digest}"
        scope = f"{now[:8]}/{REGION}/s3/aws4_request"
        hashed = hashlib.sha256(canonical.encode()).hexdigest()
        key = b"AWS4" + SECRET_ACCESS_KEY.encode()
        for part in scope.split("/"):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        to_sign = f"AWS4-HMAC-SHA256\n{now}\n{scope}\n{hashed}"
        signature = hmac.new(key, to_sign.encode(), hashlib.sha256).hexdigest()
        headers["Authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={ACCESS_KEY_ID}/{scope}, "
            f"SignedHeaders={names}, Signature={signature}"
        )
        return self._request(method, f"{path}?{query}" if query else path, headers, data)


@contextlib.contextmanager
def running_rgw(top: Path) -> Iterator[Rgw]:
    server = Rgw(top)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def _program(name: str) -> str | None:
    return shutil.which(name, path="/usr/bin:/usr/sbin")


def _allow(service: str) -> tuple[str, str, str]:
    return "--cap", service, "allow *"
