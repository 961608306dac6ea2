"""What is fetched ahead of tasks, on a real namespace and cache; the remote is in memory."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from stagefs.cache.store import Cache
from stagefs.config import ReadSettings
from stagefs.model import MIB, Inode
from stagefs.namespace.node import TASKS_INODE, Node, SandboxRow, StagedObject
from stagefs.namespace.store import Namespace
from stagefs.objects.objects import Objects
from stagefs.remote.memory import MemoryRemote
from stagefs.vfs.learning import AHEAD_AT_ONCE, Learning
from tests.support.waiting import wait_until

SIZE_BYTES = 128 << 10
NAMES = ["c", "a", "e", "b", "d", "f"]
"""In the order of use."""


class Rig:
    def __init__(self, path: Path, ahead_bytes_max: int) -> None:
        self.namespace = Namespace.open(path / "namespace.sqlite")
        self.cache = Cache.open(path / "cache", capacity_bytes=64 * MIB, free_floor_bytes=0)
        self.remote = MemoryRemote()
        self.objects = Objects(
            namespace=self.namespace,
            cache=self.cache,
            inline_flags=0,
            remote_for=lambda _url: self.remote,
            settings=ReadSettings(),
        )
        self.learning = Learning(
            namespace=self.namespace,
            objects=self.objects,
            ahead_bytes_max=ahead_bytes_max,
            directory=path,
        )

    def sandbox(
        self, task: str, names: list[str] = NAMES, *, shared: Mapping[str, Node] | None = None
    ) -> tuple[Inode, dict[str, Node]]:
        """With inputs of its own and with ``shared`` ones."""
        row = SandboxRow(state="active", on_write="copy-up", lifetime="task")
        directory = self.namespace.make_directory(TASKS_INODE, task, sandbox=row).inode
        nodes = {}
        for name in names:
            url = self.remote.store(f"/{task}/{name}", f"{task}/{name}".encode() * SIZE_BYTES)
            size = len(f"{task}/{name}") * SIZE_BYTES
            staged = StagedObject(
                url=url, version=f"declared:{size}:0", size_bytes=size, mtime_ns=0, validator=None
            )
            nodes[name] = self.namespace.register(directory, name, staged)
        for name, node in (shared or {}).items():
            nodes[name] = self.namespace.link(node.inode, directory, name)
        return directory, nodes

    def watched(self, task: str, names: list[str] = NAMES) -> tuple[Inode, dict[str, Node]]:
        directory, nodes = self.sandbox(task, names)
        self.learning.watch(directory, {name: node.inode for name, node in nodes.items()})
        return directory, nodes

    def taught(self) -> None:
        directory, nodes = self.watched("first")
        for name in NAMES:
            self.learning.used(nodes[name].inode)
        self.learning.ended(directory)

    def asked(self, task: str) -> list[str]:
        """Names of the task's inputs that were fetched, in order."""
        urls = [request.url for request in self.remote.requests if request.kind == "fetch"]
        return list(dict.fromkeys(url.rpartition("/")[2] for url in urls if f"/{task}/" in url))

    def is_cached(self, node: Node) -> bool:
        return self.objects.cached_bytes(node) >= node.size_bytes

    async def until_cached(self, *nodes: Node) -> None:
        await eventually(lambda: all(self.is_cached(node) for node in nodes), "what follows")


async def eventually(holds: Callable[[], bool], what: str) -> None:
    await trio.to_thread.run_sync(wait_until, holds, what)


@asynccontextmanager
async def rig(path: Path, *, ahead_bytes_max: int = 256 * MIB) -> AsyncIterator[Rig]:
    made = Rig(path, ahead_bytes_max)
    try:
        async with made.objects.running(), made.learning.running():
            yield made
    finally:
        made.cache.close()
        made.namespace.close()


async def test_what_follows_is_fetched_in_order(tmp_path: Path) -> None:
    async with rig(tmp_path) as stack:
        stack.taught()
        _directory, nodes = stack.watched("second")
        stack.learning.used(nodes["a"].inode)
        await stack.until_cached(*(nodes[name] for name in NAMES[2:]))
        asked = stack.asked("second")
        assert set(asked) == set(NAMES[2:]), "also what had its turn before"
        assert asked[-1] == "f" or len(asked) <= AHEAD_AT_ONCE
        assert stack.asked("first") == [], "the first task of a kind has nobody to learn from"


