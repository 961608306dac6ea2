"""Sandboxes of programs that have ended are gone at the next mount, and those of others stay."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.conftest import MakeMount
from tests.support.identity import Identity
from tests.support.mounted import Mounted

BOOT_ID = "/proc/sys/kernel/random/boot_id"


def _names(mount: Mounted) -> list[str]:
    return sorted(one["name"] for one in mount.json_of("stagefs", "sandbox", "list"))


def _create(mount: Mounted, name: str, pid: int | str, *options: str) -> None:
    mount.stagefs("sandbox", "create", name, "--worker-pid", str(pid), *options)


def test_next_mount_removes_what_ended_programs_left(
    identity: Identity, new_mount: MakeMount
) -> None:
    mount = new_mount(identity)
    worker = mount.start("cat", talks=True)
    try:
        for name in ("ended", "persistent", "failed"):
            options = ("--persistent",) if name == "persistent" else ()
            _create(mount, name, worker.pid, *options)
            mount.run("mkdir", f"MNT/tasks/{name}/made")
        mount.stagefs("sandbox", "fail", "failed", "--reason", "to be looked at")
        _create(mount, "running", os.getpid())
        mount.stagefs("sandbox", "create", "nobodys")
        worker.kill()
    finally:
        worker.communicate()
    assert _names(mount) == ["ended", "failed", "nobodys", "persistent", "running"]
    mount.umount()
    mount.mount()
    assert _names(mount) == ["failed", "nobodys", "running"]
    assert mount.run("ls", "MNT/tasks").stdout.split() == [b"failed", b"nobodys", b"running"]
    shown = mount.json_of("stagefs", "sandbox", "show", "running")
    assert shown["worker"]["pid"] == os.getpid()


@pytest.mark.skipif(os.geteuid() != 0, reason="shows a program another boot, which root may do")
def test_another_boot_ends_all_programs(
    identity: Identity, new_mount: MakeMount, work: Path
) -> None:
    mount = new_mount(identity)
    boot = work / "boot_id"
    boot.write_text("11111111-2222-3333-4444-555555555555\n")
    boot.chmod(0o644)
    create = ["stagefs", "sandbox", "create", "before", "--worker-pid", str(os.getpid())]
    as_user = shlex.join(identity.words([*create, "--mount", mount.point]))
    before = f"mount --bind {boot} {BOOT_ID} && exec {as_user}"
    environment = identity.environment(mount.environment)
    subprocess.run(["unshare", "-m", "sh", "-c", before], env=environment, check=True, timeout=60)
    _create(mount, "now", os.getpid())
    assert _names(mount) == ["before", "now"]
    mount.umount()
    mount.mount()
    assert _names(mount) == ["now"]
