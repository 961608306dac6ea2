"""The cache through the API: list, show, verify, evict, pin, warm, capacity."""

from collections.abc import Awaitable
from pathlib import Path

import pytest
import trio

from stagefs.errors import Busy, CacheFailed, InvalidName, NotFound, ObjectMissing
from stagefs.model import MIB
from stagefs.staging import values
from stagefs.staging.values import Progress
from tests.unit.staging.conftest import Staging

LARGE = bytes(range(256)) * (3 * MIB // 256)


async def _staged(staging: Staging) -> None:
    await staging.stage_in(staging.remote.store("/large", LARGE), target="staging:///d/large")
    await staging.stage_in(staging.remote.store("/small", b"small"), target="staging:///d/small")


async def _warm(staging: Staging, *paths: str) -> values.Warmed:
    return await staging.area.cache_warm(values.Warm(list(paths)), staging.progress.append)


async def _listed(staging: Staging) -> dict[str, values.CacheEntry]:
    page = await staging.area.cache_list(values.ListEntries())
    return {entry.url.rpartition("/")[2]: entry for entry in page.entries}


async def _verify(staging: Staging, subject: str | None = None) -> values.Verified:
    return await staging.area.cache_verify(values.Verify(subject), staging.progress.append)


def _flip(directory: Path, offset: int) -> None:
    files = [path for path in (directory / "cache/objects").rglob("*") if path.is_file()]
    assert len(files) == 1
    with files[0].open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


async def test_warm_fetches_all_below_and_tells_how_far(staging: Staging) -> None:
    await _staged(staging)
    warmed = await _warm(staging, "staging:///d")
    assert (warmed.entries, warmed.bytes_total) == (2, len(LARGE) + 5)
    totals = [line for line in staging.progress if line.what.startswith("fetching")]
    assert totals[-1].total == len(LARGE) + 5
    entries = await _listed(staging)
    assert entries["large"].cached_bytes == len(LARGE)
    assert entries["small"].cached_bytes == 5
    sent = staging.remote.bytes_requested()
    await _warm(staging, "staging:///d/large", "staging:///")
    assert staging.remote.bytes_requested() == sent


async def test_warming_what_is_gone_is_its_sentence(staging: Staging) -> None:
    await _staged(staging)
    staging.remote.remove("/large")
    with pytest.raises(ObjectMissing, match="large"):
        await _warm(staging, "staging:///")


async def test_entries_are_listed_in_pages(staging: Staging) -> None:
    for number in range(5):
        url = staging.remote.store(f"/{number}", b"x")
        await staging.stage_in(url, target=f"staging:///{number}")
    await _warm(staging, "staging:///")
    seen: list[str] = []
    after = None
    while True:
        page = await staging.area.cache_list(values.ListEntries(after=after, limit=2))
        seen += [entry.url for entry in page.entries]
        after = page.after
        if after is None:
            break
    assert sorted(seen) == [staging.remote.url(f"/{number}") for number in range(5)]


async def test_show_by_path_url_and_key(staging: Staging) -> None:
    await _staged(staging)
    with pytest.raises(NotFound, match="Nothing of staging:///d/large is cached"):
        await staging.area.cache_show(values.ShowEntry("staging:///d/large"))
    await _warm(staging, "staging:///d/large")
    by_path = await staging.area.cache_show(values.ShowEntry("staging:///d/large"))
    assert by_path == await staging.area.cache_show(values.ShowEntry(by_path.url))
    assert by_path == await staging.area.cache_show(values.ShowEntry(by_path.key))
    with pytest.raises(InvalidName, match="2 objects: name one"):
        await staging.area.cache_show(values.ShowEntry("staging:///d"))


async def test_verify_finds_damage_and_the_next_read_is_right(staging: Staging) -> None:
    await _staged(staging)
    await _warm(staging, "staging:///")
    clean = await _verify(staging)
    assert (clean.entries, clean.chunks, clean.damaged) == (2, 4, [])
    assert clean.bytes_read == len(LARGE) + 5
    _flip(staging.directory, MIB + 17)
    found = await _verify(staging, "staging:///d/large")
    assert len(found.damaged) == 1
    assert "1 of 3 chunks" in found.damaged[0]
    assert await staging.read("staging/d/large") == LARGE
    assert (await _verify(staging)).damaged == []


async def test_evict_and_pin(staging: Staging) -> None:
    await _staged(staging)
    await _warm(staging, "staging:///")
    pin = values.Pin("staging:///d/large")
    assert (await staging.area.cache_pin(pin, staging.progress.append)).objects == 1
    assert (await _listed(staging))["large"].pins == ["admin"]
    with pytest.raises(Busy, match="pinned"):
        await staging.area.cache_evict(values.Evict("staging:///d/large"), staging.progress.append)
    everything = await staging.area.cache_evict(values.Evict(all=True), staging.progress.append)
    assert (everything.entries, everything.kept) == (1, 1)
    assert list(await _listed(staging)) == ["large"]
    unpin = values.Pin("staging:///d/large", pinned=False)
    await staging.area.cache_pin(unpin, staging.progress.append)
    evicted = await staging.area.cache_evict(
        values.Evict("staging:///d/large"), staging.progress.append
    )
    assert evicted.freed_bytes >= len(LARGE)
    assert await _listed(staging) == {}
    assert await staging.read("staging/d/large") == LARGE


async def test_what_a_program_has_open_is_not_evicted(staging: Staging) -> None:
    await _staged(staging)
    await _warm(staging, "staging:///")
    opened = staging.objects.open(staging.node("staging/d/large"))
    await staging.objects.read(opened, 0, 1)
    with pytest.raises(Busy, match="open in a program"):
        await staging.area.cache_evict(values.Evict("staging:///d/large"), staging.progress.append)
    staging.objects.release(opened)


async def test_pin_before_anything_is_fetched(staging: Staging) -> None:
    await _staged(staging)
    pinned = await staging.area.cache_pin(values.Pin("staging:///d"), staging.progress.append)
    assert pinned.objects == 2
    await _warm(staging, "staging:///")
    assert all(entry.pinned for entry in (await _listed(staging)).values())


async def test_evict_wants_to_know_what(staging: Staging) -> None:
    for request in (values.Evict(), values.Evict("staging:///", all=True)):
        with pytest.raises(InvalidName, match="Say what to evict"):
            await staging.area.cache_evict(request, staging.progress.append)


async def test_capacity_is_set_and_room_made_at_once(staging: Staging) -> None:
    await _staged(staging)
    await _warm(staging, "staging:///")
    usage = await staging.area.cache_capacity(values.Capacity(2 * MIB), staging.progress.append)
    assert usage.capacity_bytes == 2 * MIB
    assert usage.used_bytes <= 2 * MIB
    asked = await staging.area.cache_capacity(values.Capacity(), staging.progress.append)
    assert asked.capacity_bytes == 2 * MIB
    assert await staging.read("staging/d/large") == LARGE
    with pytest.raises(InvalidName):
        await staging.area.cache_capacity(values.Capacity(-1), staging.progress.append)


async def test_status_tells_the_cache_and_the_counters(staging: Staging) -> None:
    await _staged(staging)
    await _warm(staging, "staging:///")
    status = await staging.area.status(values.Empty())
    assert status.mountpoint == "/mnt"
    assert status.cache is not None
    assert status.cache.used_bytes >= len(LARGE)
    assert status.counters["fetched_bytes"] == len(LARGE) + 5
    assert status.transfers == []


async def test_without_a_cache_disk_names_work_and_cache_verbs_say_why(
    cacheless: Staging,
) -> None:
    await _staged(cacheless)
    assert (await cacheless.area.status(values.Empty())).cache is None
    assert await cacheless.read("staging/d/small") == b"small"
    assert sorted(await cacheless.names("staging:///d")) == ["large", "small"]
    for call in (
        cacheless.area.cache_usage(values.Empty()),
        cacheless.area.cache_list(values.ListEntries()),
        cacheless.area.cache_verify(values.Verify(), cacheless.progress.append),
    ):
        with pytest.raises(CacheFailed, match="runs without a cache"):
            await call


def test_progress_is_of_bytes_unless_said_otherwise() -> None:
    assert Progress("x", 0, None).unit == "bytes"


async def test_a_verify_that_was_stopped_goes_on(staging: Staging) -> None:
    for number in range(6):
        url = staging.remote.store(f"/{number}", bytes([number]) * MIB)
        await staging.stage_in(url, target=f"staging:///{number}")
    await _warm(staging, "staging:///")
    asked: list[int | None] = []
    with trio.CancelScope() as stop:

        def stop_at_the_fourth(progress: Progress) -> None:
            asked.append(progress.done)
            if len(asked) == 4:
                stop.cancel()

        await staging.area.cache_verify(values.Verify(), stop_at_the_fourth)
    assert stop.cancelled_caught
    assert asked == [0, MIB, 2 * MIB, 3 * MIB]

    def resumed() -> Awaitable[values.Verified]:
        return staging.area.cache_verify(values.Verify(resume=True), staging.progress.append)

    # A verify of one subject in between is another matter.
    await _verify(staging, "staging:///0")
    staging.progress.clear()
    found = await resumed()
    assert [line.done // MIB for line in staging.progress] == [3, 4, 5]
    assert (found.entries, found.chunks, found.bytes_read) == (6, 6, 6 * MIB)
    # It has ended: there is nothing to go on with, and the next one begins anew.
    staging.progress.clear()
    assert (await resumed()).entries == 6
    assert [line.done // MIB for line in staging.progress] == [0, 1, 2, 3, 4, 5]


async def test_what_was_found_before_it_was_stopped_is_told_at_the_end(staging: Staging) -> None:
    url = staging.remote.store("/large", LARGE)
    await staging.stage_in(url, target="staging:///large")
    await _warm(staging, "staging:///")
    _flip(staging.directory, 0)
    for number in range(8):  # keys are hashes: some come behind the damaged one
        small = staging.remote.store(f"/{number}", b"small")
        await staging.stage_in(small, target=f"staging:///{number}")
    await _warm(staging, "staging:///")
    with trio.CancelScope() as stop:

        def stop_behind_the_large_one(progress: Progress) -> None:
            if progress.done >= len(LARGE):
                stop.cancel()

        await staging.area.cache_verify(values.Verify(), stop_behind_the_large_one)
    assert stop.cancelled_caught
    found = await staging.area.cache_verify(values.Verify(resume=True), staging.progress.append)
    assert found.entries == 9
    assert found.damaged == [f"{url}: 1 of 3 chunks were damaged"]


async def test_one_subject_is_verified_whole(staging: Staging) -> None:
    with pytest.raises(InvalidName, match="whole cache"):
        await staging.area.cache_verify(values.Verify("staging:///d", resume=True), lambda _: None)
