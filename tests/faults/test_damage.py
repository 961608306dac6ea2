"""A damaged cache: noticed, fetched again, counted; the reader gets the right byte (A7)."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.test_killed import Holder, status
from tests.support.cache_files import flip, object_file
from tests.support.identity import Identity
from tests.support.mounted import Mounted, sha256
from tests.support.served import Served, content
from tests.support.waiting import wait_until

MakeMount = Callable[..., Mounted]
MIB = 1 << 20
SIZE = 24 * MIB


def flip_a_bit(path: Path) -> None:
    flip(path, 5 * MIB + 4321)


def cut_the_data(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(7 * MIB)


def cut_the_map(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(SIZE)


def scribble_on_the_map(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(SIZE + 100)
        file.write(b"scribble" * 40)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


DAMAGES = [flip_a_bit, cut_the_data, cut_the_map, scribble_on_the_map, empty, remove]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_between_two_mounts(
    anybody: Identity, served: Served, new_mount: MakeMount, damage: Callable[[Path], None]
) -> None:
    data = content(SIZE)
    mount = new_mount(anybody, environment=served.environment(anybody))
    mount.stage_in(served.put("input.dat", data), "input.dat")
    assert mount.sha256("staging/input.dat") == sha256(data)
    mount.umount()
    sent = served.bytes_sent()
    damage(object_file(mount.state / "cache", SIZE))

    mount.mount()
    assert mount.sha256("staging/input.dat") == sha256(data)
    if damage is flip_a_bit:
        assert status(mount)["counters"]["damaged_chunks"] >= 1, "nobody counted it"
    mount.umount()
    again = served.bytes_sent() - sent
    assert again > 0, "the damage was not noticed, so nothing was tried"
    if damage is flip_a_bit:
        assert again <= 2 * MIB, "more than the damaged chunk was fetched again"


@pytest.mark.parametrize(
    "damage", [cut_the_data, empty, remove], ids=lambda damage: damage.__name__
)
def test_damage_under_a_reader(
    identity: Identity,
    served: Served,
    new_mount: MakeMount,
    work: Path,
    damage: Callable[[Path], None],
) -> None:
    data = content(SIZE)
    mount = new_mount(identity, environment=served.environment(identity))
    mount.stage_in(served.put("input.dat", data), "input.dat")
    mount.stagefs("stage-in", "--wait", served.url("input.dat"), "staging:///warm")
    holder = Holder(mount, "staging/input.dat", work / "fifo", first=MIB)
    damage(object_file(mount.state / "cache", SIZE))
    assert holder.rest() == sha256(data)


def test_small_object_with_a_flipped_bit(
    anybody: Identity, served: Served, new_mount: MakeMount
) -> None:
    mount = new_mount(anybody, environment=served.environment(anybody))
    data = content(5000)
    mount.stage_in(served.put("small", data), "small")
    assert mount.read("staging/small") == data
    mount.umount()
    segment = next((mount.state / "cache" / "segments").iterdir())
    flip(segment, segment.read_bytes().index(data[1000:1100]))
    mount.mount()
    assert mount.read("staging/small") == data


def test_whole_cache_is_gone(anybody: Identity, served: Served, new_mount: MakeMount) -> None:
    mount = new_mount(anybody, environment=served.environment(anybody))
    data = content(3 * MIB)
    mount.stage_in(served.put("input.dat", data), "input.dat")
    assert mount.read("staging/input.dat") == data
    mount.umount()
    cache = mount.state / "cache"
    for path in sorted(cache.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    cache.rmdir()
    mount.mount()
    assert mount.read("staging/input.dat") == data


def test_object_is_replaced_under_a_reader(
    identity: Identity, served: Served, new_mount: MakeMount, work: Path
) -> None:
    old, new = content(96 * MIB, "old"), content(96 * MIB, "new")
    mount = new_mount(
        identity,
        settings='[read]\nwindow_bytes_max = "4MiB"\n[namespace]\nrevalidate_s = "200ms"\n',
        environment=served.environment(identity),
    )
    mount.stage_in(served.put("input.dat", old), "input.dat")
    holder = Holder(mount, "staging/input.dat", work / "fifo", first=4 * MIB)
    assert int(mount.xattr("staging/input.dat", "cached")) < len(old), "nothing is left to fetch"
    served.put("input.dat", new)
    assert holder.rest() in {"ESTALE", sha256(old)}
    wait_until(
        lambda: mount.sha256("staging/input.dat") == sha256(new), "the new version in a new open"
    )


def test_object_is_gone(identity: Identity, served: Served, new_mount: MakeMount) -> None:
    mount = new_mount(identity, environment=served.environment(identity))
    mount.stage_in(served.put("input.dat", content(3 * MIB)), "input.dat")
    served.remove("input.dat")
    done = mount.run("cat", "MNT/staging/input.dat", check=False)
    assert done.returncode == 1
    assert done.stdout == b""
    assert served.url("input.dat") in mount.xattr("staging/input.dat", "error")
