"""Local files, private copies, publishing, special files and attributes."""

import stat
from pathlib import Path

import msgspec
import pytest

from stagefs.errors import (
    IsADirectory,
    NameExists,
    NoAttribute,
    NotFound,
    NotPermitted,
    ReadOnly,
)
from stagefs.model import EntryKind, Inode, ListedEntry, ObjectInfo
from stagefs.namespace import versions
from stagefs.namespace.node import (
    STAGING_INODE,
    TASKS_INODE,
    TEMPLATES_INODE,
    ContentKind,
    Node,
    NodeKind,
    RenameFlags,
)
from stagefs.namespace.store import Namespace
from tests.unit.namespace.trees import listing, staged


def again(namespace: Namespace, inode: Inode) -> Node:
    """The node as the file has it, not as it is remembered."""
    namespace.refresh()
    return namespace.node(inode)


def test_a_new_file_is_empty_private_and_its_makers(namespace: Namespace) -> None:
    made = namespace.create_file(TASKS_INODE, "f", 0o100640, uid=7, gid=8, operation=3)
    assert made == again(namespace, made.inode) == namespace.lookup(TASKS_INODE, "f")
    assert (made.kind, made.content) == (NodeKind.FILE, ContentKind.PRIVATE)
    assert (made.mode, made.uid, made.gid, made.nlink) == (0o640, 7, 8, 1)
    assert (made.size_bytes, made.base_bytes, made.lower, made.object_id) == (0, 0, 0, None)
    assert made.mtime_ns == made.ctime_ns > 0
    assert namespace.applied(3) == made.inode
    assert namespace.node(TASKS_INODE).mtime_ns == made.mtime_ns
    with pytest.raises(NameExists):
        namespace.create_file(TASKS_INODE, "f", 0o600)


def test_objects_belong_to_whoever_mounted(namespace: Namespace) -> None:
    node = namespace.register(STAGING_INODE, "f", staged())
    assert (node.uid, node.gid, node.atime_ns, node.content) == (-1, -1, 0, ContentKind.OBJECT)


def test_owners_of_directories_and_symlinks(namespace: Namespace) -> None:
    directory = namespace.make_directory(TASKS_INODE, "d", uid=5, gid=6)
    symlink = namespace.make_symlink(directory.inode, "s", "to/é", uid=5, gid=6)
    shown = namespace.link_directory(directory.inode, STAGING_INODE, "shown")
    for node in (directory, symlink, shown):
        assert (again(namespace, node.inode).uid, node.gid) == (5, 6)
    assert symlink.target == "to/é"
    assert symlink.size_bytes == 5


def test_a_bound_directory_takes_new_files_when_it_is_writable(namespace: Namespace) -> None:
    readable = namespace.bind(STAGING_INODE, "r", "s3://bucket/r", 60.0)
    writable = namespace.bind(STAGING_INODE, "w", "s3://bucket/w", 60.0, writable=True)
    assert (readable.writable, writable.writable) == (False, True)
    with pytest.raises(ReadOnly, match="--writable"):
        namespace.create_file(readable.inode, "f", 0o644)
    namespace.create_file(writable.inode, "f", 0o644)
    found = [ListedEntry("sub", EntryKind.DIRECTORY, "s3://bucket/w/sub")]
    namespace.merge_listing(writable.inode, found, now_ns=1)
    assert namespace.lookup(writable.inode, "sub").writable
    below = namespace.make_directory(readable.inode, "made here")
    namespace.create_file(below.inode, "f", 0o644)


@pytest.mark.parametrize(
    "kind",
    [NodeKind.FIFO, NodeKind.SOCKET, NodeKind.CHARACTER_DEVICE, NodeKind.BLOCK_DEVICE],
)
def test_special_files(namespace: Namespace, kind: NodeKind) -> None:
    made = namespace.make_special(TASKS_INODE, "x", kind, 0o4600, rdev=0x0103, uid=1, gid=2)
    found = again(namespace, made.inode)
    assert (found.kind, found.mode, found.rdev, found.uid, found.gid) == (kind, 0o4600, 0x103, 1, 2)
    assert namespace.statistics().specials == 1
    namespace.link(made.inode, STAGING_INODE, "y", publish=True)
    namespace.remove(TASKS_INODE, "x")
    assert listing(namespace, STAGING_INODE)["y"].nlink == 1
    namespace.remove(STAGING_INODE, "y")
    assert namespace.statistics().specials == 0


