"""Threads at once: fetching, evicting, verifying, reading.  Whatever happens, no wrong byte.

One thread plays the trio thread (it plans, looks entries up, and reads inline); the others
are its workers.  Bounded by a number of rounds, not by time.
"""

import os
import queue
import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stagefs.cache.entry import ABSENT, PRESENT, VERIFIED, Entry
from stagefs.cache.eviction import Plan
from stagefs.cache.store import Cache
from stagefs.model import KIB, MIB
from tests.unit.cache.filling import CHUNK, content, found, object_id, opened, small, store

SIZE = 2 * MIB + 5 * KIB
NAMES = [f"o{number}" for number in range(6)]
CONTENT = {name: content(name, SIZE) for name in NAMES}
ROUNDS = 1500


@pytest.fixture(autouse=True)
def threads_take_turns_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


class Workers:
    """A few threads that carry out what they are given; failures are raised at the end."""

    def __init__(self, count: int) -> None:
        self._jobs: queue.Queue[Callable[[], object] | None] = queue.Queue(maxsize=32)
        self._failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._work) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def give(self, job: Callable[[], object]) -> None:
        self._jobs.put(job, timeout=60)

    def finish(self) -> None:
        for _ in self._threads:
            self._jobs.put(None, timeout=60)
        for thread in self._threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in self._threads), "a worker hangs"
        if self._failures:
            raise self._failures[0]

    def _work(self) -> None:
        while (job := self._jobs.get(timeout=60)) is not None:
            try:
                job()
            except BaseException as exc:  # noqa: BLE001 - handed to the main thread
                self._failures.append(exc)


def chunk_of(data: bytes, entry: Entry, chunk: int) -> bytes:
    start = chunk * entry.chunk_bytes
    return data[start : start + entry.chunk_length(chunk)]


def read_from_a_thread(entry: Entry, name: str, chunk: int) -> None:
    """The rule for readers outside the trio thread: epoch, state, read, epoch."""
    for _ in range(100):
        epoch = entry.epoch
        if entry.state[chunk] != VERIFIED:
            return
        data = os.pread(entry.fd, entry.chunk_length(chunk), entry.base + chunk * entry.chunk_bytes)
        if entry.epoch == epoch:
            assert data == chunk_of(CONTENT[name], entry, chunk), f"a wrong byte of {name}"
            return


def fetch_one(entry: Entry, name: str, chunk: int, flights: set[tuple[str, int]]) -> None:
    data = chunk_of(CONTENT[name], entry, chunk)
    half = len(data) // 2
    start = entry.base + chunk * entry.chunk_bytes
    os.pwrite(entry.fd, data[:half], start)
    os.pwrite(entry.fd, data[half:], start + half)
    entry.commit(chunk)
    flights.discard((name, chunk))


class Player:
    """The trio thread."""

    def __init__(self, cache: Cache, workers: Workers, chance: random.Random) -> None:
        self.cache = cache
        self.workers = workers
        self.chance = chance
        self.open: dict[str, Entry] = {}
        self.flights: set[tuple[str, int]] = set()
        self.evicting = threading.Lock()
        self.reads = 0

    def step(self) -> None:
        name = self.chance.choice(NAMES)
        if name not in self.open:
            self.open_one(name)
        elif self.chance.random() < 0.02:
            self.close_one(name)
        else:
            self.use(name, self.open[name])
        if self.chance.random() < 0.2:
            self.make_room()
        if self.chance.random() < 0.02:
            self.workers.give(self.cache.flush_index)

    def open_one(self, name: str) -> None:
        entry = self.cache.entry(object_id(name), size_bytes=SIZE)
        if entry is None:
            entry = self.cache.create(
                object_id(name), size_bytes=SIZE, validator="v", mtime_ns=None
            )
        if self.cache.hold(entry):
            self.open[name] = entry

    def close_one(self, name: str) -> None:
        if not any(flying == name for flying, _ in list(self.flights)):
            self.cache.drop(self.open.pop(name))

    def use(self, name: str, entry: Entry) -> None:
        chunk = self.chance.randrange(entry.chunk_count)
        self.cache.note_use(entry)
        if entry.state[chunk] == VERIFIED:
            length = entry.chunk_length(chunk)
            data = os.pread(entry.fd, length, entry.base + chunk * entry.chunk_bytes)
            assert data == chunk_of(CONTENT[name], entry, chunk), f"a wrong byte of {name}"
            self.reads += 1
            self.workers.give(lambda: read_from_a_thread(entry, name, chunk))
        elif entry.state[chunk] == PRESENT:
            self.workers.give(lambda: entry.verify(chunk))
        elif (name, chunk) not in self.flights and entry.state[chunk] == ABSENT:
            self.flights.add((name, chunk))
            self.workers.give(lambda: fetch_one(entry, name, chunk, self.flights))

    def make_room(self) -> None:
        if not self.cache.over_capacity() or not self.evicting.acquire(blocking=False):
            return
        plan = self.cache.plan_room()
        if plan is None:
            self.evicting.release()
            return
        chosen = plan

        def carry_out(plan: Plan = chosen) -> None:
            try:
                self.cache.carry_out(plan)
            finally:
                self.evicting.release()

        self.workers.give(carry_out)


