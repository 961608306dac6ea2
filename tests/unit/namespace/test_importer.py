"""Imports: all or nothing by default, safe to repeat, beside a namespace that is in use."""

import json
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from stagefs.errors import InvalidCatalog, InvalidName, NotADirectory, ReadOnly, StageFSError
from stagefs.model import EntryKind, ListedEntry, ObjectInfo
from stagefs.namespace.check import problems
from stagefs.namespace.importer import import_catalog
from stagefs.namespace.node import STAGING_INODE, TASKS_INODE
from stagefs.namespace.store import Namespace
from tests.unit.namespace.trees import listing, paths, staged


def entry(name: str, *, size: int = 5, **more: object) -> dict[str, object]:
    return {"name": name, "url": f"https://host/{name}", "size": size, **more}


@pytest.fixture
def catalog(tmp_path: Path) -> Path:
    return tmp_path / "catalog.jsonl"


def write(catalog: Path, *entries: dict[str, object]) -> Path:
    catalog.write_text("".join(json.dumps(line) + "\n" for line in entries))
    return catalog


def test_it_makes_names_and_directories(
    namespace: Namespace, database: Path, catalog: Path
) -> None:
    sha = "sha256:" + "0" * 64
    write(catalog, entry("z"), entry("b/c/d", mtime=7, checksum=sha), entry("b/a"), entry("a"))
    before = namespace.statistics().changes
    result = import_catalog(database, catalog, "staging/ref/v1", file_mode=0o640)
    assert (result.imported, result.directories) == (4, 4)
    namespace.refresh()
    assert namespace.statistics().changes == before + 1
    assert paths(namespace, STAGING_INODE) == [
        "ref/", "ref/v1/", "ref/v1/a", "ref/v1/b/", "ref/v1/b/a", "ref/v1/b/c/", "ref/v1/b/c/d",
        "ref/v1/z",
    ]  # fmt: skip
    node = namespace.resolve("staging/ref/v1/b/c/d")
    assert node.object_id is not None
    assert (node.object_id.url, node.object_id.version) == ("https://host/b/c/d", sha)
    assert (str(node.checksum), node.mtime_ns, node.mode, node.nlink) == (sha, 7 * 10**9, 0o640, 1)
    assert (node.validator, node.checked_ns) == (None, 0)
    assert namespace.find_object("https://host/z", "declared:5:0") is not None


def test_importing_again_changes_nothing(
    namespace: Namespace, database: Path, catalog: Path
) -> None:
    write(catalog, entry("a"), entry("d/b"))
    import_catalog(database, catalog, "staging")
    before = {path: namespace.resolve(f"staging/{path}") for path in ("a", "d/b")}
    result = import_catalog(database, catalog, "staging")
    assert (result.imported, result.unchanged, result.directories) == (0, 2, 0)
    namespace.refresh()
    assert before == {path: namespace.resolve(f"staging/{path}") for path in ("a", "d/b")}


def test_a_name_that_is_another_object_needs_replace(
    namespace: Namespace, database: Path, catalog: Path
) -> None:
    old = namespace.register(STAGING_INODE, "a", staged("other"))
    namespace.link(old.inode, TASKS_INODE, "kept")
    write(catalog, entry("new"), entry("a"))
    with pytest.raises(InvalidCatalog, match=r"^Line 2 .*'a' exists and is another object"):
        import_catalog(database, catalog, "staging")
    namespace.refresh()
    assert paths(namespace, STAGING_INODE) == ["a"], "something was imported"
    result = import_catalog(database, catalog, "staging", replace=True)
    assert (result.imported, result.replaced) == (1, 1)
    namespace.refresh()
    assert namespace.resolve("staging/a").object_id != old.object_id
    assert namespace.resolve("tasks/kept").inode == old.inode
    assert namespace.node(old.inode).nlink == 1


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([entry("a"), entry("b"), entry("a")], "Line 3 .*'a' again: line 1"),
        ([entry("d/a"), entry("d")], "Line 2 .*'d' is a directory"),
        ([entry("d"), entry("d/x/y")], "Line 1 .*'d' is a directory"),
        ([entry("file/x")], "Line 1 .*file exists and is not a directory"),
        ([entry("a"), entry("directory")], "Line 2 .*'directory' exists and is a directory"),
        ([entry("a"), entry("../b")], "Line 2"),
    ],
)
def test_nothing_is_imported_from_a_wrong_catalog(
    namespace: Namespace,
    database: Path,
    catalog: Path,
    entries: list[dict[str, object]],
    reason: str,
) -> None:
    namespace.register(STAGING_INODE, "file", staged())
    namespace.make_directory(STAGING_INODE, "directory")
    before = namespace.statistics()
    with pytest.raises(InvalidCatalog, match=reason):
        import_catalog(database, write(catalog, *entries), "staging", replace=True)
    assert namespace.statistics() == before


