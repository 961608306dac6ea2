"""Uploads that go wrong on real servers, seen through a mount (B5): nothing is lost, the queue
says why, and a retry works.

What is uploaded comes from a commit and from a writable binding alike.
"""

import abc
import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import obstore
import pytest

from tests.support.faultproxy import FaultProxy, fault_proxy
from tests.support.identity import Identity
from tests.support.mounted import Mounted, sentence
from tests.support.rgw import Rgw
from tests.support.served import SharedGateway, SshServed, content
from tests.support.sshd import Login, Sshd, running_sshd
from tests.support.waiting import wait_until

MakeMount = Callable[..., Mounted]
MIB = 1 << 20
# A minute of an unreachable server is some seconds here.
SETTINGS = (
    "[stage_out]\nsettle_s = 0.05\nbackoff_s = 0.1\nbackoff_s_max = 0.5\nattempts = 3\n"
    "[remote]\nattempts = 1\nconnect_timeout_s = 3\nprogress_timeout_s = 3\n"
)
OUTPUTS = {"small": b"small", "large": content(3 * MIB + 7, "large"), "empty": b""}
BOUND = {"one": content(2 * MIB, "one"), "deep/two": b"two" * 1000}
EXPECTED = {f"runs/{name}": data for name, data in OUTPUTS.items()} | {
    f"out/{name}": data for name, data in BOUND.items()
}
DISK_BYTES = 24 * MIB


class Target(abc.ABC):
    """A server behind a proxy, and the hands of its administrator on it."""

    proxy: FaultProxy

    @abc.abstractmethod
    def url(self, name: str) -> str: ...

    @abc.abstractmethod
    def environment(self, identity: Identity) -> Mapping[str, str]: ...

    @abc.abstractmethod
    def objects(self) -> dict[str, bytes]: ...

    @abc.abstractmethod
    def hang_up(self) -> None:
        """End every connection."""

    @abc.abstractmethod
    def fill(self) -> None:
        """Hardly anything fits from now on."""

    @abc.abstractmethod
    def free(self) -> None: ...

    @abc.abstractmethod
    def forbid(self) -> None:
        """Nothing may be written from now on."""

    @abc.abstractmethod
    def allow(self) -> None: ...

    def go_away(self) -> None:
        self.proxy.refuse()
        self.hang_up()

    def come_back(self) -> None:
        self.proxy.accept_again()


class SshTarget(Target):
    """Run as nobody where root runs the suite: root may write anywhere."""

    def __init__(self, top: Path, server: Sshd, proxy: FaultProxy) -> None:
        server.trust_port(proxy.port)
        self.proxy = proxy
        self._server = server
        self._served = SshServed(top, server)
        self.top = self._served.objects
        self.top.chmod(0o777)

    def url(self, name: str) -> str:
        return self._served.url(name).replace(f":{self._server.port}/", f":{self.proxy.port}/", 1)

    def environment(self, identity: Identity) -> Mapping[str, str]:
        return self._served.environment(identity)

    def objects(self) -> dict[str, bytes]:
        return {name: self._served.get(name) for name in self._served.names() if name != "filler"}

    def hang_up(self) -> None:
        self._server.kill_sessions()

    def fill(self) -> None:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},mode=777", "none", self.top],
            check=True,
        )
        with (self.top / "filler").open("wb") as file:
            file.write(bytes(DISK_BYTES - MIB))

    def free(self) -> None:
        (self.top / "filler").unlink()

    def limit(self, size: int) -> None:
        self._server.limit_files(size)
        self.hang_up()

    def forbid(self) -> None:
        for path in (self.top, *self.top.rglob("*")):
            if path.is_dir():
                path.chmod(0o555)

    def allow(self) -> None:
        for path in (self.top, *self.top.rglob("*")):
            if path.is_dir():
                path.chmod(0o777)

    def clean_up(self) -> None:
        if os.path.ismount(self.top):
            subprocess.run(["umount", "-l", self.top], check=True)


