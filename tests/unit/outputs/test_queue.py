"""The durable queue: what each call leaves behind, for this daemon and the next one."""

import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagefs.errors import (
    NewerFormat,
    NotFound,
    NotPermitted,
    StateFailed,
    StateInUse,
    UnsuitableState,
)
from stagefs.model import Checksum, ChecksumKind
from stagefs.outputs.queued import Done, NotDone, QueueItem, Total, Upload, UploadState
from tests.unit.outputs.queue_rig import QueueRig


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[QueueRig]:
    rig = QueueRig(tmp_path / "outputs")
    yield rig
    rig.queue.close()


def test_commit_is_uploaded_only_when_it_is_activated(queue: QueueRig) -> None:
    queue.prepare("c1", "a", "b")
    assert queue.next() == []
    assert queue.queue.unsettled() == ["c1"]
    assert queue.queue.activate("c1") == 2
    assert queue.next() == ["c1/a", "c1/b"]
    assert queue.queue.unsettled() == []


def test_what_is_activated_twice_is_activated_once(queue: QueueRig) -> None:
    queue.prepare("c1", "a", overwrite=True)
    queue.queue.activate("c1")
    before = queue.all()
    assert queue.queue.activate("c1") == 0
    assert queue.all() == before


def test_discarded_commit_is_gone_with_its_files(queue: QueueRig) -> None:
    queue.prepare("c1", "a", "b")
    queue.prepare("c2", "a")
    assert queue.queue.discard("c1") == 2
    assert queue.states() == {"c2/a": "prepared"}
    assert queue.kept() == {"c2/a"}


def test_what_is_active_cannot_be_discarded(queue: QueueRig) -> None:
    queue.add("c1", "a")
    assert queue.queue.discard("c1") == 0
    assert queue.next() == ["c1/a"]


def test_row_comes_back_as_the_value_it_was(queue: QueueRig) -> None:
    (queue.queue.make_directory_of("c1") / "0").write_bytes(b"1234567")
    item = QueueItem(
        url=os.fsdecode(b"s3://bucket/caf\xe9"),
        file="0",
        size_bytes=7,
        checksums=(Checksum(ChecksumKind.SHA256, "ab" * 32), Checksum(ChecksumKind.XXH3, "0" * 16)),
        mode=0o640,
        mtime_ns=123_456_789,
        overwrite=True,
        label=os.fsdecode(b"out/\xff"),
    )
    queue.queue.add("c1", [item])
    assert queue.daemon().uploads() == [
        Upload(
            id=1,
            commit="c1",
            state=UploadState.QUEUED,
            item=item,
            added_ns=queue.clock.now_ns,
            changed_ns=queue.clock.now_ns,
            origin="here:/state-a",
        )
    ]


@pytest.mark.parametrize("size_bytes", [3, 5])
def test_file_of_another_size_is_not_queued(queue: QueueRig, size_bytes: int) -> None:
    (queue.queue.make_directory_of("c1") / "0").write_bytes(b"1234")
    item = QueueItem(url="memory://store/a", file="0", size_bytes=size_bytes)
    with pytest.raises(StateFailed, match=r"has 4 bytes.*memory://store/a"):
        queue.queue.prepare("c1", [item])
    assert queue.all() == []


def test_file_that_is_not_there_is_not_queued(queue: QueueRig) -> None:
    items = queue.files("c1", ["a", "b"])
    (queue.queue.directory_of("c1") / "b").unlink()
    with pytest.raises(StateFailed, match=r"is not there.*memory://store/b"):
        queue.queue.add("c1", items)
    assert queue.all() == []


def test_name_that_leads_out_of_the_directory_is_no_commit(queue: QueueRig) -> None:
    for name in ("..", ".", "a/b", "", "a" * 200):
        with pytest.raises(ValueError, match="cannot be the name of a commit"):
            queue.queue.directory_of(name)


# What goes out.


def test_done_is_remembered_and_its_file_goes(queue: QueueRig) -> None:
    (number,) = queue.add("c1", "a")
    queue.queue.settle([Done(number, "etag:1")])
    (upload,) = queue.daemon().uploads()
    assert (upload.state, upload.validator) == (UploadState.DONE, "etag:1")
    assert queue.kept() == set()
    assert not queue.queue.directory_of("c1").exists()