def test_where_a_catalog_cannot_go(namespace: Namespace, database: Path, catalog: Path) -> None:
    directory = namespace.make_directory(STAGING_INODE, "d")
    namespace.register(STAGING_INODE, "file", staged())
    namespace.link_directory(directory.inode, TASKS_INODE, "linked")
    write(catalog, entry("a"))
    cases: list[tuple[str, type[StageFSError]]] = [
        ("staging/file", NotADirectory),
        ("staging/file/below", NotADirectory),
        ("tasks/linked", ReadOnly),
        ("staging/../tasks", InvalidName),
    ]
    for prefix, expected in cases:
        with pytest.raises(expected):
            import_catalog(database, catalog, prefix)
    with pytest.raises(InvalidCatalog, match="cannot be read"):
        import_catalog(database, catalog.with_name("absent"), "staging")


def test_into_a_bound_directory(namespace: Namespace, database: Path, catalog: Path) -> None:
    bound = namespace.bind(STAGING_INODE, "b", "s3://bucket", 5.0).inode

    def listed(name: str) -> ListedEntry:
        url = f"s3://bucket/{name}"
        return ListedEntry(name, EntryKind.FILE, url, ObjectInfo(url, 1, "v"))

    namespace.merge_listing(bound, [listed("hidden"), listed("theirs")], now_ns=1)
    namespace.remove(bound, "hidden")
    write(catalog, entry("hidden"), entry("theirs"), entry("mine"))
    import_catalog(database, catalog, "staging/b", replace=True)
    namespace.refresh()
    namespace.merge_listing(bound, [listed("hidden"), listed("theirs")], now_ns=2)
    urls = [node.object_id.url for node in listing(namespace, bound).values() if node.object_id]
    assert sorted(urls) == [f"https://host/{name}" for name in ("hidden", "mine", "theirs")]


def test_an_empty_catalog_makes_its_directory(
    namespace: Namespace, database: Path, catalog: Path
) -> None:
    result = import_catalog(database, write(catalog), "staging/empty")
    assert (result.imported, result.directories) == (0, 1)
    namespace.refresh()
    assert paths(namespace, STAGING_INODE) == ["empty/"]


def test_new_names_show_through_links(namespace: Namespace, database: Path, catalog: Path) -> None:
    directory = namespace.make_directory(STAGING_INODE, "d")
    linked = namespace.link_directory(directory.inode, TASKS_INODE, "l")
    import_catalog(database, write(catalog, entry("a"), entry("sub/b")), "staging/d")
    namespace.refresh()
    assert paths(namespace, linked.inode) == ["a", "sub/", "sub/b"]


def test_the_daemon_changes_names_meanwhile(
    namespace: Namespace, database: Path, catalog: Path
) -> None:
    write(catalog, *(entry(f"d{n % 7}/f{n}") for n in range(3000)))
    made: list[str] = []

    def report(phase: str, done: int, _total: int) -> None:
        if phase == "import":
            made.append(f"t{done}")
            namespace.make_directory(TASKS_INODE, made[-1])

    import_catalog(database, catalog, "staging", report=report)
    assert len(made) > 1
    assert listing(namespace, TASKS_INODE).keys() == set(made)
    assert namespace.statistics().files == 3000


