"""Local files without a mount: the table of nodes is a dictionary, bases are bytes."""

from collections.abc import Awaitable, Callable
from pathlib import Path

from stagefs.errors import NoSpace
from stagefs.model import Inode
from stagefs.namespace.node import ContentKind, Node, NodeKind
from stagefs.outputs.local import LocalFiles

CHUNK = 16
LONG_AGO_NS = 10**18 + 123


class Rig:
    """What survives a daemon: the directory, the bases, and what the namespace was told.

    ``reading`` is awaited before each read of a base; ``base_reads`` notes (inode, start, size);
    a read of a base gives ``base_read_max`` bytes at most.  ``is_full``: the namespace's disk.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bases: dict[Inode, bytes] = {}
        self.nodes: dict[Inode, Node] = {}
        self.base_reads: list[tuple[Inode, int, int]] = []
        self.base_read_max = 1 << 20
        self.is_full = False
        self.reading: Callable[[], Awaitable[None]] | None = None
        self.files = self.daemon()

    def daemon(
        self, *, open_files_max: int = 8, chunk_bytes: int = CHUNK, slow_write_s: float = 0.02
    ) -> LocalFiles:
        """A new one over the same directory."""
        self.files = LocalFiles(
            self.directory,
            read_base=self.read_base,
            base_shrunk=self.base_shrunk,
            open_files_max=open_files_max,
            chunk_bytes=chunk_bytes,
            slow_write_s=slow_write_s,
        )
        return self.files

    async def read_base(self, node: Node, start: int, size: int) -> bytes:
        self.base_reads.append((node.inode, start, size))
        if self.reading is not None:
            await self.reading()
        return self.bases[node.inode][start : start + min(size, self.base_read_max)]

    def base_shrunk(self, inode: Inode, base_bytes: int) -> None:
        if self.is_full:
            raise NoSpace("the disk of the namespace is full")
        node = self.nodes[inode]
        assert base_bytes <= node.base_bytes
        self.nodes[inode] = made_node(inode, size_bytes=node.size_bytes, base_bytes=base_bytes)

    def node(self, number: int, base: bytes | None = None) -> Node:
        """The node as the namespace has it; with ``base`` for the first time, it is a copy."""
        inode = Inode(number)
        if inode not in self.nodes:
            self.bases[inode] = base or b""
            size = len(self.bases[inode])
            self.nodes[inode] = made_node(inode, size_bytes=size, base_bytes=size)
        return self.nodes[inode]

    async def read(self, node: Node, offset: int = 0, size: int = 1 << 20) -> bytes:
        data = self.files.read_now(node, offset, size)
        return bytes(data if data is not None else await self.files.read(node, offset, size))

    async def write(self, node: Node, offset: int, data: bytes) -> int:
        done = self.files.write_now(node, offset, data)
        return await self.files.write(node, offset, data) if done is None else done


def made_node(inode: Inode, *, size_bytes: int, base_bytes: int) -> Node:
    return Node(
        inode=inode,
        kind=NodeKind.FILE,
        mode=0o644,
        size_bytes=size_bytes,
        mtime_ns=LONG_AGO_NS,
        ctime_ns=LONG_AGO_NS,
        nlink=1,
        content=ContentKind.PRIVATE,
        base_bytes=base_bytes,
    )
