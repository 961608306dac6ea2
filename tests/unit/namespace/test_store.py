"""Namespace: names and nodes in plain directories, operations, and what survives closing."""

from collections.abc import Callable
from pathlib import Path

import pytest

from stagefs.errors import (
    Busy,
    InvalidName,
    InvalidUrl,
    IsADirectory,
    NameExists,
    NameTooLong,
    NotADirectory,
    NotEmpty,
    NotFound,
    NotPermitted,
    StageFSError,
)
from stagefs.model import ROOT_INODE, Checksum, ChecksumKind, Inode, ObjectId
from stagefs.namespace.node import STAGING_INODE, TASKS_INODE, NodeKind, RenameFlags, StagedObject
from stagefs.namespace.store import Namespace
from tests.unit.namespace.trees import listing, paths, staged


def test_a_registered_object_is_what_was_said(namespace: Namespace) -> None:
    checksum = Checksum(ChecksumKind.MD5, "0" * 32)
    wanted = StagedObject(
        url="s3://bucket/key",
        version="etag:1",
        size_bytes=1 << 40,
        mtime_ns=123_456_789_012_345_678,
        mode=0o640,
        validator="etag:1",
        checksum=checksum,
        ranges=False,
        checked_ns=5,
    )
    node = namespace.register(STAGING_INODE, "big", wanted)
    namespace.refresh()
    assert namespace.lookup(STAGING_INODE, "big") == node == namespace.node(node.inode)
    assert node.kind is NodeKind.FILE
    assert node.object_id == ObjectId("s3://bucket/key", "etag:1")
    assert (node.size_bytes, node.mtime_ns, node.mode) == (1 << 40, 123_456_789_012_345_678, 0o640)
    assert (node.validator, node.checksum, node.ranges, node.checked_ns) == (
        "etag:1", checksum, False, 5,
    )  # fmt: skip
    assert (node.nlink, node.successor) == (1, 0)


def test_nlink_counts_names_and_subdirectories(namespace: Namespace) -> None:
    file = namespace.register(STAGING_INODE, "f", staged())
    for number in range(128):
        task = namespace.make_directory(TASKS_INODE, f"t{number}")
        namespace.link(file.inode, task.inode, "input")
    assert namespace.node(file.inode).nlink == 129
    assert namespace.node(TASKS_INODE).nlink == 2 + 128
    namespace.remove(namespace.resolve("tasks/t5").inode, "input")
    namespace.remove_directory(TASKS_INODE, "t5")
    assert namespace.node(file.inode).nlink == 128
    assert namespace.node(TASKS_INODE).nlink == 2 + 127


def test_a_removed_file_stays_until_it_is_dropped(namespace: Namespace) -> None:
    file = namespace.register(STAGING_INODE, "f", staged())
    assert namespace.remove(STAGING_INODE, "f").nlink == 0
    assert namespace.node(file.inode).object_id == file.object_id
    with pytest.raises(NotFound):
        namespace.link(file.inode, TASKS_INODE, "again")
    assert namespace.drop_unlinked() == [file.inode]
    with pytest.raises(NotFound):
        namespace.node(file.inode)


def test_inode_numbers_are_never_given_again(database: Path) -> None:
    namespace = Namespace.open(database)
    first = namespace.register(STAGING_INODE, "f", staged())
    namespace.remove(STAGING_INODE, "f")
    namespace.drop_unlinked()
    namespace.close()
    namespace = Namespace.open(database)
    assert namespace.register(STAGING_INODE, "f", staged()).inode > first.inode
    namespace.close()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "\ud800"])
def test_names_that_can_be_none_are_refused_everywhere(namespace: Namespace, name: str) -> None:
    file = namespace.register(STAGING_INODE, "f", staged())
    directory = namespace.make_directory(STAGING_INODE, "d")
    attempts: list[Callable[[], object]] = [
        lambda: namespace.lookup(STAGING_INODE, name),
        lambda: namespace.make_directory(STAGING_INODE, name),
        lambda: namespace.make_symlink(STAGING_INODE, name, "t"),
        lambda: namespace.register(STAGING_INODE, name, staged()),
        lambda: namespace.register_many([(STAGING_INODE, name, staged())]),
        lambda: namespace.link(file.inode, STAGING_INODE, name),
        lambda: namespace.link_directory(directory.inode, TASKS_INODE, name),
        lambda: namespace.rename(STAGING_INODE, "f", STAGING_INODE, name),
        lambda: namespace.bind(STAGING_INODE, name, "s3://b", 1.0),
        lambda: namespace.instantiate_template(directory.inode, TASKS_INODE, [name]),
    ]
    for attempt in attempts:
        with pytest.raises(InvalidName):
            attempt()
    assert paths(namespace, ROOT_INODE) == ["staging/", "staging/d/", "staging/f", "tasks/"]


