"""For whom a mount is, who may enter it, where its state lies, and how long it lives."""

import os
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import kernel
from tests.support.identity import Identity
from tests.support.mounted import Mounted, sentence
from tests.support.served import HttpServed
from tests.support.waiting import wait_until

MakeMount = Callable[..., Mounted]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="root mounts for another user")


@needs_root
def test_root_mounts_for_a_user(
    all_identities: dict[str, Identity], web: HttpServed, new_mount: MakeMount
) -> None:
    root, user = all_identities["root"], all_identities["user"]
    mount = new_mount(root, "--user", "nobody", mounted=False)
    top = mount.point.parent
    os.chown(top, user.uid, user.gid)
    os.chown(mount.point, user.uid, user.gid)
    mount.mount()
    daemon = Path(f"/proc/{mount.daemon()}").stat()
    assert (daemon.st_uid, daemon.st_gid) == (user.uid, user.gid)
    assert mount.state.stat().st_uid == user.uid

    def as_user(*command: str | Path) -> bytes:
        return user.run(*command, environment={"STAGEFS_MOUNT": str(mount.point)}).stdout

    as_user("stagefs", "stage-in", web.put("x", b"for nobody"), "staging:///x")
    as_user("mkdir", mount.point / "tasks/t")
    as_user("ln", mount.point / "staging/x", mount.point / "tasks/t/x")
    assert as_user("cat", mount.point / "tasks/t/x") == b"for nobody"
    owner = as_user("stat", "-c", "%u:%g", mount.point / "tasks/t/x").strip()
    assert owner == f"{user.uid}:{user.gid}".encode()


@needs_root
def test_other_users_get_in_only_when_they_are_let(
    all_identities: dict[str, Identity], web: HttpServed, new_mount: MakeMount
) -> None:
    root, user = all_identities["root"], all_identities["user"]
    closed, opened = new_mount(root), new_mount(root, "--allow-other")
    url = web.put("x", b"for all")
    for mount in (closed, opened):
        mount.stage_in(url, "x")
    assert user.run("cat", opened.point / "staging/x").stdout == b"for all"
    assert b"denied" in user.run("cat", closed.point / "staging/x", check=False).stderr
    done = user.run("mkdir", opened.point / "tasks/t", check=False)
    assert b"denied" in done.stderr, "a name was made by somebody else"


def test_only_root_mounts_for_others(
    all_identities: dict[str, Identity], new_mount: MakeMount
) -> None:
    mount = new_mount(all_identities["user"], "--user", "daemon", mounted=False)
    assert "root" in sentence(mount.mount(check=False))


def test_state_lies_on_a_local_disk_by_default(
    identity: Identity, new_mount: MakeMount, work: Path
) -> None:
    mount = new_mount(identity, mounted=False)
    base = identity.directory(work / "scratch")
    said = identity.run(
        *("stagefs", "mount", mount.point, "--json"),
        environment={"SLURM_JOB_ID": "7", "SLURM_TMPDIR": str(base)},
    ).stdout.decode()
    try:
        states = list(base.rglob("namespace.sqlite"))
        assert len(states) == 1
        assert str(states[0].parent) in said
        for directory in (states[0].parent, states[0].parent.parent):
            assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    finally:
        identity.run("stagefs", "umount", mount.point)


@pytest.fixture
def pilot() -> Iterator[subprocess.Popen[bytes]]:
    """A program that lives until it is told to end."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as program:
        yield program
        if program.poll() is None:
            program.kill()


def test_mount_ends_with_its_pilot(
    identity: Identity, web: HttpServed, new_mount: MakeMount, pilot: subprocess.Popen[bytes]
) -> None:
    mount = new_mount(identity, "--lifetime", f"pid:{pilot.pid}")
    mount.stage_in(web.put("x", b"x"), "x")
    assert mount.read("staging/x") == b"x"
    pilot.kill()
    pilot.wait()
    wait_until(lambda: kernel.mount_at(mount.point) is None, "the end of the mount")
    wait_until(lambda: not mount.programs(), "the end of its programs")


def test_mount_of_a_job_needs_a_job(identity: Identity, new_mount: MakeMount) -> None:
    mount = new_mount(identity, "--lifetime", "job", mounted=False)
    assert "job" in sentence(mount.mount(check=False))
    assert kernel.mount_at(mount.point) is None


def test_umount_of_a_busy_mount_says_so_and_harms_nothing(
    identity: Identity, web: HttpServed, new_mount: MakeMount
) -> None:
    mount = new_mount(identity)
    mount.stage_in(web.put("x", b"x"), "x")
    user = mount.start("sleep", "1000", directory=mount.point)
    try:
        wait_until(lambda: os.readlink(f"/proc/{user.pid}/cwd") == str(mount.point), "a busy mount")
        said = sentence(mount.stagefs("umount", mount.point, check=False))
        assert f"sleep ({user.pid})" in said
        assert mount.read("staging/x") == b"x"
    finally:
        user.kill()
        user.communicate()
    mount.umount()
