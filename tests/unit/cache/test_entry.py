"""Objects with files of their own: what is committed stays, what is damaged is noticed."""

import os
from pathlib import Path

import pytest

from stagefs.cache.entry import ABSENT, PRESENT, VERIFIED
from stagefs.errors import CacheFailed
from stagefs.model import Checksum, ChecksumKind
from tests.unit.cache.filling import (
    CHUNK,
    begin,
    content,
    fetch,
    find,
    flip,
    found,
    killed_after,
    object_file,
    object_id,
    opened,
    read,
    store,
)

SIZE = 4 * CHUNK + 1000


def test_nothing_is_cached_at_first(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        assert find(cache, "a", SIZE) is None
        assert cache.counters().damaged_entries == 0


def test_committed_chunks_are_verified_at_once_and_present_after_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        entry = store(cache, "a", SIZE, range(1, 5))
        assert entry.state == bytearray([ABSENT, VERIFIED, VERIFIED, VERIFIED, VERIFIED])
        assert entry.cached_bytes == SIZE - CHUNK
        assert not entry.is_complete
    with opened(tmp_path / "c") as cache:
        again = found(cache, "a", SIZE)
        assert again.state == bytearray([ABSENT, PRESENT, PRESENT, PRESENT, PRESENT])
        assert again.verify(1, 4)
        assert again.state == bytearray([ABSENT, VERIFIED, VERIFIED, VERIFIED, VERIFIED])
        assert read(again)[CHUNK:] == content("a", SIZE)[CHUNK:]


def test_what_is_known_of_the_object_comes_back(tmp_path: Path) -> None:
    checksum = Checksum(ChecksumKind.MD5, "0" * 32)
    with opened(tmp_path / "c") as cache:
        entry = cache.create(
            object_id("a"), size_bytes=SIZE, validator='etag:"x"', mtime_ns=5, checksum=checksum
        )
        cache.hold(entry)
        fetch(entry, "a")
        cache.drop(entry)
    with opened(tmp_path / "c", chunk_bytes=4 * CHUNK) as cache:
        again = found(cache, "a", SIZE)
        assert again.object_id == object_id("a")
        assert (again.validator, again.mtime_ns, again.checksum) == ('etag:"x"', 5, checksum)
        assert again.chunk_bytes == CHUNK, "an entry keeps the chunk size it was made with"


@pytest.mark.parametrize("chunk", [0, 4])
def test_a_flipped_bit_is_noticed_and_the_chunk_can_be_fetched_again(
    tmp_path: Path, chunk: int
) -> None:
    with opened(tmp_path / "c") as cache:
        store(cache, "a", SIZE)
    flip(object_file(tmp_path / "c", "a"), chunk * CHUNK + 77)
    with opened(tmp_path / "c") as cache:
        entry = found(cache, "a", SIZE)
        epoch = entry.epoch
        assert not entry.verify(chunk)
        assert entry.state[chunk] == ABSENT
        assert entry.epoch != epoch
        assert cache.counters().damaged_chunks == 1
        assert all(entry.verify(other) for other in range(5) if other != chunk)
        fetch(entry, "a", range(chunk, chunk + 1))
        assert read(entry) == content("a", SIZE)
    with opened(tmp_path / "c") as cache:
        assert found(cache, "a", SIZE).verify(0, 5)


def test_damage_once_noticed_is_not_trusted_after_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        store(cache, "a", SIZE)
    flip(object_file(tmp_path / "c", "a"), 5)
    with opened(tmp_path / "c") as cache:
        found(cache, "a", SIZE).verify(0)
    with opened(tmp_path / "c") as cache:
        assert found(cache, "a", SIZE).state[0] == ABSENT


def test_a_damaged_slot_is_a_damaged_chunk(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        store(cache, "a", SIZE)
    path = object_file(tmp_path / "c", "a")
    flip(path, path.stat().st_size - 40 - 8 * 2)  # the slot of the last chunk but one
    with opened(tmp_path / "c") as cache:
        entry = found(cache, "a", SIZE)
        assert [entry.verify(chunk) for chunk in range(5)] == [True, True, True, False, True]


def trailer(path: Path) -> int:
    return -(-SIZE // 4096) * 4096


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: os.truncate(path, 2 * CHUNK), id="truncated data"),
        pytest.param(lambda path: os.truncate(path, trailer(path)), id="deleted map"),
        pytest.param(lambda path: os.truncate(path, 0), id="empty"),
        pytest.param(lambda path: flip(path, trailer(path) + 3), id="header"),
        pytest.param(lambda path: flip(path, path.stat().st_size - 1), id="footer's hash"),
        pytest.param(lambda path: flip(path, path.stat().st_size - 20), id="footer"),
        pytest.param(lambda path: path.write_bytes(path.read_bytes() + b"x"), id="longer"),
        pytest.param(lambda path: (path.unlink(), path.mkdir()), id="a directory"),
    ],
)
def test_a_damaged_file_is_a_counted_miss_and_can_be_replaced(
    tmp_path: Path, damage: object
) -> None:
    assert callable(damage)
    with opened(tmp_path / "c") as cache:
        store(cache, "a", SIZE)
    path = object_file(tmp_path / "c", "a")
    damage(path)
    with opened(tmp_path / "c") as cache:
        assert find(cache, "a", SIZE) is None
        counters = cache.counters()
        assert counters.damaged_entries + counters.open_failures == 1
        if path.is_dir():
            return
        store(cache, "a", SIZE)
        assert read(found(cache, "a", SIZE)) == content("a", SIZE)


