"""`stagefs mount` and `umount`: what they say, what they leave, and every way to refuse."""

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import kernel
from tests.support.identity import Identity
from tests.support.mounted import Mounted, sentence
from tests.support.served import HttpServed, content
from tests.support.sshd import Login, running_sshd

MakeMount = Callable[..., Mounted]

needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="changes /dev in a mount namespace of its own, which root may do"
)


def test_says_where_things_are(identity: Identity, new_mount: MakeMount) -> None:
    mount = new_mount(identity, "--capacity", "1GiB", mounted=False)
    said = mount.mount().stdout.decode()
    for wanted in (str(mount.point), str(mount.state), "cache", "log", "1 GiB"):
        assert wanted in said, f"{wanted!r} is not in: {said}"

    found = kernel.mount_at(mount.point)
    assert found is not None
    assert found.kind == "fuse.stagefs"
    for program in mount.programs():
        assert str(mount.point) in program.command
        assert str(mount.state) in " ".join(program.command)
    assert mount.supervisor() != mount.daemon()
    assert mount.run("ls", "-A", mount.point).stdout.split() == [b".stagefs", b"staging", b"tasks"]


def test_state_and_cache_are_private(
    identity: Identity, web: HttpServed, new_mount: MakeMount
) -> None:
    mount = new_mount(identity)
    mount.stage_in(web.put("big", content(3 << 20)), "big")
    mount.stage_in(web.put("small", b"small"), "small")
    assert mount.read("staging/small") == b"small"
    mount.sha256("staging/big")
    for path in [mount.state, *mount.state.rglob("*")]:
        status = path.lstat()
        assert status.st_uid == identity.uid, path
        if path.is_symlink():
            continue
        assert status.st_mode & 0o077 == 0, f"{path} has mode {status.st_mode & 0o777:o}"


def test_umount_leaves_nothing_and_a_second_mount_knows_the_names(
    identity: Identity, web: HttpServed, new_mount: MakeMount
) -> None:
    data = content(5 << 20)
    mount = new_mount(identity)
    mount.stage_in(web.put("input.dat", data), "input.dat")
    inode = mount.run("stat", "-c", "%i", "MNT/staging/input.dat").stdout
    assert mount.read("staging/input.dat") == data
    mount.umount()
    assert kernel.mount_at(mount.point) is None
    assert mount.programs() == []
    assert list(mount.point.iterdir()) == []

    sent = web.bytes_sent()
    mount.mount()
    assert mount.run("stat", "-c", "%i", "MNT/staging/input.dat").stdout == inode
    assert mount.read("staging/input.dat") == data
    assert web.bytes_sent() == sent, "what was cached was fetched again"


def test_foreground_stays_until_it_is_told_to_end(identity: Identity, new_mount: MakeMount) -> None:
    mount = new_mount(identity, mounted=False)
    child = identity.start("stagefs", "mount", mount.point, "--state", mount.state, "--foreground")
    assert child.stdout is not None
    said = child.stdout.readline()
    assert str(mount.point).encode() in said
    assert kernel.mount_at(mount.point) is not None
    assert child.poll() is None
    mount.stagefs("umount", mount.point)
    child.communicate(timeout=30)
    assert child.returncode == 0
    assert kernel.mount_at(mount.point) is None


def test_only_mount_is_found_without_naming_it(identity: Identity, new_mount: MakeMount) -> None:
    mount = new_mount(identity)
    status = identity.run("stagefs", "status", "--json", "--mount", mount.point).stdout
    assert str(mount.point).encode() in status
    by_variable = identity.run(
        "stagefs", "status", "--json", environment={"STAGEFS_MOUNT": str(mount.point)}
    ).stdout
    assert str(mount.point).encode() in by_variable


