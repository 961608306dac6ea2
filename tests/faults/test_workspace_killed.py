"""kill -9 of the daemon at each step of each change: it took effect once, and nobody noticed."""

import itertools
import json
import random
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import mortal_daemon
from tests.support.identity import Identity
from tests.support.mounted import Mounted
from tests.support.served import content
from tests.support.waiting import wait_until

MakeMount = Callable[..., Mounted]
MIB = 1 << 20
DATA = content(2 * MIB + 100)
CLIENTS = 3

# Does in the current directory what each line names: what must be there first, then, when the
# next line says so, the thing itself.  NAME is new for each.  Says the errno, if there was one.
PERFORMER = r"""
import ctypes, errno, json, mmap, os, sys
os.chdir(sys.argv[1])
staged, libc = sys.argv[2], ctypes.CDLL(None, use_errno=True)

def renamed(old, new, flags):
    if libc.renameat2(-100, old.encode(), -100, new.encode(), flags):
        raise OSError(ctypes.get_errno(), "renameat2")

def write(path, data=b"data", flags=os.O_CREAT | os.O_EXCL):
    fd = os.open(path, os.O_WRONLY | flags)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)

def mapped(path):
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[10:12] = b"JJ"

def linked(n):
    os.link(staged, n)

def two(n):
    write(n)
    write(n + "2", b"other")

PREPARE = {
    "rename": write, "rename over": two, "exchange": two, "link": write, "unlink": write,
    "rmdir": os.mkdir, "setxattr": write, "removexattr": lambda n: (write(n),
    os.setxattr(n, "user.k", b"v")), "publish by mv": write, "publish by ln": write,
    "append": linked, "chmod": linked, "utimens": linked, "truncate": linked, "O_TRUNC": linked,
    "copied setxattr": linked, "mmap": linked, "overwrite": linked,
}
DO = {
    "create": write,
    "mkdir": os.mkdir,
    "mkfifo": os.mkfifo,
    "symlink": lambda n: os.symlink("target", n),
    "link": lambda n: os.link(n, n + "2"),
    "rename": lambda n: renamed(n, n + "2", 1),
    "rename over": lambda n: renamed(n, n + "2", 0),
    "exchange": lambda n: renamed(n, n + "2", 2),
    "unlink": os.unlink,
    "rmdir": os.rmdir,
    "setxattr": lambda n: os.setxattr(n, "user.k", b"v", os.XATTR_CREATE),
    "removexattr": lambda n: os.removexattr(n, "user.k"),
    "publish by mv": lambda n: os.rename(n, os.path.dirname(staged) + "/" + n),
    "publish by ln": lambda n: os.link(n, os.path.dirname(staged) + "/" + n),
    "append": lambda n: write(n, b"!", os.O_APPEND),
    "overwrite": lambda n: write(n, b"J", 0),
    "chmod": lambda n: os.chmod(n, 0o600),
    "utimens": lambda n: os.utime(n, ns=(5, 6)),
    "truncate": lambda n: os.truncate(n, 1000),
    "O_TRUNC": lambda n: os.close(os.open(n, os.O_WRONLY | os.O_TRUNC)),
    "copied setxattr": lambda n: os.setxattr(n, "user.k", b"v", os.XATTR_CREATE),
    "mmap": mapped,
}
for line in sys.stdin:
    when, what, name = json.loads(line)
    try:
        (PREPARE.get(what, lambda n: None) if when == "prepare" else DO[what])(name)
        answer = None
    except OSError as error:
        answer = errno.errorcode[error.errno]
    print(json.dumps(answer), flush=True)
"""

# What is there afterwards: (names below NAME*, content or target, mode, attributes).
LOOK = r"""
import glob, hashlib, json, os, stat, sys
os.chdir(sys.argv[1])
found = {}
for path in sorted(glob.glob(sys.argv[2] + "*")):
    status = os.lstat(path)
    what = stat.filemode(status.st_mode)[0], stat.S_IMODE(status.st_mode), status.st_nlink
    if stat.S_ISREG(status.st_mode):
        data = open(path, "rb").read()
        names = [n for n in os.listxattr(path) if not n.startswith("user.stagefs.")]
        what += (len(data), hashlib.sha256(data).hexdigest()[:8], names)
    found[path.removeprefix(sys.argv[2])] = what
print(json.dumps(found))
"""

