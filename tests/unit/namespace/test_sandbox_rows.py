"""Directories that are sandboxes, and commits that show everything at once."""

from pathlib import Path

import msgspec
import pytest

from stagefs.errors import (
    IsADirectory,
    NameExists,
    NotADirectory,
    NotFound,
    NotPermitted,
    StageFSError,
    StateFailed,
)
from stagefs.model import ROOT_INODE, Inode
from stagefs.namespace.node import (
    STAGING_INODE,
    TASKS_INODE,
    TEMPLATES_INODE,
    ContentKind,
    Node,
    SandboxRow,
)
from stagefs.namespace.store import Namespace
from tests.unit.namespace.trees import listing, staged

ACTIVE = SandboxRow(state="active", on_write="copy-up", lifetime="task", manifest='{"in": []}')


@pytest.fixture
def task(namespace: Namespace) -> Node:
    return namespace.make_directory(TASKS_INODE, "t", sandbox=ACTIVE, operation=1)


def test_a_directory_made_as_a_sandbox(namespace: Namespace, task: Node, database: Path) -> None:
    row = namespace.sandbox(task.inode)
    assert row is not None
    assert row == msgspec.structs.replace(
        ACTIVE, inode=task.inode, created_ns=task.ctime_ns, changed_ns=task.ctime_ns
    )
    assert namespace.sandboxes() == [row]
    other = Namespace.open(database)
    assert other.sandboxes() == [row]
    other.close()
    assert namespace.sandbox(TASKS_INODE) is None


def test_a_sandbox_changes(namespace: Namespace, task: Node) -> None:
    before = namespace.sandbox(task.inode)
    assert before is not None
    wanted = msgspec.structs.replace(
        before, state="failed", on_write="shared", record=True, persistent=True, created_ns=0
    )
    row = namespace.put_sandbox(wanted, operation=2)
    assert row == namespace.sandbox(task.inode) == namespace.sandbox_of(task.inode)
    assert (row.state, row.on_write, row.record, row.persistent) == ("failed", "shared", True, True)
    assert row.created_ns == before.created_ns
    assert row.changed_ns > before.changed_ns
    assert namespace.applied(2) == task.inode


def test_what_can_be_no_sandbox(namespace: Namespace, task: Node) -> None:
    file = namespace.create_file(TASKS_INODE, "f", 0o644)
    gone = namespace.make_directory(TASKS_INODE, "gone")
    namespace.remove_directory(TASKS_INODE, "gone")
    for inode, error in (
        (file.inode, NotADirectory),
        (gone.inode, NotFound),
        (Inode(99), NotFound),
    ):
        with pytest.raises(error):
            namespace.put_sandbox(msgspec.structs.replace(ACTIVE, inode=inode))
    assert [row.inode for row in namespace.sandboxes()] == [task.inode]


def test_thousands_from_one_template_are_one_change(namespace: Namespace) -> None:
    template = namespace.make_directory(TEMPLATES_INODE, "t")
    before = namespace.statistics().changes
    names = [f"s{number}" for number in range(1000)]
    made = namespace.instantiate_template(template.inode, TASKS_INODE, names, sandbox=ACTIVE)
    assert namespace.statistics().changes == before + 1
    assert [row.inode for row in namespace.sandboxes()] == [node.inode for node in made]
    row = namespace.sandbox_of(made[999].inode)
    assert row is not None
    assert (row.inode, row.state) == (made[999].inode, "active")


@pytest.mark.parametrize("how", ["rmdir", "remove_tree", "replaced"])
def test_a_removed_directory_is_no_sandbox(namespace: Namespace, task: Node, how: str) -> None:
    assert namespace.sandbox_of(task.inode) is not None
    if how == "rmdir":
        namespace.remove_directory(TASKS_INODE, "t")
    elif how == "remove_tree":
        namespace.create_file(task.inode, "f", 0o644)
        namespace.remove_tree(TASKS_INODE, "t")
    else:
        namespace.make_directory(TASKS_INODE, "new")
        namespace.rename(TASKS_INODE, "new", TASKS_INODE, "t")
    assert namespace.sandbox(task.inode) is None
    assert namespace.sandboxes() == []
    assert namespace.sandbox_of(task.inode) is None


