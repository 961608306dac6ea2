"""What writable bindings owe their remotes, change by change."""

from pathlib import Path

import pytest

from stagefs.errors import CrossesMounts, InvalidUrl, NoOverwrite, NotPermitted
from stagefs.model import EntryKind, Inode, ListedEntry, ObjectInfo
from stagefs.namespace.check import problems
from stagefs.namespace.node import (
    STAGING_INODE,
    TASKS_INODE,
    Node,
    OutgoingState,
    RenameFlags,
    SandboxRow,
)
from stagefs.namespace.store import Namespace
from tests.unit.namespace.trees import staged

BASE = "ssh://host/out"


class Binding:
    """``staging/out``, and the few steps that tests take in it."""

    def __init__(self, namespace: Namespace, *, overwrites: bool, deletes: bool) -> None:
        self.namespace = namespace
        self.inode = namespace.bind(
            *(STAGING_INODE, "out", BASE, 30.0),
            writable=True,
            overwrites=overwrites,
            deletes=deletes,
        ).inode

    def closed(self, name: str, directory: Inode | None = None) -> Node:
        """A file that was written and closed."""
        made = self.namespace.create_file(directory or self.inode, name, 0o644)
        self.namespace.publish([made.inode])
        return self.namespace.node(made.inode)

    def listed(self, *names: str) -> None:
        """The remote has these files, and the directory ``d``."""
        entries = [
            ListedEntry(n, EntryKind.FILE, f"{BASE}/{n}", ObjectInfo(f"{BASE}/{n}", 5, "v", 7))
            for n in names
        ]
        entries.append(ListedEntry("d", EntryKind.DIRECTORY, f"{BASE}/d"))
        self.namespace.merge_listing(self.inode, entries, now_ns=1000)

    def due(self) -> list[tuple[str, str, Inode]]:
        return [
            (one.state.name, one.url.removeprefix(f"{BASE}/"), one.inode)
            for one in self.namespace.due_uploads(100)
        ]

    def sent(self, *, state: OutgoingState = OutgoingState.DONE) -> None:
        """The queue has all that is due, and says what became of it."""
        ids = [one.id for one in self.namespace.due_uploads(100)]
        assert self.namespace.begin_leaving(ids, "c") == ids
        self.namespace.has_left("c")
        self.namespace.settle_uploads([(number, state, None) for number in ids])

    def names(self) -> list[str]:
        return sorted(name for _, name, _ in self.namespace.page(self.inode, 0, 100))


@pytest.fixture
def binding(namespace: Namespace) -> Binding:
    return Binding(namespace, overwrites=False, deletes=False)


@pytest.fixture
def deleting(namespace: Namespace) -> Binding:
    return Binding(namespace, overwrites=True, deletes=True)


@pytest.fixture(autouse=True)
def stays_consistent(namespace: Namespace, database: Path) -> object:
    yield
    assert problems(database) == []


def test_what_is_published_is_due(binding: Binding) -> None:
    edits = binding.namespace.outgoing_edits
    open_one = binding.namespace.create_file(binding.inode, "open", 0o644)
    assert binding.due() == []
    closed = binding.closed("a")
    assert binding.due() == [("DUE", "a", closed.inode)]
    assert binding.namespace.outgoing_edits > edits
    binding.namespace.publish([open_one.inode])
    assert binding.due()[1:] == [("DUE", "open", open_one.inode)]


def test_directories_made_in_it_are_bound(binding: Binding) -> None:
    made = binding.namespace.make_directory(binding.inode, "x y")
    assert (made.bind_url, made.writable, made.bind_ttl_s) == (f"{BASE}/x%20y", True, 30.0)
    assert made.listed_ns > 0, "somebody would wait for a listing of it"
    closed = binding.closed("a", made.inode)
    assert binding.due() == [("DUE", "x%20y/a", closed.inode)]
    with pytest.raises(NotPermitted):
        binding.namespace.bind(made.inode, "other", "s3://b/x", 1.0)


def test_files_linked_and_moved_into_it(binding: Binding) -> None:
    namespace = binding.namespace
    published = binding.closed("p", STAGING_INODE)
    namespace.link(published.inode, binding.inode, "linked")
    private = namespace.create_file(TASKS_INODE, "t", 0o644)
    namespace.rename(TASKS_INODE, "t", binding.inode, "moved", publish=True)
    tree = namespace.make_directory(TASKS_INODE, "tree")
    below = namespace.create_file(tree.inode, "f", 0o644)
    namespace.rename(TASKS_INODE, "tree", binding.inode, "tree", publish=True)
    assert binding.due() == [
        ("DUE", "linked", published.inode),
        ("DUE", "moved", private.inode),
        ("DUE", "tree/f", below.inode),
    ]
    assert namespace.node(tree.inode).bind_url == f"{BASE}/tree"
    namespace.rename(binding.inode, "tree", TASKS_INODE, "tree")
    assert len(binding.due()) == 2, "it was taken back"
    moved = namespace.node(tree.inode)
    assert (moved.bind_url, moved.writable) == (None, False)


