"""Leases of what tasks link into their sandboxes by themselves."""

import itertools
from pathlib import Path

import trio
import trio.testing

from stagefs.model import MIB, Inode
from stagefs.namespace.node import TASKS_INODE, Node, RenameFlags
from stagefs.staging import values
from stagefs.vfs.changes import Owner
from stagefs.vfs.new_links import NEWS_MAX
from tests.unit.staging.conftest import Staging, open_staging

USER = Owner(0, 0)
marks = itertools.count()


def make_directory(staging: Staging, parent: Inode, name: str) -> Inode:
    made = staging.changes.make_directory(parent, name, 0o755, owner=USER, operation=None)
    return made.inode


async def staged(staging: Staging, name: str) -> Node:
    url = staging.remote.store(f"/{name}", name.encode())
    await staging.stage_in(url, target=f"staging:///{name}")
    return staging.node(f"staging/{name}")


def link(staging: Staging, node: Node, parent: Inode, name: str = "in") -> None:
    staging.changes.link(node.inode, parent, name, None)


async def held(staging: Staging, node: Node) -> list[str]:
    """For which sandboxes, when all news so far were taken: they are taken in order, and a mark is
    the last."""
    number = next(marks)
    mark = await staged(staging, f"mark{number}")
    box = make_directory(staging, TASKS_INODE, f"mark{number}")
    link(staging, mark, box)
    with trio.fail_after(20):
        while not owners(staging, mark):
            await trio.testing.wait_all_tasks_blocked(0.01)
    return owners(staging, node)


def owners(staging: Staging, node: Node) -> list[str]:
    assert staging.cache is not None
    assert node.object_id is not None
    return sorted(
        lease.owner.rpartition(":")[2] for lease in staging.cache.leases_of(node.object_id.key)
    )


async def test_links_are_held_until_the_sandbox_ends(staging: Staging) -> None:
    node = await staged(staging, "ref")
    for name in ("a", "b"):
        make_directory(staging, TASKS_INODE, name)
    a, b = (staging.node(f"tasks/{name}").inode for name in ("a", "b"))
    link(staging, node, make_directory(staging, a, "deep"))
    link(staging, node, b)
    assert await held(staging, node) == ["a", "b"]
    assert (await staging.show("a")).leases == 1
    staging.changes.unlink(b, "in", None)
    assert len(await held(staging, node)) == 2, "the lease is the sandbox's, not the link's"
    await staging.area.sandbox_fail(values.FailSandbox("a"))
    link(staging, node, a, "again")
    assert await held(staging, node) == ["b"], "a failed one takes none"
    await staging.commit("b")
    assert await held(staging, node) == []


async def test_only_sandboxes_lease(staging: Staging) -> None:
    node = await staged(staging, "ref")
    link(staging, node, make_directory(staging, staging.node("/").inode, "elsewhere"))
    link(staging, node, staging.node("staging").inode, "other")
    assert await held(staging, node) == []


async def test_leases_follow_renames_and_urls(staging: Staging) -> None:
    node, other = await staged(staging, "ref"), await staged(staging, "d/other")
    plain = make_directory(staging, staging.node("/").inode, "plain")
    box = make_directory(staging, TASKS_INODE, "t")
    below = make_directory(staging, plain, "below")
    link(staging, node, below)
    staging.changes.rename(plain, "below", box, "below", 0, None)
    assert await held(staging, node) == ["t"], "a directory with a link in it"
    second = make_directory(staging, TASKS_INODE, "u")
    link(staging, other, second, "x")
    staging.changes.rename(second, "x", box, "below", RenameFlags.EXCHANGE, None)
    assert await held(staging, other) == ["t", "u"]
    assert await held(staging, node) == ["t", "u"]
    third = make_directory(staging, TASKS_INODE, "v")
    await staging.changes.symlink(third, "ref", "staging:///d", owner=USER, operation=None)
    assert "v" in await held(staging, other), "a directory by its URL"
    url = staging.remote.store("/direct", b"direct")
    await staging.changes.symlink(third, "direct", url, owner=USER, operation=None)
    assert await held(staging, staging.node("tasks/v/direct")) == ["v"]


async def test_what_a_killed_daemon_had_not_noted_is_found(tmp_path: Path) -> None:
    async with open_staging(tmp_path, capacity_bytes=MIB) as staging:
        node = await staged(staging, "ref")
        box = make_directory(staging, TASKS_INODE, "t")
        # As after a kill between the link and its lease: the names say it, and nothing else.
        staging.namespace.link(node.inode, box, "in")
        assert await held(staging, node) == []
    async with open_staging(tmp_path, capacity_bytes=MIB) as staging:
        await staging.area.begin(is_new_mount=True)
        assert await held(staging, node) == ["t"]


async def test_a_burst_that_nobody_could_take_is_found_too(staging: Staging) -> None:
    node, late = await staged(staging, "ref"), await staged(staging, "late")
    box = make_directory(staging, TASKS_INODE, "t")
    # All in one turn of the event loop.
    for number in range(NEWS_MAX + 1):
        staging.changes.new_links.made(box, node)
        if number == NEWS_MAX - 1:
            link(staging, late, box, "late")
    assert staging.changes.new_links.missed
    assert await held(staging, late) == ["t"]
