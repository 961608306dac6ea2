"""Whether the program that works in a sandbox still runs: the same one, on the same boot."""

import os
import subprocess
from pathlib import Path

import msgspec
import pytest

from stagefs.errors import NotFound
from stagefs.staging.workers import Worker, has_ended, worker_of

BOOT = "sys/kernel/random/boot_id"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / BOOT).parent.mkdir(parents=True)
    (tmp_path / BOOT).write_text("first boot\n")
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/ns/pid").symlink_to("pid:[1]")
    _runs(tmp_path, state="S", start_ticks=500)
    return tmp_path


def _runs(proc: Path, *, state: str, start_ticks: int) -> None:
    (proc / "7").mkdir(exist_ok=True)
    between = " ".join(str(number) for number in range(4, 22))
    (proc / "7/stat").write_text(f"7 (a) b (c) {state} {between} {start_ticks} 23 24\n")


def test_a_program_is_known_by_number_start_and_boot(proc: Path) -> None:
    worker = worker_of(7, proc)
    assert worker == Worker(7, 500, "first boot", "pid:[1]")
    assert not has_ended(worker, proc)
    with pytest.raises(NotFound, match="no program 8"):
        worker_of(8, proc)


def test_its_number_may_be_another_programs(proc: Path) -> None:
    worker = worker_of(7, proc)
    _runs(proc, state="S", start_ticks=501)
    assert has_ended(worker, proc)


def test_one_that_nobody_waited_for_has_ended(proc: Path) -> None:
    worker = worker_of(7, proc)
    _runs(proc, state="Z", start_ticks=500)
    assert has_ended(worker, proc)


def test_everything_ends_with_the_boot(proc: Path) -> None:
    worker = worker_of(7, proc)
    (proc / BOOT).write_text("second boot\n")
    assert has_ended(worker, proc)


def test_what_cannot_be_seen_counts_as_running(proc: Path) -> None:
    worker = msgspec.structs.replace(worker_of(7, proc), pid=8, pid_namespace="pid:[2]")
    assert not has_ended(worker, proc)


def test_real_programs() -> None:
    assert not has_ended(worker_of(os.getpid()))
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    worker = worker_of(child.pid)
    assert not has_ended(worker)
    child.communicate()
    assert has_ended(worker)
