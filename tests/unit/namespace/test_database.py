"""The file: made once, refused when it is damaged, another program's, or from the future."""

import hashlib
import sqlite3
from importlib.resources import files
from pathlib import Path

import pytest

from stagefs.errors import NewerFormat, UnsuitableState
from stagefs.namespace.database import FORMAT_VERSION
from stagefs.namespace.node import STAGING_INODE
from stagefs.namespace.store import Namespace
from tests.unit.namespace.trees import staged

SCHEMA_DIGESTS = {1: "28152567cb0a50ec"}


def test_the_format_changes_only_with_its_version() -> None:
    """A changed schema needs a new FORMAT_VERSION, and a way to bring old files along."""
    schema = files("stagefs.namespace").joinpath("schema.sql").read_bytes()
    digest = hashlib.blake2b(schema, digest_size=8).hexdigest()
    assert SCHEMA_DIGESTS[FORMAT_VERSION] == digest


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
    }


def test_an_empty_file_becomes_a_namespace(database: Path) -> None:
    database.touch()
    namespace = Namespace.open(database)
    namespace.register(STAGING_INODE, "f", staged())
    namespace.close()
