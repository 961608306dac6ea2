"""What the state machines of the namespace share: a tree of both kinds, choosing, comparing.

Directories are chosen by their path in the model, files by what they are there.
"""

import itertools
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar, get_args

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from stagefs.errors import NotFound, StageFSError
from stagefs.model import ROOT_INODE, EntryKind, Inode, ListedEntry, ObjectInfo
from stagefs.namespace.check import problems
from stagefs.namespace.node import (
    STAGING_INODE,
    TASKS_INODE,
    TEMPLATES_INODE,
    Node,
    NodeKind,
    StagedObject,
)
from stagefs.namespace.store import Namespace
from tests.unit.namespace.tree_model import Directory, File, Kind, Refused, Tree

NAMES = st.sampled_from(["a", "b", "c"])
PICK = st.integers(0, 1 << 16)
BOOL = st.booleans()
KINDS: frozenset[Kind] = frozenset(get_args(Kind))
T = TypeVar("T")
DIRECTORIES_MAX = 40
OVERLAYS_MAX = 4
SETTINGS = settings(
    max_examples=150,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


def staged(label: str) -> StagedObject:
    return StagedObject(url=f"memory://x/{label}", version=label, size_bytes=3, mtime_ns=7)


class TreeMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.scratch = tempfile.mkdtemp()
        self.path = Path(self.scratch) / "namespace.db"
        self.namespace = Namespace.open(self.path)
        self.tree = Tree()
        self.labels = itertools.count()
        self.overlays = 0
        # Local files that were not dropped yet.
        self.local: list[File] = []

    def teardown(self) -> None:
        self.namespace.close()
        shutil.rmtree(self.scratch)

    @initialize(templates=st.integers(0, 2), links=st.integers(0, 2), more=st.booleans())
    def begin_with_something(self, templates: int, links: int, more: bool) -> None:
        """staging/a/a and staging/b; a template with a, b/c; sandboxes and linked directories.

        ``more``: the published file staging/a/b, the private staging/a/c/a, a binding staging/c."""
        staging, tasks, template_top = self.tree.staging, self.tree.tasks, self.tree.templates
        data = self.make(staging, STAGING_INODE, "a")
        self.make_one_file(*data, "a")
        self.make_one_file(staging, STAGING_INODE, "b")
        template = self.make(template_top, TEMPLATES_INODE, "a")
        below = self.make(*template, "b")
        for directory, inode, name in ((*template, "a"), (*below, "c")):
            file = staging.view()["b"]
            assert isinstance(file, File)
            self.tree.make(directory, name, file)
            self.namespace.link(self.namespace.lookup(STAGING_INODE, "b").inode, inode, name)
        if more:
            for directory, inode, name in ((*data, "b"), (*self.make(*data, "c"), "a")):
                self.create(directory, inode, name)
            self.tree.publish(data[0].view()["b"])
            self.namespace.publish([self.namespace.lookup(data[1], "b").inode])
            self.bind_one(staging, STAGING_INODE, "c", writable=True)
            self.merge_one("/staging/c", {"a": "v1", "b": "d", "c": "v1"})
        if templates:
            names = ["a", "b"][:templates]
            self.tree.instantiate(template[0], tasks, names)
            self.namespace.instantiate_template(template[1], TASKS_INODE, names)
        if links:
            self.tree.link_directory(data[0], tasks, "c")
            self.namespace.link_directory(data[1], TASKS_INODE, "c")
        if links == 2:
            self.tree.link_directory(tasks, template_top, "b")
            self.namespace.link_directory(TASKS_INODE, TEMPLATES_INODE, "b")

    def make(self, directory: Directory, inode: Inode, name: str) -> tuple[Directory, Inode]:
        made = Directory(directory)
        self.tree.make(directory, name, made)
        return made, self.namespace.make_directory(inode, name).inode

    def make_one_file(self, directory: Directory, inode: Inode, name: str) -> None:
        file = File(f"f{next(self.labels)}")
        self.tree.make(directory, name, file)
        self.namespace.register(inode, name, staged(file.label))

    # Choosing

    def directory(self, pick: int) -> tuple[Directory, Inode]:
        choices = list(self.tree.walk())
        path, directory = choices[pick % len(choices)]
        return directory, self.inode(path)

    def inode(self, path: str) -> Inode:
        if path.startswith("template"):
            inode = TEMPLATES_INODE
            for part in path.split("/")[1:]:
                inode = self.namespace.lookup(inode, part).inode
            return inode
        return self.namespace.resolve(path).inode

    def file(self, pick: int, kinds: Collection[Kind] = KINDS) -> tuple[File, Inode] | None:
        place = self.place(pick, kinds)
        return None if place is None else place[3:]

    def place(
        self, pick: int, kinds: Collection[Kind] = KINDS
    ) -> tuple[Directory, Inode, str, File, Inode] | None:
        """A name of a file: where it is, and what."""
        choices = [
            (directory, path, name, node)
            for path, directory in self.tree.walk()
            for name, node in sorted(directory.view().items())
            if isinstance(node, File) and node.kind in kinds
        ]
        if not choices:
            return None
        directory, path, name, node = choices[pick % len(choices)]
        inode = self.inode(path)
        return directory, inode, name, node, self.namespace.lookup(inode, name).inode

    def both(self, model: Callable[[], None], real: Callable[[], T]) -> T | None:
        """Both do it, or both refuse; what the namespace gave."""
        try:
            model()
        except Refused:
            with pytest.raises(StageFSError):
                real()
            return None
        return real()

    def existing(self, directory: Directory, pick: int, name: str) -> str:
        """A name that is there, three times out of four if there is one."""
        names = sorted(directory.view())
        return names[pick % len(names)] if names and pick % 4 else name

    def small(self) -> bool:
        return sum(1 for _ in self.tree.walk()) < DIRECTORIES_MAX

    def few_overlays(self) -> bool:
        return self.overlays < OVERLAYS_MAX and self.small()

    # Changing

    def create(self, directory: Directory, inode: Inode, name: str) -> None:
        file = File("", "private")
        made = self.both(
            lambda: self.tree.create_file(directory, name, file),
            lambda: self.namespace.create_file(inode, name, 0o644),
        )
        self.remember(file, made)

    def remember(self, file: File, made: Node | None) -> None:
        if made is not None:
            file.inode = made.inode
            self.local.append(file)

    @rule(which=PICK, at=PICK, name=NAMES, publish=BOOL)
    def link(self, which: int, at: int, name: str, publish: bool) -> None:
        chosen = self.file(which)
        if chosen is None:
            return
        file, file_inode = chosen
        directory, inode = self.directory(at)
        made = self.both(
            lambda: self.tree.make(directory, name, file),
            lambda: self.namespace.link(file_inode, inode, name, publish=publish),
        )
        if publish and made is not None:
            self.tree.publish(file)

    @precondition(few_overlays)
    @rule(which=PICK, at=PICK, name=NAMES)
    def link_directory(self, which: int, at: int, name: str) -> None:
        target, target_inode = self.directory(which)
        directory, inode = self.directory(at)
        self.overlays += 1
        self.both(
            lambda: self.tree.link_directory(target, directory, name),
            lambda: self.namespace.link_directory(target_inode, inode, name),
        )

    @precondition(few_overlays)
    @rule(which=PICK, at=PICK, names=st.lists(NAMES, min_size=1, max_size=2, unique=True))
    def instantiate_template(self, which: int, at: int, names: list[str]) -> None:
        template, template_inode = self.directory(which)
        directory, inode = self.directory(at)
        self.overlays += 1
        self.both(
            lambda: self.tree.instantiate(template, directory, names),
            lambda: self.namespace.instantiate_template(template_inode, inode, names),
        )

    @rule(at=PICK, name=NAMES)
    def remove(self, at: int, name: str) -> None:
        directory, inode = self.directory(at)
        name = self.existing(directory, at, name)
        self.both(
            lambda: self.tree.remove(directory, name), lambda: self.namespace.remove(inode, name)
        )

    @rule(at=PICK, name=NAMES)
    def remove_tree(self, at: int, name: str) -> None:
        directory, inode = self.directory(at)
        name = self.existing(directory, at, name)
        self.both(
            lambda: self.tree.remove_tree(directory, name),
            lambda: self.namespace.remove_tree(inode, name),
        )

    @rule(
        at=PICK,
        name=NAMES,
        to=PICK,
        new_name=NAMES,
        flags=st.sampled_from([0, 0, 0, 1, 2]),
        publish=st.booleans(),
    )
    def rename(self, at: int, name: str, to: int, new_name: str, flags: int, publish: bool) -> None:
        source, source_inode = self.directory(at)
        target, target_inode = self.directory(to)
        name = self.existing(source, at, name)
        self.both(
            lambda: self.tree.rename(source, name, target, new_name, flags, publish=publish),
            lambda: self.namespace.rename(
                source_inode, name, target_inode, new_name, flags, publish=publish
            ),
        )

    def bind_one(self, directory: Directory, inode: Inode, name: str, *, writable: bool) -> None:
        made = Directory(directory)
        made.bound = True
        made.writable = writable
        made.url = "memory://bound"
        self.both(
            lambda: self.tree.make(directory, name, made),
            lambda: self.namespace.bind(inode, name, "memory://bound", 60.0, writable=writable),
        )

    def merge_one(self, path: str, listing: dict[str, str]) -> None:
        directory, inode = dict(self.tree.walk())[path], self.inode(path)
        found = {
            name: None if what == "d" else File(f"{inode}-{name}-{what}")
            for name, what in listing.items()
        }
        self.tree.merge(directory, found)
        self.namespace.merge_listing(
            inode,
            [
                ListedEntry(name, EntryKind.DIRECTORY, f"memory://bound/{name}")
                if file is None
                else ListedEntry(
                    name,
                    EntryKind.FILE,
                    f"memory://x/{file.label}",
                    ObjectInfo(f"memory://x/{file.label}", 3, file.label),
                )
                for name, file in found.items()
            ],
            now_ns=1,
        )

    @rule()
    def open_again(self) -> None:
        self.namespace.close()
        self.namespace = Namespace.open(self.path)

    @rule()
    def forget(self) -> None:
        self.namespace.drop_unlinked()
        unlinked = self.unlinked()
        self.local = [file for file in self.local if file not in unlinked]

    def unlinked(self) -> list[File]:
        links, bases = self.tree.links(), {file.base for file in self.local}
        owed = {file for file, _url in self.tree.due}
        return [
            file
            for file in self.local
            if file not in links and file not in bases and file not in owed
        ]

    # Comparing

    @invariant()
    def shows_what_the_model_shows(self) -> None:
        seen: dict[File, Inode] = {}
        links = self.tree.links()
        self.compare(self.tree.root, ROOT_INODE, seen, links)
        self.compare(self.tree.templates, TEMPLATES_INODE, seen, links)
        inodes = list(seen.values())
        assert len(set(inodes)) == len(inodes), "two files share an inode"

    def compare(
        self,
        directory: Directory,
        inode: Inode,
        seen: dict[File, Inode],
        links: dict[File, int],
    ) -> None:
        expected = directory.view()
        listed = self.listing(inode)
        assert sorted(listed) == sorted(expected)
        for absent in {"a", "b", "c"} - expected.keys():
            with pytest.raises(NotFound):
                self.namespace.lookup(inode, absent)
        for name, node in expected.items():
            assert self.namespace.lookup(inode, name) == listed[name]
            self.compare_xattrs(node.xattrs, listed[name])
            if isinstance(node, Directory):
                assert listed[name].kind is NodeKind.DIRECTORY
                self.compare_sandbox(node, listed[name].inode)
                assert self.namespace.parent(listed[name].inode) == inode
                self.compare(node, listed[name].inode, seen, links)
            else:
                self.compare_file(node, listed[name], links)
                assert seen.setdefault(node, listed[name].inode) == listed[name].inode

    @staticmethod
    def compare_file(file: File, node: Node, links: dict[File, int]) -> None:
        if file.kind == "symlink":
            assert (node.kind, node.target) == (NodeKind.SYMLINK, file.label)
        elif file.kind == "fifo":
            assert node.kind is NodeKind.FIFO
        else:
            assert (node.kind, node.content.name.lower()) == (NodeKind.FILE, file.kind)
            assert (node.object_id.version if node.object_id else "") == file.label
            assert node.lower == (file.base.inode if file.base else 0)
            assert not file.is_local or node.inode == file.inode
        assert node.nlink == links[file]

    def compare_xattrs(self, expected: dict[bytes, bytes], node: Node) -> None:
        assert node.has_xattrs == bool(expected)
        names = self.namespace.xattrs(node.inode)
        assert {name: self.namespace.xattr(node.inode, name) for name in names} == expected

    def compare_sandbox(self, directory: Directory, inode: Inode) -> None:
        expected, row = directory.sandbox(), self.namespace.sandbox_of(inode)
        assert (row is None) == (expected is None)
        assert row is None or (row.inode == inode) == (expected is directory)
        assert (self.namespace.sandbox(inode) is not None) == directory.is_sandbox

    def listing(self, inode: Inode) -> dict[str, Node]:
        """In pages of two, so that every directory takes several."""
        found: dict[str, Node] = {}
        after = 0
        while page := self.namespace.page(inode, after, 2):
            for cookie, name, node in page:
                assert cookie > after
                assert name not in found
                after, found[name] = cookie, node
        return found

    @invariant()
    def knows_its_content_and_its_sandboxes(self) -> None:
        while self.namespace.purge():
            pass
        unlinked = {file.inode for file in self.unlinked()}
        assert set(self.namespace.unlinked_content(1000)) == unlinked
        due = {(one.inode, one.url) for one in self.namespace.due_uploads(1000)}
        assert due == {(file.inode, url) for file, url in self.tree.due}
        assert self.namespace.content_inodes() == {file.inode for file in self.local}
        sandboxes = {self.inode(path) for path, d in self.tree.walk() if d.is_sandbox}
        assert {row.inode for row in self.namespace.sandboxes()} == sandboxes

    @invariant()
    def is_consistent(self) -> None:
        assert problems(self.path) == []
