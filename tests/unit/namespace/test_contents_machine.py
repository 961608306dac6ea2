"""Any sequence of making, copying, publishing and removing local files, too."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import rule

from stagefs.errors import NoAttribute
from stagefs.namespace.node import SandboxRow
from tests.unit.namespace.tree_machine import BOOL, KINDS, NAMES, PICK, SETTINGS, TreeMachine
from tests.unit.namespace.tree_model import Kind

PRIVATE: frozenset[Kind] = frozenset({"private"})
PUBLISHED: frozenset[Kind] = frozenset({"published"})
SHARED: frozenset[Kind] = frozenset({"object", "published"})
WANTED = (PUBLISHED, PUBLISHED, SHARED, KINDS)
XATTRS = st.sampled_from([b"user.a", b"user.b"])


class ContentsMachine(TreeMachine):
    """Local files, their copies and attributes, and sandboxes."""

    @rule(at=PICK, name=NAMES)
    def create_file(self, at: int, name: str) -> None:
        self.create(*self.directory(at), name)

    @rule(which=PICK, other=PICK, right=st.sampled_from([True, True, True, False]), keep=BOOL)
    def copy_up(self, which: int, other: int, right: bool, keep: bool) -> None:
        place = self.place(which, WANTED[which % 4])
        another = self.file(other)
        if place is None or another is None:
            return
        directory, inode, name, shared, shared_inode = place
        if not right:
            shared, shared_inode = another
        copied = shared.copy(keep_content=keep)
        made = self.both(
            lambda: self.tree.copy_up(directory, name, shared, copied),
            lambda: self.namespace.copy_up(inode, name, shared_inode, keep_content=keep),
        )
        self.remember(copied, made)

    @rule(which=st.lists(PICK, min_size=1, max_size=3))
    def publish(self, which: list[int]) -> None:
        kinds = KINDS if len(which) == 3 else PRIVATE
        chosen = [found for pick in which if (found := self.file(pick, kinds)) is not None]
        for file, _inode in chosen:
            self.tree.publish(file)
        self.namespace.publish([inode for _file, inode in chosen])

    @rule(which=PICK, directory=BOOL, name=XATTRS, value=st.sampled_from([b"", b"1", b"2"]))
    def set_xattr(self, which: int, directory: bool, name: bytes, value: bytes) -> None:
        chosen = self.directory(which) if directory else self.file(which)
        if chosen is not None:
            node, inode = chosen
            node.xattrs[name] = value
            self.namespace.set_xattr(inode, name, value)

    @rule(which=PICK, directory=BOOL, name=XATTRS)
    def remove_xattr(self, which: int, directory: bool, name: bytes) -> None:
        chosen = self.directory(which) if directory else self.file(which)
        if chosen is None:
            return
        node, inode = chosen
        if node.xattrs.pop(name, None) is None:
            with pytest.raises(NoAttribute):
                self.namespace.remove_xattr(inode, name)
        else:
            self.namespace.remove_xattr(inode, name)

    @rule(which=PICK)
    def put_sandbox(self, which: int) -> None:
        directory, inode = self.directory(which)
        directory.is_sandbox = True
        self.namespace.put_sandbox(SandboxRow(inode=inode, state="active", on_write="copy-up"))


ContentsMachine.TestCase.settings = SETTINGS
TestContents = ContentsMachine.TestCase
