"""A disk with no room left: the cache says CacheFailed, keeps what it has, and goes on after."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagefs.cache.store import Cache
from stagefs.errors import CacheFailed
from stagefs.model import MIB
from tests.unit.cache.filling import (
    CHUNK,
    Clock,
    begin,
    content,
    find,
    found,
    opened,
    read,
    small,
    store,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a tmpfs")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def store_data(cache: Cache, name: str, data: bytes) -> None:
    entry = begin(cache, name, len(data))
    cache.hold(entry)
    for chunk in range(entry.chunk_count):
        entry.commit_data(chunk, data[chunk * CHUNK : (chunk + 1) * CHUNK])


def fill_up(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for piece in (MIB, 4096):
            try:
                while file.write(bytes(piece)) == piece:
                    pass
            except OSError:
                continue
    return filler


def test_a_full_disk_refuses_and_recovers(disk: Path) -> None:
    with opened(disk / "c") as cache:
        store(cache, "before", MIB)
        cache.store_small([small("small before")])
        filler = fill_up(disk)
        data = content("after", MIB)
        with pytest.raises(CacheFailed, match="No space left on device"):
            store_data(cache, "after", data)
        with pytest.raises(CacheFailed, match="No space left on device"):
            cache.store_small([small(f"s{number}", 60_000) for number in range(20)])
        assert cache.over_capacity()
        assert cache.headroom_bytes <= 0
        cache.flush_index()
        assert read(found(cache, "before", MIB)) == content("before", MIB)
        assert read(found(cache, "small before", 100)) == content("small before", 100)
        assert find(cache, "s3", 60_000) is None
        filler.unlink()
        cache.store_small([small("small after")])
        store(cache, "later", MIB)
        cache.flush_index()
    with opened(disk / "c") as cache:
        for name in ("before", "later"):
            assert found(cache, name, MIB).verify(0, 16)
        assert found(cache, "small after", 100).verify(0)
        assert found(cache, "small before", 100).verify(0)


def test_room_can_be_made_on_a_full_disk(disk: Path) -> None:
    """Every write fails; unlinking must not need one."""
    with opened(disk / "c", clock=Clock()) as cache:
        for number in range(5):
            store(cache, f"o{number}", MIB)
        cache.store_small([small(f"s{number}", 10_000) for number in range(100)])
        cache.flush_index()
        fill_up(disk)
        assert cache.over_capacity()
        assert cache.make_room() >= MIB
        assert cache.headroom_bytes > 0
        assert cache.counters().evicted_entries <= 105, "the same entry went more than once"
        store(cache, "new", MIB // 2)
        assert read(found(cache, "new", MIB // 2)) == content("new", MIB // 2)


def test_a_disk_that_was_full_from_the_start(disk: Path) -> None:
    fill_up(disk)
    with pytest.raises(CacheFailed):
        Cache.open(disk / "c", capacity_bytes=64 * MIB)


def test_more_than_the_disk_holds_passes_through(disk: Path) -> None:
    """The capacity is far larger than the disk: the free-space floor makes the room."""
    size = MIB
    with opened(disk / "c", chunk_bytes=CHUNK) as cache:
        for number in range(40):
            name = f"o{number}"
            data = content(name, size)
            entry = begin(cache, name, size)
            cache.hold(entry)
            for chunk in range(16):
                if cache.headroom_bytes < CHUNK:
                    cache.make_room()
                entry.commit_data(chunk, data[chunk * CHUNK : (chunk + 1) * CHUNK])
            assert read(entry) == data
            cache.drop(entry)
        assert cache.counters().evicted_entries > 20
