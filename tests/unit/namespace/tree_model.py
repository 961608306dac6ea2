"""What the namespace must do, on plain dictionaries: the model of the state machine.

Nothing here is lazy but one thing that is part of the behaviour: a subdirectory of a shown
directory is an object of its own in each place, which stays the same as long as the directory
below has the same one under that name.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Literal

_serial = itertools.count()


class Refused(Exception):
    """The system call fails, and nothing changes."""


Kind = Literal["object", "private", "published", "symlink", "fifo"]


class File:
    """Anything that is no directory.  ``base``: the local file that a copy was made of; a copy of
    an object has that one's label.  ``inode`` is what the namespace calls it."""

    def __init__(self, label: str, kind: Kind = "object", *, base: File | None = None) -> None:
        self.label = label
        self.kind = kind
        self.base = base
        self.inode = 0
        self.xattrs: dict[bytes, bytes] = {}

    @property
    def is_local(self) -> bool:
        return self.kind in {"private", "published"}

    def copy(self, *, keep_content: bool) -> File:
        label = self.label if keep_content and self.kind == "object" else ""
        copied = File(label, "private", base=self if keep_content and self.is_local else None)
        copied.xattrs = dict(self.xattrs)
        return copied


class Directory:
    def __init__(
        self, parent: Directory | None, lower: Directory | None = None, *, counted: bool = False
    ) -> None:
        self.serial = next(_serial)
        self.parent = parent
        self.lower = lower
        self.counted = counted
        self.frozen = False
        self.removed = False
        self.bound = False
        self.writable = False
        self.url = ""
        self.is_sandbox = False
        self.xattrs: dict[bytes, bytes] = {} if lower is None else dict(lower.xattrs)
        self.own: dict[str, Own] = {}
        self.shown: dict[str, Directory] = {}

    # Looking

    def ancestors(self) -> Iterator[Directory]:
        at: Directory | None = self
        while at is not None:
            yield at
            at = at.parent

    def sandbox(self) -> Directory | None:
        return next((above for above in self.ancestors() if above.is_sandbox), None)

    def chain(self) -> Iterator[Directory]:
        at: Directory | None = self
        while at is not None:
            yield at
            at = at.lower

    def would_loop(self, shown: Directory) -> bool:
        above = {id(link) for ancestor in self.ancestors() for link in ancestor.chain()}
        return any(id(link) in above for link in shown.chain())

    def view(self) -> dict[str, File | Directory]:
        visible = {n: e.node for n, e in self.own.items() if e.node is not None}
        for name, below in self.below().items():
            if name in self.own:
                continue
            if isinstance(below, File):
                visible[name] = below
                continue
            mine = self.shown.get(name)
            if mine is not None and mine.lower is below:
                visible[name] = mine
                continue
            counted = self.counted and below.frozen
            if counted or not self.would_loop(below):
                if mine is not None:
                    mine.end()
                mine = Directory(self, below, counted=counted)
                visible[name] = self.shown[name] = mine
        return visible

    def below(self) -> dict[str, File | Directory]:
        return self.lower.view() if self.lower is not None and not self.lower.removed else {}

    def is_own(self, name: str) -> bool:
        return name in self.own

    # Changing

    def keep(self) -> None:
        """Something of this place's own happens in here."""
        parent = self.parent
        if parent is None:
            return
        for name, mine in list(parent.shown.items()):
            if mine is self and parent.view().get(name) is self:
                del parent.shown[name]
                parent.own[name] = Own(self, "kept")
                parent.keep()
        for entry in parent.own.values():
            if entry.node is self and entry.origin == "found":
                entry.origin = "kept"
                parent.keep()

    def put(self, name: str, node: File | Directory) -> None:
        self.keep()
        hides = name in self.own and self.bound
        self.own[name] = Own(node, "ours" if hides else "own")
        if isinstance(node, Directory):
            node.parent = self

    def take(self, name: str) -> File | Directory:
        """The name is gone from here, and hidden when something below would show."""
        node = self.view()[name]
        self.keep()
        entry = self.own.pop(name, None)
        shown = self.shown.pop(name, None)
        uploaded = self.writable and isinstance(node, Directory)
        hide = (entry is not None and entry.origin != "own") or shown is not None or uploaded
        if hide or name in self.below():
            self.own[name] = Own(None, "own")
        return node

    def end(self) -> None:
        """The tree below loses its last name."""
        self.removed = True
        self.lower = None
        for entry in self.own.values():
            if isinstance(entry.node, Directory):
                entry.node.end()
        for mine in self.shown.values():
            mine.end()
        self.own.clear()
        self.shown.clear()

    def check_writable(self) -> None:
        if self.removed or self.frozen:
            raise Refused


