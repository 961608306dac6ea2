"""Reading through the cache: one fetch for all, right bytes, errors that say why."""

import contextlib
import hashlib
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from stagefs.config import ReadSettings
from stagefs.errors import (
    ChecksumMismatch,
    DeadlineExceeded,
    ObjectChanged,
    ObjectMissing,
    RemoteUnavailable,
)
from stagefs.model import MIB, Checksum, ChecksumKind, Span
from stagefs.objects.small import BATCH_BYTES_MAX
from stagefs.remote.base import WHOLE_OBJECT_BYTES_MAX, BatchItem, Results
from stagefs.remote.memory import MemoryRemote
from tests.unit.objects.conftest import MakeReading

# What failed is asked for again only after this (conftest's settings).
HOLD_S = 5.0


def random_bytes(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def sha256(data: bytes) -> Checksum:
    return Checksum(ChecksumKind.SHA256, hashlib.sha256(data).hexdigest())


async def test_reads_what_the_remote_has(make_reading: MakeReading) -> None:
    data = random_bytes(5 * MIB + 123)
    async with make_reading() as reading:
        node = reading.stage("a", data)
        assert await reading.read(node) == data


async def test_each_chunk_is_fetched_once_for_any_number_of_readers(
    make_reading: MakeReading,
) -> None:
    data = random_bytes(12 * MIB)
    async with make_reading() as reading:
        node = reading.stage("a", data)
        reading.remote.gate = trio.Event()

        async def one() -> None:
            assert await reading.read(node) == data

        async with trio.open_nursery() as nursery:
            for _ in range(16):
                nursery.start_soon(one)
            await trio.testing.wait_all_tasks_blocked()
            reading.remote.gate.set()
        assert reading.remote.bytes_requested() == len(data)


async def test_read_ahead_goes_on_when_a_fetch_ends(make_reading: MakeReading) -> None:
    """Also of a reader that says nothing more: all of what is cached it reads without a word."""
    settings = ReadSettings(parallel_spans_per_object=1)
    async with make_reading(settings=settings) as reading:
        node = reading.stage("a", random_bytes(100 * MIB))
        opened = reading.objects.open(node)
        start = 0
        while opened.ahead.window_bytes < 64 * MIB:
            await reading.objects.read(opened, start, MIB)
            start += MIB
        with trio.fail_after(60):
            while reading.objects.cached_bytes(node) < start + 48 * MIB:
                await trio.testing.wait_all_tasks_blocked(0.01)
        assert reading.remote.bytes_requested() <= node.size_bytes
        reading.objects.release(opened)


async def test_a_second_read_asks_nobody(make_reading: MakeReading) -> None:
    data = random_bytes(3 * MIB)
    async with make_reading() as reading:
        node = reading.stage("a", data)
        await reading.read(node)
        reading.remote.requests.clear()
        assert await reading.read(node) == data
        assert not reading.remote.requests


async def test_the_tail_of_a_large_object_costs_one_chunk(make_reading: MakeReading) -> None:
    data = random_bytes(20 * MIB)
    async with make_reading() as reading:
        node = reading.stage("a", data)
        assert await reading.read(node, len(data) - 4096, 4096) == data[-4096:]
        assert reading.remote.bytes_requested() == MIB


async def test_the_next_daemon_serves_what_this_one_fetched(make_reading: MakeReading) -> None:
    data = random_bytes(6 * MIB)
    async with make_reading() as reading:
        node = reading.stage("a", data)
        await reading.read(node, 0, 4 * MIB)
        remote = reading.remote
    remote.requests.clear()
    async with make_reading(remote=remote) as reading:
        node = reading.namespace.node(node.inode)
        assert node.validator is not None, "first contact was not kept"
        assert await reading.read(node) == data
        assert remote.bytes_requested() <= 2 * MIB


async def test_a_small_file_is_fetched_whole_and_its_neighbours_ahead(
    make_reading: MakeReading,
) -> None:
    async with make_reading() as reading:
        nodes = [reading.stage(f"f{i:03d}", random_bytes(4096, i)) for i in range(100)]
        for i, node in enumerate(nodes):
            assert await reading.read(node) == random_bytes(4096, i)
        counters = reading.objects.counters
        assert counters.small_objects == 100
        assert counters.batches < 50, "neighbours were not fetched together"


async def test_small_files_are_not_so_many_at_once_that_memory_grows(
    make_reading: MakeReading,
) -> None:
    size = WHOLE_OBJECT_BYTES_MAX
    asked_bytes = []

    class Watched(MemoryRemote):
        async def fetch_batch(self, items: Sequence[BatchItem]) -> Results:
            asked_bytes.append(len(items) * size)
            return await super().fetch_batch(items)

    async with make_reading(remote=Watched()) as reading:
        nodes = [reading.stage(f"f{i:03d}", random_bytes(size, i)) for i in range(200)]
        for i, node in enumerate(nodes):
            assert await reading.read(node) == random_bytes(size, i)
    assert sum(asked_bytes) == 200 * size
    assert BATCH_BYTES_MAX // 2 < max(asked_bytes) <= BATCH_BYTES_MAX


async def test_an_empty_object_asks_nobody(make_reading: MakeReading) -> None:
    async with make_reading() as reading:
        node = reading.stage("empty", b"")
        assert await reading.read(node) == b""
        assert not reading.remote.requests


async def test_a_declared_checksum_is_proved_before_the_first_byte(
    make_reading: MakeReading,
) -> None:
    data = random_bytes(3 * MIB)
    async with make_reading() as reading:
        node = reading.stage("a", data, checksum=sha256(data))
        assert await reading.read(node, 0, 10) == data[:10]
        assert reading.remote.bytes_requested() == len(data)


@pytest.mark.parametrize("size", [4096, 3 * MIB])
async def test_wrong_content_is_never_served(make_reading: MakeReading, size: int) -> None:
    data = random_bytes(size)
    async with make_reading() as reading:
        node = reading.stage("a", data, checksum=sha256(b"something else"))
        with pytest.raises(ChecksumMismatch, match="sha256"):
            await reading.read(node, 0, 10)
        error = reading.objects.last_error(node)
        assert error is not None
        assert "sha256" in error.sentence


async def test_an_object_that_changed_is_never_mixed(make_reading: MakeReading) -> None:
    data = random_bytes(8 * MIB)
    async with make_reading() as reading:
        node = reading.stage("a", data)
        opened = reading.objects.open(node)
        assert bytes(await reading.objects.read(opened, 0, 100)) == data[:100]
        reading.remote.store("/a", random_bytes(8 * MIB, seed=2))
        with pytest.raises(ObjectChanged):
            await reading.objects.read(opened, 6 * MIB, 100)
        assert bytes(await reading.objects.read(opened, 100, 100)) == data[100:200]


async def test_another_size_than_the_catalog_says_is_an_error(make_reading: MakeReading) -> None:
    async with make_reading() as reading:
        node = reading.stage("a", random_bytes(3 * MIB))
        reading.remote.store("/a", random_bytes(2 * MIB))
        with pytest.raises(ObjectChanged, match="registered"):
            await reading.read(node)


async def test_a_missing_object_says_so_and_is_not_asked_for_again_at_once(
    make_reading: MakeReading,
) -> None:
    async with make_reading() as reading:
        node = reading.stage("a", random_bytes(3 * MIB))
        reading.remote.remove("/a")
        with pytest.raises(ObjectMissing):
            await reading.read(node)
        asked = len(reading.remote.requests)
        with pytest.raises(ObjectMissing):
            await reading.read(node)
        assert len(reading.remote.requests) == asked


async def test_a_failure_is_forgotten_after_its_time(
    make_reading: MakeReading, patient_clock: trio.abc.Clock
) -> None:
    data = random_bytes(3 * MIB)
    async with make_reading() as reading:
        node = reading.stage("a", data)
        reading.remote.failures.append(RemoteUnavailable("a moment"))
        with pytest.raises(RemoteUnavailable):
            await reading.read(node)
        await trio.sleep(HOLD_S + 1)
        assert await reading.read(node) == data


async def test_a_silent_server_ends_in_the_deadline(
    make_reading: MakeReading, patient_clock: trio.abc.Clock
) -> None:
    settings = ReadSettings(read_deadline_s=30.0)
    data = random_bytes(3 * MIB)
    async with make_reading(settings=settings) as reading:
        node = reading.stage("a", data)
        other = reading.stage("other", data)
        await reading.read(other)
        reading.remote.gate = trio.Event()
        begun = trio.current_time()
        with pytest.raises(DeadlineExceeded, match="30 s"):
            await reading.read(node)
        with pytest.raises(DeadlineExceeded, match="30 s"):
            await reading.read(node)  # the kernel asks again: no second deadline
        assert trio.current_time() - begun == pytest.approx(30.0, abs=0.5)
        assert await reading.read(other) == data
        reading.remote.gate.set()
        await trio.sleep(settings.failure_hold_s)
        assert await reading.read(node) == data


async def test_a_server_that_sends_whole_objects_only(make_reading: MakeReading) -> None:
    data = random_bytes(7 * MIB)
    async with make_reading() as reading:
        reading.remote.ranges = False
        node = reading.stage("a", data)
        assert await reading.read(node, 5 * MIB, 100) == data[5 * MIB : 5 * MIB + 100]
        assert await reading.read(node) == data
        whole = [r for r in reading.remote.requests if r.span == Span(0, len(data))]
        assert len(whole) == 1


def disk_bytes(directory: Path) -> int:
    """What is on the disk, while files come and go."""
    total = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total


async def test_an_object_larger_than_the_cache(make_reading: MakeReading, tmp_path: Path) -> None:
    data = random_bytes(48 * MIB)
    async with make_reading(capacity_bytes=16 * MIB) as reading:
        node = reading.stage("a", data)
        for start in range(0, len(data), 4 * MIB):
            assert await reading.read(node, start, 4 * MIB) == data[start : start + 4 * MIB]
            used = disk_bytes(tmp_path / "cache")
            assert used <= 16 * MIB + reading.objects.counters.in_flight_bytes + 9 * MIB
        assert await reading.read(node, 0, MIB) == data[:MIB]


async def test_without_a_cache_everything_is_read_all_the_same(make_reading: MakeReading) -> None:
    data = random_bytes(9 * MIB)
    async with make_reading(with_cache=False) as reading:
        node = reading.stage("a", data)
        small = reading.stage("b", data[:100])
        assert await reading.read(node) == data
        assert await reading.read(small) == data[:100]
        assert reading.objects.counters.volatile_objects == 2


async def test_warming_fetches_the_whole_and_tells_how_far(make_reading: MakeReading) -> None:
    data = random_bytes(9 * MIB)
    async with make_reading() as reading:
        node = reading.stage("a", data)
        told: list[int] = []
        await reading.objects.warm(node, told.append)
        assert told == sorted(told)
        assert told[-1] == len(data)
        assert reading.objects.cached_bytes(node) == len(data)


async def test_stat_is_shared_and_goes_on_when_the_asker_gives_up(
    make_reading: MakeReading, patient_clock: trio.abc.Clock
) -> None:
    async with make_reading() as reading:
        url = reading.remote.store("/a", b"x")
        reading.remote.gate = trio.Event()
        with pytest.raises(DeadlineExceeded, match="try again"):
            await reading.objects.stat_soon(url)
        reading.remote.gate.set()
        assert (await reading.objects.stat_soon(url)).size_bytes == 1
        assert len([r for r in reading.remote.requests if r.kind == "stat"]) == 1