class S3Target(Target):
    def __init__(self, gateway: Rgw, bucket: str, proxy: FaultProxy) -> None:
        self.proxy = proxy
        self._gateway = gateway
        self._bucket = bucket
        self._store = gateway.bucket(bucket)

    def url(self, name: str) -> str:
        return f"s3://{self._bucket}/{name}"

    def environment(self, identity: Identity) -> Mapping[str, str]:
        endpoint = f"http://127.0.0.1:{self.proxy.port}"
        return {**self._gateway.environment, "AWS_ENDPOINT_URL": endpoint}

    def objects(self) -> dict[str, bytes]:
        names = [entry["path"] for page in obstore.list(self._store) for entry in page]
        return {name: bytes(obstore.get(self._store, name).bytes()) for name in names}

    def hang_up(self) -> None:
        self.proxy.cut(after_bytes=0, times=1000, upwards=True)

    def come_back(self) -> None:
        self.proxy.release()
        super().come_back()

    def fill(self) -> None:
        self._gateway.limit_bucket(self._bucket, MIB)

    def free(self) -> None:
        self._gateway.limit_bucket(self._bucket, 1 << 30)

    def forbid(self) -> None:
        self._gateway.deny_writes(self._bucket)

    def allow(self) -> None:
        self._gateway.allow_writes(self._bucket)


@pytest.fixture(params=["ssh", "s3"])
def target(request: pytest.FixtureRequest, served_directory: Path) -> Iterator[Target]:
    if request.param == "s3":
        shared: SharedGateway = request.getfixturevalue("gateway")
        gateway, bucket = shared.fresh_bucket()
        with fault_proxy(gateway.port) as proxy:
            yield S3Target(gateway, bucket, proxy)
        return
    login = Login.of("nobody") if os.geteuid() == 0 else None
    (served_directory / "sshd").mkdir()
    with (
        running_sshd(served_directory / "sshd", login=login) as server,
        fault_proxy(server.port) as proxy,
    ):
        made = SshTarget(served_directory, server, proxy)
        yield made
        made.clean_up()


@pytest.fixture
def mount(anybody: Identity, new_mount: MakeMount, target: Target) -> Mounted:
    """``staging/out`` is bound to the directory ``out`` of the server."""
    made = new_mount(anybody, environment=target.environment(anybody), settings=SETTINGS)
    made.stagefs("bind", target.url("out"), "staging:///out", "--writable")
    made.run("mkdir", "MNT/staging/out/deep")
    return made


def give(mount: Mounted, target: Target) -> None:
    """All outputs are acknowledged."""
    mount.stagefs("sandbox", "create", "t", "--out", f"*={target.url('runs')}/")
    for name, data in OUTPUTS.items():
        write(mount, f"tasks/t/{name}", data)
    mount.stagefs("sandbox", "commit", "t")
    for name, data in BOUND.items():
        write(mount, f"staging/out/{name}", data)


def write(mount: Mounted, path: str, data: bytes) -> None:
    source = mount.state.parent / "source"
    source.write_bytes(data)
    mount.run("cp", source, f"MNT/{path}")


def uploads(mount: Mounted) -> list[dict[str, object]]:
    found = json.loads(mount.stagefs("queue", "list", "--json").stdout)
    assert isinstance(found, list)
    return found


def reasons(mount: Mounted) -> list[str]:
    return [str(upload["reason"]) for upload in uploads(mount) if "reason" in upload]


def wait_for_reasons(mount: Mounted, count: int) -> list[str]:
    wait_until(lambda: len(reasons(mount)) >= count, f"{count} uploads that say why")
    return reasons(mount)


def check_nothing_half(target: Target) -> None:
    for name, data in target.objects().items():
        if name in EXPECTED:
            assert data == EXPECTED[name], f"half an object: {name}"


def check_all_there(mount: Mounted, target: Target) -> None:
    mount.stagefs("flush", "--deadline", "60")
    assert uploads(mount) == []
    # The gateway's listing may be a moment behind its objects.
    wait_until(
        lambda: target.objects() == EXPECTED,
        "the server to have all outputs and nothing else",
        told=lambda: f"it has {summary(target.objects())}, and should have {summary(EXPECTED)}",
    )
    for name in BOUND:
        assert mount.xattr(f"staging/out/{name}", "upload") == "done"


def summary(objects: Mapping[str, bytes]) -> dict[str, str]:
    """Short enough to be read when a test fails."""
    return {
        name: f"{len(data)} bytes, {hashlib.sha256(data).hexdigest()[:8]}"
        for name, data in objects.items()
    }


def test_server_that_is_gone_for_a_while(mount: Mounted, target: Target) -> None:
    mount.run("ls", "MNT/staging/out")
    target.go_away()
    give(mount, target)
    # A host that is not there is asked by one upload at a time.
    said = wait_for_reasons(mount, 1)
    assert all(target.url("")[:5] in reason for reason in said), said
    told = sentence(mount.stagefs("flush", "--deadline", "1", check=False))
    assert "5 outputs" in told
    assert "waiting" in told
    listed = mount.stagefs("queue", "list").stdout.decode()
    assert said[0].split(":")[0] in listed
    assert not mount.xattr("staging/out/one", "upload").startswith("failed")
    mount.kill_daemon()
    mount.run("ls", "MNT")
    assert mount.sha256("staging/out/one")
    target.come_back()
    check_all_there(mount, target)


