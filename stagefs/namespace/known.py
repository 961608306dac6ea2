"""Names and nodes that were asked for, kept in memory so that asking again costs no SQL.

Bounded by emptying: what is in use comes back at a few microseconds each.  Holds only what
exists; names that are not there are the kernel's to remember.
"""

from collections.abc import Callable, Iterable

from stagefs.model import Inode
from stagefs.namespace.node import Node, SandboxRow

# Names, and as many nodes: about 30 MB.
KNOWN_MAX = 40_000


class Known:
    """``nodes`` by inode; ``names`` by directory, each from name to inode; ``sandboxes`` by any
    directory in them, None for those in no sandbox; ``kept``: directories with nothing left to do
    for ``Edit.keep``."""

    def __init__(self, count_max: int) -> None:
        self._count_max = count_max
        self._names_count = 0
        self.nodes: dict[int, Node] = {}
        self.names: dict[int, dict[str, int]] = {}
        self.sandboxes: dict[int, SandboxRow | None] = {}
        self.kept: set[int] = set()
        self._plain: set[int] = set()

    def clear(self) -> None:
        self.nodes.clear()
        self.names.clear()
        self.sandboxes.clear()
        self.kept.clear()
        self._plain.clear()
        self._names_count = 0

    def add_kept(self, directories: set[Inode]) -> None:
        if len(self.kept) >= self._count_max:
            self.kept.clear()
        self.kept |= directories

    def overlays(self, directory: Inode, find: Callable[[int], list[Inode]]) -> list[Inode]:
        """Directories that show this one; ``find`` is not asked again when there were none."""
        if directory in self._plain:
            return []
        found = find(directory)
        if not found:
            if len(self._plain) >= self._count_max:
                self._plain.clear()
            self._plain.add(directory)
        return found

    def shown_anew(self) -> None:
        """Some directory is shown by another one from now on."""
        self._plain.clear()

    def add_sandbox(self, directories: Iterable[Inode], sandbox: SandboxRow | None) -> None:
        if len(self.sandboxes) >= self._count_max:
            self.sandboxes.clear()
        self.sandboxes.update(dict.fromkeys(directories, sandbox))

    def add_node(self, node: Node) -> None:
        if len(self.nodes) >= self._count_max:
            self.nodes.clear()
        self.nodes[node.inode] = node

    def add_name(self, directory: Inode, name: str, inode: Inode) -> None:
        if self._names_count >= self._count_max:
            self.names.clear()
            self._names_count = 0
        names = self.names.get(directory)
        if names is None:
            names = self.names[directory] = {}
        names[name] = inode
        self._names_count += 1

    def forget_name(self, directory: Inode, name: str) -> None:
        names = self.names.get(directory)
        if names is not None:
            names.pop(name, None)
