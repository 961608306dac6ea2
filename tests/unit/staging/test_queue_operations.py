"""What the control API says of the queue, and flush."""

from pathlib import Path

import pytest
import trio

from stagefs.config import StageOutSettings
from stagefs.errors import AccessDenied, InvalidName, RemoteUnavailable
from stagefs.staging import queue_operations, stageout
from stagefs.staging.queue_values import CancelUploads, Flush, ListUploads, RetryUploads
from stagefs.staging.values import Progress
from tests.unit.staging.out_rig import OutRig


@pytest.fixture
def rig(tmp_path: Path) -> OutRig:
    return OutRig(tmp_path / "outputs")


async def test_flush_waits_until_nothing_waits(rig: OutRig) -> None:
    told: list[Progress] = []
    async with rig.running():
        await rig.add("c1", "a", "b")
        flushed = await rig.operations.flush(Flush(), told.append)
        assert (flushed.uploads, flushed.bytes_sent) == (2, 8)
        assert (flushed.left.waiting, flushed.left.failed, flushed.examples) == (0, 0, [])
    assert sorted(rig.remote("one").paths()) == ["/a", "/b"]
    assert (told[0].what, told[0].done, told[0].total) == ("uploading, 2 left", 0, 8)


async def test_flush_of_an_empty_queue_is_over_at_once(rig: OutRig) -> None:
    async with rig.running():
        flushed = await rig.operations.flush(Flush(), lambda _progress: None)
        assert flushed.uploads == 0


async def test_flush_tells_what_the_daemon_had_uploaded_before(rig: OutRig) -> None:
    async with rig.running() as out:
        await rig.add("c1", "a", "b")
        await rig.until(lambda: not out.busy)
        faster = await rig.operations.flush(Flush(), lambda _progress: None)
        assert (faster.uploads, faster.before, faster.before_bytes) == (0, 2, 8)
        await rig.add("c2", "c")
        second = await rig.operations.flush(Flush(), lambda _progress: None)
        assert (second.uploads + second.before, second.bytes_sent + second.before_bytes) == (3, 12)


async def test_flush_waits_for_a_commit_that_is_being_made(rig: OutRig) -> None:
    async with rig.running() as out, trio.open_nursery() as nursery:
        await rig.prepare("c1", "a")
        told = trio.Event()

        async def activate() -> None:
            await told.wait()
            await out.activate("c1")

        nursery.start_soon(activate)
        flushed = await rig.operations.flush(Flush(), lambda _progress: told.set())
        assert flushed.uploads == 1


async def test_flush_tries_at_once_what_waits_for_its_next_try(rig: OutRig) -> None:
    rig.settings = StageOutSettings(backoff_s=1000.0)
    rig.remote("one").failures = [RemoteUnavailable("Nobody answers.")]
    async with rig.running() as out:
        await rig.add("c1", "a")
        await rig.until(lambda: bool(rig.puts()) and not out.under_way)
        flushed = await rig.operations.flush(Flush(), lambda _progress: None)
        assert flushed.uploads == 1


async def test_flush_names_what_failed_and_why(rig: OutRig) -> None:
    rig.remote("two").failures = [AccessDenied("The key is not known there.")]
    async with rig.running():
        await rig.add("c2", "b", host="two")
        flushed = await rig.operations.flush(Flush(), lambda _progress: None)
        assert (flushed.uploads, flushed.left.failed, flushed.left.failed_bytes) == (0, 1, 4)
        (left,) = flushed.examples
        assert (left.state, left.url) == ("failed", "memory://two/b")
        assert left.reason == "The key is not known there."


async def test_flush_ends_at_its_deadline(rig: OutRig) -> None:
    rig.remote("one").gate = trio.Event()
    async with rig.running():
        await rig.add("c1", "a")
        flushed = await rig.operations.flush(Flush(deadline_s=0.05), lambda _progress: None)
        assert flushed.left.waiting == 1
        assert flushed.left.uploading == 1, "it goes on after the flush"
        rig.remote("one").gate.set()
        await rig.idle()
    assert rig.remote("one").paths() == ["/a"]


async def test_flush_without_a_deadline_ends_when_nothing_moves(
    rig: OutRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_operations, "STALL_S", 0.05)
    monkeypatch.setattr(stageout, "TICK_S", 0.01)
    rig.remote("one").failures = [RemoteUnavailable("Nobody answers.")] * 100_000
    async with rig.running():
        await rig.add("c1", "a")
        flushed = await rig.operations.flush(Flush(), lambda _progress: None)
        assert flushed.left.waiting == 1
        assert flushed.examples[0].reason == "Nobody answers."


async def test_listing_tells_what_is_uploading(rig: OutRig) -> None:
    rig.remote("one").gate = trio.Event()
    async with rig.running() as out:
        await rig.add("c1", "a", "b", "c", "d")
        await rig.until(lambda: len(out.under_way) == 3)
        page = await rig.operations.list_uploads(ListUploads())
        assert [one.state for one in page.uploads] == ["uploading"] * 3 + ["queued"]
        assert page.after is None
        queued = await rig.operations.list_uploads(ListUploads(states=["queued"]))
        assert [one.url for one in queued.uploads] == ["memory://one/d"]
        uploading = await rig.operations.list_uploads(ListUploads(states=["uploading"]))
        assert len(uploading.uploads) == 3
        totals = rig.operations.totals()
        assert (totals.waiting, totals.waiting_bytes, totals.uploading) == (4, 16, 3)
        assert totals.directory == str(rig.directory)


async def test_listing_comes_in_pages(rig: OutRig) -> None:
    rig.remote("one").gate = trio.Event()
    async with rig.running():
        await rig.add("c1", *(f"{n}" for n in range(5)))
        found: list[int] = []
        after: int | None = 0
        while after is not None:
            page = await rig.operations.list_uploads(ListUploads(after=after, limit=2))
            found += [one.id for one in page.uploads]
            after = page.after
        assert found == [1, 2, 3, 4, 5]


async def test_senseless_requests_are_refused(rig: OutRig) -> None:
    async with rig.running():
        with pytest.raises(InvalidName, match="'lost' is no state"):
            await rig.operations.list_uploads(ListUploads(states=["lost"]))
        with pytest.raises(InvalidName, match="which uploads"):
            await rig.operations.retry(RetryUploads())
        with pytest.raises(InvalidName, match="which uploads"):
            await rig.operations.cancel(CancelUploads(ids=[1], all=True))


async def test_decisions_are_counted(rig: OutRig) -> None:
    rig.remote("one").failures = [AccessDenied("No.")] * 2
    async with rig.running():
        await rig.add("c1", "a", "b")
        await rig.idle()
        assert (await rig.operations.retry(RetryUploads(all=True))).uploads == 2
        await rig.idle()
        assert set((await rig.states()).values()) == {"done"}
        assert (await rig.operations.cancel(CancelUploads(all=True))).uploads == 0