def test_disk_that_is_full_at_the_server(mount: Mounted, target: Target) -> None:
    if isinstance(target, SshTarget) and os.geteuid() != 0:
        pytest.skip("only root can mount a tmpfs")
    target.fill()
    give(mount, target)
    said = wait_for_reasons(mount, 2)
    assert any("space" in reason or "full" in reason for reason in said), said
    check_nothing_half(target)
    told = sentence(mount.stagefs("flush", "--deadline", "1", check=False))
    assert "waiting" in told, "a full disk passes"
    target.free()
    check_all_there(mount, target)


@pytest.mark.parametrize("target", ["ssh"], indirect=True)
def test_quota_that_statvfs_does_not_show(mount: Mounted, target: Target) -> None:
    """The same as a full disk, though there seems to be space: it passes, however often."""
    assert isinstance(target, SshTarget)
    target.limit(MIB)
    give(mount, target)
    wait_until(
        lambda: sum(int(str(upload.get("attempts", 0))) > 3 for upload in uploads(mount)) == 2,
        "the two large ones to fail more often than other failures may",
        told=lambda: str(uploads(mount)),
    )
    said = reasons(mount)
    assert len(said) == 2
    assert all("quota" in reason for reason in said), said
    check_nothing_half(target)
    told = sentence(mount.stagefs("flush", "--deadline", "1", check=False))
    assert "2 waiting" in told, told
    target.limit(-1)
    check_all_there(mount, target)


def test_permission_that_is_lost(mount: Mounted, target: Target) -> None:
    mount.run("ls", "MNT/staging/out")
    target.forbid()
    give(mount, target)
    told = sentence(mount.stagefs("flush", "--deadline", "30", check=False))
    assert "5 failed" in told
    assert len(reasons(mount)) == 5
    assert {upload["state"] for upload in uploads(mount)} == {"failed"}
    assert mount.xattr("staging/out/one", "upload").startswith("failed: ")
    assert target.objects() == {}
    # Failures stay, whatever becomes of the daemon.
    mount.kill_daemon()
    mount.run("ls", "MNT")
    assert len(reasons(mount)) == 5
    target.allow()
    mount.stagefs("queue", "retry", "--all")
    check_all_there(mount, target)


@pytest.mark.parametrize("place", [0, 70_000, MIB, 2 * MIB + 500_000], ids=str)
def test_connection_that_is_cut(mount: Mounted, target: Target, place: int) -> None:
    mount.run("ls", "MNT/staging/out")
    target.proxy.cut(after_bytes=place, times=4, upwards=True)
    give(mount, target)
    wait_until(lambda: target.proxy.hits > 0, "the fault")
    check_nothing_half(target)
    check_all_there(mount, target)


def test_bits_that_flip_on_the_way(mount: Mounted, target: Target) -> None:
    target.proxy.flip(after_bytes=MIB, times=1, upwards=True)
    give(mount, target)
    wait_until(lambda: target.proxy.hits > 0, "the fault")
    check_all_there(mount, target)


def test_local_copy_that_is_damaged(mount: Mounted, target: Target) -> None:
    """What leaves must be what was committed or closed: its checksum says so."""
    mount.run("ls", "MNT/staging/out")
    target.go_away()
    give(mount, target)
    wait_until(lambda: len(uploads(mount)) == 5, "the queue has all")
    files = [Path(str(upload["file"])) for upload in uploads(mount)]
    saved = {path: path.read_bytes() for path in files if path.stat().st_size > MIB}
    for path in saved:
        with path.open("r+b") as file:
            file.seek(500_000)
            byte = file.read(1)
            file.seek(500_000)
            file.write(bytes([byte[0] ^ 1]))
    target.come_back()
    told = sentence(mount.stagefs("flush", "--deadline", "60", check=False))
    assert "2 failed" in told, told
    assert all("declared was" in reason for reason in reasons(mount)), reasons(mount)
    check_nothing_half(target)
    for path, data in saved.items():
        path.write_bytes(data)
    mount.stagefs("queue", "retry", "--all")
    check_all_there(mount, target)
