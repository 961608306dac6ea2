"""The file: made once, refused when it is damaged, another program's, or from the future."""

import hashlib
import sqlite3
from contextlib import closing
from importlib.resources import files
from pathlib import Path

import pytest

from stagefs.errors import NewerFormat, UnsuitableState
from stagefs.model import ObjectId
from stagefs.namespace.check import problems
from stagefs.namespace.formats import FORMAT_VERSION
from stagefs.namespace.node import STAGING_INODE, ContentKind, NodeKind, SandboxRow
from stagefs.namespace.store import Namespace
from tests.unit.namespace.trees import staged

SCHEMA_DIGESTS = {1: "28152567cb0a50ec", 2: "bfe7326e9ced1a0f", 3: "f42448c8c1e5e303"}


def test_the_format_changes_only_with_its_version() -> None:
    """A changed schema needs a new FORMAT_VERSION, and a way to bring old files along."""
    schema = files("stagefs.namespace").joinpath("schema.sql").read_bytes()
    digest = hashlib.blake2b(schema, digest_size=8).hexdigest()
    assert SCHEMA_DIGESTS[FORMAT_VERSION] == digest


@pytest.fixture
def old(database: Path) -> Path:
    """A file of format 1 with a file, a directory that shows another, a bound one, a template."""
    connection = sqlite3.connect(database)
    connection.executescript(Path(__file__).with_name("format_1.sql").read_text("utf-8"))
    connection.executescript("""
        INSERT INTO nodes (inode, kind, mode, size_bytes, mtime_ns, ctime_ns, nlink, flags, lower,
            ttl_s, url, version, validator, checksum, target, fingerprint) VALUES
            (5, 2, 420, 7, 11, 12, 3, 1, 0, 0, 'https://h/f', 'v', 'etag:v', 'md5:00', NULL, 9),
            (6, 1, 493, 0, 13, 14, 2, 4, 0, 0, NULL, NULL, NULL, NULL, NULL, NULL),
            (7, 1, 493, 0, 13, 14, 1, 2, 6, 0, NULL, NULL, NULL, NULL, NULL, NULL),
            (8, 1, 493, 0, 15, 16, 2, 0, 0, 60.0, 's3://b/k', NULL, NULL, NULL, NULL, NULL),
            (9, 3, 511, 1, 17, 18, 1, 0, 0, 0, NULL, NULL, NULL, NULL, CAST('x' AS BLOB), NULL);
        INSERT INTO names VALUES
            (2, CAST('f' AS BLOB), 5, 33554432, 0), (4, CAST('t' AS BLOB), 6, 33554433, 0),
            (6, CAST('in' AS BLOB), 5, 33554434, 0), (3, CAST('s' AS BLOB), 7, 33554435, 0),
            (2, CAST('b' AS BLOB), 8, 33554436, 0), (3, CAST('l' AS BLOB), 9, 33554437, 0);
        INSERT INTO templates VALUES (6);
        UPDATE nodes SET nlink = nlink + 1 WHERE inode IN (2, 3, 4);
        INSERT INTO changes VALUES (2, 'test', 1, '{}');
        INSERT INTO operations VALUES (77, 5, 2);
    """)
    connection.close()
    return database


def test_a_file_of_format_1_is_brought_along(old: Path) -> None:
    namespace = Namespace.open(old)
    file = namespace.resolve("staging/f")
    assert (file.size_bytes, file.mode, file.mtime_ns, file.ctime_ns) == (7, 0o644, 11, 12)
    assert (file.nlink, file.validator, file.ranges, file.inode) == (3, "etag:v", False, 5)
    assert file.object_id == ObjectId("https://h/f", "v")
    assert (file.uid, file.gid, file.atime_ns, file.base_bytes) == (-1, -1, 0, 0)
    assert (file.content, file.has_xattrs) == (ContentKind.OBJECT, False)
    assert namespace.resolve("tasks/s/in") == file
    assert namespace.resolve("tasks/l").target == "x"
    bound = namespace.resolve("staging/b")
    assert (bound.bind_url, bound.bind_ttl_s, bound.writable) == ("s3://b/k", 60.0, False)
    assert namespace.applied(77) == 5
    assert namespace.sandboxes() == []
    # All that is new works.
    sandbox = namespace.resolve("tasks/s").inode
    copied = namespace.copy_up(sandbox, "in", file.inode)
    namespace.set_xattr(copied.inode, b"user.x", b"1")
    namespace.make_special(sandbox, "fifo", NodeKind.FIFO, 0o600)
    namespace.set_attributes(namespace.create_file(sandbox, "f", 0o600).inode, size_bytes=10)
    namespace.put_sandbox(SandboxRow(inode=sandbox, state="active", on_write="copy-up"))
    namespace.commit_sandbox(sandbox, "c", "{}", state="committed")
    assert namespace.statistics().size_bytes == 24
    namespace.close()
    assert problems(old) == []