class Own:
    """``origin``: made here (``ours``: in place of one that is hidden); found in a remote's
    listing; or kept, which is one of the latter (or of the lower directory's) that has something
    of this place's own."""

    def __init__(
        self, node: File | Directory | None, origin: Literal["own", "ours", "found", "kept"]
    ) -> None:
        self.node = node
        self.origin = origin

    @property
    def at_remote(self) -> bool:
        return self.origin in {"found", "kept"}


class Tree:
    def __init__(self) -> None:
        self.root = Directory(None)
        self.staging = Directory(self.root)
        self.tasks = Directory(self.root)
        self.templates = Directory(None)
        self.root.own = {"staging": Own(self.staging, "own"), "tasks": Own(self.tasks, "own")}
        self.template_roots: list[Directory] = []
        # Published files of writable bindings, and where they are to be uploaded.
        self.due: set[tuple[File, str]] = set()

    # Writable bindings

    def gained(self, directory: Directory, name: str, node: File | Directory) -> None:
        if directory.writable and isinstance(node, File) and node.kind == "published":
            self.due.add((node, f"{directory.url}/{name}"))

    def left(self, directory: Directory, name: str, node: File | Directory | None) -> None:
        if directory.writable and isinstance(node, File):
            self.due.discard((node, f"{directory.url}/{name}"))

    def bind_like(self, directory: Directory, name: str, made: Directory) -> None:
        """A directory has its place in ``directory`` from now on."""
        made.bound = made.writable = directory.writable
        made.url = f"{directory.url}/{name}" if directory.writable else ""

    def check_moving(self, source: Directory, name: str, node: Directory, to: Directory) -> None:
        if not (source.writable or to.writable):
            return
        entry = source.own.get(name)
        if source.writable and entry is not None and entry.at_remote:
            raise Refused
        for directory in self._below(node):
            if directory.lower is not None or directory.frozen:
                raise Refused
            if directory.bound != source.writable:
                raise Refused
            for below in directory.own.values():
                of_remote = isinstance(below.node, Directory) or (
                    below.node is not None and below.node.kind == "object"
                )
                if below.at_remote and of_remote:
                    raise Refused

    def _below(self, directory: Directory) -> Iterator[Directory]:
        yield directory
        for entry in directory.own.values():
            if isinstance(entry.node, Directory):
                yield from self._below(entry.node)

    def moved(self, source: Directory, node: Directory, target: Directory, name: str) -> None:
        if not (source.writable or target.writable):
            return
        for directory in self._below(node):
            for child, entry in directory.own.items():
                self.left(directory, child, entry.node)
        self.bind_like(target, name, node)
        for directory in self._below(node):
            for child, entry in directory.own.items():
                if isinstance(entry.node, Directory):
                    self.bind_like(directory, child, entry.node)
                elif entry.node is not None:
                    self.gained(directory, child, entry.node)

    def check_replacing(self, directory: Directory, name: str, node: File | Directory) -> None:
        entry = directory.own.get(name)
        is_file = isinstance(node, File) and (node.is_local or node.kind == "object")
        if directory.writable and is_file and entry is not None and entry.at_remote:
            raise Refused

    def walk(self) -> Iterator[tuple[str, Directory]]:
        for top, prefix in ((self.root, ""), (self.templates, "template")):
            yield from self._walk(top, prefix)

    def _walk(self, directory: Directory, path: str) -> Iterator[tuple[str, Directory]]:
        yield path, directory
        for name, node in sorted(directory.view().items()):
            if isinstance(node, Directory):
                yield from self._walk(node, f"{path}/{name}")

    def links(self) -> dict[File, int]:
        """Names of each file, with those that sandboxes show from their template."""
        count: dict[File, int] = {}
        for _path, directory in self.walk():
            for name, node in directory.view().items():
                if isinstance(node, File) and (directory.is_own(name) or directory.counted):
                    count[node] = count.get(node, 0) + 1
        return count

    def make(self, directory: Directory, name: str, node: File | Directory) -> None:
        directory.check_writable()
        if name in directory.view():
            raise Refused
        if isinstance(node, Directory) and directory.writable:
            if node.bound:
                raise Refused
            self.bind_like(directory, name, node)
        directory.put(name, node)
        self.gained(directory, name, node)

    def create_file(self, directory: Directory, name: str, file: File) -> None:
        directory.check_writable()
        if directory.bound and not directory.writable:
            raise Refused
        self.make(directory, name, file)

    def copy_up(self, directory: Directory, name: str, shared: File, copied: File) -> None:
        directory.check_writable()
        found = directory.view().get(name)
        if found is not shared or shared.kind not in {"object", "published"}:
            raise Refused
        self.replace(directory, name, copied)

    def publish(self, node: File | Directory) -> None:
        if isinstance(node, Directory):
            for entry in node.own.values():
                if entry.node is not None:
                    self.publish(entry.node)
        elif node.kind == "private":
            node.kind = "published"
            for _path, directory in self.walk():
                for name, entry in directory.own.items():
                    if entry.node is node:
                        self.gained(directory, name, node)

    def link_directory(self, target: Directory, directory: Directory, name: str) -> None:
        directory.check_writable()
        if name in directory.view() or directory.would_loop(target):
            raise Refused
        target.keep()
        directory.put(name, Directory(directory, target))

    def remove(self, directory: Directory, name: str) -> None:
        directory.check_writable()
        if not isinstance(directory.view().get(name), File):
            raise Refused
        self.left(directory, name, directory.take(name))

    def remove_directory(self, directory: Directory, name: str) -> None:
        directory.check_writable()
        node = directory.view().get(name)
        if not isinstance(node, Directory) or node.view() or self._is_fixed(node):
            raise Refused
        directory.take(name)
        node.end()

    def remove_tree(self, directory: Directory, name: str) -> None:
        directory.check_writable()
        node = directory.view().get(name)
        if node is None or self._is_fixed(node):
            raise Refused
        if isinstance(node, Directory) and any(
            node in template.ancestors() for template in self._live_templates()
        ):
            raise Refused
        self.left(directory, name, directory.take(name))
        if isinstance(node, Directory):
            node.end()

    def _live_templates(self) -> list[Directory]:
        lowers = {id(d.lower) for _path, d in self.walk() if d.lower is not None}
        return [template for template in self.template_roots if id(template) in lowers]

    def _is_fixed(self, node: File | Directory) -> bool:
        return node in (self.root, self.staging, self.tasks, self.templates)

    def rename(
        self,
        source: Directory,
        name: str,
        target: Directory,
        new_name: str,
        flags: int,
        *,
        publish: bool,
    ) -> None:
        moved = source.view().get(name)
        self._rename(source, name, target, new_name, flags)
        if publish and moved is not None:
            self.publish(moved)

    def _rename(
        self, source: Directory, name: str, target: Directory, new_name: str, flags: int
    ) -> None:
        source.check_writable()
        target.check_writable()
        moved, there = source.view().get(name), target.view().get(new_name)
        if moved is None or self._is_fixed(moved) or self._below_itself(moved, source, target):
            raise Refused
        if flags == 2:
            self._exchange(source, name, target, new_name)
            return
        if flags == 1 and there is not None:
            raise Refused
        if there is moved:
            return
        if isinstance(moved, Directory):
            self.check_moving(source, name, moved, target)
        if there is not None:
            self._check_replaceable(moved, there)
            self.check_replacing(target, new_name, there)
        target.keep()
        self.left(source, name, source.take(name))
        if there is not None:
            self.left(target, new_name, target.take(new_name))
            if isinstance(there, Directory):
                there.end()
        target.put(new_name, moved)
        self.gained(target, new_name, moved)
        if isinstance(moved, Directory):
            self.moved(source, moved, target, new_name)

    @staticmethod
    def _below_itself(node: File | Directory, source: Directory, target: Directory) -> bool:
        return isinstance(node, Directory) and source is not target and target.would_loop(node)

    def _check_replaceable(self, moved: File | Directory, there: File | Directory) -> None:
        if isinstance(moved, File) != isinstance(there, File) or self._is_fixed(there):
            raise Refused
        if isinstance(there, Directory) and there.view():
            raise Refused

    def _exchange(self, source: Directory, name: str, target: Directory, new_name: str) -> None:
        moved, there = source.view()[name], target.view().get(new_name)
        if there is None or self._is_fixed(there) or self._below_itself(there, target, source):
            raise Refused
        if moved is there:
            return
        if source.writable or target.writable:
            if isinstance(moved, Directory) or isinstance(there, Directory):
                raise Refused
            self.check_replacing(source, name, moved)
            self.check_replacing(target, new_name, there)
        source.keep()
        target.keep()
        self.left(source, name, moved)
        self.left(target, new_name, there)
        for directory, at, node in ((source, name, there), (target, new_name, moved)):
            entry = directory.own.get(at)
            from_remote = directory.bound and entry is not None and entry.origin != "own"
            directory.shown.pop(at, None)
            directory.own[at] = Own(node, "kept" if from_remote else "own")
            self.gained(directory, at, node)
            if isinstance(node, Directory):
                node.parent = directory

    def replace(self, directory: Directory, name: str, file: File) -> None:
        directory.check_writable()
        if not isinstance(directory.view().get(name), File):
            raise Refused
        directory.keep()
        entry = directory.own.get(name)
        from_remote = directory.bound and entry is not None and entry.origin != "own"
        self.left(directory, name, directory.view()[name])
        directory.own[name] = Own(file, "kept" if from_remote else "own")

    def instantiate(self, template: Directory, directory: Directory, names: list[str]) -> None:
        directory.check_writable()
        if (
            self._is_fixed(template)
            or template.lower is not None
            or template.bound
            or template.removed
            or template in directory.ancestors()
            or any(name in directory.view() for name in names)
        ):
            raise Refused
        self._freeze(template)
        if template not in self.template_roots:
            self.template_roots.append(template)
        for name in names:
            directory.put(name, Directory(directory, template, counted=True))

    def _freeze(self, directory: Directory) -> None:
        directory.frozen = True
        for entry in directory.own.values():
            node = entry.node
            if isinstance(node, Directory) and node.lower is None and not node.bound:
                self._freeze(node)

    def merge(self, directory: Directory, listing: dict[str, File | None]) -> None:
        """A listing: files, and None for subdirectories."""
        for name, found in listing.items():
            entry = directory.own.get(name)
            if entry is not None and entry.origin != "found":
                continue
            old = entry.node if entry is not None else None
            if found is None:
                if not isinstance(old, Directory):
                    made = Directory(directory)
                    made.bound = True
                    made.writable = directory.writable
                    made.url = f"{directory.url}/{name}"
                    directory.own[name] = Own(made, "found")
            elif not isinstance(old, File) or old.label != found.label:
                directory.own[name] = Own(found, "found")
                if isinstance(old, Directory):
                    old.end()
        for name, entry in list(directory.own.items()):
            if entry.origin == "found" and name not in listing:
                del directory.own[name]
                if isinstance(entry.node, Directory):
                    entry.node.end()
