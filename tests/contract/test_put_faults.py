"""``put`` when network, server or caller fail: never a half object under the final name."""

import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Literal, TypeAlias, cast

import msgspec
import pytest
import trio

from stagefs.errors import (
    AccessDenied,
    DeadlineExceeded,
    NoSpace,
    RemoteUnavailable,
)
from stagefs.model import MIB, Checksum, ObjectInfo
from stagefs.remote.base import Remote
from stagefs.remote.limit import LimitedRemote
from stagefs.remote.retry import RetryingRemote
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.temporaries import temporary_name, token_of
from stagefs.remote.url import join
from tests.contract.subjects import (
    BUCKET,
    SETTINGS,
    FileSubject,
    S3Subject,
    SshSubject,
    Subject,
    new_place,
)
from tests.contract.test_put import put, put_bytes
from tests.contract.test_remote_contract import content
from tests.support.faultproxy import FaultProxy, fault_proxy
from tests.support.rgw import Rgw
from tests.support.source_file import SourceFile, source_file
from tests.support.sshd import Login, Sshd, running_sshd
from tests.support.waiting import wait_until

pytestmark = pytest.mark.timeout(120)

SHORT = msgspec.structs.replace(
    SETTINGS, connect_timeout_s=5.0, answer_timeout_s=1.0, progress_timeout_s=1.0, attempts=3
)
PATIENT = msgspec.structs.replace(SHORT, answer_timeout_s=1e5, progress_timeout_s=1e5)
# Generous against a busy machine, far below what a hang would take.
HANG_S = 40.0
OLD = b"the old object"
# One request of S3, and three parts; far more than the buffers on the way hold.
SIZES = {"small": 28 * MIB, "large": 40 * MIB}

MakeSubject: TypeAlias = Callable[[FaultProxy, RemoteSettings], Subject]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a tmpfs")


@pytest.fixture
def s3_behind(rgw: Rgw) -> tuple[int, MakeSubject]:
    top = new_place()
    return rgw.port, lambda proxy, settings: S3Subject(
        rgw, BUCKET, top, port=proxy.port, settings=settings
    )


def _ssh_behind(sshd: Sshd, top: Path, client: str) -> tuple[int, MakeSubject]:
    name = cast("Literal['openssh', 'paramiko']", client)
    return sshd.port, lambda proxy, settings: SshSubject(
        sshd, top, client=name, port=proxy.port, settings=settings
    )


@pytest.fixture
def ssh_behind(sshd: Sshd, tmp_path: Path) -> tuple[int, MakeSubject]:
    (tmp_path / "objects").mkdir()
    return _ssh_behind(sshd, tmp_path / "objects", "openssh")


@pytest.fixture
def paramiko_behind(sshd: Sshd, tmp_path: Path) -> tuple[int, MakeSubject]:
    (tmp_path / "objects").mkdir()
    return _ssh_behind(sshd, tmp_path / "objects", "paramiko")


class Broken:
    """A remote behind a proxy, and hands on its server."""

    def __init__(self, proxy: FaultProxy, make: MakeSubject) -> None:
        self.proxy = proxy
        self._make = make
        self.subject = make(proxy, SHORT)
        self.made = [self.subject]

    @property
    def bare(self) -> Remote:
        return self.subject.remote

    @property
    def url(self) -> str:
        return join(self.subject.directory, "output")

    def wrapped(self) -> Remote:
        return RetryingRemote(LimitedRemote(self.bare, SHORT), SHORT)

    def patient(self) -> Remote:
        """A driver that waits for ever."""
        self.made.append(self._make(self.proxy, PATIENT))
        return self.made[-1].remote

    def object_is(self, wanted: bytes | None) -> bool:
        if wanted is None:
            return "output" not in self.subject.names()
        return self.subject.get("output") == wanted


@pytest.fixture(params=["s3", "ssh", "paramiko"])
async def broken(request: pytest.FixtureRequest) -> AsyncIterator[Broken]:
    port, make = request.getfixturevalue(f"{request.param}_behind")
    with fault_proxy(port) as proxy:
        broken = Broken(proxy, make)
        yield broken
        proxy.release()
        for subject in broken.made:
            await subject.remote.aclose()