def test_names_of_255_bytes_and_of_any_bytes(namespace: Namespace) -> None:
    longest, any_bytes = "ä" * 127 + "x", b"\xff\xfe\n%2F".decode("utf-8", "surrogateescape")
    for name in (longest, any_bytes):
        namespace.register(STAGING_INODE, name, staged())
    with pytest.raises(NameTooLong):
        namespace.register(STAGING_INODE, longest + "x", staged())
    assert set(listing(namespace, STAGING_INODE)) == {longest, any_bytes}


def test_urls_must_be_text(namespace: Namespace) -> None:
    with pytest.raises(InvalidUrl):
        namespace.register(STAGING_INODE, "f", staged("\udcff"))


def test_errors_are_those_of_the_system_calls(namespace: Namespace) -> None:
    file = namespace.register(STAGING_INODE, "f", staged())
    full = namespace.make_directory(STAGING_INODE, "full")
    namespace.make_directory(full.inode, "below")
    empty = namespace.make_directory(STAGING_INODE, "empty")
    cases: list[tuple[type[StageFSError], Callable[[], object]]] = [
        (NameExists, lambda: namespace.make_directory(STAGING_INODE, "f")),
        (NotADirectory, lambda: namespace.lookup(file.inode, "x")),
        (NotADirectory, lambda: namespace.make_directory(file.inode, "x")),
        (NotADirectory, lambda: namespace.page(file.inode, 0, 10)),
        (NotFound, lambda: namespace.lookup(STAGING_INODE, "x")),
        (NotFound, lambda: namespace.node(Inode(999))),
        (NotFound, lambda: namespace.remove(STAGING_INODE, "x")),
        (IsADirectory, lambda: namespace.remove(STAGING_INODE, "empty")),
        (NotADirectory, lambda: namespace.remove_directory(STAGING_INODE, "f")),
        (NotEmpty, lambda: namespace.remove_directory(STAGING_INODE, "full")),
        (Busy, lambda: namespace.remove_directory(ROOT_INODE, "tasks")),
        (Busy, lambda: namespace.rename(ROOT_INODE, "tasks", ROOT_INODE, "jobs")),
        (Busy, lambda: namespace.remove_tree(ROOT_INODE, "staging")),
        (NotPermitted, lambda: namespace.link(full.inode, TASKS_INODE, "x")),
        (NotADirectory, lambda: namespace.link_directory(file.inode, TASKS_INODE, "x")),
        (InvalidName, lambda: namespace.link_directory(ROOT_INODE, TASKS_INODE, "x")),
        (InvalidName, lambda: namespace.rename(STAGING_INODE, "full", full.inode, "x")),
        (NotEmpty, lambda: namespace.rename(STAGING_INODE, "empty", STAGING_INODE, "full")),
        (IsADirectory, lambda: namespace.rename(STAGING_INODE, "f", STAGING_INODE, "empty")),
        (NotADirectory, lambda: namespace.rename(STAGING_INODE, "empty", STAGING_INODE, "f")),
        (
            NameExists,
            lambda: namespace.rename(
                STAGING_INODE, "f", STAGING_INODE, "empty", RenameFlags.NOREPLACE
            ),
        ),
        (
            NotFound,
            lambda: namespace.rename(STAGING_INODE, "f", empty.inode, "x", RenameFlags.EXCHANGE),
        ),
        (InvalidName, lambda: namespace.rename(STAGING_INODE, "f", empty.inode, "x", 4)),
        (NotFound, lambda: namespace.replace(STAGING_INODE, "x", staged())),
        (IsADirectory, lambda: namespace.replace(STAGING_INODE, "full", staged())),
        (InvalidName, lambda: namespace.make_symlink(STAGING_INODE, "s", "")),
    ]
    before = namespace.statistics()
    for expected, attempt in cases:
        with pytest.raises(expected):
            attempt()
    assert namespace.statistics() == before, "something that failed left a change"


def test_nothing_can_be_made_in_a_removed_directory(namespace: Namespace) -> None:
    directory = namespace.make_directory(TASKS_INODE, "t")
    namespace.remove_directory(TASKS_INODE, "t")
    with pytest.raises(NotFound):
        namespace.make_directory(directory.inode, "x")
    assert namespace.page(directory.inode, 0, 10) == []