# Private copies


def test_a_copy_of_an_object_shows_the_object(namespace: Namespace) -> None:
    shared = namespace.register(
        STAGING_INODE, "f", staged("big", size_bytes=100, validator="etag:1")
    )
    namespace.set_attributes(shared.inode, mode=0o755, uid=3, atime_ns=11)
    shared = namespace.node(shared.inode)
    namespace.link(shared.inode, TASKS_INODE, "a")
    namespace.link(shared.inode, TASKS_INODE, "b")
    directory = namespace.node(TASKS_INODE)
    copied = namespace.copy_up(TASKS_INODE, "a", shared.inode, operation=9)
    assert copied == again(namespace, copied.inode) == namespace.lookup(TASKS_INODE, "a")
    assert copied.inode != shared.inode == namespace.lookup(TASKS_INODE, "b").inode
    assert copied == msgspec.structs.replace(
        shared,
        inode=copied.inode,
        ctime_ns=copied.ctime_ns,
        nlink=1,
        content=ContentKind.PRIVATE,
        base_bytes=100,
    )
    assert namespace.node(shared.inode).nlink == 2
    assert namespace.node(TASKS_INODE) == directory, "the directory was changed"
    assert namespace.applied(9) == copied.inode
    assert shared.object_id is not None
    found = namespace.find_object(shared.object_id.url, shared.object_id.version)
    assert found is not None
    assert found.inode == shared.inode, "the copy was taken for the object"


def test_a_copy_without_content_is_of_nothing(namespace: Namespace) -> None:
    shared = namespace.register(STAGING_INODE, "f", staged(size_bytes=100, validator="v"))
    namespace.link(shared.inode, TASKS_INODE, "a")
    copied = namespace.copy_up(TASKS_INODE, "a", shared.inode, keep_content=False)
    assert (copied.size_bytes, copied.base_bytes, copied.object_id) == (0, 0, None)
    assert (copied.validator, copied.lower, copied.mode) == (None, 0, shared.mode)
    assert copied.mtime_ns == shared.mtime_ns


def test_a_copy_of_a_published_file_keeps_that_one(namespace: Namespace) -> None:
    shared = namespace.create_file(TASKS_INODE, "out", 0o644)
    namespace.rename(TASKS_INODE, "out", STAGING_INODE, "out", publish=True)
    namespace.link(shared.inode, TASKS_INODE, "in")
    live = msgspec.structs.replace(
        namespace.node(shared.inode), size_bytes=5000, mtime_ns=77, atime_ns=78, ctime_ns=79
    )
    copied = namespace.copy_up(TASKS_INODE, "in", shared.inode, live=live)
    assert (copied.content, copied.lower) == (ContentKind.PRIVATE, shared.inode)
    assert (copied.size_bytes, copied.base_bytes) == (5000, 5000)
    assert (copied.mtime_ns, copied.atime_ns, copied.ctime_ns) == (77, 78, 79)
    namespace.remove(STAGING_INODE, "out")
    assert namespace.unlinked_content(10) == []
    assert namespace.drop_unlinked() == []
    namespace.remove(TASKS_INODE, "in")
    assert namespace.unlinked_content(10) == [copied.inode]
    before = namespace.unlinked_edits
    assert namespace.drop_unlinked([copied.inode, shared.inode]) == [copied.inode, shared.inode]
    assert namespace.unlinked_edits > before


def test_a_copy_in_a_sandbox_of_a_template(namespace: Namespace) -> None:
    shared = namespace.register(STAGING_INODE, "f", staged())
    template = namespace.make_directory(TEMPLATES_INODE, "t")
    namespace.link(shared.inode, template.inode, "in")
    one, two = namespace.instantiate_template(template.inode, TASKS_INODE, ["1", "2"])
    assert namespace.node(shared.inode).nlink == 4
    copied = namespace.copy_up(one.inode, "in", shared.inode)
    assert namespace.node(shared.inode).nlink == 3
    assert namespace.lookup(one.inode, "in") == copied
    assert namespace.lookup(two.inode, "in").inode == shared.inode
    with pytest.raises(ReadOnly):
        namespace.copy_up(template.inode, "in", shared.inode)


