"""A daemon that lives and answers nobody is replaced, and only such a one."""

import functools
import json
import os
import signal
import socket
from pathlib import Path

import pytest

from tests.support.fuse_fixtures import SMALL, NewSupervised
from tests.support.identity import Identity
from tests.support.waiting import wait_until

QUICK = ("--probe-period-s", "0.2", "--probe-timeout-s", "2")
WEDGED = "has answered nothing"
modes = pytest.mark.parametrize("mode", [(), ("--no-resend",)], ids=["resend", "no-resend"])


@modes
def test_a_stopped_daemon_is_replaced_under_who_waits_for_it(
    new_supervised: NewSupervised, identity: Identity, mode: tuple[str, ...]
) -> None:
    mount = new_supervised(identity)
    mount.ready(*QUICK, *mode)
    stopped = mount.daemon()
    os.kill(stopped, signal.SIGSTOP)
    reader = identity.run("cat", mount.point / "big", deadline_s=60)
    assert reader.stdout == SMALL
    assert mount.daemon() != stopped
    assert f"daemon {stopped} {WEDGED}" in mount.log()
    assert mount.end() == 0


def test_a_stopped_daemon_is_noticed_although_nobody_uses_the_mount(
    new_supervised: NewSupervised, anybody: Identity
) -> None:
    mount = new_supervised(anybody)
    mount.ready(*QUICK)
    stopped = mount.daemon()
    os.kill(stopped, signal.SIGSTOP)
    wait_until(lambda: WEDGED in mount.log(), "the note that the daemon is wedged")
    wait_until(lambda: mount.log().count(" started") == 2, "the next daemon")
    assert anybody.run("cat", mount.point / "big").stdout == SMALL


def test_nothing_is_done_where_the_watchdog_is_off(
    new_supervised: NewSupervised, anybody: Identity
) -> None:
    """The supervisor goes round its loop, as its other duties show, and leaves the daemon be."""
    mount = new_supervised(anybody)
    pilot = anybody.start("sleep", "1000")
    mount.ready(
        "--probe-period-s", "0.1", "--probe-timeout-s", "0", "--lifetime", f"pid:{pilot.pid}"
    )
    stopped = mount.daemon()
    os.kill(stopped, signal.SIGSTOP)
    pilot.kill()
    pilot.communicate()
    os.kill(stopped, signal.SIGCONT)
    assert mount.wait() == 0
    assert WEDGED not in mount.log()


def test_readers_that_wait_for_ever_are_no_reason(
    new_supervised: NewSupervised, anybody: Identity
) -> None:
    mount = new_supervised(anybody)
    mount.ready("--probe-period-s", "0.1", "--probe-timeout-s", "1")
    first = mount.daemon()
    stalled = anybody.start("head", "-c1", mount.point / "stalled")
    try:
        wchan = Path(f"/proc/{stalled.pid}/wchan")
        wait_until(lambda: "folio" in wchan.read_text(), "the reader to wait")
        with pytest.raises(AssertionError, match="a wedged daemon"):
            wait_until(lambda: WEDGED in mount.log(), "a wedged daemon", deadline_s=4)
        assert mount.daemon() == first
    finally:
        stalled.kill()
        stalled.communicate(timeout=20)


def test_many_deaths_without_an_answer_end_in_a_failed_state(
    new_supervised: NewSupervised, anybody: Identity
) -> None:
    mount = new_supervised(anybody)
    mount.ready(*QUICK, daemon=("--refuse-again", "The disk is gone."))
    os.kill(mount.daemon(), signal.SIGSTOP)
    assert mount.wait() == 1
    record = json.loads((mount.state / "supervisor.json").read_text())
    assert "died without answering" in record["failed"]
    assert str(mount.point) in record["failed"]
    mount.ready()
    assert "failed" not in json.loads((mount.state / "supervisor.json").read_text())


def test_an_idle_mount_survives_any_number_of_deaths(
    new_supervised: NewSupervised, anybody: Identity
) -> None:
    mount = new_supervised(anybody)
    mount.ready("--probe-period-s", "0.1")
    for number in range(1, 7):
        wait_until(
            functools.partial(lambda n: mount.log().count("the mount answers") == n, number),
            "an answer to the supervisor's own request",
        )
        mount.kill_daemon()
    assert anybody.run("cat", mount.point / "big").stdout == SMALL
    assert "giving up" not in mount.log()


def test_what_the_service_manager_is_told(
    new_supervised: NewSupervised, identity: Identity, work: Path
) -> None:
    place = work / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(place))
        place.chmod(0o666)
        manager.settimeout(30)
        mount = new_supervised(identity)
        mount.ready("--notify-socket", str(place))
        heard = [manager.recv(4096).decode()]
        while "READY=1" not in heard[-1]:
            heard.append(manager.recv(4096).decode())
        assert f"MAINPID={mount.supervisor.pid}" in heard[-1].splitlines()
        mount.kill_daemon()
        while "bringing the daemon back" not in heard[-1]:
            heard.append(manager.recv(4096).decode())
        while heard[-1] != "WATCHDOG=1":
            heard.append(manager.recv(4096).decode())
        assert mount.end() == 0
        while "STOPPING=1" not in heard[-1]:
            heard.append(manager.recv(4096).decode())
        assert "SIGTERM received" in heard[-1]


def test_a_full_log_is_kept_once_and_begun_anew(
    new_supervised: NewSupervised, identity: Identity
) -> None:
    mount = new_supervised(identity)
    mount.ready()
    with (mount.state / "supervisor.log").open("ab") as log:
        log.write(b"x" * (9 << 20))
    wait_until(lambda: (mount.state / "supervisor.log").stat().st_size == 0, "a new log")
    assert (mount.state / "supervisor.log.1").stat().st_size > 9 << 20
    assert (mount.state / "supervisor.log.1").stat().st_uid == identity.uid
    mount.kill_daemon()
    assert identity.run("cat", mount.point / "big").stdout == SMALL
