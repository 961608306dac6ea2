"""What tasks link into their sandboxes by themselves: news for whoever keeps inputs in the cache.

A link(2), a rename or a URL's symlink(2) that gives an object, or a directory with some, a name in
an active sandbox is told on a bounded channel that nobody waits for.  When it is full, ``missed``
says that the sandboxes must be looked at instead.  Trio thread.
"""

import trio

from stagefs.model import Inode
from stagefs.namespace.node import ContentKind, Node, NodeKind, SandboxRow
from stagefs.namespace.store import Namespace

NEWS_MAX = 10_000
ACTIVE = "active"


class NewLinks:
    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._tell, self.news = trio.open_memory_channel[tuple[SandboxRow, Node]](NEWS_MAX)
        self.missed = False

    def made(self, parent: Inode, node: Node) -> None:
        """``node`` has a new name in the directory ``parent``."""
        is_object = node.kind is NodeKind.FILE and node.content is ContentKind.OBJECT
        if not is_object and node.kind is not NodeKind.DIRECTORY:
            return
        row = self._namespace.sandbox_of(parent)
        if row is None or row.state != ACTIVE:
            return
        try:
            self._tell.send_nowait((row, node))
        except trio.WouldBlock:
            self.missed = True
