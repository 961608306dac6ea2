"""Linked directories and sandboxes made from templates."""

import pytest

from stagefs.errors import Busy, InvalidName, NotFound, NotPermitted, ReadOnly
from stagefs.model import Inode
from stagefs.namespace.node import STAGING_INODE, TASKS_INODE, TEMPLATES_INODE, Node, NodeKind
from stagefs.namespace.store import Namespace
from tests.unit.namespace.trees import listing, paths, staged


@pytest.fixture
def data(namespace: Namespace) -> Node:
    """staging/data with a, b, sub/c and sub/deep/d."""
    top = namespace.make_directory(STAGING_INODE, "data")
    namespace.register(top.inode, "a", staged("a"))
    namespace.register(top.inode, "b", staged("b"))
    sub = namespace.make_directory(top.inode, "sub")
    namespace.register(sub.inode, "c", staged("c"))
    deep = namespace.make_directory(sub.inode, "deep")
    namespace.register(deep.inode, "d", staged("d"))
    return top


ALL = ["a", "b", "sub/", "sub/c", "sub/deep/", "sub/deep/d"]


def link(namespace: Namespace, data: Node, name: str = "l") -> Inode:
    return namespace.link_directory(data.inode, TASKS_INODE, name).inode


def test_it_shows_files_by_their_inodes_and_directories_by_new_ones(
    namespace: Namespace, data: Node
) -> None:
    linked = link(namespace, data)
    assert paths(namespace, linked) == ALL
    assert namespace.resolve("tasks/l/a") == namespace.resolve("staging/data/a")
    shown = namespace.resolve("tasks/l/sub")
    assert shown.inode != namespace.resolve("staging/data/sub").inode
    assert shown.inode == listing(namespace, linked)["sub"].inode
    assert namespace.parent(shown.inode) == linked
    assert namespace.path(namespace.resolve("tasks/l/sub/deep").inode) == "/tasks/l/sub/deep"


def test_inodes_of_shown_directories_outlive_the_daemon(namespace: Namespace, data: Node) -> None:
    link(namespace, data)
    before = namespace.resolve("tasks/l/sub/deep").inode
    namespace.refresh()
    assert namespace.resolve("tasks/l/sub/deep").inode == before


def test_changes_stay_in_their_place(namespace: Namespace, data: Node) -> None:
    one, two = link(namespace, data, "one"), link(namespace, data, "two")
    namespace.remove(one, "a")
    sub = namespace.lookup(one, "sub").inode
    namespace.make_directory(sub, "mine")
    namespace.rename(sub, "c", one, "moved")
    namespace.replace(one, "b", staged("b", version="v2"))
    assert paths(namespace, one) == ["b", "moved", "sub/", "sub/deep/", "sub/deep/d", "sub/mine/"]
    assert paths(namespace, two) == ALL
    assert paths(namespace, data.inode) == ALL
    assert namespace.resolve("tasks/two/b") == namespace.resolve("staging/data/b")


def test_a_removed_name_can_be_made_again(namespace: Namespace, data: Node) -> None:
    linked = link(namespace, data)
    namespace.remove_tree(linked, "sub")
    namespace.make_directory(linked, "sub")
    assert paths(namespace, linked) == ["a", "b", "sub/"]
    namespace.remove_directory(linked, "sub")
    assert paths(namespace, linked) == ["a", "b"]


def test_a_shown_directory_that_was_emptied_can_be_removed(
    namespace: Namespace, data: Node
) -> None:
    deep = namespace.lookup(namespace.lookup(link(namespace, data), "sub").inode, "deep").inode
    namespace.remove(deep, "d")
    namespace.remove_directory(namespace.resolve("tasks/l/sub").inode, "deep")
    assert paths(namespace, TASKS_INODE) == ["l/", "l/a", "l/b", "l/sub/", "l/sub/c"]


def test_what_the_lower_directory_gets_and_loses_is_seen(namespace: Namespace, data: Node) -> None:
    linked = link(namespace, data)
    assert paths(namespace, linked) == ALL
    namespace.register(data.inode, "new", staged("new"))
    namespace.remove(data.inode, "a")
    namespace.replace(data.inode, "b", staged("b", version="v2"))
    namespace.remove_tree(data.inode, "sub")
    assert paths(namespace, linked) == ["b", "new"]
    for gone in ("a", "sub"):
        with pytest.raises(NotFound):
            namespace.lookup(linked, gone)
    assert namespace.lookup(linked, "b") == namespace.lookup(data.inode, "b")


