"""The life of a mount: made, refused, ended, as root and as an ordinary user."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support import kernel
from tests.support.fuse_fixtures import SMALL, NewSupervised
from tests.support.fuse_mounts import SupervisedMount
from tests.support.identity import Identity
from tests.support.waiting import wait_until

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def sentence(answer: dict[str, object]) -> str:
    assert "error" in answer, f"it mounted: {answer}"
    text = answer["error"]
    assert isinstance(text, str)
    assert text.endswith("."), text
    assert "\n" not in text, text
    return text


def test_a_ready_mount_serves_and_shows_what_it_is(
    new_supervised: NewSupervised, identity: Identity
) -> None:
    mount = new_supervised(identity)
    facts = mount.ready()
    assert facts["mountpoint"] == str(mount.point)
    assert facts["generation"] == 0
    found = kernel.mount_at(mount.point)
    assert found is not None
    assert found.kind == "fuse.stagefs"
    assert found.connection == facts["connection"]
    assert identity.run("cat", mount.point / "big").stdout == SMALL
    named = kernel.programs_naming(mount.state)
    assert len(named) == 2, f"supervisor and daemon name mountpoint and state: {named}"
    assert all(str(mount.point) in program.command for program in named)
    record = json.loads((mount.state / "supervisor.json").read_text())
    assert record["pid"] == mount.supervisor.pid
    assert record["host"] == os.uname().nodename


def test_sigterm_ends_everything(new_supervised: NewSupervised, identity: Identity) -> None:
    mount = new_supervised(identity)
    mount.ready()
    assert mount.end() == 0
    assert not mount.is_mounted()
    assert not kernel.programs_naming(mount.state)
    assert not (mount.state / "supervisor.json").exists()


def test_sigterm_ends_a_mount_that_is_in_use(
    new_supervised: NewSupervised, identity: Identity
) -> None:
    mount = new_supervised(identity)
    mount.ready()
    user = identity.start("tail", "-f", mount.point / "big")
    try:
        assert user.stdout is not None
        user.stdout.read(1)
        assert mount.end() == 0
        assert not mount.is_mounted()
    finally:
        user.kill()
        user.communicate()


def test_unmounted_from_outside_is_a_clean_end(
    new_supervised: NewSupervised, identity: Identity
) -> None:
    mount = new_supervised(identity)
    mount.ready()
    identity.run("fusermount3", "-u", mount.point)
    assert mount.wait() == 0
    assert not kernel.programs_naming(mount.state)
    assert " died " not in mount.log()


def test_the_lifetime_of_another_process(new_supervised: NewSupervised, identity: Identity) -> None:
    mount = new_supervised(identity)
    pilot = identity.start("sleep", "1000")
    try:
        mount.ready("--lifetime", f"pid:{pilot.pid}")
    finally:
        pilot.kill()
        pilot.communicate()
    assert mount.wait() == 0
    assert not mount.is_mounted()


def test_the_lifetime_of_the_batch_job_around_it(
    new_supervised: NewSupervised, identity: Identity
) -> None:
    mount = new_supervised(identity)
    keeper = Path(shutil.copy(shutil.which("sh") or "/bin/sh", mount.top / "slurmstepd"))
    job = (str(keeper), "-c", '"$@" & wait', "sh")
    answer = mount.start("--lifetime", "job", wrapper=job)
    assert "ready" in answer, answer
    assert identity.run("cat", mount.point / "big").stdout == SMALL
    mount.supervisor.kill()  # the child of this test is the job's keeper
    mount.wait()
    wait_until(lambda: not mount.is_mounted(), "the end of the mount with its job")
    wait_until(lambda: not kernel.programs_naming(mount.state), "the end of its processes")


@pytest.mark.parametrize(
    ("lifetime", "says"),
    [
        ("pid:4194304", "there is none"),
        ("job", "needs a batch job"),
        ("tomorrow", "none of pid:N, job, forever"),
    ],
)
def test_a_lifetime_that_cannot_be(
    new_supervised: NewSupervised, anybody: Identity, lifetime: str, says: str
) -> None:
    assert says in sentence(new_supervised(anybody).start("--lifetime", lifetime))


def test_killed_supervisor_leaves_a_stale_mount_that_the_next_one_clears(
    new_supervised: NewSupervised, identity: Identity
) -> None:
    mount = new_supervised(identity)
    mount.ready()
    code = "import sys; f = open(sys.argv[1], 'rb'); print(flush=True); input(); f.read()"
    reader = subprocess.Popen(
        identity.words(["python", "-c", code, mount.point / "again"]),
        env=identity.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert reader.stdout is not None
    reader.stdout.readline()
    mount.supervisor.kill()
    mount.wait()
    wait_until(lambda: not kernel.programs_naming(mount.state), "the end of the daemon")
    _, errors = reader.communicate(b"\n", timeout=30)
    assert b"Transport endpoint is not connected" in errors, "open files get ENOTCONN"
    assert mount.is_mounted(), "nobody could unmount"
    mount.ready()
    assert "cleared a stale mount" in mount.log()
    assert identity.run("cat", mount.point / "big").stdout == SMALL


def test_mounted_twice(new_supervised: NewSupervised, identity: Identity) -> None:
    mount = new_supervised(identity)
    mount.ready()
    second = new_supervised(identity)
    said = sentence(second.start(point=mount.point))
    assert "already mounted" in said
    assert str(mount.point) in said
    assert identity.run("cat", mount.point / "big").stdout == SMALL


def test_mountpoints_that_cannot_be(new_supervised: NewSupervised, identity: Identity) -> None:
    mount = new_supervised(identity)
    (mount.point / "mine").touch()
    assert "not empty" in sentence(mount.start())
    mount.wait()
    assert "not a directory" in sentence(mount.start(point=mount.big))
    mount.wait()
    assert "no such directory" in sentence(mount.start(point=mount.top / "nowhere"))
    assert mount.wait() == 2


def test_what_the_daemon_refuses_reaches_the_user(
    new_supervised: NewSupervised, identity: Identity
) -> None:
    mount = new_supervised(identity)
    answer = mount.start(daemon=("--refuse", "The state directory is in use."))
    assert answer == {"error": "The state directory is in use.", "exit_code": 7}
    assert mount.wait() == 7
    assert not mount.is_mounted()


def test_a_daemon_that_says_nothing(new_supervised: NewSupervised, identity: Identity) -> None:
    mount = new_supervised(identity)
    said = sentence(mount.start(daemon=("--silent-end",)))
    assert "exit status 9" in said
    assert "supervisor.log" in said
    assert mount.wait() == 1
    assert not mount.is_mounted()


def test_allow_other_that_the_machine_does_not_permit(
    new_supervised: NewSupervised, all_identities: dict[str, Identity]
) -> None:
    configured = Path("/etc/fuse.conf").read_text().splitlines()
    if "user_allow_other" in configured:
        pytest.skip("this machine permits allow_other to everybody")
    assert "user_allow_other" in sentence(
        new_supervised(all_identities["user"]).start("--allow-other")
    )


def test_without_fusermount3(
    new_supervised: NewSupervised, all_identities: dict[str, Identity]
) -> None:
    mount = new_supervised(all_identities["user"])
    answer = mount.start(path="/nonexistent")
    assert "install the package fuse3" in sentence(answer)


def other_dev(mount: SupervisedMount, *commands: str) -> tuple[str, ...]:
    """A wrapper that runs the rest of its words with another /dev."""
    script = "; ".join(["mount -t tmpfs none /dev", "mknod -m 666 /dev/null c 1 3", *commands])
    return ("unshare", "--mount", "sh", "-ec", f'{script}; exec "$@"', "sh")


@as_root
def test_without_the_device(new_supervised: NewSupervised, identity: Identity) -> None:
    mount = new_supervised(identity)
    assert "/dev/fuse is missing" in sentence(mount.start(wrapper=other_dev(mount)))


@as_root
def test_with_a_forbidden_device(
    new_supervised: NewSupervised, all_identities: dict[str, Identity]
) -> None:
    mount = new_supervised(all_identities["user"])
    wrapper = other_dev(mount, "mknod -m 600 /dev/fuse c 10 229")
    assert "/dev/fuse is forbidden" in sentence(mount.start(wrapper=wrapper))


@as_root
def test_root_mounts_for_a_user(
    new_supervised: NewSupervised, all_identities: dict[str, Identity]
) -> None:
    root, user = all_identities["root"], all_identities["user"]
    mount = new_supervised(root)
    for path in (mount.point, mount.state):
        os.chown(path, user.uid, user.gid)
    mount.ready("--user", "nobody")
    assert Path(f"/proc/{mount.daemon()}").stat().st_uid == user.uid
    assert user.run("cat", mount.point / "big").stdout == SMALL
    denied = root.run("cat", mount.point / "big", check=False)
    assert b"Permission denied" in denied.stderr, "a mount without allow_other is its user's alone"
    assert (mount.state / "supervisor.log").stat().st_uid == user.uid
    mount.kill_daemon()
    assert user.run("cat", mount.point / "again").stdout == SMALL
    assert mount.end() == 0


def test_stalled_readers_do_not_delay_others_and_can_be_killed(
    new_supervised: NewSupervised, identity: Identity
) -> None:
    mount = new_supervised(identity)
    facts = mount.ready()
    code = """
import os, sys, threading
fd = os.open(sys.argv[1], os.O_RDONLY)
read = lambda number: os.pread(fd, 4096, number << 20)
threads = [threading.Thread(target=read, args=(n,)) for n in range(200)]
for thread in threads: thread.start()
print(flush=True)
"""
    stalled = identity.start("python", "-c", code, mount.point / "stalled")
    try:
        assert stalled.stdout is not None
        stalled.stdout.readline()
        waiting = Path(f"/sys/fs/fuse/connections/{facts['connection']}/waiting")
        if waiting.exists():
            wait_until(lambda: int(waiting.read_text()) >= 200, "200 waiting requests")
        assert identity.run("cat", mount.point / "big", deadline_s=20).stdout == SMALL
    finally:
        os.killpg(stalled.pid, signal.SIGKILL)
        stalled.communicate(timeout=20)