def test_failure_stays_with_its_reason_and_file(queue: QueueRig) -> None:
    first, second = queue.add("c1", "a", "b")
    at_ns = queue.clock.now_ns + 5
    outcomes = [
        NotDone(first, "It exists.", final=True),
        NotDone(second, "Nobody answers.", final=False, next_try_ns=at_ns),
    ]
    queue.queue.settle(outcomes)
    failed, waiting = queue.daemon().uploads()
    assert (failed.state, failed.reason, failed.attempts) == ("failed", "It exists.", 1)
    assert (waiting.state, waiting.reason, waiting.next_try_ns) == (
        "queued",
        "Nobody answers.",
        at_ns,
    )
    assert queue.next() == ["c1/b"]
    assert queue.kept() == {"c1/a", "c1/b"}
    queue.queue.settle([NotDone(second, "Nobody answers.", final=False)])
    assert queue.queue.upload(second).attempts == 2


def test_the_oldest_activation_is_first(queue: QueueRig) -> None:
    queue.prepare("late", "a")
    queue.add("early", "b")
    queue.queue.activate("late")
    assert queue.next() == ["early/b", "late/a"]
    assert queue.next(1) == ["early/b"]


def test_one_url_is_uploaded_in_order(queue: QueueRig) -> None:
    (first,) = queue.add("c1", "a")
    queue.add("c2", "a", "b")
    assert queue.next() == ["c1/a", "c2/b"], "the second upload to one URL waits for the first"
    assert queue.queue.next_uploads(9, without=[first])[0].item.file == "b"
    queue.queue.settle([NotDone(first, "No.", final=True)])
    assert queue.next() == ["c2/a", "c2/b"]


def test_later_output_that_overwrites_makes_earlier_ones_needless(queue: QueueRig) -> None:
    queue.add("c1", "a", "b")
    (failed,) = queue.add("c2", "c")
    queue.queue.settle([NotDone(failed, "No.", final=True)])
    queue.add("c3", "a", "c", overwrite=True)
    assert queue.states() == {
        "c1/a": "replaced",
        "c1/b": "queued",
        "c2/c": "replaced",
        "c3/a": "queued",
        "c3/c": "queued",
    }
    assert queue.kept() == {"c1/b", "c3/a", "c3/c"}
    assert queue.next() == ["c1/b", "c3/a", "c3/c"]


def test_removal_has_no_file_and_its_turn(queue: QueueRig) -> None:
    removal = QueueItem(url="memory://store/a", file="1", size_bytes=0, removes=True)
    (failed,) = queue.add("c1", "a")
    queue.queue.settle([NotDone(failed, "No.", final=True)])
    queue.queue.add("c2", [removal])
    assert queue.states() == {"c1/a": "replaced", "c2/1": "queued"}
    queue.add("c3", "a")
    assert queue.next() == ["c2/1"], "what comes after the removal would be removed"
    (found,) = queue.queue.of_commit("c2")
    assert found.item == removal
    queue.queue.settle([NotDone(found.id, "No.", final=True)])
    queue.queue.retry([found.id])
    queue.queue.settle([Done(found.id, "")])
    assert queue.next() == ["c3/a"]
    assert [one.state for one in queue.queue.some([found.id, 99])] == [UploadState.DONE]
    assert queue.kept() == {"c3/a"}


def test_prepared_output_makes_nothing_needless_before_it_is_activated(queue: QueueRig) -> None:
    queue.add("c1", "a")
    queue.prepare("c2", "a", overwrite=True)
    assert queue.next() == ["c1/a"]
    queue.queue.discard("c2")
    assert queue.states() == {"c1/a": "queued"}


def test_hosts_that_are_held_are_left_out(queue: QueueRig) -> None:
    items = queue.files("c1", ["a"], prefix="ssh://one/")
    items += queue.files("c1", ["b"], prefix="ssh://two/")
    queue.queue.add("c1", items)
    found = queue.queue.next_uploads(9, hosts_held=["ssh://one"])
    assert [upload.item.url for upload in found] == ["ssh://two/b"]


# What somebody decides.