def test_own_content_stays_when_the_lower_directory_vanishes(
    namespace: Namespace, data: Node
) -> None:
    linked = link(namespace, data)
    deep = namespace.resolve("tasks/l/sub/deep").inode
    namespace.register(deep, "mine", staged("mine"))
    namespace.remove_tree(STAGING_INODE, "data")
    namespace.drop_unlinked()
    assert paths(namespace, linked) == ["sub/", "sub/deep/", "sub/deep/mine"]
    assert namespace.resolve("tasks/l/sub/deep").inode == deep
    namespace.register(linked, "more", staged("more"))
    assert "more" in listing(namespace, linked)


def test_a_directory_replaced_below_is_another_one_here(namespace: Namespace, data: Node) -> None:
    linked = link(namespace, data)
    before = namespace.lookup(linked, "sub").inode
    namespace.remove_tree(data.inode, "sub")
    namespace.make_directory(data.inode, "sub")
    after = namespace.lookup(linked, "sub").inode
    assert before != after
    assert listing(namespace, after) == {}


def test_a_directory_that_becomes_a_file_below(namespace: Namespace, data: Node) -> None:
    linked = link(namespace, data)
    assert namespace.lookup(linked, "sub").kind is NodeKind.DIRECTORY
    namespace.remove_tree(data.inode, "sub")
    file = namespace.register(data.inode, "sub", staged())
    assert namespace.lookup(linked, "sub").inode == file.inode
    namespace.remove(linked, "sub")
    assert paths(namespace, linked) == ["a", "b"]


def test_a_link_of_a_link(namespace: Namespace, data: Node) -> None:
    first = link(namespace, data, "first")
    second = namespace.link_directory(first, TASKS_INODE, "second").inode
    assert paths(namespace, second) == ALL
    namespace.remove(first, "a")
    namespace.make_directory(namespace.lookup(first, "sub").inode, "mine")
    expected = ["b", "sub/", "sub/c", "sub/deep/", "sub/deep/d", "sub/mine/"]
    assert paths(namespace, second) == paths(namespace, first) == expected
    assert paths(namespace, data.inode) == ALL


def test_pages_of_a_changed_overlay_neither_repeat_nor_skip(namespace: Namespace) -> None:
    top = namespace.make_directory(STAGING_INODE, "top").inode
    for number in range(30):
        if number % 3:
            namespace.register(top, f"n{number}", staged(str(number)))
        else:
            namespace.make_directory(top, f"n{number}")
    linked = namespace.link_directory(top, TASKS_INODE, "l").inode
    seen: list[str] = []
    after = 0
    while page := namespace.page(linked, after, 4):
        after = page[-1][0]
        for _cookie, name, node in page:
            seen.append(name)
            # Makes the shown directory this place's own: it must keep its cookie.
            if node.kind is NodeKind.DIRECTORY:
                namespace.make_directory(node.inode, "mine")
        namespace.register(linked, f"own{len(seen)}", staged())
        if len(seen) > 200:
            break
    assert [name for name in seen if name.startswith("n")] == [f"n{n}" for n in range(30)]
    assert len(set(seen)) == len(seen)


def test_a_directory_is_never_shown_below_itself(namespace: Namespace, data: Node) -> None:
    with pytest.raises(InvalidName, match="below itself"):
        namespace.link_directory(data.inode, data.inode, "self")
    with pytest.raises(InvalidName):
        namespace.link_directory(STAGING_INODE, data.inode, "up")
    linked = link(namespace, data)
    with pytest.raises(InvalidName):
        namespace.rename(TASKS_INODE, "l", data.inode, "l")
    with pytest.raises(InvalidName):
        namespace.rename(STAGING_INODE, "data", linked, "data")


def test_directories_that_show_each_other_end(namespace: Namespace) -> None:
    one = namespace.make_directory(STAGING_INODE, "one").inode
    two = namespace.make_directory(STAGING_INODE, "two").inode
    namespace.register(one, "f", staged("f"))
    namespace.link_directory(two, one, "to-two")
    namespace.link_directory(one, two, "to-one")
    assert paths(namespace, STAGING_INODE) == [
        "one/", "one/f", "one/to-two/", "two/", "two/to-one/", "two/to-one/f",
    ]  # fmt: skip


