"""The next daemon of a real mount, which stands by until the one that serves dies."""

import os
import signal
from collections.abc import Callable

import pytest

from tests.support.identity import Identity
from tests.support.mounted import Mounted
from tests.support.waiting import wait_until

MakeMount = Callable[..., Mounted]
SOON = '[mount]\nstandby_after_s = "100ms"\n'


def standby(mount: Mounted, *besides: int) -> int:
    """The one that stands by, when it has come so far, and is none of these."""

    def others() -> list[int]:
        return [pid for pid in mount.standbys() if pid not in besides]

    wait_until(lambda: bool(others()), "a daemon that stands by", deadline_s=60)
    (pid,) = others()
    return pid


@pytest.mark.parametrize("resend", [True, False], ids=["resend", "no-resend"])
def test_it_takes_the_place_of_the_dead(
    identity: Identity, new_mount: MakeMount, resend: bool
) -> None:
    mount = new_mount(identity, settings=SOON, mounted=False)
    if resend:
        mount.mount()
    else:
        mount.mount_without_resend()
    mount.run("sh", "-c", f"echo kept >'{mount.point}/w'")
    next_one = standby(mount)
    dead = mount.kill_daemon()
    wait_until(lambda: dead not in {one.pid for one in mount.programs()}, "the end of the dead")
    assert mount.read("w") == b"kept\n"
    assert mount.daemon() == next_one
    # And there is another one after it, which has to wait for nothing that the first had open.
    third = standby(mount, next_one)
    os.kill(next_one, signal.SIGKILL)
    wait_until(lambda: mount.read("w") == b"kept\n" and mount.daemon() == third, "the third")
    if resend:
        # What came while nobody served was kept.
        mount.run("sh", "-c", f"echo more >>'{mount.point}/w'")
        assert mount.read("w") == b"kept\nmore\n"


def test_its_end_disturbs_nobody(anybody: Identity, new_mount: MakeMount) -> None:
    mount = new_mount(anybody, settings=SOON)
    serving, first = mount.daemon(), standby(mount)
    os.kill(first, signal.SIGKILL)
    standby(mount, first)
    assert mount.daemon() == serving
    log = (mount.state / "supervisor.log").read_text()
    assert f"daemon {first} ended while it stood by" in log
    assert " died " not in log


def test_it_ends_with_the_mount(anybody: Identity, new_mount: MakeMount) -> None:
    mount = new_mount(anybody, settings=SOON)
    standby(mount)
    mount.umount()
    assert not mount.programs()


def test_it_ends_with_the_supervisor(anybody: Identity, new_mount: MakeMount) -> None:
    mount = new_mount(anybody, settings=SOON)
    standby(mount)
    os.kill(mount.supervisor(), signal.SIGKILL)
    wait_until(lambda: not mount.programs(), "the end of both daemons")
    # Nobody has the device open any more: the dead mount can be told, and cleared.
    mount.mount()
    assert mount.run("ls", "MNT").stdout


def test_another_supervisor_brings_its_own(anybody: Identity, new_mount: MakeMount) -> None:
    mount = new_mount(anybody, settings=SOON)
    before, first = mount.supervisor(), standby(mount)
    mount.stagefs("mount", "--replace", mount.point, *mount.options)
    wait_until(
        lambda: before not in {one.pid for one in mount.programs()}, "the end of the one before"
    )
    assert standby(mount) != first
    assert first not in {one.pid for one in mount.programs()}
    assert mount.run("ls", "MNT").stdout
