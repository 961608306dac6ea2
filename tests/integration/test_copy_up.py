"""Writing to a link makes a private copy of it, for that name only, of what was written only."""

import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.identity import Identity
from tests.support.mounted import Mounted, sha256
from tests.support.served import HttpServed, Served, content
from tests.support.waiting import wait_until

MakeMount = Callable[..., Mounted]
MIB = 1 << 20
GIB = 1 << 30
TASKS = 100

LINK_TASKS = """
import os, sys
mount, count = sys.argv[1], int(sys.argv[2])
for number in range(count):
    os.mkdir(f"{mount}/tasks/t{number}")
    os.link(f"{mount}/staging/input.dat", f"{mount}/tasks/t{number}/in")
"""
# (size, links, last bytes) of every task's input, and of the namespace's.
LOOK = """
import os, sys
mount, count = sys.argv[1], int(sys.argv[2])
for path in ["staging/input.dat", *(f"tasks/t{n}/in" for n in range(count))]:
    with open(f"{mount}/{path}", "rb") as file:
        status = os.fstat(file.fileno())
        tail = os.pread(file.fileno(), 100, status.st_size - 16)
    print(status.st_size, status.st_nlink, tail.hex())
"""
APPEND = "import sys; open(sys.argv[1], 'ab', buffering=0).write(sys.argv[2].encode())"


def scratch_bytes(mount: Mounted) -> int:
    """What the disk holds of content that tasks wrote."""
    files = [path.stat() for path in (mount.state / "scratch").rglob("*") if path.is_file()]
    return sum(found.st_blocks * 512 for found in files)


@pytest.fixture
def mount(identity: Identity, new_mount: MakeMount, web: HttpServed) -> Mounted:
    return new_mount(identity, environment=web.environment(identity))


@pytest.fixture
def data(mount: Mounted, web: HttpServed) -> bytes:
    """An input of some chunks, linked by three tasks; nothing of it was fetched."""
    data = content(3 * MIB + 1000)
    mount.stage_in(web.put("input.dat", data), "input.dat")
    mount.python(LINK_TASKS, "MNT", "3")
    return data


@pytest.fixture
def others_see_nothing(mount: Mounted, data: bytes) -> Iterator[None]:
    """Whatever a test does to tasks/t0/in: the namespace and the other tasks keep the input."""
    facts = ("stat", "-c", "%i %s %Y %a %F", "MNT/staging/input.dat", "MNT/tasks/t1/in")
    before = mount.run(*facts).stdout
    yield
    assert mount.run(*facts).stdout == before
    assert mount.read("tasks/t1/in") == mount.read("staging/input.dat") == data


