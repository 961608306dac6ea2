"""kill -9 under readers, on the real product: every byte right, nothing fetched twice (A7)."""

import contextlib
import errno
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import kernel
from tests.support.identity import Identity
from tests.support.mounted import Mounted, sha256
from tests.support.served import Served, content
from tests.support.waiting import wait_until

MakeMount = Callable[..., Mounted]
MIB = 1 << 20
SIZE = 96 * MIB
HALF = SIZE // 2
READERS = 4


def status(mount: Mounted) -> dict[str, Any]:
    found = json.loads(mount.read(".stagefs/status"))
    assert isinstance(found, dict)
    return found


@contextlib.contextmanager
def frozen(served: Served) -> Iterator[None]:
    served.freeze()
    try:
        yield
    finally:
        served.thaw()


def half_read(mount: Mounted, served: Served, data: bytes) -> int:
    """Stage the input in and read half of it; returns how much is cached then."""
    mount.stage_in(served.put("input.dat", data), "input.dat")
    mount.run("head", "-c", str(HALF), "MNT/staging/input.dat")
    cached = int(mount.xattr("staging/input.dat", "cached"))
    assert HALF <= cached < SIZE, "nothing is left to be fetched"
    return cached


def waiting_readers(mount: Mounted) -> list[subprocess.Popen[bytes]]:
    """Readers of the whole input, when the daemon has told that they wait for the server."""
    readers = [mount.start("sha256sum", "MNT/staging/input.dat") for _ in range(READERS)]
    wait_until(
        lambda: (now := status(mount))["waiting_reads"] > 0 and bool(now["transfers"]),
        "readers that wait for a fetch under way",
    )
    return readers


def wait_for_next_daemon(mount: Mounted, dead: int) -> None:
    def there() -> bool:
        ours = mount.programs()
        pids = {program.pid for program in ours}
        return any(program.pid != dead and program.parent in pids for program in ours)

    wait_until(there, "the next daemon")


def digests(readers: list[subprocess.Popen[bytes]]) -> set[str]:
    found = set()
    for reader in readers:
        output, errors = reader.communicate(timeout=120)
        assert reader.returncode == 0, errors.decode()
        found.add(output.decode().split()[0])
    return found


def test_daemon_dies_in_the_middle_of_a_fetch(
    identity: Identity, served: Served, new_mount: MakeMount
) -> None:
    data = content(SIZE)
    mount = new_mount(
        identity,
        settings='[read]\nwindow_bytes_max = "8MiB"\n',
        environment=served.environment(identity),
    )
    cached = half_read(mount, served, data)
    with frozen(served):
        readers = waiting_readers(mount)
        dead = mount.kill_daemon()
        wait_until(
            lambda: (
                [p.pid for p in mount.programs()] != []
                and any(p.pid != dead for p in mount.programs() if p.parent == mount.supervisor())
            ),
            "the next daemon",
        )
        assert all(reader.poll() is None for reader in readers), "a reader ended with its daemon"
    assert digests(readers) == {sha256(data)}
    assert int(mount.xattr("staging/input.dat", "cached")) == SIZE
    mount.umount()
    assert served.bytes_sent() <= SIZE + (SIZE - cached) // 2, "what was cached came again"


def test_daemon_dies_where_the_kernel_cannot_resend(
    identity: Identity, served: Served, new_mount: MakeMount
) -> None:
    """As before kernel 6.9: a descriptor caught in flight may see ESTALE, and nothing worse."""
    data = content(SIZE)
    mount = new_mount(
        identity,
        settings='[read]\nwindow_bytes_max = "8MiB"\n',
        environment=served.environment(identity),
        mounted=False,
    )
    mount.mount_without_resend()
    half_read(mount, served, data)
    with frozen(served):
        readers = waiting_readers(mount)
        mount.kill_daemon()
    for reader in readers:
        output, errors = reader.communicate(timeout=120)
        if reader.returncode == 0:
            assert output.decode().split()[0] == sha256(data)
        else:
            assert b"Stale file handle" in errors, errors
    assert kernel.mount_at(mount.point) is not None
    assert mount.sha256("staging/input.dat") == sha256(data)


# Opens the file, reads a piece, says so; then waits for a word and reads the rest.
HOLDER = """
import errno, hashlib, os, sys
path, fifo, first = sys.argv[1], sys.argv[2], int(sys.argv[3])
fd = os.open(path, os.O_RDONLY)
digest = hashlib.sha256()
while first:
    piece = os.read(fd, first)
    digest.update(piece)
    first -= len(piece)
print("holding", flush=True)
open(fifo).read()
try:
    while piece := os.read(fd, 1 << 17):
        digest.update(piece)
    print(digest.hexdigest())
except OSError as error:
    print(errno.errorcode[error.errno])
"""


