"""The read-only virtual directory ``.stagefs/``: files made when they are opened.

Its inodes lie above every inode of the namespace.  A handle keeps the text it was opened
with; a handle of an earlier daemon gets the text of now.
"""

import time
from collections.abc import Callable

from stagefs.errors import NotFound
from stagefs.model import Inode
from stagefs.namespace.node import Node, NodeKind

NAME = ".stagefs"
FIRST_INODE = (1 << 40) - 64
DIRECTORY_INODE = Inode(FIRST_INODE)


class VirtualFiles:
    """``texts`` maps a file's name to the function that makes its content; ``links`` a symlink's
    name to its target."""

    def __init__(self, *, texts: dict[str, Callable[[], bytes]], links: dict[str, str]) -> None:
        self._texts = texts
        self._made_ns = time.time_ns()
        self._nodes: dict[str, Node] = {}
        self.directory = self._node(DIRECTORY_INODE, NodeKind.DIRECTORY, 0o555)
        for number, name in enumerate(texts, start=1):
            self._nodes[name] = self._node(Inode(FIRST_INODE + number), NodeKind.FILE, 0o444)
        for number, (name, target) in enumerate(links.items(), start=1 + len(texts)):
            self._nodes[name] = self._node(
                Inode(FIRST_INODE + number), NodeKind.SYMLINK, 0o777, target=target
            )
        self._by_inode = {node.inode: (name, node) for name, node in self._nodes.items()}

    def _node(self, inode: Inode, kind: NodeKind, mode: int, target: str = "") -> Node:
        return Node(
            inode=inode,
            kind=kind,
            mode=mode,
            size_bytes=len(target),
            mtime_ns=self._made_ns,
            ctime_ns=self._made_ns,
            nlink=2 if kind is NodeKind.DIRECTORY else 1,
            target=target or None,
        )

    @staticmethod
    def owns(inode: int) -> bool:
        return inode >= FIRST_INODE

    def lookup(self, name: str) -> Node:
        node = self._nodes.get(name)
        if node is None:
            raise NotFound(f"There is no {NAME}/{name}: it holds {', '.join(self._nodes)}.")
        return node

    def node(self, inode: int) -> Node:
        if inode == DIRECTORY_INODE:
            return self.directory
        found = self._by_inode.get(Inode(inode))
        if found is None:
            raise NotFound(f"There is no virtual file with inode {inode}.")
        return found[1]

    def page(self, after: int) -> list[tuple[int, str, Node]]:
        entries = enumerate(self._nodes.items(), start=1)
        return [(cookie, name, node) for cookie, (name, node) in entries if cookie > after]

    def text(self, inode: int) -> bytes:
        name, _node = self._by_inode[Inode(inode)]
        return self._texts[name]()
