"""Uploading what is queued: order, patience, interruptions, and a disk that refuses."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from stagefs.config import StageOutSettings
from stagefs.errors import (
    AccessDenied,
    ChecksumMismatch,
    NameExists,
    NoSpace,
    RemoteError,
    RemoteUnavailable,
)
from stagefs.outputs.queue import Queue
from stagefs.outputs.queued import Outcome, UploadState
from stagefs.remote.memory import MemoryRemote
from stagefs.staging import stageout
from tests.unit.outputs.queue_rig import OWNER
from tests.unit.staging.out_rig import OutRig


@pytest.fixture
def rig(tmp_path: Path) -> OutRig:
    return OutRig(tmp_path / "outputs")


@pytest.fixture(autouse=True)
def short_disk_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stageout, "DISK_PAUSE_S", 0.005)


async def test_commit_is_uploaded_when_it_is_activated(rig: OutRig) -> None:
    async with rig.running() as out:
        await rig.prepare("c1", "a", "b")
        await rig.add("c2", "c")
        await rig.until(lambda: rig.remote("one").paths() == ["/c"])
        assert out.busy, "a commit is being made"
        await out.activate("c1")
        await rig.idle()
        assert rig.remote("one").content("/a") == b"c1/a"
        assert rig.remote("one").content("/b") == b"c1/b"
        assert await rig.states() == {"c1/a": "done", "c1/b": "done", "c2/c": "done"}
        assert out.totals[UploadState.DONE].size_bytes == 12
        assert not list((rig.directory / "files").iterdir())


async def test_discarded_commit_is_never_uploaded(rig: OutRig) -> None:
    async with rig.running() as out:
        await rig.prepare("c1", "a")
        await out.discard("c1")
        assert not out.busy
        assert await rig.rows() == []


async def test_only_so_many_at_a_time(rig: OutRig) -> None:
    rig.remote("one").gate = trio.Event()
    async with rig.running() as out:
        await rig.add("c1", "a", "b", "c", "d", "e")
        await rig.until(lambda: len(rig.puts()) == 3)
        assert len(out.under_way) == 3
        rig.remote("one").gate.set()
        await rig.idle()
    assert sorted(rig.puts()) == ["a", "b", "c", "d", "e"]


async def test_one_url_at_a_time_and_the_last_one_stays(rig: OutRig) -> None:
    rig.remote("one").gate = trio.Event()
    async with rig.running():
        await rig.add("c1", "a", overwrite=True)
        await rig.until(lambda: rig.puts() == ["a"])
        await rig.add("c2", "a", overwrite=True)
        await rig.add("c3", "z")
        await rig.until(lambda: "z" in rig.puts())
        assert rig.puts() == ["a", "z"], "two uploads to one URL at a time"
        rig.remote("one").gate.set()
        await rig.idle()
        assert await rig.states() == {"c1/a": "replaced", "c2/a": "done", "c3/z": "done"}
    assert rig.remote("one").content("/a") == b"c2/a"


# Failures.


async def test_server_that_is_away_is_tried_until_it_is_back(rig: OutRig) -> None:
    rig.remote("one").failures = [RemoteUnavailable("Nobody answers.")] * 12
    async with rig.running():
        await rig.add("c1", "a")
        await rig.idle()
        assert await rig.states() == {"c1/a": "done"}
    assert len(rig.puts()) == 13, "a passing failure counts for ever"


async def test_full_server_is_tried_until_it_has_room(rig: OutRig) -> None:
    rig.remote("one").failures = [NoSpace("The disk there is full.")] * 12
    async with rig.running():
        await rig.add("c1", "a")
        await rig.idle()
        assert await rig.states() == {"c1/a": "done"}


@pytest.mark.parametrize("error", [AccessDenied, NameExists])
async def test_refusal_stays_with_its_reason_until_somebody_decides(
    rig: OutRig, error: type[RemoteError]
) -> None:
    rig.remote("one").failures = [error("No, because of this.")]
    async with rig.running() as out:
        await rig.add("c1", "a", "b")
        await rig.idle()
        refused = next(one for one in await rig.rows() if one.state == "failed")
        assert (refused.reason, refused.attempts) == ("No, because of this.", 1)
        assert out.file_of(refused).read_bytes() == f"c1/{refused.item.file}".encode()
    async with rig.running() as out:
        assert len(rig.puts()) == 2, "a failure is not tried again by itself, by no daemon"
        await out.retry([refused.id])
        await rig.idle()
        assert await rig.states() == {"c1/a": "done", "c1/b": "done"}


async def test_other_failures_are_tried_a_few_times(rig: OutRig) -> None:
    rig.remote("one").failures = [ChecksumMismatch("It arrived damaged.")] * 3
    async with rig.running():
        await rig.add("c1", "a")
        await rig.idle()
        upload = await rig.upload("a")
        assert (upload.state, upload.attempts) == ("failed", 3)
    assert len(rig.puts()) == 3


async def test_waiting_upload_tells_its_reason(tmp_path: Path) -> None:
    rig = OutRig(tmp_path / "outputs", StageOutSettings(backoff_s=1000.0))
    rig.remote("one").failures = [RemoteUnavailable("Nobody answers.")]
    async with rig.running() as out:
        await rig.add("c1", "a")
        await rig.until(lambda: bool(rig.puts()) and not out.under_way)
        await out.moved()
        upload = await rig.upload("a")
        assert (upload.state, upload.reason, upload.attempts) == ("queued", "Nobody answers.", 1)
        assert upload.next_try_ns > upload.changed_ns
        await out.retry(None)
        await rig.idle()
        assert await rig.states() == {"c1/a": "done"}


async def test_host_that_is_away_takes_no_places_from_others(rig: OutRig) -> None:
    gone = rig.remote("gone")
    gone.failures = [RemoteUnavailable("Nobody answers.")] * 100_000
    async with rig.running() as out:
        await rig.add("c1", *(f"g{n}" for n in range(50)), host="gone")
        await rig.add("c2", *(f"h{n}" for n in range(50)), host="here")
        await rig.until(lambda: len(rig.remote("here").paths()) == 50)
        asked = len(rig.puts("gone"))
        await rig.until(lambda: len(rig.puts("gone")) > asked + 5)
        assert len(out.under_way) <= 1, "a host that is away is asked by one at a time"
        gone.failures = []
        await rig.idle()
    assert len(gone.paths()) == 50


async def test_file_that_is_gone_is_a_failure_with_a_sentence(rig: OutRig) -> None:
    rig.remote("one").gate = trio.Event()
    async with rig.running() as out:
        await rig.add("c1", "a", "b", "c", "d")
        await rig.until(lambda: len(rig.puts()) == 3)
        left = next(one for one in await rig.rows() if one.item.file not in rig.puts())
        out.file_of(left).unlink()
        rig.remote("one").gate.set()
        await rig.idle()
        lost = await rig.upload(left.item.file)
        assert lost.state == "failed"
        assert lost.reason == f"The file {out.file_of(lost)} for {lost.item.url} is gone:" + (
            " nothing can be uploaded."
        )


class Broken(MemoryRemote):
    async def put(self, *_arguments: Any, **_keywords: Any) -> Any:
        raise ZeroDivisionError


async def test_bug_in_a_driver_ends_nothing(rig: OutRig, caplog: pytest.LogCaptureFixture) -> None:
    rig.remotes["one"] = Broken()
    async with rig.running():
        await rig.add("c1", "a")
        await rig.add("c2", "b", host="two")
        await rig.idle()
        assert await rig.states() == {"c1/a": "failed", "c2/b": "done"}
        assert "ZeroDivisionError" in str((await rig.upload("a")).reason)
    assert "Traceback" in caplog.text


# Decisions.


async def test_cancelled_upload_is_stopped_before_the_answer(rig: OutRig) -> None:
    rig.remote("one").gate = trio.Event()
    async with rig.running() as out:
        await rig.add("c1", "a", "b")
        await rig.until(lambda: len(rig.puts()) == 2)
        first = await rig.upload("a")
        assert await out.cancel([first.id]) == 1
        assert [one.upload.item.file for one in out.under_way] == ["b"]
        rig.remote("one").gate.set()
        await rig.idle()
        assert await rig.states() == {"c1/a": "cancelled", "c1/b": "done"}
        assert rig.remote("one").paths() == ["/b"]
        await out.retry([first.id])
        await rig.idle()
    assert rig.remote("one").content("/a") == b"c1/a"


async def test_everything_that_is_open_is_cancelled(rig: OutRig) -> None:
    rig.remote("one").gate = trio.Event()
    rig.remote("two").failures = [AccessDenied("No.")]
    async with rig.running() as out:
        await rig.add("c1", "a", "b", "c", "d", "e")
        await rig.add("c2", "f", host="two")
        await rig.until(lambda: len(rig.puts()) == 3)
        assert await out.cancel(None, discard=True) == 6
        assert not out.busy
        assert set((await rig.states()).values()) == {"cancelled"}
        assert not list((rig.directory / "files").iterdir())


# The end of a daemon, and the next one.


async def test_next_daemon_goes_on(rig: OutRig) -> None:
    rig.remote("one").gate = trio.Event()
    async with rig.running():
        await rig.prepare("c0", "p")
        await rig.add("c1", "a", "b", "c", "d")
        await rig.until(lambda: len(rig.puts()) == 3)
    rig.remote("one").gate.set()
    async with rig.running() as out:
        assert await out.unsettled() == ["c0"]
        await rig.until(lambda: len(rig.remote("one").paths()) == 4)
        await out.discard("c0")
        await rig.idle()
        assert set((await rig.states()).values()) == {"done"}


async def test_upload_whose_end_was_not_written_down_is_found_done(rig: OutRig) -> None:
    rig.remote("one").store("/a", b"c1/a")
    rig.remote("one").store("/b", b"somebody else's")
    async with rig.running():
        await rig.add("c1", "a", "b")
        await rig.idle()
        assert await rig.states() == {"c1/a": "done", "c1/b": "failed"}
    assert rig.remote("one").content("/b") == b"somebody else's"


async def test_end_of_a_mount_waits_for_what_moves(rig: OutRig) -> None:
    rig.remote("one").gate = trio.Event()
    async with rig.running() as out:
        await rig.add("c1", "a", "b", "c", "d")
        await rig.until(lambda: len(rig.puts()) == 3)
        rig.remote("one").gate.set()
        await out.drain()
        assert not out.busy
    assert len(rig.remote("one").paths()) == 4


async def test_end_of_a_mount_waits_for_nobody_else(
    rig: OutRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stageout, "TICK_S", 0.01)
    monkeypatch.setattr(stageout, "DRAIN_STALL_S", 0.02)
    rig.remote("one").failures = [RemoteUnavailable("Nobody answers.")] * 100_000
    async with rig.running() as out:
        await rig.add("c1", "a")
        await out.drain()
        assert out.busy


# A disk that refuses.


class FullDisk(Queue):
    """Refuses so many activations and settlements."""

    refusals = 0
    settled: Sequence[Outcome] = ()

    def activate(self, commit: str) -> int:
        self._refuse()
        return super().activate(commit)

    def discard(self, commit: str) -> int:
        self._refuse()
        return super().discard(commit)

    def settle(self, outcomes: Sequence[Outcome]) -> None:
        self._refuse()
        if outcomes:
            self.settled = [*self.settled, *outcomes]
        super().settle(outcomes)

    def _refuse(self) -> None:
        if FullDisk.refusals:
            FullDisk.refusals -= 1
            raise NoSpace("The disk of the queue is full.")


@pytest.fixture
def full(rig: OutRig) -> OutRig:
    FullDisk.refusals = 0
    rig.new_queue = lambda: FullDisk.open(rig.directory, owner=OWNER, origin="here")
    return rig


async def test_activation_is_made_up_for(full: OutRig) -> None:
    async with full.running() as out:
        await full.prepare("c1", "a")
        FullDisk.refusals = 3
        await out.activate("c1")
        assert out.trouble == "The disk of the queue is full."
        await full.idle()
        assert await full.states() == {"c1/a": "done"}
        assert out.trouble is None


async def test_discarding_is_made_up_for(full: OutRig) -> None:
    async with full.running() as out:
        await full.prepare("c1", "a")
        FullDisk.refusals = 3
        await out.discard("c1")
        await full.idle()
        assert await full.rows() == []


async def test_outcome_is_kept_until_it_can_be_written(full: OutRig) -> None:
    full.remote("one").gate = trio.Event()
    async with full.running():
        await full.add("c1", "a", "b")
        await full.until(lambda: len(full.puts()) == 2)
        FullDisk.refusals = 5
        full.remote("one").gate.set()
        await full.idle()
        assert await full.states() == {"c1/a": "done", "c1/b": "done"}
    assert sorted(full.puts()) == ["a", "b"], "what is done is not done again meanwhile"


async def test_full_disk_does_not_keep_a_mount_from_ending(full: OutRig) -> None:
    async with full.running() as out:
        await full.prepare("c1", "a")
        FullDisk.refusals = 1_000_000
        await out.activate("c1")
    FullDisk.refusals = 0
    async with full.running() as out:
        assert await out.unsettled() == ["c1"], "the namespace knows that it was committed"
        await out.activate("c1")
        await full.idle()
        assert await full.states() == {"c1/a": "done"}


async def test_what_is_known_is_written_down_at_the_end(full: OutRig) -> None:
    full.remote("one").gate = trio.Event()
    async with full.running() as out:
        await full.add("c1", "a")
        await full.until(lambda: len(full.puts()) == 1)
        FullDisk.refusals = 1
        full.remote("one").gate.set()
        await full.until(lambda: not out.under_way)
    async with full.running():
        assert await full.states() == {"c1/a": "done"}
    assert full.puts() == ["a"]
