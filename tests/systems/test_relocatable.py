"""The tarball of `make dist` on a machine that has nothing but it: a fresh Debian 12 (minbase) with
fuse3, without Python, compiler and headers.  It does the demo's job there (E7).

The machine is a chroot in private namespaces; the web server is another host for it.
"""

import dataclasses
import hashlib
import os
import random
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.identity import CHECKOUT, NOBODY
from tests.support.nginx import Nginx, running_nginx
from tests.support.private_machine import PrivateMachine
from tests.support.waiting import wait_until

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="a private machine needs root"),
]
MADE = CHECKOUT / ".venvs"
HOME = Path("/opt/of the site")
INPUT_BYTES = 24 << 20
# Names of glibc's libraries: all that may come from the machine itself.
GLIBC = re.compile(r"/usr/lib/x86_64-linux-gnu/(ld-linux-x86-64|lib(c|m|dl|rt|pthread|resolv))\.so")
TASKS = 'for t in t1 t2 t3; do (cd "$0/tasks/$t" && sha256sum input.dat) & done; wait'


@dataclasses.dataclass
class BareMachine:
    machine: PrivateMachine
    root: Path
    home: Path
    """The unpacked tarball, as the machine names it."""

    def run(self, *words: str | Path, uid: int = 0, check: bool = True) -> str:
        """Words that begin with bin/ are commands of the tarball."""
        named = [str(word) for word in words]
        if named[0].startswith("bin/"):
            named[0] = str(self.home / named[0])
        return self.machine.run(
            *("chroot", f"--userspec={uid}:{uid}", "--groups=", str(self.root)),
            *("env", "-C", "/tmp", *named),
            environment={
                "HOME": "/tmp",
                # What users of clusters have in theirs, and what would break any other Python.
                "PYTHONHOME": "/nowhere",
                "PYTHONPATH": "/nowhere",
                "LD_LIBRARY_PATH": "/opt/decoys",
            },
            check=check,
        )

    def libraries(self, module: str) -> set[str]:
        """Files that processes of a Python module have mapped as code."""
        found = set()
        programs = self.machine.programs(module)
        assert programs, f"no {module} runs"
        for program in programs:
            for line in Path(f"/proc/{program.pid}/maps").read_text().splitlines():
                fields = line.split(maxsplit=5)
                if "x" in fields[1] and len(fields) == 6 and fields[5].startswith("/"):
                    found.add(fields[5])
        return found


@pytest.fixture
def tarball() -> Path:
    found = sorted((MADE / "dist").glob("stagefs-*-linux-*.tar.gz"))
    assert len(found) == 1, (
        f"one tarball in {MADE / 'dist'}: run the tests with `make test-systems`"
    )
    return found[0]


@pytest.fixture
def machine(work: Path, tarball: Path) -> Iterator[BareMachine]:
    lower = MADE / "debian-12"
    assert lower.is_dir(), f"no {lower}: run the tests with `make test-systems`"
    private = PrivateMachine("bare", work)
    try:
        # What it writes lies in memory and goes with it.
        upper, root = work / "upper", work / "root"
        for path in (upper, root):
            path.mkdir(mode=0o755)
        private.run(
            *("bash", "-ec"),
            f"mount -t tmpfs -o mode=755 upper {upper}; mkdir {upper}/top {upper}/work;"
            f" mount -t overlay -o lowerdir={lower},upperdir={upper}/top,workdir={upper}/work"
            f" overlay {root}; mount -t proc proc {root}/proc;"
            f" mknod -m 666 {root}/dev/fuse c 10 229;"
            # As systemd does at boot.
            f" ln -s ../proc/self/mounts {root}/etc/mtab;"
            f" mkdir {root}/opt/decoys;"
            f" for name in libssl.so.3 libsqlite3.so.0 libfuse3.so.3;"
            f" do echo no library >{root}/opt/decoys/$name; done;"
            f" mkdir '{root}{HOME}'; mkdir '{root}{HOME}/unpacked';"
            f" tar -xzf {tarball} -C '{root}{HOME}/unpacked' --strip-components=1;"
            # It runs where it is moved to.
            f" mv '{root}{HOME}/unpacked' '{root}{HOME}/stagefs 1'",
        )
        yield BareMachine(private, root, HOME / "stagefs 1")
    finally:
        private.end()


@pytest.fixture
def server(machine: BareMachine, work: Path) -> Iterator[Nginx]:
    served = work / "served"
    served.mkdir()
    with machine.machine.in_network(), running_nginx(served) as nginx:
        yield nginx


def put(server: Nginx) -> str:
    """Serves input.dat; its SHA-256."""
    content = random.Random(7).randbytes(INPUT_BYTES)
    (server.root / "input.dat").write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def sent(server: Nginx) -> int:
    return sum(one.sent_bytes for one in server.asked() if one.method == "GET")