class TestRefusals:
    def test_not_a_directory(self, identity: Identity, new_mount: MakeMount) -> None:
        mount = new_mount(identity, mounted=False)
        mount.point = mount.point / "file"
        identity.run("touch", mount.point)
        said = sentence(mount.mount(check=False))
        assert str(mount.point) in said
        assert "not a directory" in said

    def test_absent(self, identity: Identity, new_mount: MakeMount) -> None:
        mount = new_mount(identity, mounted=False)
        mount.point = mount.point / "absent"
        assert str(mount.point) in sentence(mount.mount(check=False))

    def test_not_empty(self, identity: Identity, new_mount: MakeMount) -> None:
        mount = new_mount(identity, mounted=False)
        identity.run("touch", mount.point / "file")
        said = sentence(mount.mount(check=False))
        assert str(mount.point) in said
        assert "not empty" in said
        assert not mount.programs()

    def test_already_mounted(self, identity: Identity, new_mount: MakeMount) -> None:
        mount = new_mount(identity)
        other = mount.state.with_name("other")
        said = sentence(
            identity.run("stagefs", "mount", mount.point, "--state", other, check=False)
        )
        assert str(mount.point) in said
        assert "already mounted" in said
        assert mount.run("ls", mount.point).returncode == 0

    def test_state_in_use_names_host_and_pid(
        self, identity: Identity, new_mount: MakeMount
    ) -> None:
        mount = new_mount(identity)
        point = identity.directory(mount.point.with_name("second"))
        said = sentence(
            identity.run("stagefs", "mount", point, "--state", mount.state, check=False)
        )
        assert str(mount.state) in said
        assert socket.gethostname() in said
        pids = {str(program.pid) for program in mount.programs()}
        assert any(pid in said for pid in pids), f"none of {pids} is in: {said}"
        assert kernel.mount_at(point) is None

    def test_newer_disk_format(self, identity: Identity, new_mount: MakeMount) -> None:
        mount = new_mount(identity)
        mount.umount()
        version = mount.state / "cache" / "version"
        text = version.read_text()
        version.write_text(text.replace("1", "999"))
        said = sentence(mount.mount(check=False))
        assert str(mount.state) in said
        assert "999" in said
        assert kernel.mount_at(mount.point) is None
        assert not mount.programs()
        version.write_text(text)
        mount.mount()

    def test_unknown_option_value(self, identity: Identity, new_mount: MakeMount) -> None:
        mount = new_mount(identity, "--capacity", "plenty", mounted=False)
        done = mount.mount(check=False)
        assert done.returncode == 2
        assert b"plenty" in done.stderr
        assert b"Traceback" not in done.stderr

    def test_unknown_setting(self, identity: Identity, new_mount: MakeMount) -> None:
        mount = new_mount(identity, settings="[cache]\ncapacity_byte = 5\n", mounted=False)
        said = sentence(mount.mount(check=False))
        assert "capacity_byte" in said
        assert "capacity_bytes" in said

    def test_umount_of_what_is_no_mount(self, identity: Identity, new_mount: MakeMount) -> None:
        mount = new_mount(identity, mounted=False)
        assert str(mount.point) in sentence(
            identity.run("stagefs", "umount", mount.point, check=False)
        )

    def test_command_without_any_mount_says_so(
        self, identity: Identity, new_mount: MakeMount
    ) -> None:
        mount = new_mount(identity, mounted=False)
        done = identity.run("stagefs", "ls", "--mount", mount.point, check=False)
        assert done.returncode == 3
        assert str(mount.point) in sentence(done)

    def test_fusermount_is_missing(
        self, all_identities: dict[str, Identity], new_mount: MakeMount
    ) -> None:
        user = all_identities["user"]
        mount = new_mount(user, mounted=False)
        empty = user.directory(mount.point.with_name("empty"))
        words = (user.bin / "stagefs", "mount", mount.point, "--state", mount.state)
        done = user.run("/usr/bin/env", f"PATH={empty}", *words, check=False)
        assert "fusermount3 is missing" in sentence(done)

    @needs_root
    def test_device_is_missing(self, identity: Identity, new_mount: MakeMount) -> None:
        mount = new_mount(identity, mounted=False)
        script = (
            "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && "
            'mknod -m 666 /dev/urandom c 1 9 && exec "$@"'
        )
        said = self.in_namespace(mount, script)
        assert "/dev/fuse is missing" in said

    @needs_root
    def test_device_is_forbidden(
        self, all_identities: dict[str, Identity], new_mount: MakeMount
    ) -> None:
        mount = new_mount(all_identities["user"], mounted=False)
        node = mount.point.with_name("closed")
        subprocess.run(["mknod", "-m", "600", str(node), "c", "10", "229"], check=True)
        said = self.in_namespace(mount, f'mount --bind {node} /dev/fuse && exec "$@"')
        assert "/dev/fuse" in said
        assert "forbidden" in said

    @staticmethod
    def in_namespace(mount: Mounted, script: str) -> str:
        words = mount.identity.words(["stagefs", "mount", mount.point, "--state", mount.state])
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", script, "sh", *words],
            env=mount.identity.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=False,
        )
        return sentence(done)

    def test_state_on_a_network_file_system(
        self, anybody: Identity, new_mount: MakeMount, work: Path
    ) -> None:
        mount = new_mount(anybody, mounted=False)
        shared, served = anybody.directory(work / "shared"), anybody.directory(work / "exported")
        keys = anybody.directory(work / "keys")
        with running_sshd(keys, login=Login.mine()) as server:
            subprocess.run(
                ["sshfs", "-F", server.ssh_config, f"staged:{served}", shared],
                check=True,
                stdin=subprocess.DEVNULL,
            )
            try:
                mount.state = shared / "state"
                said = sentence(mount.mount(check=False))
            finally:
                subprocess.run(["fusermount3", "-u", shared], check=True)
        assert str(shared) in said
        assert "network" in said
        assert kernel.mount_at(mount.point) is None
