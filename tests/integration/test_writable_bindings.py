"""Writable bindings on real mounts and servers: what is closed in them reaches the remote, and
nothing else there changes."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.identity import Identity
from tests.support.mounted import Mounted, sentence, sha256
from tests.support.served import HttpServed, Served, SharedGateway, content, serving, serving_s3
from tests.support.waiting import wait_until

MakeMount = Callable[..., Mounted]
QUICK = (
    "[stage_out]\nsettle_s = 0.2\nbackoff_s = 0.1\nbackoff_s_max = 0.5\n"
    "[remote]\nattempts = 1\n[namespace]\nlisting_ttl_s = 0.05\n"
)


@pytest.fixture(params=["ssh", "s3"])
def server(request: pytest.FixtureRequest, served_directory: Path) -> Iterator[Served]:
    """A real server that takes outputs."""
    if request.param == "s3":
        gateway: SharedGateway = request.getfixturevalue("gateway")
        with serving_s3(served_directory, gateway) as bucket:
            yield bucket
    else:
        with serving(request.param, served_directory) as one:
            yield one


@pytest.fixture
def ssh(served_directory: Path) -> Iterator[Served]:
    with serving("ssh", served_directory) as one:
        yield one


def bound(
    identity: Identity, new_mount: MakeMount, server: Served, *options: str, more: str = ""
) -> Mounted:
    """A mount with ``staging/out`` bound to the directory ``out`` of the server."""
    mount = new_mount(identity, environment=server.environment(identity), settings=QUICK + more)
    mount.stagefs("bind", server.url("out"), "staging:///out", "--writable", *options)
    return mount


def write(mount: Mounted, path: str, data: bytes) -> None:
    """Make or empty a file, and fill it."""
    code = "import sys; open(sys.argv[1], 'wb').write(bytes.fromhex(sys.argv[2]))"
    mount.python(code, f"MNT/{path}", data.hex())


def failure(mount: Mounted, code: str, *paths: str) -> str:
    """The name of the errno that the Python statement ends with."""
    program = (
        "import errno, os, sys\n"
        f"a, *b = sys.argv[1:]\ntry:\n    {code}\n"
        "except OSError as error:\n    sys.stdout.write(errno.errorcode[error.errno])\n"
    )
    return mount.python(program, *(f"MNT/{path}" for path in paths)).decode()


def objects(server: Served) -> dict[str, bytes]:
    return {name: server.get(name) for name in server.names()}


def uploads(mount: Mounted) -> list[dict[str, object]]:
    found = json.loads(mount.stagefs("queue", "list", "--all", "--json").stdout)
    assert isinstance(found, list)
    return found


def test_what_is_closed_reaches_the_remote(
    identity: Identity, new_mount: MakeMount, server: Served
) -> None:
    server.put("out/before", b"was there before")
    mount = bound(identity, new_mount, server)
    assert mount.run("ls", "MNT/staging/out").stdout == b"before\n"
    write(mount, "staging/out/a", b"hello")
    mount.run("mkdir", "-p", "MNT/staging/out/deep/er")
    write(mount, "staging/out/deep/er/b c", b"x" * 1000)
    write(mount, "staging/out/empty", b"")
    large = content(9 << 20, "large")
    (mount.state.parent / "large").write_bytes(large)
    mount.run("cp", mount.state.parent / "large", "MNT/staging/out/large")
    mount.stagefs("flush")
    files = {"a": b"hello", "deep/er/b c": b"x" * 1000, "empty": b"", "large": large}
    expected = {f"out/{name}": data for name, data in files.items()}
    assert objects(server) == {**expected, "out/before": b"was there before"}
    assert mount.xattr("staging/out/a", "upload") == "done"
    assert mount.sha256("staging/out/large") == sha256(large)
    assert mount.xattr("staging/out", "writable") == "yes"
    # A listing that has our own objects changes nothing.
    inode = mount.run("stat", "-c", "%i", "MNT/staging/out/a").stdout
    sent = server.bytes_sent()
    for _ in range(3):
        mount.stagefs("ls", "staging:///out")
        assert mount.read("staging/out/a") == b"hello"
    assert mount.run("stat", "-c", "%i", "MNT/staging/out/a").stdout == inode
    assert server.bytes_sent() == sent, "what was written here was fetched"
    listed = mount.stagefs("ls", "-l", "staging:///out").stdout.decode()
    assert [line.split()[2] for line in listed.splitlines() if line.endswith(" a")] == ["done"]
    assert "5 B" in listed, listed


def test_files_that_are_moved_or_linked_into_it(
    anybody: Identity, new_mount: MakeMount, server: Served
) -> None:
    mount = bound(anybody, new_mount, server)
    mount.stage_in(server.put("input", b"of the remote"), "input")
    for name in ("moved", "linked", "tree/one", "tree/two/three"):
        mount.run("mkdir", "-p", f"MNT/work/{os.path.dirname(name)}")
        write(mount, f"work/{name}", name.encode())
    mount.run("mv", "MNT/work/moved", "MNT/staging/out/moved")
    mount.run("ln", "MNT/work/linked", "MNT/staging/out/linked")
    mount.run("mv", "MNT/work/tree", "MNT/staging/out/tree")
    mount.run("ln", "MNT/staging/input", "MNT/staging/out/input")
    mount.stagefs("flush")
    names = ("moved", "linked", "tree/one", "tree/two/three")
    expected = {f"out/{name}": name.encode() for name in names}
    assert objects(server) == {**expected, "input": b"of the remote"}
    # And from there to another name: the remote gets that one, and keeps the old one.
    mount.run("mv", "MNT/staging/out/tree", "MNT/staging/out/wood")
    mount.run("mv", "MNT/staging/out/moved", "MNT/staging/out/wood/moved")
    mount.stagefs("flush")
    more = {"out/wood/one": b"tree/one", "out/wood/two/three": b"tree/two/three"}
    assert objects(server) == {
        **expected,
        **more,
        "out/wood/moved": b"moved",
        "input": b"of the remote",
    }
    assert mount.run("ls", "MNT/staging/out").stdout.split() == [b"input", b"linked", b"wood"]


# As rsync writes: under a temporary name, times and modes when that is closed, then the rename.
RSYNC = """
import os, sys
top = sys.argv[1]
for number in range(5):
    temporary = f"{top}/.{number}.a1b2c3"
    with open(temporary, "xb", opener=lambda p, f: os.open(p, f, 0o600)) as file:
        file.write(b"%d" % number * 10_000)
    os.utime(temporary, (1_600_000_000, 1_600_000_000))
    os.chmod(temporary, 0o644)
    os.rename(temporary, f"{top}/{number}")