def test_a_name_made_meanwhile_stops_it(
    namespace: Namespace, database: Path, catalog: Path
) -> None:
    write(catalog, *(entry(f"f{n:05}") for n in range(3000)))

    def report(phase: str, _done: int, _total: int) -> None:
        if phase == "import" and "f02999" not in listing(namespace, STAGING_INODE):
            namespace.register(STAGING_INODE, "f02999", staged("mine"))

    with pytest.raises(InvalidCatalog, match="during the import"):
        import_catalog(database, catalog, "staging", report=report)
    assert namespace.resolve("staging/f02999").object_id == staged("mine").object_id


KILLED = """
import os, signal, sys
from pathlib import Path
from stagefs.namespace.importer import import_catalog

def report(phase, done, total):
    if phase == "import" and done >= 1000:
        os.kill(os.getpid(), signal.SIGKILL)

import_catalog(Path(sys.argv[1]), Path(sys.argv[2]), "staging/ref", report=report)
"""


def test_killed_and_run_again(namespace: Namespace, database: Path, catalog: Path) -> None:
    write(catalog, *(entry(f"d{n % 50}/f{n}") for n in range(5000)))
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(database), str(catalog)], check=False, timeout=60
    )
    assert killed.returncode == -signal.SIGKILL
    part = namespace.statistics().files
    assert 1000 <= part < 5000
    assert problems(database) == []
    result = import_catalog(database, catalog, "staging/ref")
    assert (result.imported, result.unchanged) == (5000 - part, part)
    assert namespace.statistics().files == 5000
    assert not list(database.parent.glob("import-*"))


def run(*arguments: str) -> tuple[int, list[dict[str, object]]]:
    done = subprocess.run(
        [sys.executable, "-m", "stagefs.namespace.importer", *arguments],
        check=False,
        stdout=subprocess.PIPE,
        timeout=60,
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_the_command_tells_its_progress_and_result(
    namespace: Namespace, database: Path, catalog: Path
) -> None:
    write(catalog, *(entry(f"f{n}") for n in range(10)))
    code, lines = run(str(database), str(catalog), "staging", "--file-mode", "600")
    assert code == 0
    assert {"phase": "import", "done": 10, "total": 10} in lines
    assert lines[-1] == {
        "result": {"imported": 10, "unchanged": 0, "replaced": 0, "directories": 0}
    }
    assert namespace.resolve("staging/f3").mode == 0o600


def test_the_command_tells_its_error(namespace: Namespace, database: Path, catalog: Path) -> None:
    write(catalog, entry("a"), entry("\udcff/.."))
    code, lines = run(str(database), str(catalog), "staging")
    assert code == InvalidCatalog.exit_code
    assert lines[-1]["kind"] == "InvalidCatalog"
    assert str(lines[-1]["error"]).startswith("Line 2 of the catalog")
    code, lines = run(str(database.with_name("absent.db")), str(catalog), "staging")
    assert code == 2
    assert not database.with_name("absent.db").exists()
    assert namespace.statistics().files == 0


def test_the_command_can_be_stopped(namespace: Namespace, database: Path, catalog: Path) -> None:
    write(catalog, *(entry(f"f{n}") for n in range(20_000)))
    # Holds the import at its first transaction.
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    child = subprocess.Popen(
        [sys.executable, "-m", "stagefs.namespace.importer", database, catalog, "staging"],
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    size = catalog.stat().st_size
    for line in child.stdout:
        if json.loads(line) == {"phase": "check", "done": size, "total": size}:
            child.send_signal(signal.SIGTERM)
            break
    holder.execute("ROLLBACK")
    holder.close()
    output, _ = child.communicate(timeout=60)
    assert json.loads(output.splitlines()[-1])["kind"] == "Stopped"
    assert child.returncode == 1
    assert namespace.statistics().files < 20_000
    import_catalog(database, catalog, "staging")
    assert namespace.statistics().files == 20_000
