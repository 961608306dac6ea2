"""kill -9 of the daemon under load: nobody notices, nothing happens twice."""

import hashlib
import os
import random
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support import kernel
from tests.support.fuse_fixtures import SMALL, NewSupervised
from tests.support.identity import Identity
from tests.support.waiting import wait_until

BIG_BYTES = 200 << 20
KILLS = 3
# On a busy machine the daemon may be idle whenever it is killed: then it is killed more often.
KILLS_MAX = 12
resend_modes = pytest.mark.parametrize("mode", [(), ("--no-resend",)], ids=["resend", "no-resend"])


def in_flight(log: str) -> list[int]:
    return [int(number) for number in re.findall(r"(\d+) requests were in flight", log)]


@resend_modes
def test_a_reader_does_not_notice_dead_daemons(
    new_supervised: NewSupervised, identity: Identity, mode: tuple[str, ...]
) -> None:
    content = random.Random(1).randbytes(BIG_BYTES)
    mount = new_supervised(identity, content=content)
    facts = mount.ready(*mode)
    if not mode and not facts["resend"]:
        pytest.skip("this kernel has no RESEND")
    reader = identity.start("sha256sum", mount.point / "big", mount.point / "again")
    try:
        for kills in range(KILLS_MAX):
            mount.daemon()
            if kills >= KILLS and (not facts["resend"] or any(in_flight(mount.log()))):
                break
            _wait_for_progress(reader)
            assert reader.poll() is None, "it had finished before the daemon died"
            mount.kill_daemon()
        output, errors = reader.communicate(timeout=120)
    finally:
        reader.kill()
        reader.communicate()
    assert reader.returncode == 0, errors
    digests = {line.split()[0] for line in output.decode().splitlines()}
    assert digests == {hashlib.sha256(content).hexdigest()}
    if facts["resend"]:
        assert max(in_flight(mount.log())) > 0, "no kill hit a request"


def _wait_for_progress(reader: subprocess.Popen[bytes]) -> None:
    """Until it has read some more, so that the daemon dies in the middle."""

    def read_bytes() -> int:
        text = Path(f"/proc/{reader.pid}/io").read_text()
        return int(text.split("rchar: ")[1].split()[0])

    before = read_bytes()
    wait_until(lambda: read_bytes() > before + (1 << 20), "progress of the reader")


# Linux repeats mkdir when the request itself is answered with ESTALE, but not when the lookup
# of the name that precedes it is: without RESEND that error, and no other, reaches the program.
CHANGE_NAMES = """
import errno, os, sys, pathlib
top, stop, number = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
count = 0
with open(stop + number, "ab", buffering=0) as progress:
    while not os.path.exists(stop):
        first, second = top / f"{number}-{count}-a", top / f"{number}-{count}-b"
        try:
            first.mkdir()
        except OSError as exc:
            if exc.errno != errno.ESTALE or sys.argv[4] == "True":
                raise
            first.mkdir()
        first.rename(second)
        second.rmdir()
        count += 1
        progress.write(b".")
"""
CHANGERS = 4
CHANGES_KILLED_MAX = 100


@resend_modes
def test_names_change_exactly_once(
    new_supervised: NewSupervised, identity: Identity, mode: tuple[str, ...]
) -> None:
    mount = new_supervised(identity)
    facts = mount.ready(*mode)
    stop = mount.state / "stop"
    changers = [
        identity.start(
            *("python", "-c", CHANGE_NAMES, mount.point / "names", stop),
            *(str(number), str(facts["resend"])),
        )
        for number in range(CHANGERS)
    ]
    chance = random.Random(2)
    try:
        for kills in range(CHANGES_KILLED_MAX):
            if kills >= 12 and (not facts["resend"] or any(in_flight(mount.log()))):
                break
            _wait_for_changes(stop, chance.randrange(2, 30))
            mount.kill_daemon()
        _wait_for_changes(stop, 2)
    finally:
        stop.touch()
        errors = [changer.communicate(timeout=60)[1] for changer in changers]
    assert not any(errors), b"".join(errors).decode()
    if facts["resend"]:
        assert sum(in_flight(mount.log())) > 0, "no kill hit a request"


def _wait_for_changes(stop: Path, count: int) -> None:
    """Until every changer has done so many more rounds.

    Every one: without RESEND the kernel repeats a request once, so a test may not kill two
    daemons over the same one.
    """

    def rounds(number: int) -> int:
        path = stop.with_name(f"{stop.name}{number}")
        return path.stat().st_size if path.exists() else 0

    wanted = [rounds(number) + count for number in range(CHANGERS)]

    def all_changed() -> bool:
        return all(rounds(number) >= wanted[number] for number in range(CHANGERS))

    wait_until(all_changed, "changes of names", deadline_s=20)


def test_a_daemon_stuck_in_the_kernel_is_replaced(
    new_supervised: NewSupervised, identity: Identity
) -> None:
    mount = new_supervised(identity)
    mount.ready()
    waiter = identity.start("stat", mount.point / "names/wait")
    try:
        first = mount.daemon()
        wait_until(lambda: _is_stuck(first), "a thread of the daemon waiting in the kernel")
        os.kill(first, signal.SIGKILL)
        _, errors = waiter.communicate(timeout=60)
    finally:
        waiter.kill()
        waiter.communicate()
    assert b"No such file" in errors, "the next daemon answers"
    assert mount.end() == 0


def _is_stuck(pid: int) -> bool:
    """Whether a thread sits in uninterruptible sleep."""
    stats = Path(f"/proc/{pid}/task").glob("*/stat")
    return any(stat.read_text().rpartition(")")[2].split()[0] == "D" for stat in stats)


def test_a_daemon_that_always_dies_ends_the_mount(
    new_supervised: NewSupervised, identity: Identity
) -> None:
    mount = new_supervised(identity)
    facts = mount.ready()
    if not facts["resend"]:
        pytest.skip("without RESEND the deadly request does not come again")
    reader = identity.run("cat", mount.point / "crash", check=False)
    assert reader.returncode != 0
    assert mount.wait() == 1
    assert "giving up" in mount.log()
    assert not mount.is_mounted()
    assert not kernel.programs_naming(mount.state)


def test_a_next_daemon_that_refuses_ends_the_mount(
    new_supervised: NewSupervised, identity: Identity
) -> None:
    mount = new_supervised(identity)
    mount.ready(daemon=("--refuse-again", "The disk is gone."))
    os.kill(mount.daemon(), signal.SIGKILL)
    assert mount.wait() == 1
    assert "The disk is gone." in mount.log()
    assert not mount.is_mounted()


@resend_modes
def test_stalled_readers_survive_in_the_next_daemon(
    new_supervised: NewSupervised, identity: Identity, mode: tuple[str, ...]
) -> None:
    """Neither the readers that wait nor those that come later are lost with a daemon."""
    mount = new_supervised(identity)
    mount.ready(*mode)
    stalled = identity.start("head", "-c1", mount.point / "stalled")
    try:
        wait_until(lambda: "folio" in _wait_channel(stalled.pid), "the reader to wait")
        mount.kill_daemon()
        assert identity.run("cat", mount.point / "big").stdout == SMALL
        assert stalled.poll() is None, "it still waits"
    finally:
        stalled.kill()
        # A page that failed once is read by a request that the kernel does not let go of
        # before it is answered: such a reader ends with the mount.
        assert mount.end() == 0
        stalled.communicate(timeout=20)


def _wait_channel(pid: int) -> str:
    return Path(f"/proc/{pid}/wchan").read_text()