"""


def test_temporary_names_are_not_uploaded(
    identity: Identity, new_mount: MakeMount, ssh: Served
) -> None:
    mount = bound(identity, new_mount, ssh)
    mount.python(RSYNC, "MNT/staging/out")
    write(mount, "staging/out/gone", b"x")
    mount.run("rm", "MNT/staging/out/gone")
    mount.stagefs("flush")
    assert objects(ssh) == {f"out/{n}": b"%d" % n * 10_000 for n in range(5)}
    assert len(uploads(mount)) == 5
    stat = mount.run("stat", "-c", "%Y %a", "MNT/staging/out/3").stdout
    assert stat == b"1600000000 644\n"


def test_objects_are_replaced_only_where_that_is_allowed(
    identity: Identity, new_mount: MakeMount, server: Served
) -> None:
    server.put("out/theirs", b"theirs")
    mount = bound(identity, new_mount, server)
    write(mount, "staging/out/mine", b"mine")
    mount.stagefs("flush")
    assert mount.xattr("staging/out/mine", "upload") == "done"
    write(mount, "work", b"new")
    for name in ("theirs", "mine"):
        path = f"staging/out/{name}"
        assert failure(mount, "open(a, 'r+b')", path) == "EROFS"
        assert failure(mount, "open(a, 'wb')", path) == "EROFS"
        assert failure(mount, "os.truncate(a, 0)", path) == "EROFS"
        assert failure(mount, "os.chmod(a, 0o600)", path) == "EROFS"
        assert failure(mount, "os.rename(b[0], a)", path, "work") == "EROFS"
        assert mount.read(path) == name.encode()
    log = (mount.state / "stagefs.log").read_text()
    assert "was bound without --overwrite: " in log, "EROFS without a sentence"
    # A name that was not seen here: the upload finds the object.
    server.put("out/unseen", b"theirs")
    mount.run("mkdir", "MNT/elsewhere")
    write(mount, "elsewhere/unseen", b"mine")
    failure(mount, "os.rename(b[0], a)", "staging/out/unseen", "elsewhere/unseen")
    mount.stagefs("flush", check=False)
    assert objects(server) == {
        "out/theirs": b"theirs",
        "out/mine": b"mine",
        "out/unseen": b"theirs",
    }
    mount.stagefs("queue", "cancel", "--all", "--discard")


def test_upload_that_meets_an_object_stays_with_its_reason(
    anybody: Identity, new_mount: MakeMount, ssh: Served
) -> None:
    mount = bound(anybody, new_mount, ssh, more="")
    mount.run("ls", "MNT/staging/out")
    ssh.freeze()
    write(mount, "staging/out/a", b"mine")
    ssh.thaw()
    ssh.put("out/a", b"theirs")
    said = sentence(mount.stagefs("flush", check=False))
    assert "out/a exists and has other content" in said
    assert mount.xattr("staging/out/a", "upload").startswith("failed: ")
    assert ssh.get("out/a") == b"theirs"
    assert mount.read("staging/out/a") == b"mine"
    ssh.remove("out/a")
    mount.stagefs("queue", "retry", "--all")
    mount.stagefs("flush")
    assert ssh.get("out/a") == b"mine"
    assert mount.xattr("staging/out/a", "upload") == "done"


def test_overwriting(identity: Identity, new_mount: MakeMount, server: Served) -> None:
    old = content(5 << 20, "old")
    server.put("out/large", old)
    server.put("out/small", b"theirs")
    mount = bound(identity, new_mount, server, "--overwrite")
    mount.run("ls", "MNT/staging/out")
    mount.run("ln", "-s", "staging:///out/large", "MNT/tasks/input")
    append = "open(a, 'ab').write(b'!')"
    assert failure(mount, append, "staging/out/large") == ""
    write(mount, "staging/out/small", b"mine")
    write(mount, "other", b"moved")
    mount.stagefs("flush")
    assert objects(server) == {"out/large": old + b"!", "out/small": b"mine"}
    mount.run("mv", "MNT/other", "MNT/staging/out/small")
    assert failure(mount, append, "staging/out/large") == ""
    mount.stagefs("flush")
    assert objects(server) == {"out/large": old + b"!!", "out/small": b"moved"}
    assert mount.read("staging/out/small") == b"moved"
    assert mount.sha256("tasks/input") == sha256(old), "a task's input changed"


def test_rm_of_everything_leaves_every_remote_untouched(
    identity: Identity, new_mount: MakeMount, server: Served, work: Path
) -> None:
    for number in range(3):
        server.put(f"out/deep/{number}", b"theirs")
        server.put(f"read/{number}", b"theirs")
    place = identity.directory(work / "place")
    (place / "theirs").write_bytes(b"theirs")
    mount = bound(identity, new_mount, server, "--overwrite")
    mount.stagefs("bind", server.url("read"), "staging:///read")
    mount.stagefs("bind", f"file://{place}", "staging:///place", "--writable")
    mount.stage_in(server.url("read/1"), "one")
    mount.run("mkdir", "MNT/staging/out/ours")
    for path in ("out/a", "out/deep/b", "out/ours/c", "place/d"):
        write(mount, f"staging/{path}", b"ours")
    write(mount, "staging/out/deep/2", b"new version")
    mount.stagefs("flush")
    before = objects(server)
    assert before["out/ours/c"] == b"ours"
    assert before["out/deep/2"] == b"new version"
    mount.run("find", "MNT/staging")
    mount.run("bash", "-c", "rm -rf MNT/* 2>/dev/null; true".replace("MNT", str(mount.point)))
    assert mount.run("find", "MNT/staging", "-mindepth", "1").stdout == b"", "all names are gone"
    mount.stagefs("flush")
    assert objects(server) == before
    assert {path.name: path.read_bytes() for path in place.iterdir()} == {
        "theirs": b"theirs",
        "d": b"ours",
    }
    # Nor does the command, nor the end of the mount, nor what is bound again.
    mount.stagefs("bind", server.url("out"), "staging:///out", "--writable")
    assert mount.run("ls", "MNT/staging/out/deep").stdout.split() == [b"0", b"1", b"2", b"b"]
    mount.stagefs("rm", "--recursive", "staging:///out")
    mount.umount()
    assert objects(server) == before


def test_names_that_were_removed_stay_hidden(
    anybody: Identity, new_mount: MakeMount, ssh: Served
) -> None:
    mount = bound(anybody, new_mount, ssh)
    mount.run("mkdir", "MNT/staging/out/d")
    for name in ("a", "d/b"):
        write(mount, f"staging/out/{name}", b"x")
    mount.stagefs("flush")
    mount.run("rm", "-r", "MNT/staging/out/a", "MNT/staging/out/d")
    for _ in range(3):
        mount.stagefs("ls", "staging:///out")
        assert mount.run("ls", "MNT/staging/out").stdout == b""
    assert ssh.names() == ["out/a", "out/d/b"]


def test_removal_reaches_the_remote_where_that_was_asked_for(
    identity: Identity, new_mount: MakeMount, server: Served
) -> None:
    for name in ("theirs", "moved", "d/1", "d/2", "kept"):
        server.put(f"out/{name}", b"theirs")
    server.put("beside", b"theirs")
    mount = bound(identity, new_mount, server, "--propagate-delete")
    for name in ("mine", "old", "d/mine"):
        write(mount, f"staging/out/{name}", b"mine")
    mount.stagefs("flush")
    mount.run("rm", "MNT/staging/out/theirs", "MNT/staging/out/mine")
    mount.stagefs("rm", "--recursive", "staging:///out/d")
    mount.run("mv", "MNT/staging/out/old", "MNT/staging/out/new")
    # What only the remote has is never removed because its name moves.
    mount.run("mv", "MNT/staging/out/moved", "MNT/staging/out/elsewhere")
    mount.stagefs("flush")
    assert objects(server) == {
        "beside": b"theirs",
        "out/kept": b"theirs",
        "out/moved": b"theirs",
        "out/new": b"mine",
    }
    assert mount.read("staging/out/elsewhere") == b"theirs"
    # Made again, it is uploaded again: the removal came first.
    write(mount, "staging/out/theirs", b"mine")
    mount.stagefs("flush")
    assert server.get("out/theirs") == b"mine"
    mount.stagefs("rm", "--recursive", "staging:///out")
    mount.stagefs("flush")
    assert "out/kept" in server.names(), "the end of a binding removed objects"


def test_removals_are_seen_in_the_queue_and_wait_for_the_server(
    anybody: Identity, new_mount: MakeMount, ssh: Served
) -> None:
    ssh.put("out/a", b"theirs")
    # The first login may take longer than a listing waits as a rule, on a busy machine.
    more = "connect_timeout_s = 10\nprogress_timeout_s = 2\n"
    quick = QUICK.replace("attempts = 1\n", f"attempts = 1\n{more}")
    quick += "[read]\nanswer_deadline_s = 10\n"
    mount = new_mount(anybody, environment=ssh.environment(anybody), settings=quick)
    mount.stagefs(*("bind", ssh.url("out"), "staging:///out", "--writable", "--propagate-delete"))
    mount.run("ls", "MNT/staging/out")
    ssh.freeze()
    mount.run("rm", "MNT/staging/out/a")
    said = sentence(mount.stagefs("flush", "--deadline", "2", check=False))
    assert "1 output" in said
    assert "remove the object" in mount.stagefs("queue", "list").stdout.decode()
    mount.kill_daemon()
    mount.run("ls", "MNT")
    ssh.thaw()
    mount.stagefs("flush", "--deadline", "60")
    assert ssh.names() == []


def test_remotes_that_cannot_be_written_are_refused(
    anybody: Identity, new_mount: MakeMount, web: HttpServed
) -> None:
    web.put("dir/a", b"x")
    mount = new_mount(anybody)
    said = sentence(
        mount.stagefs("bind", web.url("dir/"), "staging:///out", "--writable", check=False)
    )
    assert "http remotes are read only" in said
    said = sentence(
        mount.stagefs("bind", web.url("dir/"), "staging:///out", "--overwrite", check=False)
    )
    assert "--writable" in said
    assert mount.run("ls", "MNT/staging").stdout == b""
    mount.stagefs("bind", web.url("dir/"), "staging:///read")
    assert failure(mount, "open(a, 'x')", "staging/read/new") == "EROFS"


def test_directories_of_the_remote_are_moved_by_copying(
    anybody: Identity, new_mount: MakeMount, ssh: Served
) -> None:
    ssh.put("out/theirs/a", b"theirs")
    mount = bound(anybody, new_mount, ssh)
    assert failure(mount, "os.rename(a, b[0])", "staging/out/theirs", "staging/out/x") == "EXDEV"
    mount.run("mv", "MNT/staging/out/theirs", "MNT/staging/out/copied")
    mount.stagefs("flush")
    assert objects(ssh) == {"out/theirs/a": b"theirs", "out/copied/a": b"theirs"}
    assert mount.run("ls", "MNT/staging/out").stdout == b"copied\n"


def test_commit_into_a_writable_binding(
    anybody: Identity, new_mount: MakeMount, server: Served
) -> None:
    mount = bound(anybody, new_mount, server)
    mount.stagefs("sandbox", "create", "t", "--out", "*=staging:///out/runs/")
    write(mount, "tasks/t/result", b"42")
    mount.stagefs("sandbox", "commit", "t")
    mount.stagefs("flush")
    assert objects(server) == {"out/runs/result": b"42"}


def test_killed_between_close_and_queue(
    identity: Identity, new_mount: MakeMount, ssh: Served
) -> None:
    """The settling time is long: nothing is queued when the daemon dies, or when the mount ends."""
    slow = QUICK.replace("settle_s = 0.2", "settle_s = 60")
    mount = new_mount(identity, environment=ssh.environment(identity), settings=slow)
    mount.rough_end = True
    mount.stagefs("bind", ssh.url("out"), "staging:///out", "--writable")
    write(mount, "staging/out/a", b"one")
    assert mount.xattr("staging/out/a", "upload") == "queued"
    assert uploads(mount) == []
    mount.kill_daemon()
    mount.run("ls", "MNT")
    write(mount, "staging/out/b", b"two")
    status = json.loads(mount.stagefs("status", "--json").stdout)["queue"]
    assert (status["waiting"], status["due"]) == (2, 2)
    mount.kill_all()
    mount.mount()
    said = mount.stagefs("flush").stdout.decode()
    assert said.startswith("uploaded 2 outputs")
    assert objects(ssh) == {"out/a": b"one", "out/b": b"two"}


# Writes, says so, and keeps the file open.
HOLDER = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
os.write(fd, b"as far as it came")
os.fsync(fd)
print("written", flush=True)
sys.stdin.read()
"""


def test_what_was_open_when_the_mount_died_is_uploaded_by_the_next(
    identity: Identity, new_mount: MakeMount, ssh: Served
) -> None:
    mount = bound(identity, new_mount, ssh)
    mount.rough_end = True
    holder = mount.start("python", "-c", HOLDER, "MNT/staging/out/a", talks=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"written\n"
    mount.stagefs("flush")
    assert ssh.names() == [], "it is open still"
    mount.kill_all()
    holder.communicate(b"", timeout=20)
    mount.mount()
    wait_until(lambda: ssh.names() == ["out/a"], "the upload")
    assert ssh.get("out/a") == b"as far as it came"


def test_umount_uploads_what_was_just_closed(
    anybody: Identity, new_mount: MakeMount, ssh: Served
) -> None:
    slow = QUICK.replace("settle_s = 0.2", "settle_s = 60")
    mount = new_mount(anybody, environment=ssh.environment(anybody), settings=slow)
    mount.stagefs("bind", ssh.url("out"), "staging:///out", "--writable")
    write(mount, "staging/out/a", b"one")
    mount.umount()
    assert objects(ssh) == {"out/a": b"one"}
