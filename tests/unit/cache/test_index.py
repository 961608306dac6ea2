"""The index is derived: it may be missing, damaged or behind, and nothing is lost."""

import sqlite3
from pathlib import Path

import pytest

from stagefs.cache.store import Cache
from stagefs.errors import CacheFailed
from stagefs.model import MIB
from tests.unit.cache.filling import (
    CHUNK,
    begin,
    content,
    disk_bytes,
    fetch,
    find,
    flip,
    found,
    killed_after,
    object_file,
    object_id,
    opened,
    read,
    small,
    store,
)


def fill(directory: Path) -> None:
    with opened(directory) as cache:
        for number in range(5):
            store(cache, f"o{number}", MIB)
        cache.store_small([small(f"s{number}") for number in range(50)])


def assert_all_there(cache: Cache) -> None:
    assert all(found(cache, f"o{number}", MIB).verify(0, 16) for number in range(5))
    assert all(read(found(cache, f"s{n}", 100)) == content(f"s{n}", 100) for n in range(50))


def no_index(path: Path) -> None:
    path.unlink()


def garbage(path: Path) -> None:
    path.write_bytes(b"no database at all" * 1000)


def another_format(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 99")
    connection.close()


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize("spoil", [no_index, garbage, another_format, cut_short])
def test_it_is_rebuilt_from_the_files(tmp_path: Path, spoil: object) -> None:
    assert callable(spoil)
    directory = tmp_path / "c"
    fill(directory)
    spoil(directory / "index.sqlite")
    with opened(directory) as cache:
        assert find(cache, "o1", MIB) is not None, "objects' files need no index"
        store(cache, "new", MIB)
        if cache.index_complete:  # the opening did not look where the damage lies
            with pytest.raises(CacheFailed):
                cache.rows()
        for _ in range(3):  # the first notices, a later one ends
            cache.flush_index()
        assert cache.index_complete
        assert cache.usage().entries == 56
        assert_all_there(cache)
        cache.flush_index()
        assert abs(cache.used_bytes - disk_bytes(directory)) < CHUNK
        cache.capacity_bytes = 0
        cache.make_room()
        assert find(cache, "o1", MIB) is None, "a file without a row cannot be evicted"
    with opened(directory) as cache:
        assert cache.index_complete


def test_a_rebuild_counts_and_removes_damaged_files(tmp_path: Path) -> None:
    fill(tmp_path / "c")
    (tmp_path / "c" / "index.sqlite").unlink()
    path = object_file(tmp_path / "c", "o3")
    flip(path, path.stat().st_size - 1)
    with opened(tmp_path / "c") as cache:
        cache.rebuild_index()
        assert cache.counters().damaged_entries == 1
        assert not path.exists()
        assert cache.usage().entries == 54


def test_a_rebuild_ends_when_the_cache_closes(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        cache.store_small([small(f"s{number}") for number in range(500)])
    (tmp_path / "c" / "index.sqlite").unlink()
    with opened(tmp_path / "c") as cache:
        cache.stop_rebuilding()
        assert not cache.rebuild_index()
        assert not cache.index_complete
    with opened(tmp_path / "c") as cache:
        assert not cache.index_complete, "an unfinished rebuild counts as none"
        assert cache.rebuild_index()
        assert cache.usage().entries == 500


def test_after_kill_9_every_file_is_known_and_counted(tmp_path: Path) -> None:
    directory = tmp_path / "c"
    fill(directory)
    killed_after(
        directory,
        """
        for number in range(3):
            store(cache, f"late{number}", MIB)
        grown = begin(cache, "grown", MIB)
        cache.hold(grown)
        fetch(grown, "grown", range(0, 2))
        cache.flush_index()
        fetch(grown, "grown", range(2, 9))
        """,
    )
    with opened(directory) as cache:
        assert cache.index_complete
        cache.flush_index()
        assert abs(cache.used_bytes - disk_bytes(directory)) < CHUNK
        rows = {row.url: row for row in cache.rows()}
        assert len(rows) == 59
        assert rows[b"http://host/grown"].cached_bytes == 9 * CHUNK
        assert rows[b"http://host/late2"].cached_bytes == MIB
        cache.capacity_bytes = 0
        cache.make_room()
    assert not [path for path in (directory / "objects").rglob("*") if path.is_file()]
    assert not list((directory / "segments").iterdir())


def test_kill_9_in_the_middle_of_an_eviction(tmp_path: Path) -> None:
    directory = tmp_path / "c"
    fill(directory)
    killed_after(
        directory,
        """
        cache.capacity_bytes = 3 << 20
        plan = cache.plan_room()
        os.unlink(object_file(cache.directory, "o0"))
        """,
    )
    with opened(directory) as cache:
        assert find(cache, "o0", MIB) is None
        assert found(cache, "o1", MIB).verify(0, 16)
        cache.capacity_bytes = 0
        cache.make_room()
        cache.flush_index()
        assert cache.usage().entries == 0
        assert abs(cache.used_bytes - disk_bytes(directory)) < CHUNK


def test_used_bytes_follow_the_disk(tmp_path: Path) -> None:
    directory = tmp_path / "c"
    with opened(directory) as cache:
        for number in range(5):
            store(cache, f"o{number}", MIB)
            cache.store_small([small(f"s{number}", 5000)])
            assert abs(cache.used_bytes - disk_bytes(directory)) < 4 * CHUNK
        found(cache, "o1", MIB).discard()
        cache.flush_index()
        assert abs(cache.used_bytes - disk_bytes(directory)) < CHUNK
        usage = cache.usage()
        assert usage.entries == 9
        assert usage.cached_bytes == 4 * MIB + 25_000
    with opened(directory) as cache:
        assert abs(cache.used_bytes - disk_bytes(directory)) < CHUNK


def test_entries_of_a_url_are_found(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        store(cache, "a", MIB)
        store(cache, "b", MIB)
        (row,) = cache.rows(url="http://host/a")
        assert row.key.hex() == object_id("a").key
        assert cache.rows(url="http://host/none") == []


def test_entries_are_listed_in_pages(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        cache.store_small([small(f"s{number}") for number in range(25)])
        keys: list[str] = []
        while page := cache.rows_after(keys[-1] if keys else "", limit=10):
            assert len(page) <= 10
            keys += [row.key.hex() for row in page]
        assert keys == sorted(object_id(f"s{number}").key for number in range(25))
        row = cache.row(keys[3])
        assert row is not None
        assert row.size_bytes == 100


def test_it_goes_on_when_the_index_fails(tmp_path: Path) -> None:
    """The index is no condition for reading: files are found by their names."""
    directory = tmp_path / "c"
    with opened(directory) as cache:
        store(cache, "a", MIB)
        cache.flush_index()
        lock = sqlite3.connect(directory / "index.sqlite", isolation_level=None)
        lock.execute("DROP TABLE entries")
        lock.close()
        entry = begin(cache, "b", MIB)
        cache.hold(entry)
        fetch(entry, "b")
        cache.drop(entry)
        cache.flush_index()
        assert cache.counters().index_failures > 0
        assert read(found(cache, "a", MIB)) == content("a", MIB)
        assert read(found(cache, "b", MIB)) == content("b", MIB)
        assert find(cache, "small", 100) is None