@pytest.fixture(params=[None, OLD], ids=["new", "overwriting"])
def before(request: pytest.FixtureRequest) -> bytes | None:
    """What is at the URL, and stays there until the put is done."""
    old: bytes | None = request.param
    return old


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("fault", "before"), [("cut", None), ("reset", OLD)], ids=["cut-new", "reset-overwriting"]
)
@pytest.mark.parametrize("share", [0.0, 0.4, 0.99])
async def test_connection_that_breaks(
    broken: Broken, fault: str, share: float, size: str, before: bytes | None, tmp_path: Path
) -> None:
    data = content(SIZES[size])
    if before is not None:
        broken.subject.put("output", before)
    # One of S3's parts at most goes over each connection.
    place = int(min(len(data), 8 * MIB) * share)
    getattr(broken.proxy, fault)(after_bytes=place, times=1000, upwards=True)
    with source_file(tmp_path / "source", data) as source:
        with trio.fail_after(HANG_S), pytest.raises((RemoteUnavailable, DeadlineExceeded)):
            await put(broken.bare, broken.url, source, overwrite=before is not None)
        assert broken.proxy.hits, "the fault did not strike"
        assert broken.object_is(before), "half an object, or none"
        getattr(broken.proxy, fault)(after_bytes=place, times=1, upwards=True)
        await put(broken.wrapped(), broken.url, source, overwrite=before is not None)
    assert broken.proxy.hits > 1, "the fault did not strike again"
    assert broken.subject.get("output") == data
    assert broken.subject.names() == {"output"}, "an earlier try left something"


async def test_bits_that_flip_on_the_way(broken: Broken, tmp_path: Path) -> None:
    data = content(40 * MIB)
    broken.proxy.flip(after_bytes=3 * MIB, upwards=True)
    with trio.fail_after(HANG_S):
        await put_bytes(broken.wrapped(), broken.url, data, tmp_path / "source")
    assert broken.proxy.hits == 1, "the fault did not strike"
    assert broken.subject.get("output") == data
    assert broken.subject.names() == {"output"}


@pytest.mark.parametrize("size", SIZES)
async def test_stall_ends_at_the_deadline(
    broken: Broken, size: str, before: bytes | None, tmp_path: Path
) -> None:
    data = content(SIZES[size])
    if before is not None:
        broken.subject.put("output", before)
    broken.proxy.stall(after_bytes=3 * MIB, times=1000, upwards=True)
    with source_file(tmp_path / "source", data) as source:
        with trio.fail_after(HANG_S), pytest.raises(DeadlineExceeded) as caught:
            await put(broken.bare, broken.url, source, overwrite=before is not None)
        assert broken.url in str(caught.value)
        assert broken.proxy.hits, "the fault did not strike"
        assert broken.object_is(before), "half an object, or none"
        broken.proxy.release()
        await put(broken.wrapped(), broken.url, source, overwrite=before is not None)
    assert broken.subject.get("output") == data
    assert broken.subject.names() == {"output"}, "an earlier try left something"


async def test_answers_that_do_not_come(broken: Broken, tmp_path: Path) -> None:
    """The server takes everything and is silent at the end."""
    data = content(MIB)
    await put_bytes(broken.bare, f"{broken.url}-first", b"warm", tmp_path / "source")
    broken.proxy.stall(after_bytes=0, times=1000)
    with trio.fail_after(HANG_S), pytest.raises(DeadlineExceeded):
        await put_bytes(broken.bare, broken.url, data, tmp_path / "source", overwrite=True)
    assert broken.proxy.hits, "the fault did not strike"
    broken.proxy.release()
    await put_bytes(broken.wrapped(), broken.url, data, tmp_path / "source", overwrite=True)
    assert broken.subject.get("output") == data
    wait_until(
        lambda: broken.subject.names() == {"output", "output-first"},
        "the removal of what was written",
    )


@pytest.mark.parametrize("size", SIZES)
async def test_stalled_put_can_be_cancelled(
    broken: Broken, size: str, before: bytes | None, tmp_path: Path
) -> None:
    """At once, not at the deadline."""
    if before is not None:
        broken.subject.put("output", before)
    broken.proxy.stall(after_bytes=3 * MIB, times=1000, upwards=True)
    with source_file(tmp_path / "source", content(SIZES[size])) as source, trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                await put(broken.patient(), broken.url, source, overwrite=before is not None)

            nursery.start_soon(run)
            await trio.to_thread.run_sync(broken.proxy.wait_for_hit)
            nursery.cancel_scope.cancel()
    assert broken.object_is(before), "half an object, or none"
    broken.proxy.release()
    await broken.bare.stat(broken.subject.put("other", b"x"))
    assert broken.object_is(before), "it was completed after it had been cancelled"
    broken.subject.remove("other")
    left = set() if before is None else {"output"}
    wait_until(
        lambda: broken.subject.names() == left,
        f"the removal of what was written ({broken.subject.names()})",
    )


