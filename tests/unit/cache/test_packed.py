"""Small objects in segments: stored by the thousand, found without a scan, never wrong."""

import os
from pathlib import Path

import pytest

from stagefs.cache.entry import ABSENT, VERIFIED
from stagefs.cache.loading import PACKED_BYTES_MAX
from stagefs.cache.packed import SmallObject
from stagefs.model import MIB
from tests.unit.cache.filling import (
    content,
    fetch,
    find,
    flip,
    found,
    killed_after,
    object_id,
    opened,
    read,
    small,
    store,
)


def segments(directory: Path) -> list[Path]:
    return sorted((directory / "segments").iterdir())


def place_of(directory: Path, name: str, size_bytes: int) -> tuple[Path, int]:
    """Where the data of an object lies."""
    data = content(name, size_bytes)
    for segment in segments(directory):
        offset = segment.read_bytes().find(data)
        if offset >= 0:
            return segment, offset
    raise AssertionError(f"{name} is in no segment")


def test_stored_objects_are_whole_and_verified(tmp_path: Path) -> None:
    sizes = {"empty": 0, "one": 1, "page": 4096, "largest": PACKED_BYTES_MAX}
    # Of files; a record is one chunk all the same.
    with opened(tmp_path / "c", chunk_bytes=64 << 10) as cache:
        entries = cache.store_small([small(name, size) for name, size in sizes.items()])
        for entry, (name, size) in zip(entries, sizes.items(), strict=True):
            assert read(entry) == content(name, size)
            assert entry.is_complete
            assert entry.cached_bytes == size
            assert set(entry.state) <= {VERIFIED}
            assert find(cache, name, size) is entry
    with opened(tmp_path / "c") as cache:
        for name, size in sizes.items():
            again = found(cache, name, size)
            assert again.verify(0, again.chunk_count)
            assert read(again) == content(name, size)


def test_thousands_take_one_file(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        cache.store_small([small(f"o{number}", 1000) for number in range(3000)])
        assert len(segments(tmp_path / "c")) == 1
        assert cache.counters().stored_records == 3000
    with opened(tmp_path / "c") as cache:
        assert all(
            read(found(cache, f"o{number}", 1000)) == content(f"o{number}", 1000)
            for number in range(0, 3000, 100)
        )


def test_a_full_segment_is_followed_by_another(tmp_path: Path) -> None:
    with opened(tmp_path / "c", capacity_bytes=32 * MIB) as cache:  # segments of 1 MiB
        names = [f"o{number}" for number in range(50)]
        cache.store_small([small(name, 50_000) for name in names])
        assert len(segments(tmp_path / "c")) == 3
        assert all(path.stat().st_size <= MIB for path in segments(tmp_path / "c"))
        assert all(read(found(cache, name, 50_000)) == content(name, 50_000) for name in names)


def test_appending_goes_on_after_a_restart(tmp_path: Path) -> None:
    for number in range(3):
        with opened(tmp_path / "c") as cache:
            cache.store_small([small(f"o{number}")])
    assert len(segments(tmp_path / "c")) == 1
    with opened(tmp_path / "c") as cache:
        assert all(find(cache, f"o{number}", 100) for number in range(3))


def test_kill_9_keeps_what_was_stored(tmp_path: Path) -> None:
    with opened(tmp_path / "c"):
        pass
    killed_after(tmp_path / "c", "cache.store_small([small(f'o{n}') for n in range(500)])")
    with opened(tmp_path / "c") as cache:
        assert all(find(cache, f"o{number}", 100) for number in range(500))


def test_records_the_index_was_not_told_of_are_found_at_start(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        cache.store_small([small("before")])
    index = (tmp_path / "c" / "index.sqlite").read_bytes()
    with opened(tmp_path / "c") as cache:
        cache.store_small([small("after"), small("later")])
    (tmp_path / "c" / "index.sqlite").write_bytes(index)
    with opened(tmp_path / "c") as cache:
        assert all(find(cache, name, 100) for name in ("before", "after", "later"))


@pytest.mark.parametrize("where", ["data", "header", "mark"])
def test_a_damaged_record_is_never_served(tmp_path: Path, where: str) -> None:
    with opened(tmp_path / "c") as cache:
        cache.store_small([small(name, 3000) for name in ("a", "b", "c")])
    path, offset = place_of(tmp_path / "c", "b", 3000)
    head = path.read_bytes().rfind(b"LIVE", 0, offset)
    flip(path, {"data": offset + 1500, "header": offset - 5, "mark": head}[where])
    with opened(tmp_path / "c") as cache:
        entry = find(cache, "b", 3000)
        if where == "data":
            assert entry is not None
            assert not entry.verify(0)
            assert entry.state[0] == ABSENT
            assert cache.counters().damaged_chunks == 1
            fetch(entry, "b")
            assert read(entry) == content("b", 3000)
        else:
            assert entry is None
            assert cache.counters().damaged_entries == 1
            cache.store_small([small("b", 3000)])
        assert all(found(cache, name, 3000).verify(0) for name in ("a", "b", "c"))
    with opened(tmp_path / "c") as cache:
        assert all(read(found(cache, n, 3000)) == content(n, 3000) for n in ("a", "b", "c"))


def test_a_segment_cut_short_loses_only_what_was_cut(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        cache.store_small([small(f"o{number}", 1000) for number in range(10)])
    path, offset = place_of(tmp_path / "c", "o5", 1000)
    os.truncate(path, offset + 10)
    with opened(tmp_path / "c") as cache:
        here = [n for n in range(10) if (e := find(cache, f"o{n}", 1000)) and e.verify(0)]
        assert here == [0, 1, 2, 3, 4]
        cache.store_small([small(f"o{number}", 1000) for number in range(5, 10)])
    with opened(tmp_path / "c") as cache:
        assert all(found(cache, f"o{number}", 1000).verify(0) for number in range(10))


def test_a_discarded_record_stays_away(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        entry = cache.store_small([small("a"), small("b")])[0]
        entry.discard()
        assert find(cache, "a", 100) is None
    (tmp_path / "c" / "index.sqlite").unlink()
    with opened(tmp_path / "c") as cache:
        assert cache.rebuild_index()
        assert find(cache, "a", 100) is None
        assert find(cache, "b", 100) is not None


def test_the_newer_of_two_records_counts(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        for validator in ("etag:old", "etag:new"):
            again = SmallObject(object_id=object_id("a"), data=b"same", validator=validator)
            cache.store_small([again])
    (tmp_path / "c" / "index.sqlite").unlink()
    with opened(tmp_path / "c") as cache:
        cache.rebuild_index()
        assert found(cache, "a", 4).validator == "etag:new"
        assert cache.usage().entries == 1


def test_what_is_absent_of_many_is_known_at_once(tmp_path: Path) -> None:
    """Packed, in a file of its own, open or not: whatever is there is not called absent."""
    names = [f"o{number}" for number in range(1300)]
    with opened(tmp_path / "c") as cache:
        cache.store_small([small(name, 100) for name in names[:600]])
        store(cache, "own", 1000)
        keys = {object_id(name).key: name for name in (*names, "own")}
        assert {keys[key] for key in cache.absent(list(keys))} == set(names[600:])
    with opened(tmp_path / "c") as cache:
        assert {keys[key] for key in cache.absent(list(keys))} == set(names[600:])
