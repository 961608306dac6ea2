"""Programs that work in a sandbox get the same results as in a plain directory (B2)."""

import dataclasses
import json
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.identity import Identity
from tests.support.mounted import Mounted, sha256
from tests.support.served import Served

MakeMount = Callable[..., Mounted]
SOURCES, STAGED_SOURCES = 24, 5
ROWS, STAGED_ROWS = 150, 20

# Relative path, type, mode, size and digest of everything below a directory.
TREE = r"""
import hashlib, json, os, stat, sys
found = {}
for directory, names, files in os.walk(sys.argv[1]):
    for name in names + files:
        path = os.path.join(directory, name)
        status = os.lstat(path)
        what = [stat.filemode(status.st_mode)]
        if stat.S_ISREG(status.st_mode):
            what += [status.st_size, hashlib.sha256(open(path, "rb").read()).hexdigest()]
        elif stat.S_ISLNK(status.st_mode):
            what.append(os.readlink(path))
        found[os.path.relpath(path, sys.argv[1])] = what
json.dump(found, sys.stdout)
"""


@dataclasses.dataclass
class Places:
    """A plain directory and a sandbox; and a directory for what both start from."""

    mount: Mounted
    start: Path
    plain: Path
    sandbox: Path

    def both(self, *command: str | Path) -> list[bytes]:
        """What a command prints in each; both must go well."""
        places = (self.plain, self.sandbox)
        return [self.mount.run(*command, directory=place).stdout for place in places]

    def same(self, *command: str | Path) -> bytes:
        plain, mounted = self.both(*command)
        assert mounted == plain
        return mounted

    def same_tree(self, path: str) -> None:
        """But for what git notes of the time."""
        plain, mounted = (
            json.loads(self.mount.python(TREE, place / path))
            for place in (self.plain, self.sandbox)
        )
        for tree in (plain, mounted):
            for name in [name for name in tree if name.startswith(".git")]:
                del tree[name]
        assert mounted == plain
        assert plain, "nothing was compared"


@pytest.fixture
def places(identity: Identity, new_mount: MakeMount, work: Path) -> Places:
    mount = new_mount(identity)
    mount.run("mkdir", "MNT/tasks/t")
    start, plain = identity.directory(work / "start"), identity.directory(work / "plain")
    return Places(mount, start, plain, mount.point / "tasks/t")


def write_sources(top: Path, count: int = SOURCES) -> None:
    """A program of many small files with a Makefile that knows what depends on what."""
    top.mkdir()
    numbers = range(count)
    (top / "all.h").write_text("".join(f"int part{n}(int);\n" for n in numbers))
    for n in numbers:
        text = f'#include "all.h"\nint part{n}(int x) {{ return x * {n} + {n * n % 7}; }}\n'
        (top / f"part{n}.c").write_text(text)
    calls = " + ".join(f"part{n}({n})" for n in numbers)
    (top / "main.c").write_text(
        f'#include <stdio.h>\n#include "all.h"\nint main(void) {{ printf("%d\\n", {calls}); }}\n'
    )
    objects = " ".join([*(f"part{n}.o" for n in numbers), "main.o"])
    (top / "Makefile").write_text(
        f"program: libparts.a main.o\n\tcc -o $@ main.o libparts.a\n"
        f"libparts.a: {objects.removesuffix(' main.o')}\n\tar rcsD $@ $^\n"
        f"%.o: %.c all.h\n\tcc -O1 -c -o $@ $<\n"
    )
    (top / "run.sh").write_text("#!/bin/sh\nexec ./program\n")
    (top / "run.sh").chmod(0o755)
    (top / "link").symlink_to("run.sh")


@pytest.fixture
def sources(places: Places) -> Path:
    write_sources(places.start / "src")
    places.mount.run(
        "sh", "-c", 'cp -r "$1" "$2"', "sh", places.start / "src", places.start / "own"
    )
    return places.start / "own"


def test_tar_and_make(places: Places, sources: Path) -> None:
    packed = places.start / "src.tar.gz"
    places.mount.run("tar", "-czf", packed, "own", directory=places.start)
    places.both("tar", "-xzf", packed)
    places.same_tree("own")
    places.both("make", "-s", "-C", "own", "-j2")
    assert places.same("own/program").strip().isdigit()
    places.same("sh", "-c", "cd own && ./run.sh && ./link")
    places.same_tree("own")
    # Nothing is to do; then what depends on one file, and only that.
    assert b"up to date" in places.both("make", "-C", "own")[1]
    places.both("touch", "own/part3.c")
    rebuilt = places.mount.run("make", "-C", "own", "-j2", directory=places.sandbox).stdout
    assert b"part3.c" in rebuilt
    assert b"part4.c" not in rebuilt