def test_a_file_under_another_name_is_not_believed(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        store(cache, "a", SIZE)
        store(cache, "b", SIZE)
    os.replace(object_file(tmp_path / "c", "a"), object_file(tmp_path / "c", "b"))
    with opened(tmp_path / "c") as cache:
        assert find(cache, "b", SIZE) is None
        assert cache.counters().damaged_entries == 1


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        store(cache, "a", SIZE)
    path = object_file(tmp_path / "c", "a")
    os.replace(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with opened(tmp_path / "c") as cache:
        assert find(cache, "a", SIZE) is None
    assert (tmp_path / "elsewhere").stat().st_size > SIZE


def test_another_size_is_not_served(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        store(cache, "a", SIZE)
        assert find(cache, "a", SIZE + 1) is None
        assert cache.counters().damaged_entries == 1
        assert find(cache, "a", SIZE) is None, "what two sides disagree about is dropped"


def test_kill_9_keeps_what_was_committed(tmp_path: Path) -> None:
    with opened(tmp_path / "c"):
        pass
    killed_after(
        tmp_path / "c",
        f"""
        entry = begin(cache, "a", {SIZE})
        cache.hold(entry)
        fetch(entry, "a", range(0, 3))
        os.pwrite(entry.fd, b"half", 3 * {CHUNK})
        """,
    )
    with opened(tmp_path / "c") as cache:
        entry = found(cache, "a", SIZE)
        assert entry.state == bytearray([PRESENT, PRESENT, PRESENT, ABSENT, ABSENT])
        assert entry.verify(0, 3)


def test_nothing_stays_of_an_entry_that_was_never_committed(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        entry = begin(cache, "a", SIZE)
        cache.hold(entry)
        os.pwrite(entry.fd, b"x" * 1000, 0)
        cache.drop(entry)
        assert find(cache, "a", SIZE) is None
        assert not list((tmp_path / "c" / "incoming").iterdir())


def test_what_was_reserved_and_did_not_come_is_given_back(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        entry = begin(cache, "a", SIZE)
        cache.hold(entry)
        entry.reserve(0, 5)
        assert os.fstat(entry.fd).st_blocks * 512 >= SIZE, "nothing was reserved"
        fetch(entry, "a", range(1, 3))
        entry.give_back([0, 1, 3, 4])
        assert os.fstat(entry.fd).st_blocks * 512 < 3 * CHUNK
        assert entry.state == bytearray([ABSENT, VERIFIED, VERIFIED, ABSENT, ABSENT])
        assert read(entry)[CHUNK : 3 * CHUNK] == content("a", SIZE)[CHUNK : 3 * CHUNK]
        fetch(entry, "a")
        assert read(entry) == content("a", SIZE)
        cache.drop(entry)


def test_commit_data_writes_and_takes_in(tmp_path: Path) -> None:
    data = content("a", SIZE)
    with opened(tmp_path / "c") as cache:
        entry = begin(cache, "a", SIZE)
        cache.hold(entry)
        for chunk in range(5):
            entry.commit_data(chunk, memoryview(data)[chunk * CHUNK : (chunk + 1) * CHUNK])
        assert entry.is_complete
        assert read(entry) == data
        cache.drop(entry)
    with opened(tmp_path / "c") as cache:
        assert found(cache, "a", SIZE).verify(0, 5)


def test_committing_bytes_that_never_came_fails(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        entry = begin(cache, "a", SIZE)
        with pytest.raises(CacheFailed):
            entry.commit(0)
        assert entry.state[0] == ABSENT


def test_dropped_chunks_are_gone_at_once_and_for_good(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        entry = store(cache, "a", SIZE)
        epoch = entry.epoch
        entry.drop_chunks(1, 2)
        assert entry.state == bytearray([VERIFIED, ABSENT, ABSENT, VERIFIED, VERIFIED])
        assert entry.epoch != epoch
    with opened(tmp_path / "c") as cache:
        state = found(cache, "a", SIZE).state
        assert state == bytearray([PRESENT, ABSENT, ABSENT, PRESENT, PRESENT])


def test_a_discarded_entry_is_gone_but_can_be_made_again(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        entry = store(cache, "a", SIZE)
        cache.hold(entry)
        before = cache.used_bytes
        entry.discard()
        assert entry.gone
        assert set(entry.state) == {ABSENT}
        assert before - cache.used_bytes >= SIZE
        assert find(cache, "a", SIZE) is None
        again = store(cache, "a", SIZE)
        fetch(entry, "a", range(1))  # a fetch that was under way: kept nowhere, harms nobody
        cache.drop(entry)
        assert find(cache, "a", SIZE) is again
    with opened(tmp_path / "c") as cache:
        assert found(cache, "a", SIZE).verify(0, 5)


def test_an_entry_made_anew_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        store(cache, "a", SIZE)
        before = cache.used_bytes
        again = store(cache, "a", SIZE)
        assert find(cache, "a", SIZE) is again
        assert abs(cache.used_bytes - before) < CHUNK
    with opened(tmp_path / "c") as cache:
        assert found(cache, "a", SIZE).verify(0, 5)


def test_an_empty_object_needs_no_chunk(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        entry = begin(cache, "empty", 0)
        assert entry.is_complete
        assert entry.cached_bytes == 0


def test_the_same_entry_is_given_while_it_is_known(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        store(cache, "a", SIZE)
        assert find(cache, "a", SIZE) is find(cache, "a", SIZE)


def test_a_million_chunks_load_quickly_and_right(tmp_path: Path) -> None:
    """A sparse object of 64 GiB, of which three chunks are here."""
    size = 1_000_000 * CHUNK
    with opened(tmp_path / "c") as cache:
        entry = begin(cache, "huge", size)
        cache.hold(entry)
        for chunk in (0, 77_777, 999_999):
            os.pwrite(entry.fd, b"\1" * CHUNK, chunk * CHUNK)
            entry.commit(chunk)
        cache.drop(entry)
        assert cache.used_bytes < 16 << 20
    with opened(tmp_path / "c") as cache:
        again = found(cache, "huge", size)
        here = [chunk for chunk in range(1_000_000) if again.state[chunk]]
        assert here == [0, 77_777, 999_999]
        assert again.verify(77_777)