def test_rename_replaces_and_keeps_other_links(namespace: Namespace) -> None:
    new = namespace.register(STAGING_INODE, "new", staged("new"))
    old = namespace.register(STAGING_INODE, "old", staged("old"))
    namespace.link(old.inode, TASKS_INODE, "kept")
    namespace.rename(STAGING_INODE, "new", STAGING_INODE, "old")
    assert listing(namespace, STAGING_INODE).keys() == {"old"}
    assert namespace.lookup(STAGING_INODE, "old").inode == new.inode
    assert namespace.lookup(TASKS_INODE, "kept").inode == old.inode
    assert namespace.node(old.inode).nlink == 1


def test_rename_between_two_names_of_one_file_leaves_both(namespace: Namespace) -> None:
    file = namespace.register(STAGING_INODE, "a", staged())
    namespace.link(file.inode, STAGING_INODE, "b")
    namespace.rename(STAGING_INODE, "a", STAGING_INODE, "b")
    assert listing(namespace, STAGING_INODE).keys() == {"a", "b"}


def test_exchange_of_a_file_and_a_directory(namespace: Namespace) -> None:
    file = namespace.register(STAGING_INODE, "f", staged())
    directory = namespace.make_directory(TASKS_INODE, "d")
    namespace.rename(STAGING_INODE, "f", TASKS_INODE, "d", RenameFlags.EXCHANGE)
    assert namespace.lookup(STAGING_INODE, "f").inode == directory.inode
    assert namespace.lookup(TASKS_INODE, "d").inode == file.inode
    assert namespace.node(STAGING_INODE).nlink == 3
    assert namespace.node(TASKS_INODE).nlink == 2


def test_a_directory_that_changes_while_it_is_listed(namespace: Namespace) -> None:
    directory = namespace.make_directory(STAGING_INODE, "d").inode
    old = [f"old{number}" for number in range(20)]
    namespace.register_many([(directory, name, staged(name)) for name in old])
    seen: list[str] = []
    after = 0
    for step in range(100):
        page = namespace.page(directory, after, 3)
        if not page:
            break
        after = page[-1][0]
        seen += [name for _cookie, name, _node in page]
        namespace.register(directory, f"new{step}", staged())
        namespace.remove(directory, seen[0] if step == 0 else f"new{step - 1}")
    assert [name for name in seen if name.startswith("old")] == old
    assert len(set(seen)) == len(seen)


def test_cookies_outlive_the_daemon(database: Path) -> None:
    namespace = Namespace.open(database)
    namespace.register_many([(STAGING_INODE, f"f{n}", staged(str(n))) for n in range(9)])
    first = namespace.page(STAGING_INODE, 0, 4)
    namespace.close()
    namespace = Namespace.open(database)
    rest = namespace.page(STAGING_INODE, first[-1][0], 100)
    assert [name for _, name, _ in first + rest] == [f"f{n}" for n in range(9)]
    assert all(0 < cookie < 1 << 62 for cookie, _, _ in first + rest)
    namespace.close()


def test_an_operation_is_known_once_it_took_effect(database: Path) -> None:
    namespace = Namespace.open(database)
    made = namespace.make_directory(TASKS_INODE, "t", operation=1 << 60)
    with pytest.raises(NameExists):
        namespace.make_directory(TASKS_INODE, "t", operation=2 << 60)
    namespace.remove_directory(TASKS_INODE, "t", operation=3 << 60)
    namespace.close()
    namespace = Namespace.open(database)
    assert namespace.applied(1 << 60) == made.inode
    assert namespace.applied(2 << 60) is None
    assert namespace.applied(3 << 60) == made.inode
    namespace.close()


def test_an_operation_cannot_take_effect_twice(namespace: Namespace) -> None:
    namespace.make_directory(TASKS_INODE, "a", operation=7)
    with pytest.raises(StageFSError):
        namespace.make_directory(TASKS_INODE, "b", operation=7)
    assert listing(namespace, TASKS_INODE).keys() == {"a"}


def test_old_operations_are_forgotten_and_recent_ones_not(namespace: Namespace) -> None:
    for number in range(1, 25_001):
        namespace.set_attributes(TASKS_INODE, mtime_ns=number, operation=number)
    assert namespace.applied(1) is None
    assert all(namespace.applied(number) for number in range(25_000 - 10_000, 25_001))


def test_a_large_tree_goes_in_steps(namespace: Namespace) -> None:
    kept = namespace.register(STAGING_INODE, "kept", staged())
    top = namespace.make_directory(STAGING_INODE, "top")
    for number in range(30):
        below = namespace.make_directory(top.inode, f"d{number}")
        namespace.register_many([(below.inode, f"f{n}", staged(str(n))) for n in range(200)])
        namespace.link(kept.inode, below.inode, "kept")
    before = namespace.statistics().changes
    namespace.remove_tree(STAGING_INODE, "top")
    assert namespace.statistics().changes == before + 1
    assert paths(namespace, STAGING_INODE) == ["kept"]
    steps = 1
    while namespace.purge():
        steps += 1
    assert steps > 1
    assert namespace.node(kept.inode).nlink == 1
    assert namespace.statistics().files == 1
    while namespace.drop_unlinked():
        pass
    with pytest.raises(NotFound):
        namespace.node(top.inode)


