"""Hosts on a network of their own, each with systemd as its first process: what the cluster's
provisioning runs on here, as it runs on virtual machines elsewhere.  Needs root.

A host's root is this machine's, with all it writes kept in memory.  It has private namespaces, the
network is a bridge between them, and its systemd a control group of its own.  All of it ends with
the host.  Nothing of this machine's kernel settings can be changed from it.
"""

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.identity import CHECKOUT, SYSTEM_PATH, CommandFailed
from tests.support.private_machine import PrivateMachine
from tests.support.waiting import wait_until

ENVIRONMENT = {"PATH": SYSTEM_PATH, "LANG": "C.UTF-8"}
NAMESPACES = ("--mount", "--net", "--uts", "--ipc", "--pid", "--cgroup")
# Of a machine that has its devices, its time and its kernel from somebody else.
NOT_STARTED = (
    "systemd-udevd.service",
    "systemd-udev-trigger.service",
    "systemd-modules-load.service",
    "systemd-remount-fs.service",
    "systemd-timesyncd.service",
    "systemd-update-utmp.service",
    "timers.target",
)
DEVICES = (
    "null 1 3", "zero 1 5", "full 1 7", "random 1 8", "urandom 1 9", "tty 5 0", "fuse 10 229"
)  # fmt: skip
# Nothing that this machine happens to have installed; and users may log in.
TARGET = """[Unit]
Requires=basic.target
Wants=systemd-user-sessions.service
After=basic.target systemd-user-sessions.service
"""
# $1: an empty directory; $2: the checkout; $3: the host's name; then units.  Becomes systemd.
BOOT = """
mount -t tmpfs -o mode=755 memory "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay -o lowerdir=/,upperdir="$1/upper",workdir="$1/work" overlay "$1/root"
checkout=$2 name=$3
cd "$1/root"
shift 3
mount -t proc proc proc
mount --bind proc/sys proc/sys && mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup sys/fs/cgroup
mount -t tmpfs -o mode=755 run run
mount -t tmpfs -o mode=1777 tmp tmp
mount -t tmpfs -o mode=755 devices dev
while read -r device major minor; do mknod -m 666 dev/$device c $major $minor; done <<<"$devices"
ln -s /proc/self/fd dev/fd
mkdir dev/shm dev/pts
mount -t tmpfs -o mode=1777 shm dev/shm
mount -t devpts -o newinstance,ptmxmode=666 pts dev/pts
ln -s pts/ptmx dev/ptmx
mkdir -p "./$checkout"
mount --bind "$checkout" "./$checkout"
mount -o remount,bind,ro "./$checkout"
for unit in "$@"; do ln -sf /dev/null etc/systemd/system/$unit; done
rm -f etc/systemd/system/default.target
echo "$target" >etc/systemd/system/default.target
echo "$name" >etc/hostname
: >etc/machine-id
pivot_root . mnt
umount -l mnt
exec env -i container=other PATH="$PATH" /lib/systemd/systemd --log-target=console \\
  --log-level=notice --show-status=no
"""


class Host:
    """``directory`` is empty.  Made by ``running_hosts``."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self._log = directory / "console"
        self._group = _control_group() / f"stagefs-{os.getpid()}-{name}"
        self._group.mkdir()
        top = directory / "top"
        top.mkdir()
        join = 'echo $$ >"$0/cgroup.procs" && exec "$@"'
        boot = ["bash", "-euc", BOOT, "boot", str(top), str(CHECKOUT), name, *NOT_STARTED]
        leave = ["unshare", *NAMESPACES, "--fork", "--kill-child"]
        with self._log.open("wb") as log:
            self._unshare = subprocess.Popen(
                ["sh", "-c", join, str(self._group), *leave, *boot],
                env={**ENVIRONMENT, "devices": "\n".join(DEVICES), "target": TARGET},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
            )

    def connect(self, network: int, address: str) -> None:
        """When it has booted, to the bridge in that process's network."""
        wait_until(lambda: bool(self._children()), "its first process", told=self.log)
        self._pid = int(self._children()[0])
        peer = ("peer", "name", "eth0", "netns", str(self._pid))
        for command in (
            ("ip", "link", "add", self.name, "type", "veth", *peer),
            ("ip", "link", "set", self.name, "master", "bridge", "up"),
        ):
            _run("nsenter", f"--net=/proc/{network}/ns/net", *command)
        self._wait_until_booted()
        self.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")

    def _children(self) -> list[str]:
        pid = self._unshare.pid
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()

    def log(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]

    def _wait_until_booted(self) -> None:
        def booted() -> bool:
            assert self._unshare.poll() is None, self.log()
            said = self.run("systemctl", "is-system-running", check=False)
            return said.strip() in ("running", "degraded")

        wait_until(booted, f"systemd on {self.name}", deadline_s=90, told=self.log)

    def run(self, *command: str | Path, check: bool = True, deadline_s: float = 120.0) -> str:
        """What a command of root's said, standard error included."""
        words = ("nsenter", f"--target={self._pid}", *NAMESPACES, "--wdns=/", *command)
        return _run(*words, check=check, deadline_s=deadline_s)

    def as_user(self, user: str, script: str, *words: str | Path) -> str:
        """What a script of bash said, in a login of this user's."""
        return self.run("runuser", "-l", user, "-c", script, "--", "script", *words)

    def write(self, path: str, data: bytes) -> None:
        """A file of root's, as if somebody had copied it to the host."""
        (Path(f"/proc/{self._pid}/root") / path.lstrip("/")).write_bytes(data)

    def journal(self) -> str:
        return self.run("journalctl", "--no-pager", "-n", "60", check=False)

    def end(self) -> None:
        # Its systemd goes with it, and with that all others of the host.
        self._unshare.kill()
        self._unshare.wait()
        events = self._group / "cgroup.events"
        wait_until(lambda: "populated 0" in events.read_text(), f"the end of {self.name}")
        for group, _below, _files in os.walk(self._group, topdown=False):
            Path(group).rmdir()


@contextlib.contextmanager
def running_hosts(addresses: dict[str, str], directory: Path) -> Iterator[dict[str, Host]]:
    """All of them, booted, with these addresses on one network."""
    for name in ("network", *addresses):
        (directory / name).mkdir(mode=0o755)
    with contextlib.ExitStack() as stack:
        network = PrivateMachine("network", directory / "network")
        stack.callback(network.end)
        network.run("ip", "link", "add", "bridge", "type", "bridge")
        network.run("ip", "link", "set", "bridge", "up")

        def boot(name: str) -> Host:
            host = Host(name, directory / name)
            stack.callback(host.end)
            host.connect(network.pid, addresses[name])
            return host

        with ThreadPoolExecutor() as pool:
            hosts = dict(zip(addresses, pool.map(boot, addresses), strict=True))
        yield hosts


def _control_group() -> Path:
    """This process's own in the hierarchy that systemd wants."""
    mounts = Path("/proc/self/mountinfo").read_text()
    mounted = re.search(r"^\d+ \d+ \S+ / (\S+) .* - cgroup2 ", mounts, re.MULTILINE)
    own = re.search(r"^0::(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
    if mounted is None or own is None:
        pytest.skip("systemd needs control groups of version 2, and none are mounted here")
    return Path(mounted[1]) / own[1].lstrip("/")


def _run(*command: str | Path, check: bool = True, deadline_s: float = 120.0) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd="/",
        timeout=deadline_s,
        check=False,
    )
    said = os.fsdecode(done.stdout)
    if check and done.returncode:
        raise CommandFailed(f"{command} ended with {done.returncode}: {said}")
    return said
