"""Bound directories: listings become names; what users do there is theirs."""

import pytest

from stagefs.errors import NotADirectory, NotFound
from stagefs.model import EntryKind, Inode, ListedEntry, ObjectInfo
from stagefs.namespace.node import STAGING_INODE, TASKS_INODE, NodeKind
from stagefs.namespace.store import Namespace
from tests.unit.namespace.trees import listing, paths, staged

BASE = "s3://bucket/prefix"


def file(name: str, validator: str = "etag:1", size_bytes: int = 5) -> ListedEntry:
    url = f"{BASE}/{name}"
    return ListedEntry(name, EntryKind.FILE, url, ObjectInfo(url, size_bytes, validator, 7))


def directory(name: str) -> ListedEntry:
    return ListedEntry(name, EntryKind.DIRECTORY, f"{BASE}/{name}")


@pytest.fixture
def bound(namespace: Namespace) -> Inode:
    return namespace.bind(STAGING_INODE, "ref", BASE, 30.0).inode


def merge(namespace: Namespace, bound: Inode, *entries: ListedEntry) -> set[str]:
    return set(namespace.merge_listing(bound, entries, now_ns=1000))


def test_it_begins_unlisted(namespace: Namespace, bound: Inode) -> None:
    node = namespace.node(bound)
    assert (node.bind_url, node.bind_ttl_s, node.listed_ns) == (BASE, 30.0, 0)
    assert namespace.page(bound, 0, 10) == []


def test_a_listing_becomes_names(namespace: Namespace, bound: Inode) -> None:
    # Nobody can have known these names.
    assert merge(namespace, bound, file("a"), directory("sub")) == set()
    found = listing(namespace, bound)
    assert found["a"].object_id is not None
    assert found["a"].object_id.url == f"{BASE}/a"
    assert (found["a"].validator, found["a"].size_bytes, found["a"].mtime_ns) == ("etag:1", 5, 7)
    assert found["a"].nlink == 1
    assert (found["sub"].bind_url, found["sub"].bind_ttl_s) == (f"{BASE}/sub", 30.0)
    assert namespace.node(bound).listed_ns == 1000
    assert namespace.node(bound).nlink == 3


def test_a_fresh_listing_changes_only_what_changed(namespace: Namespace, bound: Inode) -> None:
    merge(namespace, bound, file("same"), file("changed"), file("gone"), directory("sub"))
    before = listing(namespace, bound)
    changed = merge(
        namespace, bound, file("same"), file("changed", "etag:2"), file("new"), directory("sub")
    )
    after = listing(namespace, bound)
    assert changed == {"changed", "gone"}
    assert after.keys() == {"same", "changed", "new", "sub"}
    assert after["same"] == before["same"]
    assert after["sub"] == before["sub"]
    assert after["changed"].inode != before["changed"].inode
    assert namespace.node(before["changed"].inode).successor == after["changed"].inode


def test_links_outlive_what_vanished_at_the_remote(namespace: Namespace, bound: Inode) -> None:
    merge(namespace, bound, file("a"))
    node = namespace.lookup(bound, "a")
    namespace.link(node.inode, TASKS_INODE, "kept")
    merge(namespace, bound)
    assert paths(namespace, bound) == []
    assert namespace.lookup(TASKS_INODE, "kept").nlink == 1


def test_a_name_that_changes_its_kind(namespace: Namespace, bound: Inode) -> None:
    merge(namespace, bound, file("x"), directory("y"))
    merge(namespace, namespace.lookup(bound, "y").inode, file("below"))
    merge(namespace, bound, directory("x"), file("y"))
    found = listing(namespace, bound)
    assert found["x"].kind is NodeKind.DIRECTORY
    assert found["y"].kind is NodeKind.FILE
    assert namespace.node(bound).nlink == 3


def test_what_a_user_removed_stays_away(namespace: Namespace, bound: Inode) -> None:
    merge(namespace, bound, file("a"), directory("sub"))
    namespace.remove(bound, "a")
    namespace.remove_tree(bound, "sub")
    assert merge(namespace, bound, file("a"), directory("sub")) == set()
    assert paths(namespace, bound) == []
    with pytest.raises(NotFound):
        namespace.add_found(bound, "a", staged("a"))


def test_what_a_user_made_stays(namespace: Namespace, bound: Inode) -> None:
    merge(namespace, bound, file("a"), directory("sub"), file("c"))
    namespace.register(bound, "mine", staged("mine"))
    namespace.register(namespace.lookup(bound, "sub").inode, "mine", staged("mine"))
    namespace.replace(bound, "a", staged("other"))
    namespace.remove(bound, "c")
    namespace.make_symlink(bound, "c", "elsewhere")
    expected = ["a", "c", "mine", "sub/", "sub/mine"]
    merge(namespace, bound, file("a", "etag:9"), file("c", "etag:9"), file("mine"))
    assert paths(namespace, bound) == expected
    merge(namespace, bound)
    assert paths(namespace, bound) == expected
    namespace.remove(bound, "c")
    merge(namespace, bound, file("c"))
    assert "c" not in listing(namespace, bound), "a name hidden before came back"


def test_hostile_and_repeated_names_are_left_out(namespace: Namespace, bound: Inode) -> None:
    hostile = ["..", ".", "", "a/b", "/etc", "x\0y", "n" * 256]
    merge(namespace, bound, *(file(name) for name in hostile), file("ok"), directory("ok"))
    assert paths(namespace, bound) == ["ok"]


def test_a_file_of_unknown_size_stays_as_it_was(namespace: Namespace, bound: Inode) -> None:
    merge(namespace, bound, file("a"))
    unsized = [ListedEntry(name, EntryKind.FILE, f"{BASE}/{name}") for name in ("a", "b")]
    assert merge(namespace, bound, *unsized) == set()
    assert paths(namespace, bound) == ["a"]


def test_names_found_one_by_one(namespace: Namespace, bound: Inode) -> None:
    found = namespace.add_found(bound, "f", staged("f", validator="v1"))
    assert namespace.lookup(bound, "f") == found
    again = namespace.add_found(bound, "f", staged("f", validator="v1"))
    assert (again.inode, again.checked_ns > 0) == (found.inode, True)
    newer = namespace.add_found(bound, "f", staged("f", version="v2", validator="v2"))
    assert newer.inode != found.inode
    below = namespace.add_found(bound, "d", f"{BASE}/d")
    assert below.bind_url == f"{BASE}/d"
    namespace.register(bound, "mine", staged("mine"))
    assert namespace.add_found(bound, "mine", staged("theirs", validator="x")).object_id == (
        staged("mine").object_id
    )


def test_a_bound_directory_that_is_linked(namespace: Namespace, bound: Inode) -> None:
    linked = namespace.link_directory(bound, TASKS_INODE, "l").inode
    merge(namespace, bound, file("a"), directory("sub"))
    merge(namespace, namespace.lookup(bound, "sub").inode, file("below"))
    assert paths(namespace, linked) == ["a", "sub/", "sub/below"]
    assert namespace.overlays(bound) == [linked]
    namespace.remove(linked, "a")
    merge(namespace, bound, file("a", "etag:2"), file("b"))
    assert paths(namespace, linked) == ["b"]


def test_only_bound_directories_have_listings(namespace: Namespace, bound: Inode) -> None:
    with pytest.raises(NotADirectory):
        merge(namespace, STAGING_INODE, file("a"))
    namespace.remove_directory(STAGING_INODE, "ref")
    with pytest.raises(NotFound):
        merge(namespace, bound, file("a"))