async def test_refused_connection(broken: Broken, tmp_path: Path) -> None:
    broken.proxy.refuse()
    with pytest.raises(RemoteUnavailable) as caught:
        await put_bytes(broken.bare, broken.url, b"x", tmp_path / "source")
    assert broken.url in str(caught.value)
    broken.proxy.accept_again()
    await put_bytes(broken.bare, broken.url, b"x", tmp_path / "source")


# Without a proxy.


@pytest.fixture(params=["memory", "file", "s3", "ssh", "paramiko"])
async def subject(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    made: Subject = request.getfixturevalue(f"{request.param}_subject")()
    yield made
    await made.remote.aclose()


class LosesAnswer:
    """A remote whose first put succeeds and says that it failed."""

    def __init__(self, remote: Remote) -> None:
        self._remote = remote
        self.puts = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._remote, name)

    async def put(
        self,
        url: str,
        *,
        source: int,
        size_bytes: int,
        overwrite: bool,
        checksum: Checksum | None,
        mode: int | None,
        progress: Callable[[int], None],
    ) -> ObjectInfo:
        self.puts += 1
        info = await self._remote.put(
            url,
            source=source,
            size_bytes=size_bytes,
            overwrite=overwrite,
            checksum=checksum,
            mode=mode,
            progress=progress,
        )
        if self.puts == 1:
            raise RemoteUnavailable("The answer was lost.")
        return info


@pytest.mark.parametrize("size", SIZES)
async def test_lost_answer(subject: Subject, size: str, tmp_path: Path) -> None:
    data = content(SIZES[size])
    losing = LosesAnswer(subject.remote)
    remote = RetryingRemote(cast("Remote", losing), SHORT)
    url = join(subject.directory, "output")
    info = await put_bytes(remote, url, data, tmp_path / "source")
    assert losing.puts == 2
    assert info == await subject.remote.stat(url)
    assert subject.get("output") == data
    assert subject.names() == {"output"}


async def test_cancelled_in_mid_transfer(subject: Subject, tmp_path: Path) -> None:
    url = join(subject.directory, "output")
    with source_file(tmp_path / "source", content(100 * MIB)) as source, trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                await put(subject.remote, url, source)

            nursery.start_soon(run)
            await source.begun.wait()
            nursery.cancel_scope.cancel()
    wait_until(lambda: subject.names() == set(), "the removal of what was written")


async def test_source_may_be_closed_after_a_cancel(subject: Subject, tmp_path: Path) -> None:
    """Its number may be another file's by then, whose bytes must not be sent."""
    url = join(subject.directory, "output")
    data = content(100 * MIB)
    with source_file(tmp_path / "source", data) as source:
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                await put(subject.remote, url, source)

            nursery.start_soon(run)
            await source.begun.wait()
            nursery.cancel_scope.cancel()
        other = os.open("/dev/zero", os.O_RDONLY)
        os.dup2(other, source.fd)
        os.close(other)
    await put_bytes(subject.remote, url, data, tmp_path / "source")
    assert subject.get("output") == data


