"""Processes by number and start time."""

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest

from stagefs.supervisor.lifetime import is_stuck_zombie, parse_lifetime, read_process


def test_for_ever_names_nobody() -> None:
    assert parse_lifetime("forever") is None


def test_a_process_lives_until_it_ends() -> None:
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    named = parse_lifetime(f"pid:{child.pid}")
    assert named is not None
    assert named.is_alive()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_stuck_zombie(child.pid)
    assert not named.is_alive(), "a zombie has ended"
    child.communicate()
    assert not named.is_alive()


def test_the_same_number_is_not_the_same_process() -> None:
    this = read_process(os.getpid())
    assert this is not None
    assert this.is_alive()
    assert not dataclasses.replace(this, start_time=this.start_time - 1).is_alive()


@pytest.mark.parametrize("text", ["pid:", "pid:x", "pid:-1", "process:1", ""])
def test_what_is_no_lifetime(text: str) -> None:
    with pytest.raises(ValueError, match="none of pid:N, job, forever"):
        parse_lifetime(text)


def test_jobs_live_as_long_as_one_of_them(tmp_path: Path) -> None:
    jobs = parse_lifetime(f"jobs:{tmp_path}")
    assert jobs is not None
    assert not jobs.is_alive(), "no job is there"
    this = read_process(os.getpid())
    assert this is not None
    (tmp_path / "ended").write_text(f"{this.pid} {this.start_time - 1}")
    assert not jobs.is_alive(), "its process has ended, and another one has its number"
    (tmp_path / "running").write_text(f"{this.pid} {this.start_time}")
    assert jobs.is_alive()
    (tmp_path / "running").write_text("")
    assert jobs.is_alive(), "it has no process, so it lives until it is removed"
    (tmp_path / "running").unlink()
    assert not jobs.is_alive()
    (tmp_path / "ended").unlink()
    tmp_path.rmdir()
    assert not jobs.is_alive()
