"""From a node to what the kernel wants to know of it."""

from collections.abc import Mapping

import pyfuse3

from stagefs.model import Inode
from stagefs.namespace.node import Node
from stagefs.vfs.vfs import LONG_TIMEOUT_S, file_type

BLOCK_BYTES = 512
# What programs are told to read at a time: the size of one request to the daemon.
PREFERRED_IO_BYTES = 128 << 10


class Encoder:
    """``uid`` and ``gid`` own everything of which the namespace says nothing else;
    ``hidden_links`` of a file are in templates of sandboxes, where nobody sees them."""

    def __init__(self, *, uid: int, gid: int, hidden_links: Mapping[Inode, int]) -> None:
        self._hidden_links = hidden_links
        self._uid = uid
        self._gid = gid

    def attributes(
        self, node: Node, entry_timeout_s: float = LONG_TIMEOUT_S
    ) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(node.inode)
        entry.entry_timeout = entry_timeout_s
        entry.attr_timeout = LONG_TIMEOUT_S
        entry.st_mode = pyfuse3.ModeT(file_type(node) | node.mode)
        entry.st_nlink = node.nlink
        if self._hidden_links:
            entry.st_nlink -= self._hidden_links.get(node.inode, 0)
        entry.st_uid = node.uid if node.uid >= 0 else self._uid
        entry.st_gid = node.gid if node.gid >= 0 else self._gid
        entry.st_rdev = node.rdev
        entry.st_size = node.size_bytes
        entry.st_blksize = PREFERRED_IO_BYTES
        entry.st_blocks = -(-node.size_bytes // BLOCK_BYTES)
        entry.st_atime_ns = node.atime_ns or node.mtime_ns
        entry.st_mtime_ns = node.mtime_ns
        entry.st_ctime_ns = node.ctime_ns
        return entry
