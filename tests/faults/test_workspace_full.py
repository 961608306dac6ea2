"""A scratch disk without room: ENOSPC to the writer, and everything else goes on (B8)."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.identity import Identity
from tests.support.mounted import Mounted, sha256
from tests.support.served import HttpServed, content

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a tmpfs")
MakeMount = Callable[..., Mounted]
MIB = 1 << 20
DATA = content(6 * MIB)

# Writes until it is refused; says how, and how many bytes were taken.
FILL = """
import errno, os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
piece, done = b"0123456789abcdef" * 4096, 0
try:
    while True:
        done += os.write(fd, piece)
except OSError as error:
    print(errno.errorcode[error.errno], done)
os.close(fd)
"""
REFUSED = """
import errno, os, sys
def tried(function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
def write(path, offset, size):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        os.pwrite(fd, b"x" * size, offset)
    finally:
        os.close(fd)
print(tried(write, "new", 0, 1 << 20), tried(write, "kept", 20 << 20, 1 << 20),
      tried(write, "in", 3 << 20, 10))
"""


@pytest.fixture(params=["scratch", "state"])
def mount(
    request: pytest.FixtureRequest,
    identity: Identity,
    new_mount: MakeMount,
    web: HttpServed,
    work: Path,
) -> Iterator[Mounted]:
    """The scratch directory, or all of the state, has 48 MiB; the cache lies elsewhere."""
    options = ("--cache", str(identity.directory(work / "cache") / "c"))
    made = new_mount(identity, *options, environment=web.environment(identity), mounted=False)
    place = identity.directory(made.state)
    place.chmod(0o700)
    if request.param == "scratch":
        place = identity.directory(place / "scratch")
    tmpfs = f"size=48m,uid={identity.uid},gid={identity.gid},mode=700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", tmpfs, "none", place], check=True)
    try:
        made.mount()
        yield made
        made.at_end()
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def full(mount: Mounted, web: HttpServed) -> Mounted:
    """tasks/t: kept and small, written before; in, a link; big, which took all the room."""
    mount.stage_in(web.put("input.dat", DATA), "input.dat")
    mount.run("mkdir", "MNT/tasks/t")
    mount.run("ln", "MNT/staging/input.dat", "MNT/tasks/t/in")
    mount.run("cp", "MNT/tasks/t/in", "MNT/tasks/t/kept")
    said, taken = mount.python(FILL, "MNT/tasks/t/big").split()
    assert said == b"ENOSPC"
    assert int(taken) > 20 * MIB
    assert mount.run("stat", "-c", "%s", "MNT/tasks/t/big").stdout == taken + b"\n"
    return mount


def test_a_full_disk_refuses_writers_only(full: Mounted) -> None:
    refused = full.run("python", "-c", REFUSED, directory=full.point / "tasks/t").stdout.split()
    assert set(refused) == {b"ENOSPC"}, refused
    # What was written is as it was, what is read comes, also what was never fetched.
    pattern = full.python(
        "import sys; d = open(sys.argv[1], 'rb').read(); u = b'0123456789abcdef' * 4096;"
        "print(d == (u * (len(d) // len(u) + 1))[:len(d)])",
        "MNT/tasks/t/big",
    )
    assert pattern == b"True\n"
    assert full.sha256("tasks/t/kept") == full.sha256("tasks/t/in") == sha256(DATA)
    assert full.sha256("staging/input.dat") == sha256(DATA)
    full.run("ls", "-lR", "MNT/tasks")
    full.run("stat", "-f", "MNT/tasks")
    full.run("stagefs", "status")


def test_removing_makes_room_at_once(full: Mounted) -> None:
    full.run("rm", "MNT/tasks/t/big")
    full.python("import sys; open(sys.argv[1], 'wb').write(bytes(20 << 20))", "MNT/tasks/t/next")
    full.run("truncate", "-s", "0", "MNT/tasks/t/next")
    full.python("import sys; open(sys.argv[1], 'ab').write(b'!')", "MNT/tasks/t/in")
    assert full.read("tasks/t/in") == DATA + b"!"
    assert full.sha256("tasks/t/kept") == sha256(DATA)


def test_truncating_makes_room_at_once(full: Mounted) -> None:
    full.run("truncate", "-s", "1000", "MNT/tasks/t/big")
    full.python("import sys; open(sys.argv[1], 'wb').write(bytes(20 << 20))", "MNT/tasks/t/next")
    assert full.sha256("tasks/t/kept") == sha256(DATA)


def test_a_daemon_that_dies_on_a_full_disk_comes_back(full: Mounted) -> None:
    full.kill_daemon()
    assert full.sha256("tasks/t/kept") == sha256(DATA)
    full.run("rm", "MNT/tasks/t/big")
    full.python("import sys; open(sys.argv[1], 'wb').write(bytes(20 << 20))", "MNT/tasks/t/next")