def test_a_copy_in_a_linked_directory_stays_there(namespace: Namespace) -> None:
    data = namespace.make_directory(STAGING_INODE, "data")
    below = namespace.make_directory(data.inode, "sub")
    shared = namespace.register(below.inode, "f", staged())
    linked = namespace.link_directory(data.inode, TASKS_INODE, "l")
    place = namespace.lookup(linked.inode, "sub").inode
    namespace.copy_up(place, "f", shared.inode)
    assert namespace.lookup(below.inode, "f").inode == shared.inode
    assert namespace.node(shared.inode).nlink == 1
    namespace.remove_tree(data.inode, "sub")
    assert list(listing(namespace, place)) == ["f"]


def test_a_copy_in_a_binding_stays_when_it_is_listed_again(namespace: Namespace) -> None:
    url = "s3://bucket/k"
    bound = namespace.bind(STAGING_INODE, "bound", url, 60.0, writable=True).inode

    def listed_again(now_ns: int) -> None:
        told = ObjectInfo(f"{url}/f", 3, f"etag:{now_ns}")
        entries = [ListedEntry("f", EntryKind.FILE, told.url, told)]
        namespace.merge_listing(bound, entries, now_ns=now_ns)

    listed_again(1)
    copied = namespace.copy_up(bound, "f", namespace.lookup(bound, "f").inode)
    listed_again(2)
    assert namespace.lookup(bound, "f") == copied
    namespace.remove(bound, "f")
    listed_again(3)
    assert listing(namespace, bound) == {}, "removing the copy did not hide the remote's file"


def test_what_cannot_be_copied_up(namespace: Namespace) -> None:
    shared = namespace.register(STAGING_INODE, "f", staged())
    namespace.register(STAGING_INODE, "g", staged("g"))
    private = namespace.create_file(TASKS_INODE, "p", 0o600)
    symlink = namespace.make_symlink(TASKS_INODE, "s", "f")
    directory = namespace.make_directory(TASKS_INODE, "d")
    before = namespace.statistics()
    with pytest.raises(NotFound, match="another file"):
        namespace.copy_up(STAGING_INODE, "g", shared.inode)
    with pytest.raises(NotFound):
        namespace.copy_up(STAGING_INODE, "absent", shared.inode)
    with pytest.raises(NotPermitted):
        namespace.copy_up(TASKS_INODE, "p", private.inode)
    with pytest.raises(NotPermitted):
        namespace.copy_up(TASKS_INODE, "s", symlink.inode)
    with pytest.raises(IsADirectory):
        namespace.copy_up(TASKS_INODE, "d", directory.inode)
    assert namespace.statistics() == before


def test_a_copy_for_all_is_followed_by_the_other_names(namespace: Namespace) -> None:
    shared = namespace.create_file(STAGING_INODE, "f", 0o644)
    namespace.publish([shared.inode])
    for name in ("a", "b"):
        namespace.link(shared.inode, TASKS_INODE, name)
    copied = namespace.copy_up(TASKS_INODE, "a", shared.inode, for_all=True)
    assert again(namespace, shared.inode).successor == copied.inode
    for directory, name in ((STAGING_INODE, "f"), (TASKS_INODE, "a"), (TASKS_INODE, "b")):
        assert namespace.lookup(directory, name).inode == copied.inode
    assert (namespace.node(copied.inode).nlink, namespace.node(shared.inode).nlink) == (3, 0)
    # Whose name goes does not take the new version along.
    namespace.remove(TASKS_INODE, "a")
    assert namespace.drop_unlinked() == []


def test_names_too_many_to_follow_at_once_do_when_they_are_looked_up(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "FOLLOWING_AT_ONCE_MAX", 1)
    shared = namespace.create_file(STAGING_INODE, "f", 0o644)
    namespace.publish([shared.inode])
    for name in ("a", "b"):
        namespace.link(shared.inode, TASKS_INODE, name)
    copied = namespace.copy_up(TASKS_INODE, "a", shared.inode, for_all=True)
    assert namespace.lookup(STAGING_INODE, "f").inode == copied.inode
    assert namespace.lookup(TASKS_INODE, "b").inode == shared.inode
    assert namespace.rebind_name(TASKS_INODE, "b", copied.inode).inode == copied.inode
    assert (namespace.node(copied.inode).nlink, namespace.node(shared.inode).nlink) == (3, 0)