def test_hundred_tasks_and_one_that_appends(mount: Mounted, web: HttpServed) -> None:
    size = GIB + 5
    path = web.objects / "input.dat"
    with path.open("wb") as file:
        for offset in (0, GIB // 2, GIB - 2 * MIB):
            file.seek(offset)
            file.write(content(MIB, str(offset)))
        file.truncate(size)
    mount.stage_in(web.url("input.dat"), "input.dat")
    mount.python(LINK_TASKS, "MNT", str(TASKS))
    digest = mount.sha256("staging/input.dat")
    assert int(mount.xattr("staging/input.dat", "cached")) == size
    sent = web.bytes_sent()
    mount.run("python", "-c", APPEND, "MNT/tasks/t7/in", "!")
    lines = mount.python(LOOK, "MNT", str(TASKS)).decode().splitlines()
    tail = bytes(16).hex()
    changed = lines.pop(1 + 7)
    assert changed == f"{size + 1} 1 {bytes(15).hex()}21"
    assert set(lines) == {f"{size} {TASKS} {tail}"}
    assert mount.sha256("staging/input.dat") == mount.sha256("tasks/t8/in") == digest
    mount.run("cmp", "-n", str(size), "MNT/tasks/t7/in", "MNT/staging/input.dat")
    assert web.bytes_sent() == sent, "what was cached was fetched again"
    assert scratch_bytes(mount) <= MIB, "more was copied than was written"


def test_copying_up_over_every_remote(
    identity: Identity, served: Served, new_mount: MakeMount
) -> None:
    """In short what the tests around this one try over http."""
    mount = new_mount(identity, environment=served.environment(identity))
    data = content(5 * MIB + 3)
    mount.stage_in(served.put("input.dat", data), "input.dat")
    mount.python(LINK_TASKS, "MNT", "10")
    sent = served.bytes_sent()
    mount.python("import sys; open(sys.argv[1], 'r+b').close()", "MNT/tasks/t0/in")
    mount.run("touch", "MNT/tasks/t1/in")
    mount.run("chmod", "600", "MNT/tasks/t2/in")
    mount.run("truncate", "-s", "0", "MNT/tasks/t3/in")
    assert served.bytes_sent() == sent, "a change that needs no content fetched some"
    digest = mount.sha256("staging/input.dat")
    sent = served.bytes_sent()
    mount.run("python", "-c", APPEND, "MNT/tasks/t7/in", "!")
    assert mount.read("tasks/t7/in") == data + b"!"
    assert mount.read("tasks/t1/in") == mount.read("tasks/t2/in") == data
    assert mount.read("tasks/t3/in") == b""
    assert mount.sha256("staging/input.dat") == mount.sha256("tasks/t8/in") == digest
    links = mount.run("stat", "-c", "%h", "MNT/staging/input.dat", "MNT/tasks/t8/in").stdout
    assert set(links.split()) == {b"6"}, "five tasks opened or changed theirs: t0 to t3, and t7"
    assert served.bytes_sent() == sent, "what was cached was fetched again"


def test_opening_for_writing_fetches_and_copies_nothing(
    mount: Mounted, web: HttpServed, data: bytes
) -> None:
    before = mount.run("stat", "-c", "%s %Y %a", "MNT/tasks/t0/in").stdout
    mount.python("import sys; open(sys.argv[1], 'r+b').close()", "MNT/tasks/t0/in")
    assert mount.run("stat", "-c", "%s %Y %a", "MNT/tasks/t0/in").stdout == before
    mount.run("touch", "MNT/tasks/t1/in")
    assert web.bytes_sent() == 0
    assert scratch_bytes(mount) == 0
    assert mount.read("tasks/t0/in") == mount.read("tasks/t1/in") == data


def test_sqlite_that_only_reads_copies_nothing(mount: Mounted, web: HttpServed, work: Path) -> None:
    with sqlite3.connect(work / "rows.sqlite") as database:
        database.execute("CREATE TABLE rows (number INTEGER PRIMARY KEY, text TEXT)")
        database.executemany("INSERT INTO rows VALUES (?, ?)", ((n, "x" * 99) for n in range(9999)))
    database.close()
    mount.stage_in(web.put("rows", (work / "rows.sqlite").read_bytes()), "rows")
    mount.run("mkdir", "MNT/tasks/t")
    mount.run("ln", "MNT/staging/rows", "MNT/tasks/t/rows")
    mount.read("staging/rows")
    sent = web.bytes_sent()
    query = "SELECT count(*), sum(length(text)) FROM rows"
    assert mount.run("sqlite3", "MNT/tasks/t/rows", query).stdout == b"9999|989901\n"
    assert web.bytes_sent() == sent
    assert scratch_bytes(mount) == 0
    mount.run("sqlite3", "MNT/tasks/t/rows", "DELETE FROM rows WHERE number > 5")
    assert mount.run("sqlite3", "MNT/tasks/t/rows", query).stdout == b"6|594\n"
    assert mount.run("sqlite3", "-readonly", "MNT/staging/rows", query).stdout == b"9999|989901\n"


# What a task does to the link PATH; each says the inode before, after, and after doing it again.
CHANGE = """
import mmap, os, sys
path = sys.argv[1]

def change():
    {change}

inodes = [os.stat(path).st_ino]
for _ in range(2):
    change()
    inodes.append(os.stat(path).st_ino)
print(*inodes)
"""
CHANGES = {
    "chmod": ("os.chmod(path, 0o600)", None),
    "utimens": ("os.utime(path, ns=(5, 6))", None),
    "truncate": ("os.truncate(path, 5000)", lambda data: data[:5000]),
    "grow": (
        "os.truncate(path, 4 << 20)",
        lambda data: data + bytes((4 << 20) - len(data)),
    ),
    "O_TRUNC": ("open(path, 'wb').close()", lambda _data: b""),
    "setxattr": ("os.setxattr(path, 'user.k', b'v')", None),
    "write": (
        "os.pwrite(os.open(path, os.O_WRONLY), b'J', 2 << 20)",
        lambda data: data[: 2 << 20] + b"J" + data[(2 << 20) + 1 :],
    ),
    "mmap": (
        "file = open(path, 'r+b'); mmap.mmap(file.fileno(), 0)[10:12] = b'JJ'",
        lambda data: data[:10] + b"JJ" + data[12:],
    ),
}
NEEDLESS = {
    "chmod": "os.chmod(path, os.stat(path).st_mode & 0o7777)",
    "utimens": "os.utime(path, ns=(os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns))",
    "truncate": "os.truncate(path, os.stat(path).st_size)",
    "read": "open(path, 'rb').read()",
}


@pytest.mark.usefixtures("others_see_nothing")
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_copies_up_once(mount: Mounted, data: bytes, name: str) -> None:
    change, expected = CHANGES[name]
    said = mount.python(CHANGE.format(change=change), "MNT/tasks/t0/in").split()
    assert said[0] != said[1], "nothing was copied"
    assert said[1] == said[2], "it was copied twice"
    assert mount.read("tasks/t0/in") == (expected(data) if expected else data)
    assert mount.run("stat", "-c", "%h", "MNT/staging/input.dat").stdout == b"3\n"


@pytest.mark.usefixtures("others_see_nothing")
@pytest.mark.parametrize("name", NEEDLESS)
def test_what_changes_nothing_copies_nothing(mount: Mounted, name: str) -> None:
    said = mount.python(CHANGE.format(change=NEEDLESS[name]), "MNT/tasks/t0/in").split()
    assert len(set(said)) == 1
    assert mount.run("stat", "-c", "%h", "MNT/staging/input.dat").stdout == b"4\n"


@pytest.mark.usefixtures("others_see_nothing")
def test_renaming_over_a_link_and_removing_one(mount: Mounted) -> None:
    mount.run(
        "sh", "-c", 'echo new > "$1" && mv -f "$1" "$2"', "sh", "MNT/tasks/new", "MNT/tasks/t0/in"
    )
    assert mount.read("tasks/t0/in") == b"new\n"
    mount.run("rm", "-f", "MNT/tasks/t2/in")
    assert mount.run("stat", "-c", "%h", "MNT/staging/input.dat").stdout == b"2\n"
    assert scratch_bytes(mount) <= MIB


@pytest.mark.usefixtures("others_see_nothing")
def test_two_names_of_one_link(mount: Mounted, data: bytes) -> None:
    """A copy is per name: the other name keeps the input, as if it were another task's."""
    mount.run("ln", "MNT/tasks/t0/in", "MNT/tasks/t0/second")
    mount.run("python", "-c", APPEND, "MNT/tasks/t0/in", "!")
    assert mount.read("tasks/t0/in") == data + b"!"
    assert mount.read("tasks/t0/second") == data
    mount.run("python", "-c", APPEND, "MNT/tasks/t0/second", "?")
    assert mount.read("tasks/t0/in") == data + b"!"
    assert mount.read("tasks/t0/second") == data + b"?"
    # A second name of the copy is an ordinary hard link.
    mount.run("ln", "MNT/tasks/t0/in", "MNT/tasks/t0/third")
    mount.run("python", "-c", APPEND, "MNT/tasks/t0/third", "+")
    assert mount.read("tasks/t0/in") == data + b"!+"


HOLD = """
import os, sys
held = os.open(sys.argv[1], os.O_RDONLY)
with open(sys.argv[1], "ab") as file:
    file.write(b"!")
data = os.pread(held, 1 << 30, 0)
print(len(data), len(open(sys.argv[1], "rb").read()))
"""


@pytest.mark.usefixtures("others_see_nothing")
def test_a_reader_from_before_the_copy_keeps_the_input(mount: Mounted, data: bytes) -> None:
    said = mount.python(HOLD, "MNT/tasks/t0/in").split()
    assert [int(word) for word in said] == [len(data), len(data) + 1]


@pytest.mark.usefixtures("others_see_nothing")
def test_a_read_only_sandbox(mount: Mounted, data: bytes) -> None:
    mount.stagefs(
        "sandbox", "create", "r", "--in", "in=staging:///input.dat", "--on-write", "read-only"
    )
    for change, _expected in CHANGES.values():
        done = mount.run(
            *("python", "-c", CHANGE.format(change=change), "MNT/tasks/r/in"), check=False
        )
        assert b"Read-only file system" in done.stderr, (change, done.stderr)
    assert mount.read("tasks/r/in") == data
    # Its own files are as everywhere, and a link may be removed.
    mount.run("python", "-c", APPEND, "MNT/tasks/r/own", "own")
    assert mount.read("tasks/r/own") == b"own"
    mount.run("rm", "-f", "MNT/tasks/r/in")


@pytest.mark.usefixtures("others_see_nothing")
def test_a_shared_sandbox(mount: Mounted, data: bytes) -> None:
    """What was published here gets a new version for everybody; an input from a remote does not."""
    mount.run("sh", "-c", 'echo first > "$1"', "sh", "MNT/staging/log")
    for name, policy in (("s", "shared"), ("u", "copy-up")):
        options = ("--in", "log=staging:///log", "--in", "in=staging:///input.dat")
        mount.stagefs("sandbox", "create", name, *options, "--on-write", policy)
    mount.run("python", "-c", APPEND, "MNT/tasks/s/log", "second")
    assert mount.read("tasks/s/log") == b"first\nsecond"
    assert mount.read("tasks/u/log") == b"first\nsecond"
    # Closed, it is like any other entry: who copies up has his own, the shared one goes on.
    mount.run("python", "-c", APPEND, "MNT/tasks/u/log", " alone")
    assert mount.read("tasks/u/log") == b"first\nsecond alone"
    mount.run("python", "-c", APPEND, "MNT/tasks/s/log", " third")
    assert mount.read("tasks/s/log") == mount.read("staging/log") == b"first\nsecond third"
    assert mount.read("tasks/u/log") == b"first\nsecond alone"
    mount.run("python", "-c", APPEND, "MNT/tasks/s/in", "!")
    assert mount.read("tasks/s/in") == data + b"!"


# Opens for writing or maps writable, writes one byte in front, says so, and goes on holding it.
HOLDERS = {
    "descriptor": "os.pwrite(fd, b'W', 0)",
    "mapping": "m = mmap.mmap(fd, 0); os.close(fd); m[:1] = b'W'",
}
# What stat(2) says under each name, when they agree.
ALIKE = """
import os, sys
found = {(s.st_ino, s.st_size, s.st_nlink) for s in map(os.stat, sys.argv[1:])}
print(*found.pop() if len(found) == 1 else ["differ"])
"""


@pytest.fixture
def log(mount: Mounted) -> tuple[str, ...]:
    """The names of one published file: in a shared sandbox, in one that copies up, in staging/."""
    mount.run("sh", "-c", 'echo first > "$1"', "sh", "MNT/staging/log")
    for name, policy in (("s", "shared"), ("u", "copy-up")):
        mount.stagefs("sandbox", "create", name, "--in", "log=staging:///log", "--on-write", policy)
    return "MNT/tasks/s/log", "MNT/tasks/u/log", "MNT/staging/log"


@pytest.mark.parametrize("dies", [False, True], ids=["", "daemon-dies"])
@pytest.mark.parametrize("held", HOLDERS)
def test_a_shared_file_that_is_still_written_is_not_published(
    mount: Mounted, log: tuple[str, ...], held: str, dies: bool
) -> None:
    shared, private, staged = log
    code = (
        "import mmap, os, sys; fd = os.open(sys.argv[1], os.O_RDWR); "
        f"{HOLDERS[held]}; print(flush=True); sys.stdin.read()"
    )
    with mount.start("python", "-c", code, shared, talks=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"\n"
        if dies:
            mount.kill_daemon()
        for command in ("mv", "ln"):
            for name in (shared, private):
                done = mount.run(command, name, "MNT/staging/other", check=False)
                assert b"busy" in done.stderr, (command, name, done.stderr)
        mount.run("rm", staged)
        _output, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors.decode()
    # Closed: it is published although no name in staging/ is left, so nobody can change it.
    wait_until(lambda: mount.xattr(shared[4:], "state") == "published", "its publication")
    mount.run("python", "-c", APPEND, private, "mine")
    assert mount.read(private[4:]) == b"Wirst\nmine"
    assert mount.read(shared[4:]) == b"Wirst\n"
    mount.run("mv", shared, "MNT/staging/other")
    assert mount.read("staging/other") == b"Wirst\n"


def test_stat_sees_a_new_version_under_all_names(mount: Mounted, log: tuple[str, ...]) -> None:
    """Also under names that the kernel knows already; a reader of the old version keeps it."""
    hold = (
        "import os, sys; f = open(sys.argv[1]); print(flush=True); sys.stdin.read(); "
        "print(os.fstat(f.fileno()).st_size, f.read())"
    )
    with mount.start("python", "-c", hold, log[1], talks=True) as reader:
        assert reader.stdout is not None
        reader.stdout.readline()
        assert mount.python(ALIKE, *log).split()[1:] == [b"6", b"3"]
        mount.run("python", "-c", APPEND, log[0], "second")
        assert reader.communicate(timeout=60)[0] == b"6 first\n\n"
    wait_until(lambda: mount.python(ALIKE, *log).split()[1:] == [b"12", b"3"], "stat of all names")
    mount.run("python", "-c", APPEND, log[0], "third")
    listed = mount.run("ls", "-l", "MNT/staging", "MNT/tasks/u", "MNT/tasks/s").stdout.decode()
    sizes = [line.split()[4] for line in listed.splitlines() if line.endswith(" log")]
    assert sizes == ["17"] * 3, listed
    # It is everybody's: it stays when the task that wrote it is gone.
    mount.stagefs("sandbox", "remove", "s")
    assert mount.read("staging/log") == b"first\nsecondthird"


# Appends through one name and looks through the other at once, in turns.
IN_TURNS = """
import os, sys
names, written = sys.argv[1:3], "first\\n"
for turn in range(30):
    one, other = names[turn % 2], names[1 - turn % 2]
    with open(one, "a") as file:
        file.write(str(turn))
    written += str(turn)
    with open(other) as file:
        assert file.read() == written, (turn, written)
        assert os.fstat(file.fileno()).st_size == os.stat(one).st_size == len(written), turn
"""


@pytest.mark.parametrize("record", [(), ("--record",)], ids=["", "record"])
def test_two_shared_sandboxes_write_in_turns(
    mount: Mounted, log: tuple[str, ...], record: tuple[str, ...]
) -> None:
    """Whatever the kernel still believes of a name: no ESTALE, and nothing of an old version."""
    for name in ("v", "w"):
        options = ("--in", "log=staging:///log", "--on-write", "shared")
        mount.stagefs("sandbox", "create", name, *options, *record)
    mount.python(IN_TURNS, "MNT/tasks/v/log", "MNT/tasks/w/log")
    assert mount.read("tasks/v/log") == mount.read("tasks/u/log") == mount.read("staging/log")


def test_copies_survive_the_mount(mount: Mounted, web: HttpServed, data: bytes) -> None:
    mount.run("python", "-c", APPEND, "MNT/tasks/t0/in", "!")
    mount.run("truncate", "-s", "100", "MNT/tasks/t1/in")
    mount.run("truncate", "-s", "200", "MNT/tasks/t1/in")
    mount.umount()
    mount.mount()
    assert mount.read("tasks/t0/in") == data + b"!"
    assert mount.read("tasks/t1/in") == data[:100] + bytes(100)
    assert mount.sha256("staging/input.dat") == sha256(data)
    assert os.path.exists(mount.state / "scratch")
