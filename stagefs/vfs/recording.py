"""Recording: which sandbox opens which object, and what that costs.

An OPEN of a shared file names only the inode.  While some sandbox records, each first OPEN of
a shared file is answered with ESTALE; the kernel walks the path again, the LOOKUP tells the
name and so the sandbox, and the second OPEN is served (DESIGN section 5b).  What is pending
outlives the daemon; counts are written down every few seconds and when they are asked for,
so a daemon that is killed loses that much of them, but never that an object was opened.

Concurrency: trio thread.
"""

from collections.abc import Callable

from stagefs.model import Inode
from stagefs.namespace.node import ContentKind, Node, Opened
from stagefs.namespace.store import Namespace
from stagefs.objects.content import OpenObject
from stagefs.vfs.copying import Pending
from stagefs.vfs.workspace import OpenLocal

LOCAL = "local"


class Tally:
    """What one open handle did since it was last written down."""

    __slots__ = ("blocked_ns", "fetched_bytes", "node", "sandbox", "served_bytes")

    def __init__(self, sandbox: Inode, node: Node) -> None:
        self.sandbox = sandbox
        self.node = node
        self.served_bytes = self.fetched_bytes = self.blocked_ns = 0


class RecordedOpen:
    """An open handle whose reads are counted for a sandbox."""

    __slots__ = ("inner", "tally")

    def __init__(self, inner: OpenObject | OpenLocal, tally: Tally) -> None:
        self.inner = inner
        self.tally = tally

    def read_now(self, offset: int, size: int) -> memoryview | bytes | None:
        data = self.inner.read_now(offset, size)
        if data is not None:
            self.tally.served_bytes += len(data)
        return data


class Recording:
    def __init__(
        self, namespace: Namespace, pending: Pending, *, live: Callable[[Node], Node]
    ) -> None:
        """``live``: a local file with the size that it has."""
        self._namespace = namespace
        self._live = live
        self._pending = pending
        self._tallies: dict[int, Tally] = {}

    @property
    def active(self) -> bool:
        return self._namespace.recording

    def named(self, parent: Inode, name: str, node: Node, thread: int) -> None:
        """The LOOKUP that an OPEN was sent back for."""
        row = self._namespace.sandbox_of(parent)
        sandbox = row.inode if row is not None and row.record else Inode(0)
        if sandbox:
            self._note(sandbox, parent, name, node)
        self._pending.grant(thread, node.inode, sandbox)

    def _note(self, sandbox: Inode, parent: Inode, name: str, node: Node) -> None:
        top = self._namespace.path(sandbox)
        if node.content is not ContentKind.OBJECT:
            node = self._live(node)
        path = f"{self._namespace.path(parent)}/{name}"[len(top) + 1 :]
        self._namespace.add_opened([(sandbox, _opened(node, path, opens=1))])

    def wrapped(
        self, handle: int, inner: OpenObject | OpenLocal, node: Node, sandbox: Inode | None
    ) -> OpenObject | OpenLocal | RecordedOpen:
        """``sandbox``: 0 or None for one that does not record."""
        if not sandbox:
            return inner
        tally = self._tallies[handle] = Tally(sandbox, node)
        return RecordedOpen(inner, tally)

    def released(self, handle: int) -> None:
        tally = self._tallies.get(handle)
        if tally is not None:
            self._write([tally])
            del self._tallies[handle]

    def write_down(self) -> None:
        self._write(list(self._tallies.values()))

    def _write(self, tallies: list[Tally]) -> None:
        seen = []
        for tally in tallies:
            if tally.served_bytes or tally.blocked_ns:
                row = _opened(
                    tally.node,
                    "",
                    served_bytes=tally.served_bytes,
                    fetched_bytes=tally.fetched_bytes,
                    blocked_ns=tally.blocked_ns,
                )
                seen.append((tally.sandbox, row))
                tally.served_bytes = tally.fetched_bytes = tally.blocked_ns = 0
        if seen:
            self._namespace.add_opened(seen)


def _opened(node: Node, name: str, **counts: int) -> Opened:
    of = node.object_id if node.content is ContentKind.OBJECT else None
    return Opened(
        inode=node.inode,
        name=name,
        url=LOCAL if of is None else of.url,
        version=f"inode:{node.inode}" if of is None else node.validator or of.version,
        size_bytes=node.size_bytes,
        **counts,
    )