# Where the daemon dies: every note is made, the change is committed, then the note is finished.
NAMES = {
    "create": ["before begin", "after begin", "after create", "before finish", "after finish"],
    "mkdir": ["after begin", "before finish"],
    "mkfifo": ["before finish"],
    "symlink": ["before finish"],
    "link": ["before finish"],
    "rename": ["after begin", "before finish"],
    "rename over": ["after rename"],
    "exchange": ["before finish"],
    "unlink": ["after begin", "before finish"],
    "rmdir": ["before finish"],
    "setxattr": ["after begin", "after setxattr", "before finish"],
    "removexattr": ["before finish"],
    "publish by mv": ["before finish"],
    "publish by ln": ["before finish"],
}
# The request is answered with ESTALE, the path is walked again, the name gets a copy of its own.
COPIES = {
    "append": [
        *("before ask", "after ask", "before lookup", "before resolve", "before copy"),
        *("after copy", "after resolve", "after open", "after write_now"),
    ],
    "overwrite": ["after ask", "after copy", "before write", "after write"],
    "chmod": ["after ask", "before resolve", "after copy", "after attributes"],
    "utimens": ["after ask", "after copy", "after setattr"],
    "truncate": ["after ask", "after copy", "before truncate", "after truncate"],
    "O_TRUNC": ["after ask", "after copy", "after truncate", "after open"],
    "copied setxattr": ["after ask", "after copy", "after setxattr", "before finish"],
    "mmap": ["after copy", "before write", "after write"],
}


# Without RESEND what is written to an open file while the daemon dies ends in ESTALE.
ON_OPEN_FILES = {"after write_now", "before write", "after write"}


class Performer:
    def __init__(self, mount: Mounted, *, resend: bool) -> None:
        self.mount = mount
        self.resend = resend
        self.plan = mount.state / mortal_daemon.PLAN_NAME
        words = ("python", "-c", PERFORMER, "MNT/tasks/t", "MNT/staging/input.dat")
        self.child = mount.start(*words, talks=True)
        self._names = itertools.count()

    def ask(self, *words: str) -> Any:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(json.dumps(words).encode() + b"\n")
        self.child.stdin.flush()
        line = self.child.stdout.readline()
        assert line, self.child.communicate()[1].decode()
        return json.loads(line)

    def perform(self, what: str, step: str | None) -> tuple[Any, Any]:
        """(errno or None, what is there afterwards), with a death at ``step``."""
        name = f"n{next(self._names)}."
        assert self.ask("prepare", what, name) is None
        if step is not None:
            self.plan.write_text(step)
        answer = self.ask("do", what, name)
        assert not self.plan.exists(), f"{what}: no daemon died {step}"
        if answer == "ESTALE" and not self.resend and what in COPIES:
            # The kernel walks a path again only once, and a copy needs that walk itself.
            answer = self.ask("do", what, name)
        found = json.loads(self.mount.python(LOOK, "MNT/tasks/t", name))
        return answer, found

    def end(self) -> None:
        self.child.kill()
        self.child.communicate()


@pytest.fixture
def script(work: Path) -> Path:
    """The checkout may be closed to ordinary users."""
    copied = work / "mortal_daemon.py"
    copied.write_text(Path(mortal_daemon.__file__).read_text())
    copied.chmod(0o644)
    return copied


@pytest.fixture
def prepared(
    request: pytest.FixtureRequest, new_mount: MakeMount, work: Path, script: Path
) -> Iterator[Performer]:
    """A mount whose daemons die where they are told to.  ``param``: whose, and whether requests are
    sent again."""
    name, resend = request.param
    identity = request.getfixturevalue("all_identities").get(name)
    if identity is None:
        pytest.skip("root runs this")
    mount = new_mount(identity, mounted=False)
    mount.mount_otherwise(resend=resend, daemon=script)
    source = work / "input.dat"
    source.write_bytes(DATA)
    source.chmod(0o644)
    mount.stage_in(f"file://{source}", "input.dat")
    mount.run("mkdir", "MNT/tasks/t")
    performer = Performer(mount, resend=resend)
    yield performer
    performer.end()


# Who mounts, whether requests are sent again, kills; with ``--every-step`` all pairs and 100 kills.
MODES = {"root": ("root", True), "user-no-resend": ("user", False)}
OTHER_MODES = {"user": ("user", True), "root-no-resend": ("root", False)}
KILLS = {"root": 30, "user": 10, "user-no-resend": 10}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = metafunc.config.getoption("--every-step")
    if "prepared" in metafunc.fixturenames:
        modes = MODES | OTHER_MODES if every else MODES
        metafunc.parametrize("prepared", modes.values(), ids=modes.keys(), indirect=True)
    elif "kills" in metafunc.fixturenames:
        kills = dict.fromkeys(MODES | OTHER_MODES, 100) if every else KILLS
        bound = pytest.mark.timeout(2000 if every else 400)
        arguments = [
            pytest.param(*(MODES | OTHER_MODES)[mode], count, id=mode, marks=bound)
            for mode, count in kills.items()
        ]
        metafunc.parametrize(("name", "resend", "kills"), arguments)