async def test_no_further_ahead_than_so_many_bytes(tmp_path: Path) -> None:
    size_bytes = len("second/a") * SIZE_BYTES
    async with rig(tmp_path, ahead_bytes_max=2 * size_bytes) as stack:
        stack.taught()
        _directory, nodes = stack.watched("second")
        for done in range(len(NAMES)):
            stack.learning.used(nodes[NAMES[done]].inode)
            await stack.until_cached(*(nodes[name] for name in NAMES[done + 1 : done + 3]))
            await trio.testing.wait_all_tasks_blocked()
            assert set(stack.asked("second")) == set(NAMES[1 : done + 3])


async def test_it_ends_with_its_sandbox(tmp_path: Path) -> None:
    async with rig(tmp_path) as stack:
        stack.taught()
        directory, nodes = stack.watched("second")
        stack.remote.gate = trio.Event()
        stack.learning.used(nodes[NAMES[0]].inode)
        requests = stack.remote.requests
        await eventually(lambda: len(requests) == AHEAD_AT_ONCE, "the first requests")
        stack.learning.ended(directory)
        stack.remote.gate.set()
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert stack.asked("second") == [], "fetched for a sandbox that is gone"
        assert len(requests) == AHEAD_AT_ONCE
        assert stack.learning.sandboxes == []


async def test_a_directory_that_is_gone_ends_it_too(tmp_path: Path) -> None:
    async with rig(tmp_path) as stack:
        stack.taught()
        _directory, nodes = stack.watched("second")
        stack.learning.used(nodes[NAMES[0]].inode)
        stack.namespace.remove_tree(TASKS_INODE, "second")
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert stack.asked("second") == []


async def test_an_input_of_several_tasks_begins_none(tmp_path: Path) -> None:
    """A reference that a thousand tasks share says nothing about whose turn it is."""
    async with rig(tmp_path) as stack:
        _directory, common = stack.sandbox("common", ["a"])
        names = [name for name in NAMES if name != "a"]
        tasks = {}
        for task in ("first", "second", "third"):
            directory, nodes = stack.sandbox(task, names, shared=common)
            stack.learning.watch(directory, {name: node.inode for name, node in nodes.items()})
            tasks[task] = nodes
            if task == "first":
                for name in NAMES:
                    stack.learning.used(nodes[name].inode)
        stack.learning.used(common["a"].inode)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert stack.asked("second") == stack.asked("third") == []
        stack.learning.used(tasks["second"]["c"].inode)
        await stack.until_cached(*(tasks["second"][name] for name in NAMES[2:]))
        assert stack.asked("third") == []


async def test_links_made_one_by_one_are_inputs(tmp_path: Path) -> None:
    async with rig(tmp_path) as stack:
        tasks = {}
        for task in ("first", "second"):
            directory, nodes = stack.sandbox(task)
            for node in nodes.values():
                stack.learning.link_made(directory, node)
            tasks[task] = nodes
        for name in NAMES:
            stack.learning.used(tasks["first"][name].inode)
        stack.learning.used(tasks["second"]["c"].inode)
        await stack.until_cached(*(tasks["second"][name] for name in NAMES[1:]))


async def test_what_was_learned_outlives_the_daemon(tmp_path: Path) -> None:
    async with rig(tmp_path) as stack:
        stack.taught()
    async with rig(tmp_path) as stack:
        _directory, nodes = stack.watched("second")
        stack.learning.used(nodes["c"].inode)
        await stack.until_cached(*(nodes[name] for name in NAMES[1:]))


@pytest.mark.parametrize(
    ("used", "learned"),
    [(NAMES[:2], NAMES), (NAMES[3::-1], NAMES[3::-1]), ([*NAMES[1:], "c"], [*NAMES[1:], "c"])],
    ids=["failed early", "needs less", "another order"],
)
async def test_the_latest_task_that_came_far_says_the_order(
    tmp_path: Path, used: list[str], learned: list[str]
) -> None:
    async with rig(tmp_path) as stack:
        stack.taught()
        directory, nodes = stack.watched("second")
        for name in used:
            stack.learning.used(nodes[name].inode)
        stack.learning.ended(directory)
        _directory, third = stack.watched("third")
        stack.learning.used(third[learned[0]].inode)
        await stack.until_cached(*(third[name] for name in learned[1:]))
        assert set(stack.asked("third")) == set(learned[1:])


async def test_switched_off(tmp_path: Path) -> None:
    async with rig(tmp_path, ahead_bytes_max=0) as stack:
        stack.taught()
        _directory, nodes = stack.watched("second")
        stack.learning.used(nodes["c"].inode)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert stack.remote.requests == []
        assert stack.learning.sandboxes == []
    assert not (tmp_path / "kinds.json").exists()