def test_sandboxes_below_a_removed_directory_go_too(namespace: Namespace) -> None:
    top = namespace.make_directory(ROOT_INODE, "pilot")
    for number in range(3):
        namespace.make_directory(top.inode, f"t{number}", sandbox=ACTIVE)
    namespace.remove_tree(ROOT_INODE, "pilot")
    while namespace.purge():
        pass
    assert namespace.sandboxes() == []


# In which sandbox a directory lies


def sandbox_inode(namespace: Namespace, directory: Inode) -> Inode | None:
    """As remembered; and asked anew, it is the same."""
    row = namespace.sandbox_of(directory)
    namespace.refresh()
    assert namespace.sandbox_of(directory) == row
    return None if row is None else row.inode


def test_the_innermost_sandbox_counts(namespace: Namespace, task: Node) -> None:
    below = namespace.make_directory(task.inode, "a").inode
    deep = namespace.make_directory(below, "b").inode
    assert sandbox_inode(namespace, deep) == task.inode
    assert sandbox_inode(namespace, TASKS_INODE) is None
    assert sandbox_inode(namespace, ROOT_INODE) is None
    namespace.put_sandbox(msgspec.structs.replace(ACTIVE, inode=below))
    assert sandbox_inode(namespace, deep) == below
    assert sandbox_inode(namespace, task.inode) == task.inode
    namespace.remove_directory(below, "b")
    namespace.remove_directory(task.inode, "a")
    assert namespace.sandbox_of(task.inode) is not None


def test_it_follows_what_moves(namespace: Namespace, task: Node) -> None:
    other = namespace.make_directory(TASKS_INODE, "o", sandbox=ACTIVE)
    moved = namespace.make_directory(task.inode, "d").inode
    deep = namespace.make_directory(moved, "e").inode
    assert namespace.sandbox_of(deep) == namespace.sandbox(task.inode)
    namespace.rename(task.inode, "d", other.inode, "d")
    assert namespace.sandbox_of(deep) == namespace.sandbox(other.inode)
    namespace.rename(other.inode, "d", STAGING_INODE, "d")
    assert namespace.sandbox_of(deep) is None
    namespace.make_directory(task.inode, "d")
    namespace.rename(STAGING_INODE, "d", task.inode, "d", 2)
    assert sandbox_inode(namespace, deep) == task.inode


# Commits


@pytest.fixture
def outputs(namespace: Namespace, task: Node) -> list[Inode]:
    return [namespace.create_file(task.inode, name, 0o644).inode for name in ("a", "b")]


def test_a_commit_shows_everything_at_once(
    namespace: Namespace, task: Node, outputs: list[Inode]
) -> None:
    runs = namespace.make_directory(STAGING_INODE, "runs").inode
    changes = namespace.statistics().changes
    row = namespace.commit_sandbox(
        task.inode,
        "c1",
        '{"outputs": 2}',
        state="committed",
        publish=outputs,
        links=[(runs, "a", outputs[0]), (runs, "b", outputs[1])],
        operation=9,
    )
    assert (row.inode, row.state) == (task.inode, "committed")
    assert row == namespace.sandbox_of(task.inode)
    assert namespace.statistics().changes == changes + 1
    assert namespace.applied(9) == task.inode
    found = listing(namespace, runs)
    assert [found[name].inode for name in ("a", "b")] == outputs
    assert {(node.content, node.nlink) for node in found.values()} == {(ContentKind.PUBLISHED, 2)}
    commit = namespace.commit_record("c1")
    assert commit is not None
    assert (commit.id, commit.sandbox, commit.record) == ("c1", "/tasks/t", '{"outputs": 2}')
    assert commit.time_ns == row.changed_ns
    namespace.commit_sandbox(task.inode, "c0", "{}", state="committed")
    assert [commit.id for commit in namespace.commits("/tasks/t")] == ["c1", "c0"]
    assert [commit.id for commit in namespace.commits()] == ["c1", "c0"]
    assert namespace.commits("/tasks/other") == []
    assert namespace.commit_record("absent") is None
    namespace.remove_tree(TASKS_INODE, "t")
    assert len(namespace.commits("/tasks/t")) == 2


