"""More than the cache holds, and a cache disk that is full: reading goes on (A8)."""

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.cache_files import disk_bytes
from tests.support.identity import Identity
from tests.support.mounted import Mounted, sha256
from tests.support.served import Served, content

MakeMount = Callable[..., Mounted]
MIB = 1 << 20
IN_FLIGHT = 16 * MIB
SETTINGS = f"[read]\nin_flight_bytes_max = {IN_FLIGHT}\n"


class Watch:
    """The largest a directory ever was while it was watched."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.largest = 0
        self.looks = 0

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._end.wait(0.01):
            self.largest = max(self.largest, disk_bytes(self._directory))
            self.looks += 1


def test_one_object_five_times_the_cache(
    identity: Identity,
    served: Served,
    new_mount: MakeMount,
    figures: Callable[[str], None],
) -> None:
    capacity, data = 64 * MIB, content(64 * MIB) * 5
    mount = new_mount(
        identity,
        *("--capacity", str(capacity)),
        settings=SETTINGS,
        environment=served.environment(identity),
    )
    mount.stage_in(served.put("input.dat", data), "input.dat")
    with Watch(mount.state / "cache") as watch:
        for _ in range(2):
            assert mount.sha256("staging/input.dat") == sha256(data)
    figures(f"at most {watch.largest >> 20} MiB on disk, capacity {capacity >> 20} MiB")
    assert watch.looks > 20
    assert capacity // 2 < watch.largest <= capacity + IN_FLIGHT


def test_many_objects_five_times_the_cache(
    anybody: Identity, served: Served, new_mount: MakeMount
) -> None:
    capacity, pieces = 64 * MIB, [content(4 * MIB, str(number)) for number in range(80)]
    mount = new_mount(
        anybody,
        *("--capacity", str(capacity)),
        settings=SETTINGS,
        environment=served.environment(anybody),
    )
    for number, piece in enumerate(pieces):
        served.put(f"many/f{number}", piece)
    mount.stagefs("bind", served.url("many/"), "staging:///many")
    wanted = {f"f{number}": sha256(piece) for number, piece in enumerate(pieces)}
    with Watch(mount.state / "cache") as watch:
        done = mount.run("sha256sum", *wanted, directory=mount.point / "staging/many")
    found = dict(line.split("  ")[::-1] for line in done.stdout.decode().splitlines())
    assert found == wanted
    assert capacity // 2 < watch.largest <= capacity + IN_FLIGHT
    assert mount.cache("verify").returncode == 0


@pytest.fixture
def small_disk(identity: Identity, work: Path) -> Iterator[Path]:
    """A tmpfs of 64 MiB that belongs to the mount's user."""
    disk = work / "disk"
    disk.mkdir()
    options = f"size=64m,uid={identity.uid},gid={identity.gid},mode=755"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], check=True)
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a tmpfs")


@needs_root
def test_cache_disk_is_full(
    identity: Identity, served: Served, new_mount: MakeMount, small_disk: Path
) -> None:
    """All but a little of it is taken by others; what is read does not fit by far."""
    (small_disk / "others").write_bytes(bytes(61 * MIB))
    large, small = content(96 * MIB), [content(3000, str(number)) for number in range(200)]
    mount = new_mount(
        identity,
        *("--cache", str(small_disk / "cache"), "--capacity", "1GiB"),
        environment=served.environment(identity),
    )
    mount.stage_in(served.put("large", large), "large")
    for number, piece in enumerate(small):
        served.put(f"small/f{number}", piece)
    mount.stagefs("bind", served.url("small/"), "staging:///small")
    for _ in range(2):
        assert mount.sha256("staging/large") == sha256(large)
    names = [f"f{number}" for number in range(200)]
    done = mount.run("sha256sum", *names, directory=mount.point / "staging/small")
    assert [line[:64] for line in done.stdout.decode().splitlines()] == [
        sha256(piece) for piece in small
    ]


def fill(path: Path) -> None:
    """To the last byte of its disk."""
    subprocess.run(["dd", "if=/dev/zero", f"of={path}", "bs=64k"], capture_output=True, check=False)
    disk = os.statvfs(path)
    assert disk.f_bavail * disk.f_bsize < MIB


@needs_root
def test_cache_disk_fills_up_while_it_is_read(
    identity: Identity, served: Served, new_mount: MakeMount, small_disk: Path
) -> None:
    data = content(160 * MIB)
    mount = new_mount(
        identity,
        *("--cache", str(small_disk / "cache"), "--capacity", "1GiB"),
        environment=served.environment(identity),
    )
    mount.stage_in(served.put("large", data), "large")
    mount.run("head", "-c", str(8 * MIB), "MNT/staging/large")
    fill(small_disk / "others")
    assert mount.sha256("staging/large") == sha256(data)
    (small_disk / "others").unlink()
    mount.stage_in(served.put("later", b"later"), "later")
    assert mount.read("staging/later") == b"later"