def check_that_nothing_else_is_there(machine: BareMachine) -> None:
    for program in ("python3", "python", "pip", "gcc", "cc", "ssh"):
        said = machine.run("sh", "-c", f"command -v {program}", check=False)
        assert not said, f"the machine is not bare: {said}"
    machine.run("test", "!", "-e", "/usr/include/fuse3")
    machine.run("test", "-u", "/usr/bin/fusermount3")


@pytest.mark.parametrize("uid", [0, NOBODY], ids=["root", "user"])
def test_the_demo_on_a_machine_with_fuse3_alone(
    machine: BareMachine, server: Nginx, uid: int
) -> None:
    check_that_nothing_else_is_there(machine)
    digest = put(server)
    url = server.url("input.dat")

    said = machine.run("bin/stagefs", "doctor", url, uid=uid)
    assert "fail" not in said.lower(), said
    assert server.url("")[:-1].rpartition("/plain")[0] in said

    point, state = "/tmp/a mount", "/var/tmp/state"
    machine.run("mkdir", point, uid=uid)
    machine.run("bin/stagefs", "mount", point, "--state", state, "--capacity", "1GiB", uid=uid)
    machine.run("bin/stagefs", "stage-in", url, "staging:///input.dat", "--mount", point, uid=uid)
    wanted = ("--in", "input.dat=staging:///input.dat", "--mount", point)
    machine.run("bin/stagefs", "sandbox", "create", "t1", *wanted, uid=uid)
    tasks = f"{point}/tasks"
    machine.run("mkdir", f"{tasks}/t2", f"{tasks}/t3", uid=uid)
    machine.run("ln", "-s", url, f"{tasks}/t2/input.dat", uid=uid)
    machine.run("ln", f"{point}/staging/input.dat", f"{tasks}/t3/input.dat", uid=uid)
    assert sent(server) == 0

    said = machine.run("bash", "-c", TASKS, point, uid=uid)
    assert said.split() == [digest, "input.dat"] * 3
    wait_until(lambda: sent(server) >= INPUT_BYTES, "the server's log of one copy")
    assert sent(server) == INPUT_BYTES, "three tasks, one copy"
    assert "input.dat" in machine.run("bin/stagefs-cache", "list", "--mount", point, uid=uid)

    # Neither the machine's libfuse3 nor a decoy: all but glibc is the tarball's own.
    for module in ("stagefs.supervisor", "stagefs.daemon"):
        mapped = machine.libraries(module)
        own = {name for name in mapped if str(machine.home) in name}
        assert any("libsqlite3" in name for name in own) or module == "stagefs.supervisor"
        assert {name for name in mapped - own if not GLIBC.search(name)} == set()

    machine.run("bin/stagefs", "umount", point, uid=uid)
    assert not machine.machine.staging_mounts()
    wait_until(
        lambda: not machine.machine.programs("stagefs.supervisor"), "the end of the supervisor"
    )
    assert not machine.machine.programs("stagefs.daemon")


def test_mount_8_finds_the_helper_through_a_link(machine: BareMachine, server: Nginx) -> None:
    digest = put(server)
    machine.run("ln", "-s", machine.home / "bin/mount.stagefs", "/sbin/mount.stagefs")
    machine.run("mkdir", "/tmp/mnt")
    machine.run("mount", "-t", "stagefs", "stage", "/tmp/mnt", "-o", "state=/var/tmp/s")
    machine.run("ln", "-s", server.url("input.dat"), "/tmp/mnt/staging/x")
    assert machine.run("sha256sum", "/tmp/mnt/staging/x").startswith(digest)
    machine.run("umount", "/tmp/mnt")
    wait_until(
        lambda: not machine.machine.programs("stagefs.supervisor"), "the end of the supervisor"
    )


def test_licenses_of_all_parts_are_told(tarball: Path, tmp_path: Path) -> None:
    with tarfile.open(tarball) as tar:
        names = tar.getnames()
        top = names[0]
        contents = tar.extractfile(f"{top}/CONTENTS")
        assert contents is not None
        lines = contents.read().decode().splitlines()
    for line in (line for line in lines if line.startswith(("debian ", "python "))):
        kind, name, version = line.split()[:3]
        where = f"{top}/LICENSES/{kind}/{name}" + ("" if kind == "debian" else f"-{version}/")
        assert any(one.startswith(where) for one in names), line
    # Every package that can be imported is one of those told of.
    infos = [
        one for one in names if re.fullmatch(rf"{top}/python/lib/packages/[^/]+\.dist-info", one)
    ]
    assert len(infos) == sum(line.startswith("python ") for line in lines) + 1  # StageFS
    assert any(line.startswith("debian  libfuse3-3 ") for line in lines)
