"""Making room: least recently used first, never what is held or leased, never a wrong byte."""

from pathlib import Path

import pytest

from stagefs.cache.entry import ABSENT, PRESENT, VERIFIED
from stagefs.cache.file_system import punch
from stagefs.cache.store import Cache
from stagefs.model import MIB
from tests.unit.cache.filling import (
    CHUNK,
    Clock,
    begin,
    content,
    disk_bytes,
    fetch,
    find,
    found,
    object_id,
    opened,
    read,
    small,
    store,
)

SIZE = MIB


def fill(cache: Cache, clock: Clock, count: int) -> list[str]:
    """``count`` objects of a mebibyte, the first the least recently used."""
    names = [f"o{number}" for number in range(count)]
    for name in names:
        cache.note_use(store(cache, name, SIZE))
        clock.advance()
    return names


def still_there(cache: Cache, names: list[str], size_bytes: int = SIZE) -> list[str]:
    return [name for name in names if find(cache, name, size_bytes) is not None]


@pytest.mark.parametrize("flushed", [True, False])
@pytest.mark.parametrize("restarted", [True, False])
def test_the_least_recently_used_go_first(
    tmp_path: Path, *, flushed: bool, restarted: bool
) -> None:
    clock = Clock()
    with opened(tmp_path / "c", clock=clock) as cache:
        names = fill(cache, clock, 10)
        cache.note_use(found(cache, "o2", SIZE))
        if flushed:
            cache.flush_index()
        if not restarted:
            cache.capacity_bytes = 83 * MIB // 10
            assert cache.over_capacity()
            assert cache.make_room() >= 2 * MIB
            assert not cache.over_capacity()
            assert still_there(cache, names) == ["o2", *names[4:]]
    if restarted:
        with opened(tmp_path / "c", clock=clock, capacity_bytes=83 * MIB // 10) as cache:
            assert cache.make_room() >= 2 * MIB
            assert still_there(cache, names) == ["o2", *names[4:]]


def test_the_directory_shrinks_by_what_was_freed(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path / "c", clock=clock) as cache:
        fill(cache, clock, 10)
        cache.flush_index()
        before = disk_bytes(tmp_path / "c")
        cache.capacity_bytes = 5 * MIB
        freed = cache.make_room()
        assert freed > 0
        assert before - disk_bytes(tmp_path / "c") >= freed - (64 << 10)
        cache.flush_index()
        assert abs(cache.used_bytes - disk_bytes(tmp_path / "c")) < 64 << 10


def test_held_and_leased_entries_stay(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path / "c", clock=clock) as cache:
        names = fill(cache, clock, 10)
        held = found(cache, "o0", SIZE)
        cache.hold(held)
        cache.pin([(object_id("o1").key, "url")], owner="me")
        cache.pin([(object_id("o2").key, "url")], owner="me", expires=clock.now + 10)
        cache.pin([(object_id("o3").key, "url")], owner="me", expires=clock.now - 10)
        cache.capacity_bytes = 6 * MIB
        cache.make_room()
        left = still_there(cache, names)
        assert left[:3] == ["o0", "o1", "o2"]
        assert "o3" not in left
        assert set(held.state) == {VERIFIED}
        clock.advance(60)
        cache.drop(held)
        cache.capacity_bytes = 3 * MIB
        cache.make_room()
        assert still_there(cache, names)[0] == "o1", "the pin has no end, the lease had"


def test_an_object_larger_than_the_cache_is_read_through_it(tmp_path: Path) -> None:
    """The point A8 in small: five times the capacity, one chunk in flight at a time."""
    size, capacity = 40 * MIB, 8 * MIB
    data = content("big", size)
    with opened(tmp_path / "c", capacity_bytes=capacity, chunk_bytes=4 * CHUNK) as cache:
        entry = begin(cache, "big", size)
        cache.hold(entry)
        for chunk in range(entry.chunk_count):
            start = chunk * entry.chunk_bytes
            entry.commit_data(chunk, data[start : start + entry.chunk_bytes])
            assert disk_bytes(tmp_path / "c") <= capacity + entry.chunk_bytes
            while cache.over_capacity():
                plan = cache.plan_room()
                assert plan is not None
                cache.carry_out(plan)
            assert entry.state[chunk] == VERIFIED, "what came last goes last"
        counters = cache.counters()
        assert counters.evicted_chunks > entry.chunk_count / 2
        assert all(
            read(entry)[start : start + entry.chunk_bytes]
            == data[start : start + entry.chunk_bytes]
            for chunk in range(entry.chunk_count)
            if entry.state[chunk] == VERIFIED
            for start in [chunk * entry.chunk_bytes]
        )
        cache.drop(entry)
    with opened(tmp_path / "c") as cache:
        again = found(cache, "big", size)
        here = [chunk for chunk in range(again.chunk_count) if again.state[chunk] == PRESENT]
        assert here
        assert here == list(range(here[0], again.chunk_count)), "the oldest were punched"
        assert all(again.verify(chunk) for chunk in here)


def test_readers_keep_off_from_the_moment_of_the_plan(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        entry = store(cache, "a", SIZE)
        cache.hold(entry)
        cache.capacity_bytes = SIZE // 2
        epoch = entry.epoch
        plan = cache.plan_room()
        assert plan is not None
        demoted = [chunk for chunk in range(16) if entry.state[chunk] == PRESENT]
        assert demoted
        assert entry.epoch != epoch
        cache.carry_out(plan)
        assert all(entry.state[chunk] == ABSENT for chunk in demoted)
        fetch(entry, "a")
        assert read(entry) == content("a", SIZE)


def test_a_chunk_that_is_read_again_before_the_punch_stays(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        entry = store(cache, "a", SIZE)
        cache.hold(entry)
        cache.capacity_bytes = SIZE // 2
        plan = cache.plan_room()
        assert plan is not None
        assert entry.verify(0)
        cache.carry_out(plan)
        assert entry.state[0] == VERIFIED
        assert read(entry)[:CHUNK] == content("a", SIZE)[:CHUNK]
        assert ABSENT in entry.state


def test_nobody_can_fetch_into_a_chunk_that_is_being_punched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk is ABSENT, which is when a fetch may begin, only after the hole is there."""
    states: list[int] = []

    def look(fd: int, start: int, length: int) -> None:
        states.extend(entry.state[start // CHUNK : (start + length) // CHUNK])
        punch(fd, start, length)

    with opened(tmp_path / "c") as cache:
        entry = store(cache, "a", SIZE)
        cache.hold(entry)
        cache.capacity_bytes = SIZE // 2
        plan = cache.plan_room()
        assert plan is not None
        monkeypatch.setattr("stagefs.cache.entry.punch", look)
        cache.carry_out(plan)
        assert states
        assert set(states) == {PRESENT}


def test_an_entry_asked_for_before_its_removal_is_rescued(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path / "c", clock=clock) as cache:
        names = fill(cache, clock, 4)
        before = cache.used_bytes
        cache.capacity_bytes = 2 * MIB
        plan = cache.plan_room()
        assert plan is not None
        rescued = found(cache, "o0", SIZE)
        freed = cache.carry_out(plan)
        assert "o0" in still_there(cache, names)
        assert rescued.verify(0, rescued.chunk_count)
        assert read(rescued) == content("o0", SIZE)
        assert abs(before - freed - cache.used_bytes) < 64 << 10
    with opened(tmp_path / "c", clock=clock) as cache:
        assert find(cache, "o0", SIZE) is not None, "what was asked for was removed all the same"


def test_an_entry_made_anew_before_its_removal_stays(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path / "c", clock=clock) as cache:
        fill(cache, clock, 4)
        cache.flush_index()
        cache.capacity_bytes = 2 * MIB
        plan = cache.plan_room()
        assert plan is not None
        store(cache, "o0", SIZE)
        cache.carry_out(plan)
        cache.flush_index()
    with opened(tmp_path / "c", clock=clock) as cache:
        assert found(cache, "o0", SIZE).verify(0)
        assert object_id("o0").key in [row.key.hex() for row in cache.rows()]


def test_an_evicted_entry_stays_readable_for_who_has_it(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        entry = store(cache, "a", SIZE)
        cache.capacity_bytes = 0
        cache.make_room()
        assert entry.gone
        assert not cache.hold(entry)
        assert read(entry) == content("a", SIZE)
        assert find(cache, "a", SIZE) is None


def test_fetching_again_what_was_evicted_lately_is_thrash(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path / "c", clock=clock) as cache:
        fill(cache, clock, 3)
        cache.capacity_bytes = 0
        cache.make_room()
        clock.advance(60)
        store(cache, "o0", SIZE)
        assert cache.counters().thrash == 1
        clock.advance(3600)
        store(cache, "o1", SIZE)
        assert cache.counters().thrash == 1


def test_whole_segments_go_and_what_was_used_lately_moves(tmp_path: Path) -> None:
    clock = Clock()
    size = 10_000
    names = [f"o{number}" for number in range(600)]  # six segments of a mebibyte
    with opened(tmp_path / "c", capacity_bytes=32 * MIB, clock=clock) as cache:
        for name in names:
            cache.store_small([small(name, size)])
        first = min((tmp_path / "c" / "segments").iterdir())
        clock.advance(1000)
        held = found(cache, "o1", size)
        cache.hold(held)
        cache.pin([(object_id("o2").key, "url")], owner="me")
        cache.note_use(found(cache, "o3", size))
        cache.flush_index()
        cache.capacity_bytes = 6 * MIB
        assert cache.make_room() > MIB // 2, "what must stay was moved round and round"
        assert not first.exists()
        left = still_there(cache, names, size)
        assert left[:3] == ["o1", "o2", "o3"]
        assert "o0" not in left
        assert "o599" in left
        assert all(read(found(cache, name, size)) == content(name, size) for name in left)
        assert read(held) == content("o1", size)
        cache.drop(held)
    with opened(tmp_path / "c", clock=clock) as cache:
        assert still_there(cache, names, size) == left
        assert all(found(cache, name, size).verify(0) for name in left)


def test_segments_are_emptied_even_when_all_was_used_lately(tmp_path: Path) -> None:
    clock = Clock()
    names = [f"o{number}" for number in range(300)]
    with opened(tmp_path / "c", capacity_bytes=32 * MIB, clock=clock) as cache:
        cache.store_small([small(name, 10_000) for name in names])
        for name in names:
            clock.advance(1)
            cache.note_use(found(cache, name, 10_000))
        cache.capacity_bytes = 2 * MIB
        cache.make_room()
        assert not cache.over_capacity()
        assert disk_bytes(tmp_path / "c") < 2 * MIB
        left = still_there(cache, names, 10_000)
        assert left
        assert all(read(found(cache, name, 10_000)) == content(name, 10_000) for name in left)


def test_evicting_by_key(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        for name in ("large", "held", "pinned"):
            store(cache, name, SIZE)
        cache.store_small([small("small"), small("other")])
        cache.flush_index()
        cache.hold(found(cache, "held", SIZE))
        cache.pin([(object_id("pinned").key, "url")], owner="me")
        keys = [object_id(name).key for name in ("large", "small", "held", "pinned", "unknown")]
        plan = cache.plan_eviction(keys)
        assert plan is not None
        assert plan.kept == [object_id("held").key, object_id("pinned").key]
        assert cache.carry_out(plan) >= SIZE
        assert find(cache, "large", SIZE) is None
        assert find(cache, "small", 100) is None
        assert find(cache, "other", 100) is not None
        cache.drop(found(cache, "held", SIZE))
    (tmp_path / "c" / "index.sqlite").unlink()
    with opened(tmp_path / "c") as cache:
        cache.rebuild_index()
        assert find(cache, "small", 100) is None, "a rebuild brought back what was evicted"
        assert cache.usage().entries == 3


def test_everything_pinned_leaves_nothing_to_free(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path / "c", clock=clock) as cache:
        names = fill(cache, clock, 3)
        cache.pin([(object_id(name).key, "url") for name in names], owner="me")
        cache.capacity_bytes = 0
        assert cache.make_room() == 0
        assert cache.plan_room() is None
        assert cache.headroom_bytes < 0
        assert still_there(cache, names) == names


def test_the_free_space_floor_counts_as_full(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        store(cache, "a", SIZE)
        assert not cache.over_capacity()
        cache.free_floor_bytes = 1 << 60
        assert cache.over_capacity()
        assert cache.headroom_bytes < 0
        assert cache.make_room() >= SIZE
