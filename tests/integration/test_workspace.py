"""Tasks write in the mount as in any directory; nothing of it reaches other tasks."""

import json
from collections.abc import Callable

import pytest

from tests.support.identity import Identity
from tests.support.mounted import Mounted
from tests.support.served import Served, content

MakeMount = Callable[..., Mounted]

# Says what each call answered, as JSON: a plain directory must say the same.
PROGRAM = r"""
import errno, fcntl, json, mmap, os, socket, stat, sys
os.umask(0o022)
os.chdir(sys.argv[1])
said = []

def call(name, function, *arguments, **options):
    try:
        answer = function(*arguments, **options)
    except OSError as error:
        answer = errno.errorcode[error.errno]
    if isinstance(answer, bytes):
        answer = answer.decode("latin-1")
    said.append([name, answer])

def kind(path):
    found = os.lstat(path)
    return [stat.filemode(found.st_mode), found.st_nlink, found.st_size]

def write(path, data, flags=os.O_WRONLY | os.O_CREAT, offset=0, mode=0o644):
    fd = os.open(path, flags, mode)
    try:
        return os.pwrite(fd, data, offset)
    finally:
        os.close(fd)

def read(path):
    with open(path, "rb") as file:
        return file.read()

call("write", write, "a", b"hello")
call("kind", kind, "a")
call("exclusive", write, "a", b"x", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
call("append", lambda: open("a", "ab").write(b" world"))
call("read", read, "a")
call("overwrite", write, "a", b"J")
call("sparse", write, "s", b"end", offset=5_000_000)
call("sparse kind", kind, "s")
call("sparse blocks", lambda: os.stat("s").st_blocks < 100)
call("hole", lambda: open("s", "rb").read(4096) == bytes(4096))
call("truncate", os.truncate, "a", 4)
call("grow", os.truncate, "a", 10)
call("read grown", read, "a")
call("empty", lambda: os.close(os.open("a", os.O_WRONLY | os.O_TRUNC)))
call("emptied", kind, "a")
call("link", os.link, "a", "b")
call("linked", kind, "b")
call("write by link", write, "b", b"shared")
call("read by name", read, "a")
call("unlink", os.unlink, "a")
call("left", kind, "b")
call("mkdir", os.mkdir, "d")
call("rename", os.rename, "b", "d/b")
call("rename over", lambda: (write("c", b"new"), os.rename("c", "d/b"))[0])
call("renamed", read, "d/b")
call("rename dir", os.rename, "d", "e")
call("rmdir full", os.rmdir, "e")
call("symlink", os.symlink, "e/b", "sym")
call("through", read, "sym")
call("fifo", os.mkfifo, "f", 0o600)
call("fifo kind", kind, "f")
def bound():
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("sock")
call("socket", bound)
call("socket kind", kind, "sock")
call("chmod", os.chmod, "e/b", 0o4755)
call("chmod kind", kind, "e/b")
call("write clears", write, "e/b", b"N")
call("cleared", kind, "e/b")
call("utime", os.utime, "e/b", ns=(1_000_000_001, 2_000_000_002))
call("times", lambda: [os.stat("e/b").st_atime_ns, os.stat("e/b").st_mtime_ns])
call("utime dir", os.utime, "e", ns=(3_000_000_003, 4_000_000_004))
call("dir times", lambda: [os.stat("e").st_atime_ns, os.stat("e").st_mtime_ns])
call("setxattr", os.setxattr, "e/b", "user.k", b"v")
call("create xattr", os.setxattr, "e/b", "user.k", b"w", os.XATTR_CREATE)
call("replace xattr", os.setxattr, "e/b", "user.k", b"w", os.XATTR_REPLACE)
call("getxattr", os.getxattr, "e/b", "user.k")
call("no xattr", os.getxattr, "e/b", "user.none")
call("removexattr", os.removexattr, "e/b", "user.k")
call("remove again", os.removexattr, "e/b", "user.k")
def unlinked():
    fd = os.open("u", os.O_RDWR | os.O_CREAT)
    os.write(fd, b"still here")
    os.unlink("u")
    os.lseek(fd, 0, 0)
    answer = [os.read(fd, 100).decode(), os.fstat(fd).st_nlink, os.path.exists("u")]
    os.close(fd)
    return answer
call("unlinked but open", unlinked)
def mapped():
    with open("m", "w+b") as file:
        file.truncate(8192)
        with mmap.mmap(file.fileno(), 8192) as memory:
            memory[4090:4100] = b"0123456789"
            memory.flush()
        return read("m")[4085:4105]
call("mmap", mapped)
def locked():
    with open("l", "wb") as one, open("l", "rb") as two:
        fcntl.flock(one, fcntl.LOCK_EX)
        try:
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "locked"
call("flock", locked)
call("posix lock", lambda: fcntl.lockf(open("l", "wb"), fcntl.LOCK_EX | fcntl.LOCK_NB))
call("fsync", lambda: os.fsync(os.open("l", os.O_RDONLY)))
call("names", lambda: sorted(os.listdir(".")))
call("long name", write, "n" * 256, b"")
call("missing dir", write, "none/x", b"")
call("not a dir", write, "l/x", b"")
print(json.dumps(said))
"""

# Writes what it is told, line by line, and answers each with an empty line.
WRITER = """
import sys
with open(sys.argv[1], "wb", buffering=0) as file:
    for line in sys.stdin:
        file.write(line.encode())
        print(flush=True)
"""