class Holder:
    """A reader that stops in the middle until it is told to go on."""

    def __init__(self, mount: Mounted, path: str, fifo: Path, *, first: int) -> None:
        os.mkfifo(fifo)
        fifo.chmod(0o644)
        self._fifo = fifo
        self.child = mount.start("python", "-c", HOLDER, f"MNT/{path}", fifo, str(first))
        assert self.child.stdout is not None
        said = self.child.stdout.readline()
        assert said == b"holding\n", (said, self.child.communicate())

    def rest(self) -> str:
        """The digest of all it read, or the name of the errno it ended with."""
        self._fifo.write_text("go on")
        output, errors = self.child.communicate(timeout=120)
        assert self.child.returncode == 0, errors.decode()
        return output.decode().strip()


def test_supervisor_and_daemon_die_and_the_next_mount_goes_on(
    identity: Identity, served: Served, new_mount: MakeMount, work: Path
) -> None:
    data = content(SIZE)
    mount = new_mount(
        identity,
        settings='[read]\nwindow_bytes_max = "8MiB"\n',
        environment=served.environment(identity),
    )
    mount.rough_end = True
    cached = half_read(mount, served, data)
    holder = Holder(mount, "staging/input.dat", work / "fifo", first=MIB)
    with frozen(served):
        readers = waiting_readers(mount)
        mount.kill_all()
        for reader in readers:
            _, errors = reader.communicate(timeout=60)
            assert reader.returncode != 0, "it read to the end through a dead mount"
            assert b"not connected" in errors or b"connection abort" in errors, errors
    assert holder.rest() == errno.errorcode[errno.ENOTCONN]

    assert kernel.mount_at(mount.point) is not None, "the stale mount is what is to be cleared"
    mount.mount()
    assert int(mount.xattr("staging/input.dat", "cached")) >= cached
    assert mount.sha256("staging/input.dat") == sha256(data)
    mount.umount()
    assert served.bytes_sent() <= SIZE + (SIZE - cached) // 2, "what was cached came again"


def test_names_change_exactly_once_under_kills(anybody: Identity, new_mount: MakeMount) -> None:
    """Directories are made, renamed and removed while daemons die: no false EEXIST or ENOENT."""
    mount = new_mount(anybody)
    code = """
import os, sys
top = sys.argv[1]
print("begun", flush=True)
for n in range(2000):
    os.mkdir(f"{top}/a{n}")
    os.rename(f"{top}/a{n}", f"{top}/b{n}")
    os.symlink("x", f"{top}/b{n}/s")
    os.unlink(f"{top}/b{n}/s")
    os.rmdir(f"{top}/b{n}")
print("done")
"""
    writers = []
    for number in range(3):
        mount.run("mkdir", f"MNT/w{number}")
        writers.append(mount.start("python", "-c", code, f"MNT/w{number}"))
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"begun\n"
    kills = 0

    def hit() -> int:
        log = (mount.state / "supervisor.log").read_text()
        return sum(int(number) for number in re.findall(r"(\d+) requests were in flight", log))

    while (kills < 12 or not hit()) and any(writer.poll() is None for writer in writers):
        mount.kill_daemon()
        kills += 1
        # It answers again: a daemon that dies before its first answer is another matter.
        mount.run("ls", "MNT")
    for writer in writers:
        output, errors = writer.communicate(timeout=120)
        assert output == b"done\n", errors.decode()
    assert hit() >= 1, f"{kills} kills hit no request"
    tops = [f"MNT/w{number}" for number in range(3)]
    assert mount.run("find", *tops, "-mindepth", "1").stdout == b""


@pytest.mark.parametrize("kind", ["cat", "find"])
def test_idle_mount_survives_a_kill(
    identity: Identity, served: Served, new_mount: MakeMount, kind: str
) -> None:
    mount = new_mount(identity, environment=served.environment(identity))
    mount.stage_in(served.put("input.dat", b"some input"), "input.dat")
    dead = mount.kill_daemon()
    command = {"cat": ("cat", "MNT/staging/input.dat"), "find": ("find", "MNT/staging")}[kind]
    assert b"input" in mount.run(*command).stdout
    assert mount.daemon() != dead
