"""Newer versions: replaced by a user, or superseded because the remote changed."""

import pytest

from stagefs.errors import InvalidName, NotFound
from stagefs.namespace.node import STAGING_INODE, TASKS_INODE, TEMPLATES_INODE
from stagefs.namespace.store import Namespace
from tests.unit.namespace.trees import staged


def version(namespace: Namespace, path: str) -> str:
    found = namespace.resolve(path).object_id
    assert found is not None
    return found.version


def test_replace_leaves_other_links_with_what_they_had(namespace: Namespace) -> None:
    old = namespace.register(STAGING_INODE, "f", staged())
    namespace.link(old.inode, TASKS_INODE, "f")
    new = namespace.replace(STAGING_INODE, "f", staged(version="v2"))
    assert new.inode != old.inode
    assert (version(namespace, "staging/f"), version(namespace, "tasks/f")) == ("v2", "v1")
    assert (namespace.node(old.inode).nlink, new.nlink) == (1, 1)
    assert namespace.node(old.inode).successor == 0


def test_supersede_moves_staging_at_once_and_others_later(namespace: Namespace) -> None:
    old = namespace.register(STAGING_INODE, "f", staged())
    below = namespace.make_directory(STAGING_INODE, "d")
    namespace.link(old.inode, below.inode, "g")
    namespace.link(old.inode, TASKS_INODE, "f")
    place = namespace.place(old.inode)
    new = namespace.supersede(old.inode, staged(version="v2"))
    assert version(namespace, "staging/f") == version(namespace, "staging/d/g") == "v2"
    linked = namespace.lookup(TASKS_INODE, "f")
    assert (linked.inode, linked.successor, linked.nlink) == (old.inode, new.inode, 1)
    assert namespace.rebind_name(TASKS_INODE, "f", linked.successor).inode == new.inode
    assert version(namespace, "tasks/f") == "v2"
    assert namespace.node(new.inode).nlink == 3
    assert namespace.node(old.inode).nlink == 0
    assert place is not None


def test_rebind_goes_to_the_newest_of_several(namespace: Namespace) -> None:
    first = namespace.register(TASKS_INODE, "f", staged())
    second = namespace.supersede(first.inode, staged(version="v2"))
    third = namespace.supersede(first.inode, staged(version="v3"))
    assert namespace.node(second.inode).successor == third.inode
    assert namespace.newest(first.inode) == third
    assert namespace.rebind_name(TASKS_INODE, "f", second.inode).inode == third.inode


def test_the_same_news_twice_are_one_version(namespace: Namespace) -> None:
    old = namespace.register(STAGING_INODE, "f", staged())
    new = namespace.supersede(old.inode, staged(version="v2"))
    assert namespace.supersede(old.inode, staged(version="v2")).inode == new.inode


def test_directories_have_no_versions(namespace: Namespace) -> None:
    directory = namespace.make_directory(STAGING_INODE, "d")
    with pytest.raises(InvalidName):
        namespace.supersede(directory.inode, staged())


def test_a_superseded_object_of_a_template(namespace: Namespace) -> None:
    """Every sandbox counts on the new version once the template's own name has moved."""
    old = namespace.register(STAGING_INODE, "f", staged())
    template = namespace.make_directory(TEMPLATES_INODE, "t")
    below = namespace.make_directory(template.inode, "d")
    namespace.link(old.inode, below.inode, "in")
    sandboxes = namespace.instantiate_template(template.inode, TASKS_INODE, list("123"))
    shown = namespace.lookup(sandboxes[0].inode, "d").inode
    namespace.remove(shown, "in")
    assert namespace.node(old.inode).nlink == 4
    new = namespace.supersede(old.inode, staged(version="v2"))
    namespace.rebind_name(below.inode, "in", new.inode)
    assert namespace.node(old.inode).nlink == 0
    assert namespace.node(new.inode).nlink == 4
    in_second = namespace.lookup(namespace.lookup(sandboxes[1].inode, "d").inode, "in")
    assert in_second.inode == new.inode


def test_a_sandbox_can_move_before_its_template(namespace: Namespace) -> None:
    old = namespace.register(STAGING_INODE, "f", staged())
    template = namespace.make_directory(TEMPLATES_INODE, "t")
    namespace.link(old.inode, template.inode, "in")
    one, two = namespace.instantiate_template(template.inode, TASKS_INODE, ["1", "2"])
    new = namespace.supersede(old.inode, staged(version="v2"))
    namespace.rebind_name(one.inode, "in", new.inode)
    assert namespace.lookup(one.inode, "in").inode == new.inode
    assert namespace.lookup(two.inode, "in").inode == old.inode
    assert namespace.node(old.inode).nlink == 2
    assert namespace.node(new.inode).nlink == 2


def test_first_contact(namespace: Namespace) -> None:
    node = namespace.register(STAGING_INODE, "f", staged())
    told = namespace.set_validator(node.inode, "etag:1", checked_ns=9, ranges=False)
    assert (told.validator, told.checked_ns, told.ranges) == ("etag:1", 9, False)
    assert told.object_id == node.object_id
    assert namespace.set_validator(node.inode, "etag:1", checked_ns=10).ranges is False
    assert namespace.touch_checked(node.inode, 11).checked_ns == 11
    other = namespace.register(STAGING_INODE, "g", staged("g"))
    namespace.set_ranges_refused(other.inode)
    assert not namespace.node(other.inode).ranges
    with pytest.raises(NotFound):
        namespace.set_validator(namespace.node(TASKS_INODE).successor, "x", checked_ns=1)


def test_an_object_is_found_again(namespace: Namespace) -> None:
    node = namespace.register(STAGING_INODE, "f", staged("data/f"))
    assert namespace.find_object("https://host/data/f", "v1") == node
    assert namespace.find_object("https://host/data/f", "v2") is None
    assert namespace.find_object("https://host/data/g", "v1") is None
    namespace.remove(STAGING_INODE, "f")
    assert namespace.find_object("https://host/data/f", "v1") is None


def test_first_contact_with_many_is_seen_at_once_and_kept(namespace: Namespace) -> None:
    for name in ("a", "b", "gone"):
        namespace.register(STAGING_INODE, name, staged(name))
    ahead = [node for _cookie, _name, node in namespace.upcoming(STAGING_INODE, 0, 10)]
    namespace.remove(STAGING_INODE, "gone")
    namespace.drop_unlinked()
    namespace.set_validators([(node.inode, f"etag:{node.inode}") for node in ahead], checked_ns=7)
    for node in ahead[:2]:
        now = namespace.node(node.inode)
        assert (now.validator, now.checked_ns) == (f"etag:{node.inode}", 7)
    with pytest.raises(NotFound):
        namespace.node(ahead[2].inode)
    namespace.refresh()
    assert [namespace.node(node.inode).validator for node in ahead[:2]] == [
        f"etag:{node.inode}" for node in ahead[:2]
    ]