@pytest.fixture
def mount(identity: Identity, new_mount: MakeMount) -> Mounted:
    return new_mount(identity)


@pytest.mark.parametrize("place", ["tasks/t", "own/layout"])
def test_same_as_a_plain_directory(mount: Mounted, place: str) -> None:
    plain = mount.state.parent / "plain"
    mount.run("mkdir", plain)
    mount.run("mkdir", "-p", f"MNT/{place}")
    expected = json.loads(mount.python(PROGRAM, plain))
    found = json.loads(mount.python(PROGRAM, f"MNT/{place}"))
    for wanted, said in zip(expected, found, strict=True):
        assert said == wanted


def test_content_and_names_outlive_the_daemon(mount: Mounted) -> None:
    mount.run("mkdir", "MNT/tasks/t")
    with mount.start("python", "-c", WRITER, "MNT/tasks/t/log", talks=True) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        for number in range(3):
            mount.kill_daemon()
            writer.stdin.write(b"line %d\n" % number)
            writer.stdin.flush()
            assert writer.stdout.readline() == b"\n"
        writer.stdin.close()
        assert writer.wait(60) == 0
    assert mount.read("tasks/t/log") == b"line 0\nline 1\nline 2\n"
    mount.umount()
    mount.mount()
    assert mount.read("tasks/t/log") == b"line 0\nline 1\nline 2\n"


def test_write_through_a_link_is_private(
    identity: Identity, served: Served, new_mount: MakeMount
) -> None:
    mount = new_mount(identity, environment=served.environment(identity))
    data = content(3_000_000)
    mount.stage_in(served.put("input.dat", data), "input.dat")
    for task in ("t1", "t2"):
        mount.stagefs("sandbox", "create", task, "--in", "in=staging:///input.dat")
    before = mount.run("stat", "-c", "%Y %a", "MNT/tasks/t1/in").stdout
    mount.python("import sys; open(sys.argv[1], 'r+b').close()", "MNT/tasks/t1/in")
    assert served.requests_for("input.dat") <= 1  # the stat of stage-in
    assert mount.run("stat", "-c", "%Y %a", "MNT/tasks/t1/in").stdout == before
    mount.python("import sys; open(sys.argv[1], 'ab').write(b'!')", "MNT/tasks/t1/in")
    assert mount.read("tasks/t1/in") == data + b"!"
    assert mount.read("tasks/t2/in") == mount.read("staging/input.dat") == data
    assert mount.run("stat", "-c", "%h", "MNT/tasks/t2/in").stdout.strip() == b"2"
    mount.kill_daemon()
    assert mount.read("tasks/t1/in") == data + b"!"


def test_published_by_moving_and_by_linking(mount: Mounted) -> None:
    mount.run("mkdir", "-p", "MNT/tasks/t/tree/below")
    for name in ("out", "other", "tree/below/leaf"):
        mount.python(
            "import sys; open(sys.argv[1], 'w').write(sys.argv[2])", f"MNT/tasks/t/{name}", name
        )
    mount.run("mv", "MNT/tasks/t/out", "MNT/staging/out")
    mount.run("ln", "MNT/tasks/t/other", "MNT/staging/other")
    mount.run("mv", "MNT/tasks/t/tree", "MNT/staging/tree")
    mount.run("mkdir", "MNT/tasks/u")
    for name in ("out", "other", "tree/below/leaf"):
        assert mount.xattr(f"staging/{name}", "state") == "published"
        mount.run("ln", f"MNT/staging/{name}", "MNT/tasks/u/")
    mount.python("import sys; open(sys.argv[1], 'a').write('!')", "MNT/tasks/t/other")
    assert mount.read("tasks/t/other") == b"other!"
    assert mount.read("staging/other") == mount.read("tasks/u/other") == b"other"
    assert mount.read("tasks/u/leaf") == b"tree/below/leaf"


def test_publishing_what_is_still_written_is_refused(mount: Mounted) -> None:
    mount.run("mkdir", "MNT/tasks/t")
    with mount.start("python", "-c", WRITER, "MNT/tasks/t/out", talks=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        holder.stdin.write(b"x")
        holder.stdin.write(b"\n")
        holder.stdin.flush()
        holder.stdout.readline()
        for command in ("mv", "ln"):
            done = mount.run(command, "MNT/tasks/t/out", "MNT/staging/out", check=False)
            assert b"busy" in done.stderr, done.stderr
        mount.kill_daemon()
        done = mount.run("mv", "MNT/tasks/t/out", "MNT/staging/out", check=False)
        assert b"busy" in done.stderr, done.stderr
        holder.stdin.close()
        assert holder.wait(60) == 0
    mount.run("mv", "MNT/tasks/t/out", "MNT/staging/out")
    assert mount.read("staging/out") == b"x\n"


def test_copied_into_staging_is_published_when_closed(mount: Mounted) -> None:
    source = mount.state.parent / "source"
    source.write_bytes(b"from outside")
    source.chmod(0o644)
    mount.run("cp", "-p", source, "MNT/staging/copied")
    assert mount.xattr("staging/copied", "state") == "published"
    mount.run("mkdir", "MNT/tasks/t")
    mount.run("ln", "MNT/staging/copied", "MNT/tasks/t/copied")
    mount.python("import sys; open(sys.argv[1], 'a').write('!')", "MNT/staging/copied")
    assert mount.read("staging/copied") == b"from outside!"
    assert mount.read("tasks/t/copied") == b"from outside"