@pytest.mark.parametrize("dropped", [False, True])
def test_names_do_not_follow_to_a_copy_that_is_gone(
    namespace: Namespace, dropped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "FOLLOWING_AT_ONCE_MAX", 0)
    shared = namespace.create_file(TASKS_INODE, "f", 0o644)
    namespace.publish([shared.inode])
    namespace.link(shared.inode, TASKS_INODE, "a")
    copied = namespace.copy_up(TASKS_INODE, "a", shared.inode, for_all=True)
    namespace.remove(TASKS_INODE, "a")
    if dropped:
        assert namespace.drop_unlinked() == [copied.inode]
    node = namespace.rebind_name(TASKS_INODE, "f", copied.inode)
    assert (node.inode, node.successor, node.nlink) == (shared.inode, 0, 1)
    assert namespace.newest(shared.inode) == node


# Publishing


def test_a_link_publishes(namespace: Namespace) -> None:
    made = namespace.create_file(TASKS_INODE, "f", 0o644)
    namespace.link(made.inode, TASKS_INODE, "g")
    assert namespace.node(made.inode).content is ContentKind.PRIVATE
    node = namespace.link(made.inode, STAGING_INODE, "f", publish=True)
    assert (node.content, node.nlink) == (ContentKind.PUBLISHED, 3)
    assert again(namespace, made.inode) == node


def test_a_moved_tree_is_published_whole(namespace: Namespace) -> None:
    top = namespace.make_directory(TASKS_INODE, "top")
    below = namespace.make_directory(top.inode, "below")
    files = [
        namespace.create_file(top.inode, "a", 0o644).inode,
        namespace.create_file(below.inode, "b", 0o644).inode,
    ]
    other = namespace.create_file(TASKS_INODE, "other", 0o644).inode
    data = namespace.make_directory(STAGING_INODE, "data")
    namespace.create_file(data.inode, "shown", 0o644)
    namespace.link_directory(data.inode, below.inode, "linked")
    staged_file = namespace.register(below.inode, "object", staged())
    assert sorted(namespace.private_files(top.inode)) == files
    assert namespace.private_files(other) == [other]
    changes = namespace.statistics().changes
    namespace.rename(TASKS_INODE, "top", STAGING_INODE, "top", publish=True)
    assert namespace.statistics().changes == changes + 1
    assert namespace.private_files(top.inode) == []
    assert [namespace.node(inode).content for inode in files] == [ContentKind.PUBLISHED] * 2
    assert namespace.node(staged_file.inode).content is ContentKind.OBJECT
    assert namespace.node(other).content is ContentKind.PRIVATE
    assert namespace.lookup(data.inode, "shown").content is ContentKind.PRIVATE


def test_publishing_by_number(namespace: Namespace) -> None:
    private = namespace.create_file(TASKS_INODE, "f", 0o644).inode
    shared = namespace.register(STAGING_INODE, "o", staged()).inode
    namespace.publish([private, shared], operation=5)
    assert namespace.applied(5) is not None
    assert namespace.node(private).content is ContentKind.PUBLISHED
    assert namespace.node(shared).content is ContentKind.OBJECT


def test_an_exchange_publishes_what_moves(namespace: Namespace) -> None:
    one = namespace.create_file(TASKS_INODE, "f", 0o644).inode
    two = namespace.create_file(STAGING_INODE, "f", 0o644).inode
    namespace.rename(TASKS_INODE, "f", STAGING_INODE, "f", RenameFlags.EXCHANGE, publish=True)
    assert namespace.node(one).content is ContentKind.PUBLISHED
    assert namespace.node(two).content is ContentKind.PRIVATE


# What nothing leads to


def test_content_is_told_by_inode(namespace: Namespace) -> None:
    files = {namespace.create_file(TASKS_INODE, name, 0o644).inode for name in "abc"}
    namespace.register(STAGING_INODE, "o", staged())
    namespace.rename(TASKS_INODE, "a", STAGING_INODE, "a", publish=True)
    assert namespace.content_inodes() == files
    assert namespace.unlinked_content(10) == []


def test_it_is_told_when_a_file_loses_its_last_name(namespace: Namespace) -> None:
    made = namespace.create_file(TASKS_INODE, "a", 0o644)
    namespace.link(made.inode, TASKS_INODE, "b")
    over = namespace.create_file(TASKS_INODE, "over", 0o644)
    before = namespace.unlinked_edits
    namespace.remove(TASKS_INODE, "a")
    assert namespace.unlinked_edits == before
    namespace.rename(TASKS_INODE, "b", TASKS_INODE, "over")
    assert namespace.unlinked_edits == before + 1
    assert namespace.unlinked_content(10) == [over.inode]
    namespace.remove(TASKS_INODE, "over")
    assert namespace.unlinked_edits == before + 2
    assert len(namespace.unlinked_content(1)) == 1
    assert sorted(namespace.unlinked_content(10)) == sorted([made.inode, over.inode])


