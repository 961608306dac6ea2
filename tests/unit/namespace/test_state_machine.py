"""Any sequence of operations leaves the namespace as the plain model says, and consistent."""

from pathlib import Path
from typing import Literal

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from stagefs.namespace.node import STAGING_INODE, TASKS_INODE, NodeKind
from stagefs.namespace.store import Namespace
from tests.unit.namespace.tree_machine import NAMES, PICK, SETTINGS, TreeMachine, staged
from tests.unit.namespace.tree_model import Directory, File


class NamespaceMachine(TreeMachine):
    """Directories, links of objects, and what is bound."""

    @precondition(TreeMachine.small)
    @rule(at=PICK, name=NAMES)
    def make_directory(self, at: int, name: str) -> None:
        directory, inode = self.directory(at)
        self.both(
            lambda: self.tree.make(directory, name, Directory(directory)),
            lambda: self.namespace.make_directory(inode, name),
        )

    @rule(at=PICK, name=NAMES, kind=st.sampled_from(["object", "symlink", "fifo"]))
    def make_file(self, at: int, name: str, kind: Literal["object", "symlink", "fifo"]) -> None:
        directory, inode = self.directory(at)
        file = File(f"f{next(self.labels)}", kind)
        make = {
            "object": lambda: self.namespace.register(inode, name, staged(file.label)),
            "symlink": lambda: self.namespace.make_symlink(inode, name, file.label),
            "fifo": lambda: self.namespace.make_special(inode, name, NodeKind.FIFO, 0o644),
        }
        self.both(lambda: self.tree.make(directory, name, file), make[kind])

    @rule(at=PICK, name=NAMES)
    def remove_directory(self, at: int, name: str) -> None:
        directory, inode = self.directory(at)
        self.both(
            lambda: self.tree.remove_directory(directory, name),
            lambda: self.namespace.remove_directory(inode, name),
        )

    @rule(at=PICK, name=NAMES)
    def replace(self, at: int, name: str) -> None:
        directory, inode = self.directory(at)
        name = self.existing(directory, at, name)
        file = File(f"r{next(self.labels)}")
        self.both(
            lambda: self.tree.replace(directory, name, file),
            lambda: self.namespace.replace(inode, name, staged(file.label)),
        )

    @precondition(TreeMachine.small)
    @rule(at=PICK, name=NAMES, writable=st.booleans())
    def bind(self, at: int, name: str, writable: bool) -> None:
        self.bind_one(*self.directory(at), name, writable=writable)

    @rule(
        which=PICK,
        listing=st.dictionaries(NAMES, st.sampled_from(["d", "v1", "v2"]), max_size=3),
    )
    def merge_listing(self, which: int, listing: dict[str, str]) -> None:
        bound = [path for path, directory in self.tree.walk() if directory.bound]
        if bound:
            self.merge_one(bound[which % len(bound)], listing)


NamespaceMachine.TestCase.settings = SETTINGS
TestNamespace = NamespaceMachine.TestCase


def test_fixed_inodes_are_what_they_are_called(tmp_path: Path) -> None:
    namespace = Namespace.open(tmp_path / "namespace.db")
    assert namespace.resolve("staging").inode == STAGING_INODE
    assert namespace.resolve("/tasks/").inode == TASKS_INODE
    namespace.close()
