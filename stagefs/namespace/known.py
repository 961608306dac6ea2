"""Names and nodes that were asked for, kept in memory so that asking again costs no SQL.

Bounded by emptying: what is in use comes back at a few microseconds each.  Holds only what
exists; names that are not there are the kernel's to remember.
"""

from stagefs.model import Inode
from stagefs.namespace.node import Node

# Names, and as many nodes: about 30 MB.
KNOWN_MAX = 40_000


class Known:
    """``nodes`` by inode; ``names`` by directory, each from name to inode."""

    def __init__(self, count_max: int) -> None:
        self._count_max = count_max
        self._names_count = 0
        self.nodes: dict[int, Node] = {}
        self.names: dict[int, dict[str, int]] = {}

    def clear(self) -> None:
        self.nodes.clear()
        self.names.clear()
        self._names_count = 0

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