def test_large_objects(tmp_path: Path) -> None:
    for seed in range(4):
        with opened(tmp_path / "c", capacity_bytes=5 * MIB) as cache:
            workers = Workers(4)
            player = Player(cache, workers, random.Random(seed))
            try:
                for _ in range(ROUNDS):
                    player.step()
            finally:
                workers.finish()
            for name in list(player.open):
                player.close_one(name)
            counters = cache.counters()
            assert counters.damaged_chunks == 0
            assert counters.damaged_entries == 0
            assert counters.evicted_chunks + counters.evicted_entries > 0
            assert counters.thrash > 0
            assert player.reads > ROUNDS // 100
        with opened(tmp_path / "c") as cache:
            for name in NAMES:
                entry = cache.entry(object_id(name), size_bytes=SIZE)
                for chunk in range(entry.chunk_count) if entry is not None else []:
                    assert entry is not None
                    assert entry.state[chunk] == ABSENT or entry.verify(chunk)


def test_small_objects_while_segments_go(tmp_path: Path) -> None:
    chance = random.Random(7)
    names = [f"s{number}" for number in range(2000)]
    data = {name: content(name, 4000) for name in names}
    served = 0
    with opened(tmp_path / "c", capacity_bytes=4 * MIB) as cache:
        workers = Workers(3)
        try:
            evicting = threading.Lock()
            player = Player(cache, workers, chance)
            player.evicting = evicting
            for _ in range(400):
                batch = chance.sample(names, 20)
                missing = []
                for name in batch:
                    entry = cache.entry(object_id(name), size_bytes=4000)
                    if entry is None:
                        missing.append(name)
                    elif entry.state[0] == VERIFIED:
                        cache.note_use(entry)
                        assert os.pread(entry.fd, 4000, entry.base) == data[name]
                        served += 1
                    else:
                        assert entry.state[0] == PRESENT
                if missing:
                    items = [small(name, 4000) for name in missing]
                    workers.give(lambda items=items: cache.store_small(items))  # type: ignore[misc]
                player.make_room()
        finally:
            workers.finish()
        assert cache.counters().evicted_entries > 0
        assert served > 100
    with opened(tmp_path / "c") as cache:
        for name in names:
            entry = cache.entry(object_id(name), size_bytes=4000)
            assert entry is None or (
                entry.verify(0) and os.pread(entry.fd, 4000, entry.base) == data[name]
            )


def test_verifying_the_same_chunk_from_many_threads(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        store(cache, "o1", SIZE)
    with opened(tmp_path / "c") as cache:
        entry = found(cache, "o1", SIZE)
        workers = Workers(8)
        answers: list[bool] = []
        for chunk in range(entry.chunk_count):
            for _ in range(4):
                workers.give(lambda chunk=chunk: answers.append(entry.verify(chunk)))  # type: ignore[misc]
        workers.finish()
        assert answers == [True] * (4 * entry.chunk_count)
        assert cache.counters().damaged_chunks == 0


def test_first_commits_from_many_threads(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        entry = cache.create(object_id("o1"), size_bytes=SIZE, validator="v", mtime_ns=None)
        cache.hold(entry)
        workers = Workers(8)
        flights: set[tuple[str, int]] = set()
        for chunk in range(entry.chunk_count):
            workers.give(lambda chunk=chunk: fetch_one(entry, "o1", chunk, flights))  # type: ignore[misc]
        workers.finish()
        assert entry.is_complete
        cache.drop(entry)
    with opened(tmp_path / "c") as cache:
        again = found(cache, "o1", SIZE)
        assert again.verify(0, again.chunk_count)
        assert os.pread(again.fd, CHUNK, 0) == CONTENT["o1"][:CHUNK]