def test_virtual_links_are_not_uploaded(binding: Binding) -> None:
    object_ = binding.namespace.register(STAGING_INODE, "o", staged())
    binding.namespace.link(object_.inode, binding.inode, "o")
    assert binding.due() == []


def test_commits_into_it(binding: Binding) -> None:
    namespace = binding.namespace
    sandbox = namespace.make_directory(TASKS_INODE, "t")
    namespace.put_sandbox(SandboxRow(inode=sandbox.inode, state="active", on_write="copy-up"))
    file = namespace.create_file(sandbox.inode, "f", 0o644)
    namespace.commit_sandbox(
        *(sandbox.inode, "id", "{}"),
        state="committed",
        publish=[file.inode],
        links=[(binding.inode, "f", file.inode)],
    )
    assert binding.due() == [("DUE", "f", file.inode)]


def test_until_it_left_it_can_be_taken_back(binding: Binding) -> None:
    namespace = binding.namespace
    first = binding.closed("a")
    namespace.rename(binding.inode, "a", binding.inode, "b")
    assert binding.due() == [("DUE", "b", first.inode)]
    copied = namespace.copy_up(binding.inode, "b", first.inode, live=first)
    assert binding.due() == []
    namespace.publish([copied.inode])
    assert binding.due() == [("DUE", "b", copied.inode)]
    namespace.remove(binding.inode, "b")
    assert binding.due() == []
    binding.listed()
    assert binding.names() == ["d"], "nothing is hidden: the remote never had it"


def test_what_left_takes_its_way(binding: Binding) -> None:
    namespace = binding.namespace
    file = binding.closed("a")
    assert not namespace.is_at_remote(binding.inode, "a")
    (due,) = namespace.due_uploads(10)
    assert namespace.begin_leaving([due.id], "c") == [due.id]
    assert namespace.begin_leaving([due.id], "again") == []
    assert namespace.is_at_remote(binding.inode, "a")
    namespace.remove(binding.inode, "a")
    assert binding.due() == [("LEAVING", "a", file.inode)]
    assert namespace.unlinked_content(10) == [], "the queue does not have its content yet"
    assert namespace.drop_unlinked() == []
    namespace.has_left("c")
    assert namespace.unlinked_content(10) == [file.inode]
    binding.listed("a")
    assert binding.names() == ["d"], "a removed name came back"
    assert namespace.drop_unlinked() == [file.inode]
    assert namespace.uploads_of(file.inode) == []


def test_a_queue_that_never_heard_of_it(binding: Binding, database: Path) -> None:
    file = binding.closed("a")
    (due,) = binding.namespace.due_uploads(10)
    binding.namespace.begin_leaving([due.id], "c")
    again = Namespace.open(database)
    assert [one.commit for one in again.due_uploads(10)] == ["c"]
    again.still_due("c")
    assert [(one.state, one.commit) for one in again.due_uploads(10)] == [(OutgoingState.DUE, None)]
    again.close()
    binding.namespace.refresh()
    assert binding.due() == [("DUE", "a", file.inode)]


def test_what_the_queue_says_is_kept(binding: Binding) -> None:
    namespace = binding.namespace
    file = binding.closed("a")
    (due,) = namespace.due_uploads(10)
    namespace.begin_leaving([due.id], "c")
    # It may be faster than we are.
    namespace.settle_uploads([(due.id, OutgoingState.FAILED, "No.")])
    namespace.has_left("c")
    (upload,) = namespace.uploads_of(file.inode)
    assert (upload.state, upload.reason) == (OutgoingState.FAILED, "No.")
    assert [one.id for one in namespace.open_uploads(10)] == [due.id]
    namespace.settle_uploads([(due.id, OutgoingState.DONE, None)])
    assert namespace.open_uploads(10) == []


def test_nothing_at_the_remote_is_replaced(binding: Binding) -> None:
    namespace = binding.namespace
    binding.listed("theirs")
    binding.closed("mine")
    binding.sent()
    new = binding.closed("n", STAGING_INODE)
    for name in ("theirs", "mine"):
        assert namespace.is_at_remote(binding.inode, name)
        for flags in (0, RenameFlags.EXCHANGE):
            with pytest.raises(NoOverwrite, match="bound without --overwrite"):
                namespace.rename(STAGING_INODE, "n", binding.inode, name, flags)
    assert namespace.lookup(STAGING_INODE, "n").inode == new.inode
    assert binding.due() == []