def test_failed_upload_is_retried(queue: QueueRig) -> None:
    (number,) = queue.add("c1", "a")
    queue.queue.settle([NotDone(number, "No.", final=True)])
    queue.queue.retry([number])
    upload = queue.queue.upload(number)
    assert (upload.state, upload.attempts, upload.reason) == ("queued", 0, "No.")


def test_cancelled_upload_can_be_brought_back(queue: QueueRig) -> None:
    first, second = queue.add("c1", "a", "b")
    queue.queue.cancel([first, second])
    assert queue.next() == []
    assert queue.kept() == {"c1/a", "c1/b"}
    queue.queue.retry([second])
    assert queue.next() == ["c1/b"]


def test_discarded_upload_cannot(queue: QueueRig) -> None:
    (number,) = queue.add("c1", "a")
    queue.queue.cancel([number], discard=True)
    assert queue.kept() == set()
    with pytest.raises(StateFailed, match="is not there"):
        queue.queue.retry([number])
    assert queue.states() == {"c1/a": "cancelled"}


def test_end_of_an_attempt_that_was_cancelled(queue: QueueRig) -> None:
    first, second = queue.add("c1", "a", "b")
    queue.queue.cancel([first, second])
    queue.queue.settle([Done(first, "etag:1"), NotDone(second, "No.", final=False)])
    assert queue.states() == {"c1/a": "done", "c1/b": "cancelled"}, "what was uploaded is done"


def test_nothing_is_decided_about_what_is_over_or_being_made(queue: QueueRig) -> None:
    (number,) = queue.add("c1", "a")
    queue.queue.settle([Done(number, "etag:1")])
    queue.prepare("c2", "b")
    for decide in (queue.queue.retry, queue.queue.cancel):
        with pytest.raises(NotPermitted, match=r"Upload 1 \(memory://store/a\) is done"):
            decide([number])
        with pytest.raises(NotPermitted, match="belongs to a commit that is being made"):
            decide([2])
        with pytest.raises(NotFound, match="no upload 77"):
            decide([77])
    assert queue.states() == {"c1/a": "done", "c2/b": "prepared"}


# Other daemons.


def test_second_daemon_is_told_who_has_the_directory(queue: QueueRig) -> None:
    with pytest.raises(StateInUse) as caught:
        queue.open("state-b")
    sentence = str(caught.value)
    assert f"process {os.getpid()} on {os.uname().nodename}" in sentence
    assert str(queue.directory) in sentence
    assert "state here:/state-a" in sentence


def test_other_state_directory_adopts_what_is_queued(queue: QueueRig) -> None:
    queue.add("c1", "a")
    assert queue.daemon("state-b").next_uploads(9)[0].item.file == "a"


def test_what_another_state_directory_prepared_waits_for_a_decision(queue: QueueRig) -> None:
    queue.prepare("c1", "a", "b")
    queue.prepare("c2", "c", "d")
    adopted = queue.daemon("state-b")
    adopted.sweep()
    assert adopted.unsettled() == [], "only the other namespace knows whether it was committed"
    assert [(one.own, one.origin) for one in adopted.uploads()] == [(False, "here:/state-a")] * 4
    adopted.retry([1])
    adopted.cancel([3])
    assert queue.states() == {
        "c1/a": "queued",
        "c1/b": "queued",
        "c2/c": "cancelled",
        "c2/d": "cancelled",
    }, "a commit is decided as a whole"


def test_first_state_directory_finds_what_it_prepared(queue: QueueRig) -> None:
    queue.prepare("c1", "a")
    queue.daemon("state-b")
    assert queue.daemon().unsettled() == ["c1"]


def test_files_that_nobody_queued_are_swept(queue: QueueRig) -> None:
    (done,) = queue.add("kept", "done")
    queue.add("kept2", "a")
    queue.files("never", ["x", "y"])
    queue.queue.settle([Done(done, "v")])
    queue.queue.make_directory_of("kept")
    (queue.queue.directory_of("kept") / "done").write_bytes(b"left by a crash")
    assert queue.daemon().sweep() == 3
    assert queue.kept() == {"kept2/a"}
    assert {path.name for path in (queue.directory / "files").iterdir()} == {"kept2"}


# Keeping house.


