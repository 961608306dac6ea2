"""Whose copy a write goes to, decided on a real namespace; the kernel's part is played here."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from stagefs.errors import ReadOnly, RepeatLookup
from stagefs.fuse.operations_log import PendingLookups, SharedMemory
from stagefs.model import Inode, OnWrite
from stagefs.namespace.node import (
    STAGING_INODE,
    TASKS_INODE,
    ContentKind,
    Node,
    SandboxRow,
    StagedObject,
)
from stagefs.namespace.store import Namespace
from stagefs.supervisor import memory as supervisors
from stagefs.vfs.copying import Copying

THREAD, OTHER = 1234, 1235


class Rig:
    """tasks/t/in and tasks/u/in are links of staging/in."""

    def __init__(self, path: Path, default: OnWrite) -> None:
        supervisor = supervisors.SharedMemory(can_resend=True)
        supervisor.begin_generation(None, first=True)
        self.memory = supervisor
        self.namespace = Namespace.open(path)
        self.default = default
        self.relinked: list[Inode] = []
        self.renamed: list[tuple[Inode, str]] = []
        staged = StagedObject(url="memory://x/in", version="1", size_bytes=3, mtime_ns=7)
        self.shared = self.namespace.register(STAGING_INODE, "in", staged)
        self.tasks = {
            name: self.namespace.make_directory(TASKS_INODE, name).inode for name in ("t", "u")
        }
        for directory in self.tasks.values():
            self.namespace.link(self.shared.inode, directory, "in")

    def copying(self) -> Copying:
        """As the next daemon makes it."""
        pending: PendingLookups = SharedMemory(
            self.memory.fd, call_soon=lambda _action: None
        ).pending
        return Copying(
            namespace=self.namespace,
            pending=pending,
            default=self.default,
            live=lambda node: node,
            links_changed=self.relinked.append,
            name_changed=lambda directory, name: self.renamed.append((directory, name)),
        )

    def looked_up(self, copying: Copying, task: str, thread: int = THREAD) -> Node:
        """The thread's LOOKUP of tasks/TASK/in."""
        node = self.namespace.lookup(self.tasks[task], "in")
        if not copying.pending.wants_copy_up(thread, node.inode):
            return node
        return copying.resolve(self.tasks[task], "in", node, thread)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path / "namespace.db", OnWrite.COPY_UP)
    yield made
    made.namespace.close()


def test_the_name_that_is_walked_gets_the_copy(rig: Rig) -> None:
    copying = rig.copying()
    assert isinstance(copying.walk_again(rig.shared, THREAD), RepeatLookup)
    copy = rig.looked_up(copying, "t")
    assert copy.inode != rig.shared.inode
    assert (copy.content, copy.base_bytes) == (ContentKind.PRIVATE, 3)
    assert rig.looked_up(copying, "t") == copy
    assert rig.looked_up(copying, "u").inode == rig.shared.inode
    assert rig.relinked == [rig.shared.inode]
    assert copying.copied == 1


def test_a_lookup_that_was_not_asked_for_copies_nothing(rig: Rig) -> None:
    copying = rig.copying()
    copying.walk_again(rig.shared, THREAD)
    assert rig.looked_up(copying, "t", OTHER).inode == rig.shared.inode
    copying.pending.drop(THREAD)
    assert rig.looked_up(copying, "t").inode == rig.shared.inode
    assert copying.copied == 0


def test_what_was_asked_for_outlives_the_daemon(rig: Rig) -> None:
    rig.copying().walk_again(rig.shared, THREAD)
    survivor = rig.copying()
    assert rig.looked_up(survivor, "u").inode != rig.shared.inode
    assert rig.looked_up(rig.copying(), "t").inode == rig.shared.inode


def test_a_copy_that_a_dead_daemon_made_is_found_and_not_made_again(rig: Rig) -> None:
    copying = rig.copying()
    copying.walk_again(rig.shared, THREAD)
    made = rig.namespace.copy_up(rig.tasks["t"], "in", rig.shared.inode)
    assert rig.looked_up(rig.copying(), "t").inode == made.inode
    assert rig.relinked == []


def test_a_caller_whose_thread_is_unknown_is_refused(rig: Rig) -> None:
    assert isinstance(rig.copying().walk_again(rig.shared, 0), ReadOnly)


def test_a_read_only_sandbox_keeps_its_inputs(rig: Rig) -> None:
    row = SandboxRow(inode=rig.tasks["t"], state="active", on_write=OnWrite.READ_ONLY)
    rig.namespace.put_sandbox(row)
    copying = rig.copying()
    copying.walk_again(rig.shared, THREAD)
    assert rig.looked_up(copying, "t").inode == rig.shared.inode
    refusal = copying.refusal(rig.shared.inode, THREAD)
    assert refusal is not None
    assert "read-only sandbox" in str(refusal)
    # The other sandbox is asked for itself.
    copying.walk_again(rig.shared, THREAD)
    assert rig.looked_up(copying, "u").inode != rig.shared.inode
