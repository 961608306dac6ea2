"""Looking into a directory without a daemon: right, read-only, and content with no index."""

import os
from pathlib import Path

import pytest

from stagefs.cache.inspect import CacheDirectory, EntrySummary, FoundDamage, Verifying
from stagefs.errors import InvalidName, NewerFormat, UnsuitableState
from stagefs.model import MIB
from tests.unit.cache.filling import (
    CHUNK,
    begin,
    disk_bytes,
    fetch,
    flip,
    object_file,
    object_id,
    opened,
    small,
    store,
)


@pytest.fixture(params=["index", "no index"])
def directory(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    directory = tmp_path / "c"
    with opened(directory) as cache:
        store(cache, "whole", MIB)
        store(cache, "part", MIB + 10, range(3, 9))
        cache.store_small([small("small"), small("empty", 0), small("small")])
        cache.pin([(object_id("part").key, "http://host/part")], owner="task 7")
    if request.param == "no index":
        (directory / "index.sqlite").unlink()
    return directory


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in directory.rglob("*")
    }


def damage_in(directory: Path) -> list[FoundDamage]:
    return [step for step in CacheDirectory(directory).verify() if isinstance(step, FoundDamage)]


def test_list(directory: Path) -> None:
    listed = {entry.url.removeprefix("http://host/"): entry for entry in inspected(directory)}
    assert set(listed) == {"whole", "part", "small", "empty"}
    assert listed["whole"].cached_bytes == listed["whole"].size_bytes == MIB
    assert listed["part"].cached_bytes == 6 * CHUNK
    assert listed["part"].pinned
    assert not listed["whole"].pinned
    key = object_id("whole").key
    assert (listed["whole"].key, listed["whole"].place) == (key, f"objects/{key[:2]}/{key}")
    assert listed["small"].place.startswith("segments/000001@")


def inspected(directory: Path) -> list[EntrySummary]:
    return list(CacheDirectory(directory).entries())


def test_looking_changes_nothing(directory: Path) -> None:
    before = snapshot(directory)
    looked = CacheDirectory(directory)
    list(looked.entries())
    looked.usage()
    looked.show("http://host/part")
    list(looked.verify())
    assert snapshot(directory) == before


def test_usage(directory: Path) -> None:
    usage = CacheDirectory(directory).usage()
    assert usage.entries == 4
    assert usage.cached_bytes == MIB + 6 * CHUNK + 100
    assert usage.used_bytes == disk_bytes(directory)
    assert usage.pinned_bytes >= 6 * CHUNK
    assert usage.leases == 1
    assert usage.daemon is None
    assert usage.index_complete == (directory / "index.sqlite").exists()


@pytest.mark.parametrize("by", ["key", "url"])
def test_show(directory: Path, by: str) -> None:
    subject = object_id("part").key if by == "key" else "http://host/part"
    (detail,) = CacheDirectory(directory).show(subject)
    assert detail.present == [(3, 6)]
    assert (detail.chunk_bytes, detail.chunk_count) == (CHUNK, 17)
    assert [lease.owner for lease in detail.leases] == ["task 7"]
    assert detail.validator == "etag:1"


def test_show_a_packed_object(directory: Path) -> None:
    (detail,) = CacheDirectory(directory).show("http://host/small")
    assert detail.present == [(0, 1)]


def test_show_what_is_not_there(directory: Path) -> None:
    with pytest.raises(InvalidName, match="nothing is cached of http://host/none"):
        CacheDirectory(directory).show("http://host/none")


def test_verify_a_sound_cache(directory: Path) -> None:
    steps = list(CacheDirectory(directory).verify())
    last = steps[-1]
    assert isinstance(last, Verifying)
    assert last.done_bytes == last.total_bytes == MIB + 6 * CHUNK + 200  # "small" is there twice
    assert not damage_in(directory)


def test_verify_finds_each_damage_and_names_it(directory: Path) -> None:
    whole = object_file(directory, "whole")
    flip(whole, 5 * CHUNK + 1)
    flip(whole, 7 * CHUNK + 1)
    part = object_file(directory, "part")
    os.truncate(part, 100)
    segment = directory / "segments" / "000001"
    flip(segment, segment.stat().st_size - 20)
    found = damage_in(directory)
    key = object_id("whole").key
    assert {(each.path, each.chunk) for each in found if each.key == key} == {
        (str(whole), 5),
        (str(whole), 7),
    }
    assert [each.path for each in found if each.key == object_id("part").key] == [str(part)]
    assert [each.url for each in found if each.path == str(segment)] == ["http://host/small"]
    assert len(found) == 4


def test_a_damaged_stretch_of_a_segment(directory: Path) -> None:
    segment = directory / "segments" / "000001"
    flip(segment, 16)
    (found,) = damage_in(directory)
    assert (found.path, found.key) == (str(segment), None)


def test_beside_a_daemon(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        store(cache, "flushed", MIB)
        cache.flush_index()
        entry = begin(cache, "just now", MIB)
        cache.hold(entry)
        fetch(entry, "just now", range(2))
        looked = CacheDirectory(tmp_path / "c")
        listed = {each.url: each.cached_bytes for each in looked.entries()}
        assert listed == {"http://host/flushed": MIB, "http://host/just now": 2 * CHUNK}
        assert looked.usage().daemon == f"process {os.getpid()} on {os.uname().nodename}"
        cache.drop(entry)


def test_only_a_cache_directory_is_looked_into(tmp_path: Path) -> None:
    for other in (tmp_path, tmp_path / "none", Path("/dev/null")):
        with pytest.raises(UnsuitableState, match=r"CACHEDIR\.TAG"):
            CacheDirectory(other)


def test_a_newer_format_is_not_guessed_at(tmp_path: Path) -> None:
    with opened(tmp_path / "c"):
        pass
    (tmp_path / "c" / "version").write_text("stagefs cache format 9\n")
    with pytest.raises(NewerFormat, match="format 9"):
        CacheDirectory(tmp_path / "c")