def test_git(places: Places, sources: Path) -> None:
    git = ("git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main")
    run = places.mount.run
    run(*git, "init", "-q", directory=sources)
    for number in range(5):
        run("sh", "-c", f"echo /* {number} */ >> part{number}.c", directory=sources)
        run(*git, "add", "-A", directory=sources)
        run(*git, "commit", "-q", "-m", f"change {number}", directory=sources)
    places.both(*git, "clone", "-q", f"file://{sources}", "clone")
    places.same_tree("clone")
    assert places.same(*git, "-C", "clone", "status", "--porcelain") == b""
    places.same(*git, "-C", "clone", "log", "--format=%H %s")
    places.both(*git, "-C", "clone", "fsck", "--strict")
    places.both("sh", "-c", "echo new > clone/new; echo more >> clone/part1.c; rm clone/part2.c")
    changed = places.same(*git, "-C", "clone", "status", "--porcelain")
    assert changed.split() == [b"M", b"part1.c", b"D", b"part2.c", b"??", b"new"]
    places.both(*git, "-C", "clone", "stash", "-q", "-u")
    assert places.same(*git, "-C", "clone", "status", "--porcelain") == b""
    places.both(*git, "-C", "clone", "stash", "pop", "-q")
    places.both(*git, "-C", "clone", "checkout", "-q", "-b", "other")
    places.both(*git, "-C", "clone", "commit", "-q", "-a", "-m", "other")
    places.both(*git, "-C", "clone", "gc", "-q")
    places.both(*git, "-C", "clone", "checkout", "-q", "main")
    places.same_tree("clone")


def write_wheel(path: Path) -> None:
    name = "stagefs_tried-1.0"
    files = {
        "stagefs_tried/__init__.py": "def value():\n    return 42\n",
        "stagefs_tried/__main__.py": "from stagefs_tried import value\nprint(value())\n",
        f"{name}.dist-info/METADATA": "Metadata-Version: 2.1\nName: stagefs-tried\nVersion: 1.0\n",
        f"{name}.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
        f"{name}.dist-info/entry_points.txt": "[console_scripts]\ntried = stagefs_tried:value\n",
    }
    record = "".join(f"{each},,\n" for each in (*files, f"{name}.dist-info/RECORD"))
    with zipfile.ZipFile(path, "w") as wheel:
        for each, text in {**files, f"{name}.dist-info/RECORD": record}.items():
            wheel.writestr(each, text)


@pytest.mark.timeout(300)
def test_pip_install(places: Places) -> None:
    wheel = places.start / "stagefs_tried-1.0-py3-none-any.whl"
    write_wheel(wheel)
    wheel.chmod(0o644)
    places.mount.run("/usr/bin/python3", "-m", "venv", "venv", directory=places.sandbox)
    pip = ("venv/bin/python", "-m", "pip", "--disable-pip-version-check")
    run = places.mount.run
    run(*pip, "install", "-q", "--no-index", wheel, directory=places.sandbox)
    code = "venv/bin/python", "-m", "stagefs_tried"
    assert run(*code, directory=places.sandbox).stdout == b"42\n"
    run("venv/bin/tried", directory=places.sandbox, check=False)
    assert b"stagefs-tried" in run(*pip, "list", directory=places.sandbox).stdout
    run(*pip, "check", directory=places.sandbox)
    run(*pip, "uninstall", "-q", "-y", "stagefs-tried", directory=places.sandbox)
    assert run(*code, directory=places.sandbox, check=False).returncode != 0


WRITER = """
import sqlite3, sys
with sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None) as database:
    assert database.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
    for number in range(int(sys.argv[3])):
        database.execute("BEGIN IMMEDIATE")
        total = database.execute("SELECT count(*) FROM rows").fetchone()[0]
        database.execute("INSERT INTO rows VALUES (?, ?, ?)", (sys.argv[2], number, total))
        database.execute("COMMIT")
"""


def write_from_two_sides(mount: Mounted, path: Path, rows: int) -> None:
    # Once, and before: SQLite does not wait for others when it changes the mode.
    assert mount.run("sqlite3", path, "PRAGMA journal_mode = WAL").stdout == b"wal\n"
    writers = [mount.start("python", "-c", WRITER, path, name, str(rows)) for name in ("a", "b")]
    ended = [(writer.communicate(timeout=90)[1], writer.returncode) for writer in writers]
    for errors, code in ended:
        assert code == 0, errors.decode()
    check = "PRAGMA integrity_check; SELECT count(*), max(total), count(DISTINCT writer) FROM rows"
    said = mount.run("sqlite3", path, check).stdout
    assert said == b"ok\n%d|%d|2\n" % (2 * rows, 2 * rows - 1)


TABLE = "CREATE TABLE rows (writer, number, total UNIQUE)"


def test_sqlite_wal_with_two_writers(places: Places) -> None:
    path = places.sandbox / "rows.sqlite"
    places.mount.run("sqlite3", path, TABLE)
    write_from_two_sides(places.mount, path, ROWS)