def test_it_is_then_as_if_it_had_been_made_so(old: Path, tmp_path: Path) -> None:
    new = tmp_path / "new.db"
    for database in (old, new):
        Namespace.open(database).close()
    assert schema(old) == schema(new)
    assert int.from_bytes(old.read_bytes()[60:64], "big") == FORMAT_VERSION


def schema(database: Path) -> dict[str, object]:
    """What is in the file by name: columns of tables, the text of all else."""
    with closing(sqlite3.connect(database)) as connection:
        found: dict[str, object] = {}
        for kind, name, sql in connection.execute("SELECT type, name, sql FROM sqlite_master"):
            if kind == "table":
                found[name] = connection.execute(f"PRAGMA table_xinfo({name})").fetchall()
            elif sql is not None:
                found[name] = " ".join(sql.split())
        counters = connection.execute("SELECT kind FROM counters ORDER BY kind").fetchall()
    return found | {"kinds counted": counters}


def test_what_cannot_be_brought_along_stays_as_it_was(old: Path) -> None:
    with closing(sqlite3.connect(old)) as connection:
        # In the way of one of the later steps.
        connection.execute("CREATE TABLE commits (x)")
    before = schema(old)
    with pytest.raises(UnsuitableState, match="commits already exists"):
        Namespace.open(old)
    assert schema(old) == before
    assert int.from_bytes(old.read_bytes()[60:64], "big") == 1


def test_a_newer_format_that_is_only_in_the_log_is_refused(database: Path) -> None:
    Namespace.open(database).close()
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute(f"PRAGMA user_version = {FORMAT_VERSION + 1}")
        assert int.from_bytes(database.read_bytes()[60:64], "big") == FORMAT_VERSION
        with pytest.raises(NewerFormat, match="newer StageFS"):
            Namespace.open(database)


def test_nobody_else_can_read_it(database: Path) -> None:
    Namespace.open(database).close()
    for file in database.parent.iterdir():
        assert file.stat().st_mode & 0o077 == 0, file


def test_a_newer_format_is_refused_and_left_alone(database: Path) -> None:
    Namespace.open(database).close()
    with sqlite3.connect(database) as connection:
        connection.execute(f"PRAGMA user_version = {FORMAT_VERSION + 1}")
    connection.close()
    before = database.read_bytes()
    with pytest.raises(NewerFormat, match="newer StageFS"):
        Namespace.open(database)
    assert database.read_bytes() == before


@pytest.mark.parametrize("content", [b"not a database", b"SQLite format 3\0" + b"\1" * 2000])
def test_a_damaged_file_is_refused_and_left_alone(database: Path, content: bytes) -> None:
    database.write_bytes(content)
    with pytest.raises(UnsuitableState, match="damaged or not ours"):
        Namespace.open(database)
    assert database.read_bytes() == content


def test_a_file_of_another_program_is_refused(database: Path) -> None:
    connection = sqlite3.connect(database)
    connection.execute("PRAGMA application_id = 99")
    connection.execute("CREATE TABLE things (x)")
    connection.close()
    with pytest.raises(UnsuitableState, match="another program"):
        Namespace.open(database)


def test_a_file_without_its_tables_is_refused(database: Path) -> None:
    Namespace.open(database).close()
    connection = sqlite3.connect(database)
    connection.execute("DROP TABLE names")
    connection.close()
    with pytest.raises(UnsuitableState, match="names is missing"):
        Namespace.open(database)


def test_a_symbolic_link_is_not_followed(database: Path) -> None:
    database.symlink_to(database.with_name("elsewhere"))
    with pytest.raises(UnsuitableState):
        Namespace.open(database)
    assert not database.with_name("elsewhere").exists()


def test_what_was_left_of_a_making_that_was_cut_short_is_no_obstacle(database: Path) -> None:
    database.with_name(database.name + ".new").write_bytes(b"half")
    Namespace.open(database).close()
    assert {file.name for file in database.parent.iterdir()} == {
        "namespace.db",
        "namespace.db-turn",
        "namespace.db.reserve",
    }


def test_an_empty_file_becomes_a_namespace(database: Path) -> None:
    database.touch()
    namespace = Namespace.open(database)
    namespace.register(STAGING_INODE, "f", staged())
    namespace.close()