def test_a_commit_replaces_only_when_told(
    namespace: Namespace, task: Node, outputs: list[Inode]
) -> None:
    old = namespace.register(STAGING_INODE, "a", staged())
    link = [(STAGING_INODE, "a", outputs[0])]
    with pytest.raises(NameExists, match="--overwrite"):
        namespace.commit_sandbox(task.inode, "c", "{}", state="committed", links=link)
    namespace.commit_sandbox(task.inode, "c", "{}", state="committed", links=link, replace=True)
    assert namespace.lookup(STAGING_INODE, "a").inode == outputs[0]
    assert namespace.node(old.inode).nlink == 0
    namespace.commit_sandbox(task.inode, "again", "{}", state="committed", links=link, replace=True)
    assert namespace.node(outputs[0]).nlink == 2


@pytest.mark.parametrize("wrong", ["there", "directory", "id", "gone", "output", "parent", "plain"])
def test_a_commit_that_fails_changes_nothing(
    namespace: Namespace, task: Node, outputs: list[Inode], wrong: str
) -> None:
    namespace.register(STAGING_INODE, "there", staged())
    directory = namespace.make_directory(STAGING_INODE, "directory").inode
    gone = namespace.create_file(task.inode, "gone", 0o644).inode
    namespace.remove(task.inode, "gone")
    namespace.commit_sandbox(task.inode, "used", "{}", state="active")
    expected: dict[str, tuple[type[StageFSError], tuple[Inode, str, Inode]]] = {
        "there": (NameExists, (STAGING_INODE, "there", outputs[1])),
        "directory": (IsADirectory, (STAGING_INODE, "directory", outputs[1])),
        "id": (NameExists, (STAGING_INODE, "b", outputs[1])),
        "gone": (NotFound, (STAGING_INODE, "b", gone)),
        "output": (NotPermitted, (STAGING_INODE, "b", directory)),
        "parent": (NotADirectory, (outputs[0], "b", outputs[1])),
        "plain": (NotFound, (STAGING_INODE, "b", outputs[1])),
    }
    error, link = expected[wrong]
    before = namespace.statistics()
    with pytest.raises(error):
        namespace.commit_sandbox(
            directory if wrong == "plain" else task.inode,
            "used" if wrong == "id" else "new",
            "{}",
            state="committed",
            publish=outputs,
            links=[(STAGING_INODE, "a", outputs[0]), link],
            operation=3,
        )
    namespace.refresh()
    assert namespace.statistics() == before
    assert sorted(listing(namespace, STAGING_INODE)) == ["directory", "there"]
    assert namespace.node(outputs[0]).content is ContentKind.PRIVATE
    assert namespace.commit_record("new") is None
    row = namespace.sandbox(task.inode)
    assert row is not None
    assert row.state == "active"
    assert namespace.applied(3) is None


def test_syncing_needs_the_disk(namespace: Namespace, database: Path) -> None:
    namespace.make_directory(TASKS_INODE, "t")
    namespace.sync()
    namespace.checkpoint()
    namespace.sync()
    aside = database.with_name("aside")
    log = database.with_name(database.name + "-wal")
    log.rename(aside)
    with pytest.raises(StateFailed, match="durable"):
        namespace.sync()
    aside.rename(log)
