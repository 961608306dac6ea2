"""Any sequence of operations leaves the namespace as the plain model says, and consistent."""

import itertools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

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
from tests.unit.namespace.tree_model import Directory, File, Refused, Tree

NAMES = st.sampled_from(["a", "b", "c"])
PICK = st.integers(0, 1 << 16)
DIRECTORIES_MAX = 40
OVERLAYS_MAX = 4


def staged(label: str) -> StagedObject:
    return StagedObject(url=f"memory://x/{label}", version=label, size_bytes=3, mtime_ns=7)


class NamespaceMachine(RuleBasedStateMachine):
    """Directories are chosen by their path in the model; files are told apart by their label."""

    def __init__(self) -> None:
        super().__init__()
        self.scratch = tempfile.mkdtemp()
        self.path = Path(self.scratch) / "namespace.db"
        self.namespace = Namespace.open(self.path)
        self.tree = Tree()
        self.labels = itertools.count()
        self.overlays = 0

    def teardown(self) -> None:
        self.namespace.close()
        shutil.rmtree(self.scratch)

    @initialize(templates=st.integers(0, 2), links=st.integers(0, 2))
    def begin_with_something(self, templates: int, links: int) -> None:
        """staging/a/a and staging/b; a template with a, b/c; sandboxes and linked directories."""
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

    def file(self, pick: int) -> tuple[File, Inode] | None:
        choices = [
            (node, path, name)
            for path, directory in self.tree.walk()
            for name, node in sorted(directory.view().items())
            if isinstance(node, File)
        ]
        if not choices:
            return None
        node, path, name = choices[pick % len(choices)]
        return node, self.namespace.lookup(self.inode(path), name).inode

    def both(self, model: Callable[[], None], real: Callable[[], object]) -> None:
        """Both do it, or both refuse."""
        try:
            model()
        except Refused:
            with pytest.raises(StageFSError):
                real()
        else:
            real()

    def small(self) -> bool:
        return sum(1 for _ in self.tree.walk()) < DIRECTORIES_MAX

    def few_overlays(self) -> bool:
        return self.overlays < OVERLAYS_MAX and self.small()

    # Changing

    @precondition(small)
    @rule(at=PICK, name=NAMES)
    def make_directory(self, at: int, name: str) -> None:
        directory, inode = self.directory(at)
        self.both(
            lambda: self.tree.make(directory, name, Directory(directory)),
            lambda: self.namespace.make_directory(inode, name),
        )

    @rule(at=PICK, name=NAMES, is_symlink=st.booleans())
    def make_file(self, at: int, name: str, is_symlink: bool) -> None:
        directory, inode = self.directory(at)
        file = File(f"f{next(self.labels)}", is_symlink=is_symlink)
        self.both(
            lambda: self.tree.make(directory, name, file),
            lambda: (
                self.namespace.make_symlink(inode, name, file.label)
                if is_symlink
                else self.namespace.register(inode, name, staged(file.label))
            ),
        )

    @rule(which=PICK, at=PICK, name=NAMES)
    def link(self, which: int, at: int, name: str) -> None:
        chosen = self.file(which)
        if chosen is None:
            return
        file, file_inode = chosen
        directory, inode = self.directory(at)
        self.both(
            lambda: self.tree.make(directory, name, file),
            lambda: self.namespace.link(file_inode, inode, name),
        )

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
        self.both(
            lambda: self.tree.remove(directory, name), lambda: self.namespace.remove(inode, name)
        )

    @rule(at=PICK, name=NAMES)
    def remove_directory(self, at: int, name: str) -> None:
        directory, inode = self.directory(at)
        self.both(
            lambda: self.tree.remove_directory(directory, name),
            lambda: self.namespace.remove_directory(inode, name),
        )

    @rule(at=PICK, name=NAMES)
    def remove_tree(self, at: int, name: str) -> None:
        directory, inode = self.directory(at)
        self.both(
            lambda: self.tree.remove_tree(directory, name),
            lambda: self.namespace.remove_tree(inode, name),
        )

    @rule(at=PICK, name=NAMES, to=PICK, new_name=NAMES, flags=st.sampled_from([0, 0, 0, 1, 2]))
    def rename(self, at: int, name: str, to: int, new_name: str, flags: int) -> None:
        source, source_inode = self.directory(at)
        target, target_inode = self.directory(to)
        self.both(
            lambda: self.tree.rename(source, name, target, new_name, flags),
            lambda: self.namespace.rename(source_inode, name, target_inode, new_name, flags),
        )

    @rule(at=PICK, name=NAMES)
    def replace(self, at: int, name: str) -> None:
        directory, inode = self.directory(at)
        file = File(f"r{next(self.labels)}")
        self.both(
            lambda: self.tree.replace(directory, name, file),
            lambda: self.namespace.replace(inode, name, staged(file.label)),
        )

    @precondition(small)
    @rule(at=PICK, name=NAMES)
    def bind(self, at: int, name: str) -> None:
        directory, inode = self.directory(at)
        made = Directory(directory)
        made.bound = True
        self.both(
            lambda: self.tree.make(directory, name, made),
            lambda: self.namespace.bind(inode, name, "memory://bound", 60.0),
        )

    @rule(
        which=PICK,
        listing=st.dictionaries(NAMES, st.sampled_from(["d", "v1", "v2"]), max_size=3),
    )
    def merge_listing(self, which: int, listing: dict[str, str]) -> None:
        bound = [(path, d) for path, d in self.tree.walk() if d.bound]
        if not bound:
            return
        path, directory = bound[which % len(bound)]
        inode = self.inode(path)
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
        while self.namespace.purge():
            pass
        self.namespace.drop_unlinked()

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
            if isinstance(node, Directory):
                assert listed[name].kind is NodeKind.DIRECTORY
                assert self.namespace.parent(listed[name].inode) == inode
                self.compare(node, listed[name].inode, seen, links)
            else:
                self.compare_file(node, listed[name], links)
                assert seen.setdefault(node, listed[name].inode) == listed[name].inode

    @staticmethod
    def compare_file(file: File, node: Node, links: dict[File, int]) -> None:
        if file.is_symlink:
            assert (node.kind, node.target) == (NodeKind.SYMLINK, file.label)
        else:
            assert node.object_id is not None
            assert (node.kind, node.object_id.version) == (NodeKind.FILE, file.label)
        assert node.nlink == links[file]

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
    def is_consistent(self) -> None:
        assert problems(self.path) == []


NamespaceMachine.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestNamespace = NamespaceMachine.TestCase


def test_fixed_inodes_are_what_they_are_called(tmp_path: Path) -> None:
    namespace = Namespace.open(tmp_path / "namespace.db")
    assert namespace.resolve("staging").inode == STAGING_INODE
    assert namespace.resolve("/tasks/").inode == TASKS_INODE
    namespace.close()