def test_linking_costs_no_links_of_files(namespace: Namespace, data: Node) -> None:
    linked = link(namespace, data)
    assert paths(namespace, linked) == ALL
    assert namespace.lookup(linked, "a").nlink == 1
    assert namespace.node(linked).nlink == 1
    namespace.remove(linked, "a")
    assert namespace.lookup(data.inode, "a").nlink == 1
    namespace.rename(linked, "b", linked, "own")
    assert namespace.lookup(data.inode, "b").nlink == 2


# Templates


@pytest.fixture
def template(namespace: Namespace, data: Node) -> Node:
    """A template with in (staging/data/a), again (the same) and dir/in2 (staging/data/b)."""
    made = namespace.make_directory(TEMPLATES_INODE, "t")
    below = namespace.make_directory(made.inode, "dir")
    a = namespace.lookup(data.inode, "a").inode
    namespace.link(a, made.inode, "in")
    namespace.link(a, made.inode, "again")
    namespace.link(namespace.lookup(data.inode, "b").inode, below.inode, "in2")
    return made


def links(namespace: Namespace, data: Node) -> tuple[int, int]:
    return (
        namespace.lookup(data.inode, "a").nlink,
        namespace.lookup(data.inode, "b").nlink,
    )


def test_sandboxes_count_as_links(namespace: Namespace, data: Node, template: Node) -> None:
    assert links(namespace, data) == (3, 2)
    before = namespace.statistics().changes
    names = [f"s{number}" for number in range(100)]
    made = namespace.instantiate_template(template.inode, TASKS_INODE, names)
    assert namespace.statistics().changes == before + 1
    assert links(namespace, data) == (203, 102)
    assert namespace.node(TASKS_INODE).nlink == 102
    for sandbox in (made[0], made[99]):
        assert paths(namespace, sandbox.inode) == ["again", "dir/", "dir/in2", "in"]
    assert links(namespace, data) == (203, 102), "looking changed the links"


def test_what_a_sandbox_no_longer_shows_no_longer_counts(
    namespace: Namespace, data: Node, template: Node
) -> None:
    one, two, three = (
        node.inode
        for node in namespace.instantiate_template(template.inode, TASKS_INODE, ["1", "2", "3"])
    )
    assert links(namespace, data) == (9, 5)
    namespace.remove(one, "in")
    assert links(namespace, data) == (8, 5)
    namespace.rename(one, "again", one, "renamed")
    assert links(namespace, data) == (8, 5)
    namespace.replace(two, "in", staged("other"))
    assert links(namespace, data) == (7, 5)
    namespace.remove(namespace.lookup(two, "dir").inode, "in2")
    assert links(namespace, data) == (7, 4)
    namespace.remove_tree(three, "dir")
    assert links(namespace, data) == (7, 3)
    for name in ("1", "2", "3"):
        namespace.remove_tree(TASKS_INODE, name)
    assert links(namespace, data) == (3, 2)
    assert paths(namespace, TASKS_INODE) == []


def test_a_template_cannot_change_and_not_go_while_it_is_used(
    namespace: Namespace, template: Node
) -> None:
    namespace.instantiate_template(template.inode, TASKS_INODE, ["s"])
    for directory in (template.inode, namespace.lookup(template.inode, "dir").inode):
        with pytest.raises(ReadOnly):
            namespace.register(directory, "x", staged())
    with pytest.raises(ReadOnly):
        namespace.remove(template.inode, "in")
    with pytest.raises(Busy):
        namespace.remove_tree(TEMPLATES_INODE, "t")
    namespace.remove_tree(TASKS_INODE, "s")
    namespace.remove_tree(TEMPLATES_INODE, "t")


def test_what_can_be_no_template(namespace: Namespace, data: Node) -> None:
    linked = link(namespace, data)
    for refused in (STAGING_INODE, linked):
        with pytest.raises(NotPermitted):
            namespace.instantiate_template(refused, TASKS_INODE, ["s"])
    with pytest.raises(NotPermitted):
        namespace.instantiate_template(data.inode, data.inode, ["s"])


def test_a_template_with_a_linked_directory(namespace: Namespace, data: Node) -> None:
    made = namespace.make_directory(TEMPLATES_INODE, "t")
    namespace.link_directory(data.inode, made.inode, "data")
    sandbox = namespace.instantiate_template(made.inode, TASKS_INODE, ["s"])[0]
    namespace.remove(namespace.lookup(sandbox.inode, "data").inode, "a")
    assert paths(namespace, sandbox.inode) == ["data/", *(f"data/{path}" for path in ALL[1:])]
    assert links(namespace, data) == (1, 1)
    assert paths(namespace, data.inode) == ALL