def test_rsync_in_and_out(places: Places, sources: Path) -> None:
    run = places.mount.run
    run("sh", "-c", "truncate -s 5M sparse; mkfifo fifo; ln part1.c hard", directory=sources)
    run("touch", "-d", "2001-02-03 04:05:06.789", "all.h", directory=sources)
    out = places.plain / "out"
    run("rsync", "-aHS", f"{sources}/", places.sandbox / "in/")
    run("diff", "-r", "--no-dereference", "-x", "fifo", sources, places.sandbox / "in")
    again = run("rsync", "-aHSi", f"{sources}/", places.sandbox / "in/").stdout
    assert again == b"", "rsync found something different in what it had copied"
    run("rsync", "-aHS", f"{places.sandbox}/in/", f"{out}/")
    run("diff", "-r", "--no-dereference", "-x", "fifo", sources, out)
    assert run("rsync", "-aHSi", f"{sources}/", f"{out}/").stdout == b""
    run(
        "sh",
        "-c",
        'rm part1.c && echo new > new && mv all.h "$1"',
        "sh",
        "moved",
        directory=sources,
    )
    run("rsync", "-a", "--delete", f"{sources}/", places.sandbox / "in/")
    run("diff", "-r", "--no-dereference", "-x", "fifo", sources, places.sandbox / "in")


@pytest.fixture
def inputs(work: Path) -> Path:
    """What a task may start from: a repository, sources, a package and a database."""
    top = work / "inputs"
    top.mkdir()
    write_sources(top / "src", STAGED_SOURCES)
    (top / "src/link").unlink()  # not all servers have symbolic links
    write_wheel(top / "stagefs_tried-1.0-py3-none-any.whl")
    words = "git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "safe.directory=*"
    for command in (
        ("tar", "-czf", "src.tar.gz", "src"),
        ("sqlite3", "rows.sqlite", TABLE),
        (*words, "init", "-q", "-b", "main", work / "repository"),
        (*words, "-C", work / "repository", "--work-tree", top / "src", "add", "-A"),
        (*words, "-C", work / "repository", "commit", "-q", "-m", "all"),
        (*words, "-C", work / "repository", "bundle", "create", "-q", top / "b.bundle", "--all"),
    ):
        subprocess.run(command, cwd=top, check=True)
    return top


@pytest.mark.timeout(300)
def test_real_work_on_staged_inputs(
    identity: Identity, new_mount: MakeMount, served: Served, inputs: Path, work: Path
) -> None:
    """The same work, where everything that it begins with is at a remote."""
    served.publish(inputs, "in")
    mount = new_mount(identity, environment=served.environment(identity))
    mount.stagefs("bind", served.url("in/x").removesuffix("x"), "staging:///in")
    names = [path.name for path in inputs.iterdir()]
    links = [word for name in names for word in ("--in", f"{name}=staging:///in/{name}")]
    mount.stagefs("sandbox", "create", "t", *links)
    plain, task = identity.directory(work / "plain"), mount.point / "tasks/t"

    def run(*command: str | Path) -> bytes:
        return mount.run(*command, directory=task).stdout

    run("git", "clone", "-q", "b.bundle", "clone")
    assert run("git", "-C", "clone", "status", "--porcelain") == b""
    run("diff", "-r", "-x", ".git", inputs / "src", "clone")

    run("sh", "-c", "mkdir unpacked && tar -xzf src.tar.gz -C unpacked")
    run("diff", "-r", inputs / "src", "unpacked/src")
    run("rsync", "-a", "src/", plain / "out/")
    run("rsync", "-a", f"{plain}/out/", "copied/")
    expected = sum(n * n + n * n % 7 for n in range(STAGED_SOURCES))
    # In the linked directory, too: what is made there is the task's own.
    for sources in ("unpacked/src", "copied", "src"):
        run("make", "-s", "-C", sources, "-j2")
        assert run("sh", "-c", f"cd {sources} && ./run.sh") == b"%d\n" % expected, sources
        assert b"up to date" in run("make", "-C", sources)
    run("rsync", "-a", "src/", plain / "built/")
    run("diff", "-r", plain / "built", "src")
    run("diff", "-r", inputs / "src", plain / "out")

    run("/usr/bin/python3", "-m", "venv", "--without-pip", "venv")
    wheel = next(name for name in names if name.endswith(".whl"))
    pip = ("/usr/bin/python3", "-m", "pip", "--python", "venv/bin/python")
    run(*pip, "--disable-pip-version-check", "install", "-q", "--no-index", wheel)
    assert run("venv/bin/python", "-m", "stagefs_tried") == b"42\n"

    write_from_two_sides(mount, task / "rows.sqlite", STAGED_ROWS)
    # None of it reached the inputs, here or at the remote.
    for name in names:
        if (inputs / name).is_file():
            assert mount.sha256(f"staging/in/{name}") == sha256((inputs / name).read_bytes())
    mount.run("diff", "-r", inputs / "src", "MNT/staging/in/src")
    published = (path for path in inputs.rglob("*") if path.is_file())
    assert served.names() == sorted(f"in/{path.relative_to(inputs)}" for path in published)