def test_statistics_follow_every_change(namespace: Namespace) -> None:
    file = namespace.register(STAGING_INODE, "f", staged(size_bytes=10))
    namespace.link(file.inode, TASKS_INODE, "f")
    namespace.make_symlink(TASKS_INODE, "s", "target")
    namespace.replace(STAGING_INODE, "f", staged(size_bytes=5, version="v2"))
    counts = namespace.statistics()
    assert (counts.directories, counts.files, counts.symlinks) == (4, 2, 1)
    assert counts.size_bytes == 15
    namespace.remove(TASKS_INODE, "f")
    assert namespace.statistics().size_bytes == 5


def test_paths_for_messages(namespace: Namespace) -> None:
    directory = namespace.make_directory(STAGING_INODE, "a")
    file = namespace.register(directory.inode, "b", staged())
    assert namespace.path(file.inode) == "/staging/a/b"
    assert namespace.parent(file.inode) == directory.inode
    assert namespace.parent(ROOT_INODE) == ROOT_INODE
    place = namespace.place(file.inode)
    assert place is not None
    assert namespace.page(directory.inode, place[1] - 1, 1)[0][1] == "b"


def test_known_names_are_bounded_and_stay_right(database: Path) -> None:
    namespace = Namespace.open(database, known_max=10)
    for number in range(50):
        namespace.register(STAGING_INODE, f"f{number}", staged(str(number)))
    for _ in range(2):
        for number in range(50):
            node = namespace.lookup(STAGING_INODE, f"f{number}")
            assert node.object_id == ObjectId(f"https://host/{number}", "v1")
    namespace.close()


def test_a_change_of_another_process_is_seen(namespace: Namespace, database: Path) -> None:
    namespace.register(STAGING_INODE, "f", staged())
    assert namespace.lookup(STAGING_INODE, "f").nlink == 1
    other = Namespace.open(database)
    other.replace(STAGING_INODE, "f", staged(version="v2"))
    other.close()
    namespace.make_directory(TASKS_INODE, "anything")
    found = namespace.lookup(STAGING_INODE, "f").object_id
    assert found is not None
    assert found.version == "v2"


def test_checkpoint_moves_the_log(namespace: Namespace, database: Path) -> None:
    namespace.register_many([(STAGING_INODE, f"f{n}", staged(str(n))) for n in range(2000)])
    size = database.stat().st_size
    assert namespace.checkpoint()
    assert database.stat().st_size > size


def test_attributes(namespace: Namespace) -> None:
    node = namespace.make_directory(TASKS_INODE, "t", 0o2750)
    assert node.mode == 0o2750
    changed = namespace.set_attributes(node.inode, mode=0o700, mtime_ns=-5)
    assert (changed.mode, changed.mtime_ns) == (0o700, -5)
    assert changed.ctime_ns >= node.ctime_ns
    link = namespace.make_symlink(TASKS_INODE, "s", "../x\udcff")
    assert (link.target, link.size_bytes) == ("../x\udcff", 5)


def test_what_another_process_changes_between_two_changes_is_seen(
    namespace: Namespace, database: Path
) -> None:
    """Sequence numbers, counts of links and times are remembered only as long as they are right."""
    top = namespace.make_directory(TASKS_INODE, "top").inode
    file = namespace.register(top, "f", staged())
    other = Namespace.open(database)
    for number in range(3):
        namespace.make_directory(top, f"mine{number}", operation=2 * number + 1)
        other.make_directory(top, f"others{number}", operation=2 * number + 2)
        other.rename(top, "f", top, "g")
        other.link(file.inode, TASKS_INODE, f"link{number}")
        assert namespace.rename(top, "g", top, "f").nlink == 2 + number
        node = namespace.make_symlink(top, f"symlink{number}", "x")
        directory = namespace.node(top)
        assert directory.nlink == 2 + 2 * (number + 1)
        assert directory.mtime_ns == directory.ctime_ns == node.ctime_ns
    other.refresh()
    assert other.node(top) == directory
    other.link_directory(top, STAGING_INODE, "shown")
    namespace.make_directory(top, "last")
    assert "last" in listing(namespace, namespace.resolve("staging/shown").inode)
    other.close()