def test_totals_follow_every_change(queue: QueueRig) -> None:
    assert queue.queue.totals() == {}
    queue.prepare("c0", "a")
    first, second = queue.add("c1", "a", "b")
    assert queue.queue.totals() == {
        UploadState.PREPARED: Total(1, 4),
        UploadState.QUEUED: Total(2, 8),
    }
    queue.queue.settle([Done(first, "v"), NotDone(second, "No.", final=True)])
    queue.queue.discard("c0")
    assert queue.daemon().totals() == {
        UploadState.DONE: Total(1, 4),
        UploadState.FAILED: Total(1, 4),
    }


def test_what_is_over_is_forgotten_after_a_while(queue: QueueRig) -> None:
    done, cancelled, failed = queue.add("c1", "done", "cancelled", "failed")
    queue.queue.settle([Done(done, "v"), NotDone(failed, "No.", final=True)])
    queue.queue.cancel([cancelled])
    queue.clock.move_s(99)
    assert queue.queue.trim(keep_s=100, keep_max=10) == 0
    queue.clock.move_s(2)
    assert queue.queue.trim(keep_s=100, keep_max=10) == 2
    assert queue.queue.trim(keep_s=100, keep_max=10) == 0
    assert queue.states() == {"c1/failed": "failed"}, "a failure stays until somebody decides"
    assert queue.kept() == {"c1/failed"}


def test_only_so_much_of_what_is_over_is_kept(queue: QueueRig) -> None:
    for number in range(5):
        (upload,) = queue.add(f"c{number}", "a")
        queue.clock.move_s(1)
        queue.queue.settle([Done(upload, "v")])
    assert queue.queue.trim(keep_s=1000, keep_max=2) == 3
    assert queue.states() == {"c3/a": "done", "c4/a": "done"}


# The directory.


def test_nobody_else_can_read_it(queue: QueueRig) -> None:
    queue.add("c1", "a")
    for path in [queue.directory / "files", *queue.directory.glob("queue.*")]:
        assert not path.stat().st_mode & 0o077, path


def test_directory_that_everybody_may_write_is_refused(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    outputs.chmod(0o777)
    with pytest.raises(UnsuitableState, match="chmod o-w"):
        QueueRig(outputs)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory of another user")
def test_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    os.chown(outputs, 12345, 12345)
    with pytest.raises(UnsuitableState, match="belongs to user 12345"):
        QueueRig(outputs)


def test_file_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    foreign = sqlite3.connect(outputs / "queue.sqlite")
    foreign.execute("CREATE TABLE mine (x)")
    foreign.close()
    before = (outputs / "queue.sqlite").read_bytes()
    with pytest.raises(UnsuitableState, match="belongs to another program"):
        QueueRig(outputs)
    assert (outputs / "queue.sqlite").read_bytes() == before


def test_symbolic_link_in_its_place_is_refused(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    (outputs / "queue.sqlite").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsuitableState):
        QueueRig(outputs)
    assert not (tmp_path / "elsewhere").exists()


def test_later_format_is_refused(queue: QueueRig) -> None:
    path = queue.directory / "queue.sqlite"
    queue.queue.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(NewerFormat, match="format 2, this StageFS knows 1"):
        queue.open()


def test_damaged_queue_is_refused(queue: QueueRig) -> None:
    queue.queue.close()
    path = queue.directory / "queue.sqlite"
    with path.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff" * 4096)
    with pytest.raises(UnsuitableState, match="damaged or not ours"):
        queue.open()


def test_format_on_disk(queue: QueueRig) -> None:
    """Who changes the schema raises FORMAT_VERSION, migrates, and then changes this."""
    queue.queue.close()
    assert stat.S_IMODE((queue.directory / "queue.sqlite").stat().st_mode) == 0o600
    connection = sqlite3.connect(queue.directory / "queue.sqlite")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    columns = [row[1] for row in connection.execute("PRAGMA table_info(uploads)")]
    connection.close()
    assert version == 1
    assert columns == [
        "id", "commit_id", "state", "turn", "owner", "origin", "host", "url", "removes", "file",
        "label",
        "size_bytes", "checksums", "mode", "mtime_ns", "overwrite", "attempts", "reason",
        "next_try_ns", "added_ns", "changed_ns", "validator",
    ]  # fmt: skip