def test_it_is_told_when_a_tree_with_files_goes(namespace: Namespace) -> None:
    top = namespace.make_directory(TASKS_INODE, "top")
    made = namespace.create_file(top.inode, "a", 0o644)
    before = namespace.unlinked_edits
    namespace.remove_tree(TASKS_INODE, "top")
    assert namespace.unlinked_edits > before
    assert namespace.unlinked_content(10) == [made.inode]


# Attributes


def test_attributes_are_what_was_set(namespace: Namespace) -> None:
    made = namespace.create_file(TASKS_INODE, "a", 0o644)
    node = namespace.set_attributes(
        made.inode, mode=stat.S_IFREG | 0o4711, uid=1, gid=2, atime_ns=3, mtime_ns=4, size_bytes=5
    )
    assert node == again(namespace, made.inode)
    assert (node.mode, node.uid, node.gid, node.atime_ns, node.mtime_ns, node.size_bytes) == (
        0o4711, 1, 2, 3, 4, 5,
    )  # fmt: skip
    assert node.ctime_ns > made.ctime_ns
    assert namespace.statistics().size_bytes == 5
    assert namespace.set_attributes(made.inode, size_bytes=9).ctime_ns == node.ctime_ns
    with pytest.raises(NotFound):
        namespace.set_attributes(Inode(99), mode=0)
    with pytest.raises(NotFound):
        namespace.set_attributes(Inode(99))


def test_what_was_cut_off_a_base_never_shows_again(namespace: Namespace) -> None:
    shared = namespace.register(STAGING_INODE, "f", staged(size_bytes=100))
    copied = namespace.copy_up(STAGING_INODE, "f", shared.inode)
    for wanted, left in ((60, 60), (80, 60), (0, 0), (100, 0)):
        node = namespace.set_attributes(copied.inode, base_bytes=wanted)
        assert (node.base_bytes, node.size_bytes) == (left, 100)


def test_extended_attributes(namespace: Namespace, database: Path) -> None:
    made = namespace.create_file(TASKS_INODE, "a", 0o644).inode
    assert namespace.xattrs(made) == []
    namespace.set_xattr(made, b"user.b\xff", b"\0\xff")
    namespace.set_xattr(made, b"user.a", b"", operation=7)
    assert namespace.applied(7) == made
    assert again(namespace, made).has_xattrs
    assert namespace.xattrs(made) == [b"user.a", b"user.b\xff"]
    assert namespace.xattr(made, b"user.b\xff") == b"\0\xff"
    assert namespace.xattr(made, b"user.a") == b""
    namespace.set_xattr(made, b"user.a", b"new")
    assert namespace.xattr(made, b"user.a") == b"new"
    with pytest.raises(NoAttribute, match="absent"):
        namespace.xattr(made, b"user.absent")
    with pytest.raises(NoAttribute):
        namespace.remove_xattr(made, b"user.absent")
    namespace.remove_xattr(made, b"user.a")
    namespace.remove_xattr(made, b"user.b\xff")
    assert not namespace.node(made).has_xattrs


def test_copies_have_the_attributes_of_what_they_are_of(namespace: Namespace) -> None:
    top = namespace.make_directory(STAGING_INODE, "top")
    below = namespace.make_directory(top.inode, "below")
    shared = namespace.register(below.inode, "f", staged())
    for inode in (top.inode, below.inode, shared.inode):
        namespace.set_xattr(inode, b"user.a", b"1")
    linked = namespace.link_directory(top.inode, TASKS_INODE, "l")
    shown = namespace.lookup(linked.inode, "below")
    copied = namespace.copy_up(shown.inode, "f", shared.inode)
    for node in (linked, shown, copied):
        assert namespace.xattrs(node.inode) == [b"user.a"]
    namespace.set_xattr(copied.inode, b"user.a", b"2")
    assert namespace.xattr(shared.inode, b"user.a") == b"1"
    namespace.remove(shown.inode, "f")
    assert namespace.drop_unlinked() == [copied.inode]
    with pytest.raises(NotFound):
        namespace.xattrs(copied.inode)