@pytest.fixture(params=["file", "ssh", "paramiko"])
async def files(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    made: Subject = request.getfixturevalue(f"{request.param}_subject")()
    yield made
    await made.remote.aclose()


async def test_what_earlier_processes_left_is_removed(files: Subject, tmp_path: Path) -> None:
    url = join(files.directory, "output")
    with source_file(tmp_path / "source", b"content") as source:
        mine = temporary_name("output", token_of(url, source.fd))
        others = temporary_name("output", token_of(f"{url}2", source.fd))
        for name in (mine, others, ".output.stagefs-x"):
            files.put(name, b"half")
        await put(files.remote, url, source)
    assert files.names() == {"output", others, ".output.stagefs-x"}


async def test_mode(files: Subject, tmp_path: Path) -> None:
    for mode in (0o755, 0o640, 0o444):
        url = join(files.directory, f"mode-{mode:o}")
        with source_file(tmp_path / "source", b"content") as source:
            info = await put(files.remote, url, source, mode=mode)
        assert info.mode == mode
    url = join(files.directory, "any")
    info = await put_bytes(files.remote, url, b"content", tmp_path / "source")
    (tmp_path / "reference").touch()
    assert info.mode == (tmp_path / "reference").stat().st_mode & 0o777, "not as the umask says"


# Disks that are full or read-only.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", disk], check=True)
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.fixture(params=["file", "openssh", "paramiko"])
async def on_small_disk(
    request: pytest.FixtureRequest, small_disk: Path, sshd: Sshd
) -> AsyncIterator[FileSubject | SshSubject]:
    made: FileSubject | SshSubject
    if request.param == "file":
        made = FileSubject(small_disk)
    else:
        made = SshSubject(sshd, small_disk, client=request.param)
    yield made
    await made.remote.aclose()


@needs_root
async def test_full_disk(
    on_small_disk: FileSubject | SshSubject, before: bytes | None, tmp_path: Path
) -> None:
    subject = on_small_disk
    url = join(subject.directory, "output")
    if before is not None:
        subject.put("output", before)
    with pytest.raises(NoSpace) as caught:
        await put_bytes(
            subject.remote,
            url,
            content(40 * MIB),
            tmp_path / "source",
            overwrite=before is not None,
        )
    assert url in str(caught.value)
    assert subject.names() == (set() if before is None else {"output"})
    assert before is None or subject.get("output") == before
    data = content(8 * MIB)
    await put_bytes(subject.remote, url, data, tmp_path / "source", overwrite=True)
    assert subject.get("output") == data


@needs_root
async def test_read_only_disk(on_small_disk: FileSubject | SshSubject, tmp_path: Path) -> None:
    subject = on_small_disk
    url = join(subject.directory, "output")
    remount = ["mount", "-o", "remount,ro", str(subject.top)]
    await trio.run_process(remount)
    with pytest.raises(AccessDenied) as caught:
        await put_bytes(subject.remote, url, b"x", tmp_path / "source")
    assert url in str(caught.value)


async def test_full_bucket(rgw: Rgw, tmp_path: Path) -> None:
    bucket = new_place()
    rgw.make_bucket(bucket)
    rgw.limit_bucket(bucket, 4 * MIB)
    subject = S3Subject(rgw, bucket, "top")
    url = join(subject.directory, "output")
    for size_bytes in (8 * MIB, 40 * MIB):
        with pytest.raises(NoSpace, match="QuotaExceeded"):
            await put_bytes(subject.remote, url, content(size_bytes), tmp_path / "source")
    assert subject.names() == set()
    assert rgw.unfinished_uploads(bucket) == []
    await put_bytes(subject.remote, url, content(MIB), tmp_path / "source")
    await subject.remote.aclose()


# Permissions.


async def test_wrong_keys(rgw: Rgw, tmp_path: Path) -> None:
    subject = S3Subject(rgw, BUCKET, new_place())
    remote, url = subject.forbidden("output", OLD)
    for overwrite in (False, True):
        with pytest.raises(AccessDenied) as caught:
            await put_bytes(remote, url, b"new", tmp_path / "source", overwrite=overwrite)
        assert url in str(caught.value)
    assert subject.get("output") == OLD


@needs_root
async def test_permission_that_is_lost_on_the_way(session_directory: Path, tmp_path: Path) -> None:
    """The file was begun and cannot be given its name, nor removed: the next try does both."""
    top = session_directory / new_place()
    for directory in (top, top / "sshd", top / "objects"):
        directory.mkdir(mode=0o777)
        directory.chmod(0o777)
    data = content(40 * MIB)
    with running_sshd(top / "sshd", login=Login.of("nobody")) as server:
        subject = SshSubject(server, top / "objects")
        url = join(subject.directory, "output")

        class Locking(SourceFile):
            def progress(self, sent_bytes: int) -> None:
                subject.top.chmod(0o555)

        with source_file(tmp_path / "source", data) as source:
            locking = Locking(source.fd, source.size_bytes)
            with pytest.raises(AccessDenied) as caught:
                await put(subject.remote, url, locking)
            assert url in str(caught.value)
            assert "output" not in subject.names()
            subject.top.chmod(0o777)
            await put(subject.remote, url, source)
        assert subject.get("output") == data
        assert subject.names() == {"output"}
        await subject.remote.aclose()


async def test_unfinished_uploads_of_earlier_processes_are_aborted(
    rgw: Rgw, tmp_path: Path
) -> None:
    bucket = new_place()
    rgw.make_bucket(bucket)
    for key in ("top/output", "top/output2"):
        rgw.begin_upload(bucket, key)
    subject = S3Subject(rgw, bucket, "top")
    url = join(subject.directory, "output")
    await put_bytes(subject.remote, url, content(40 * MIB), tmp_path / "source")
    assert rgw.unfinished_uploads(bucket) == ["top/output2"]
    await subject.remote.aclose()
