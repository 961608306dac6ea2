"""A machine of its own for one test: a host name, a loopback network, mounts and processes that
nobody else sees, and that all end with it.  Needs root.

Programs of the test run in it through ``run`` and ``start``; what is to be another host (a real
sshd) is started ``in_network``, where it can be reached.
"""

import contextlib
import ctypes
import os
import select
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.support import kernel
from tests.support.identity import SYSTEM_PATH, CommandFailed

CLONE_NEWNET = 0x40000000
OWN = ("--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
# The first process of the machine: whose parent ended is its child, and must be reaped.
FIRST = "echo ready; while read -r _; do :; done"
END_S = 60.0


class PrivateMachine:
    """``directory`` is empty; the machine's own files lie in it."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.directory = directory
        self._unshare = subprocess.Popen(
            ["unshare", *OWN, "bash", "-c", FIRST],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"PATH": SYSTEM_PATH, "LANG": "C.UTF-8"},
            cwd="/",
        )
        assert self._unshare.stdout is not None
        assert self._unshare.stdout.readline() == b"ready\n", "no private namespaces here"
        self.pid = self._first_process()
        # The first name of 127.0.0.1 is the machine's own.
        hosts = directory / "hosts"
        hosts.write_text(f"127.0.0.1 {name}\n127.0.0.1 localhost\n")
        script = (
            # Copies of the mounts of other tests would keep those alive.
            "awk '/ - fuse\\.stagefs /{print $5}' /proc/self/mountinfo | xargs -r umount -l;"
            f" ip link set lo up; ip addr add 127.0.0.2/8 dev lo; hostname {name};"
            f" mount --bind {hosts} /etc/hosts;"
            " mount -t tmpfs -o mode=755 run /run; mkdir -p /run/sshd"
        )
        self.run("bash", "-ec", script)

    def run(
        self,
        *command: str | Path,
        uid: int = 0,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
        check: bool = True,
        deadline_s: float = 90.0,
    ) -> str:
        """What the command said, standard error included."""
        done = subprocess.run(
            self._words(command, uid, directory or self.directory),
            env={"PATH": SYSTEM_PATH, "LANG": "C.UTF-8", **(environment or {})},
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

    def _words(self, command: Sequence[str | Path], uid: int, directory: Path) -> list[str]:
        words = ["nsenter", f"--target={self.pid}", "--mount", "--net", "--uts", "--pid"]
        if uid:
            words += ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
        return [*words, "env", "-C", str(directory), *map(str, command)]

    def _first_process(self) -> int:
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
        return int(children.read_text().split()[0])

    @contextlib.contextmanager
    def in_network(self) -> Iterator[None]:
        """What this thread starts meanwhile, and the sockets it makes, are on this network."""
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        there = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY)
        try:
            _enter(there)
            try:
                yield
            finally:
                _enter(own)
        finally:
            os.close(own)
            os.close(there)

    def staging_mounts(self) -> list[str]:
        return [line.split(" ")[4] for line in self._mounts() if " fuse.stagefs " in line]

    def is_mounted(self, place: str) -> bool:
        return any(line.split(" ")[4] == place for line in self._mounts())

    def _mounts(self) -> list[str]:
        return Path(f"/proc/{self.pid}/mountinfo").read_text().splitlines()

    def programs(self, module: str) -> list[kernel.Program]:
        """Those of the machine that run a Python module."""
        own = os.stat(f"/proc/{self.pid}/ns/pid").st_ino
        found = []
        for program in kernel.programs():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if (
                    module in program.command
                    and os.stat(f"/proc/{program.pid}/ns/pid").st_ino == own
                ):
                    found.append(program)
        return found

    def end(self) -> None:
        assert self._unshare.stdin is not None
        assert self._unshare.stdout is not None
        # Its first process ends after all others of the machine have.
        first = os.pidfd_open(self.pid)
        self._unshare.kill()
        self._unshare.wait()
        ended, _, _ = select.select([first], [], [], END_S)
        os.close(first)
        assert ended, f"the machine {self.name} does not end"
        self._unshare.stdin.close()
        self._unshare.stdout.close()


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