def test_a_failed_upload_may_be_replaced(binding: Binding) -> None:
    binding.closed("mine")
    binding.sent(state=OutgoingState.FAILED)
    new = binding.closed("n", STAGING_INODE)
    binding.namespace.rename(STAGING_INODE, "n", binding.inode, "mine")
    assert binding.due() == [("DUE", "mine", new.inode)]


def test_with_overwriting_all_is_replaced(deleting: Binding) -> None:
    namespace = deleting.namespace
    deleting.listed("theirs")
    new = deleting.closed("n", STAGING_INODE)
    namespace.rename(STAGING_INODE, "n", deleting.inode, "theirs")
    (due,) = namespace.due_uploads(10)
    assert (due.inode, due.overwrite) == (new.inode, True)


def test_removals_are_due_where_that_was_asked_for(deleting: Binding) -> None:
    namespace = deleting.namespace
    deleting.listed("theirs", "moved")
    for name in ("mine", "old"):
        deleting.closed(name)
    deleting.sent()
    for name in ("theirs", "mine"):
        namespace.remove(deleting.inode, name)
    old = namespace.rename(deleting.inode, "old", deleting.inode, "new")
    namespace.rename(deleting.inode, "moved", deleting.inode, "elsewhere")
    deleting.closed("never sent")
    namespace.remove(deleting.inode, "never sent")
    assert deleting.due() == [
        ("DUE", "theirs", 0),
        ("DUE", "mine", 0),
        ("DUE", "old", 0),
        ("DUE", "new", old.inode),
    ]
    # Moved back, it is uploaded again: the removal comes first.
    namespace.rename(deleting.inode, "new", deleting.inode, "old")
    assert deleting.due()[2:] == [("DUE", "old", 0), ("DUE", "old", old.inode)]
    deleting.sent()
    assert deleting.due() == []


def test_removals_are_not_due_elsewhere(binding: Binding) -> None:
    binding.listed("theirs")
    binding.closed("mine")
    binding.sent()
    for name in ("theirs", "mine"):
        binding.namespace.remove(binding.inode, name)
    binding.namespace.remove_tree(STAGING_INODE, "out")
    assert binding.due() == []


def test_directories_that_the_remote_has_are_not_renamed(binding: Binding) -> None:
    namespace = binding.namespace
    binding.listed()
    made = namespace.make_directory(binding.inode, "made")
    other = namespace.make_directory(TASKS_INODE, "t")
    namespace.link_directory(binding.inode, other.inode, "overlay")
    for parent, name, new_parent in (
        (binding.inode, "d", binding.inode),
        (binding.inode, "d", TASKS_INODE),
        (TASKS_INODE, "t", binding.inode),
    ):
        with pytest.raises(CrossesMounts):
            namespace.rename(parent, name, new_parent, "new")
    with pytest.raises(CrossesMounts):
        namespace.rename(binding.inode, "made", binding.inode, "d", RenameFlags.EXCHANGE)
    namespace.rename(binding.inode, "made", binding.inode, "new")
    assert namespace.node(made.inode).bind_url == f"{BASE}/new"
    # The binding itself may move: it stays bound.
    namespace.rename(STAGING_INODE, "out", TASKS_INODE, "out")
    assert namespace.node(binding.inode).writable


def test_a_removed_directory_stays_hidden(binding: Binding) -> None:
    namespace = binding.namespace
    made = namespace.make_directory(binding.inode, "d")
    binding.closed("a", made.inode)
    binding.sent()
    namespace.remove(made.inode, "a")
    namespace.remove_directory(binding.inode, "d")
    namespace.drop_unlinked()
    binding.listed()
    assert binding.names() == []


def test_a_listing_changes_nothing_of_ours(binding: Binding) -> None:
    file = binding.closed("a")
    binding.sent()
    for validator in ("v1", "v2"):
        info = ObjectInfo(f"{BASE}/a", 5, validator, 7)
        entries = [ListedEntry("a", EntryKind.FILE, f"{BASE}/a", info)]
        assert binding.namespace.merge_listing(binding.inode, entries, now_ns=1) == []
    assert binding.namespace.merge_listing(binding.inode, [], now_ns=2) == []
    assert binding.namespace.lookup(binding.inode, "a") == binding.namespace.node(file.inode)


def test_names_that_no_url_can_spell_are_refused(namespace: Namespace) -> None:
    bound = namespace.bind(STAGING_INODE, "s3", "s3://b/k", 1.0, writable=True)
    for name in ("line\nbreak", "latin-\udce9"):
        with pytest.raises(InvalidUrl):
            namespace.create_file(bound.inode, name, 0o644)
        with pytest.raises(InvalidUrl):
            namespace.make_directory(bound.inode, name)
    assert namespace.page(bound.inode, 0, 10) == []