def test_names_change_once_whenever_the_daemon_dies(prepared: Performer) -> None:
    for what, steps in NAMES.items():
        expected = prepared.perform(what, None)
        assert expected[0] is None, what
        for step in steps:
            assert prepared.perform(what, step) == expected, f"{what}, died {step}"


def test_a_link_is_copied_once_whenever_the_daemon_dies(prepared: Performer) -> None:
    for what, steps in COPIES.items():
        expected = prepared.perform(what, None)
        assert expected[0] is None, what
        for step in steps:
            if prepared.resend or step not in ON_OPEN_FILES:
                assert prepared.perform(what, step) == expected, f"{what}, died {step}"
    assert prepared.mount.read("staging/input.dat") == DATA


# Changes names as fast as it can, each in all the ways there are, until it is told to stop.
# Without RESEND the kernel may pass ESTALE on (docs/SEMANTICS.md): then it is asked again.
CHANGE_NAMES = r"""
import errno, os, pathlib, sys
top, stop, number = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
resend = sys.argv[4] == "True"

def once(function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        if error.errno != errno.ESTALE or resend:
            raise
        function(*arguments)

def create(path):
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))

count = 0
with open(stop + number, "ab", buffering=0) as progress:
    while not os.path.exists(stop):
        a, b, c = (str(top / f"{number}-{count}-{letter}") for letter in "abc")
        once(os.mkdir, a)
        once(os.rename, a, b)
        once(create, b + "/f")
        once(os.setxattr, b + "/f", "user.k", b"v", os.XATTR_CREATE)
        once(os.removexattr, b + "/f", "user.k")
        once(os.link, b + "/f", c)
        once(os.unlink, b + "/f")
        once(os.rename, c, b + "/f")
        once(os.symlink, "target", a)
        once(os.mkfifo, c)
        for path in (a, c, b + "/f"):
            once(os.unlink, path)
        once(os.rmdir, b)
        count += 1
        progress.write(b".")
"""


def test_three_clients_and_many_kills(
    all_identities: dict[str, Identity],
    new_mount: MakeMount,
    figures: Callable[[str], None],
    name: str,
    resend: bool,
    kills: int,
) -> None:
    if name not in all_identities:
        pytest.skip("root runs this")
    mount = new_mount(all_identities[name], mounted=False)
    if resend:
        mount.mount()
    else:
        mount.mount_without_resend()
    mount.run("mkdir", "MNT/tasks/t")
    stop = mount.state / "stop"
    clients = [
        mount.start("python", "-c", CHANGE_NAMES, "MNT/tasks/t", stop, str(number), str(resend))
        for number in range(CLIENTS)
    ]
    chance = random.Random(3)
    try:
        for done in range(4 * kills):
            if done >= kills and caught_requests(mount) > kills // 4:
                break
            _wait_for_rounds(stop, clients, chance.randrange(1, 4))
            mount.kill_daemon()
        _wait_for_rounds(stop, clients, 2)
    finally:
        stop.touch()
        errors = [client.communicate(timeout=60)[1] for client in clients]
    assert not any(errors), b"".join(errors).decode()
    assert mount.run("ls", "-A", "MNT/tasks/t").stdout == b""
    caught = caught_requests(mount)
    assert caught > kills // 4, "few kills hit a request"
    figures(f"{done} kills, {caught} requests in flight")


def caught_requests(mount: Mounted) -> int:
    said = (mount.state / "supervisor.log").read_text()
    return sum(int(n) for n in re.findall(r"(\d+) requests? (?:that )?were in flight", said))


def _wait_for_rounds(stop: Path, clients: list[subprocess.Popen[bytes]], count: int) -> None:
    """Until every client has done so many more."""

    def rounds(number: int) -> int:
        path = stop.with_name(f"{stop.name}{number}")
        return path.stat().st_size if path.exists() else 0

    wanted = [rounds(number) + count for number in range(CLIENTS)]

    def all_did() -> bool:
        for client in clients:
            if client.poll() is not None:
                pytest.fail(f"a client ended: {client.communicate()[1].decode()}")
        return all(rounds(number) >= wanted[number] for number in range(CLIENTS))

    wait_until(all_did, "changes of names")
