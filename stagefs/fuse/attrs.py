"""From a node to what the kernel wants to know of it."""

import pyfuse3

from stagefs.namespace.node import Node
from stagefs.vfs.vfs import LONG_TIMEOUT_S, file_type

BLOCK_BYTES = 512
# What programs are told to read at a time: the size of one request to the daemon.
PREFERRED_IO_BYTES = 128 << 10


class Encoder:
    """``uid`` and ``gid`` own everything in the mount."""

    def __init__(self, *, uid: int, gid: int) -> None:
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
        entry.st_uid = self._uid
        entry.st_gid = self._gid
        entry.st_size = node.size_bytes
        entry.st_blksize = PREFERRED_IO_BYTES
        entry.st_blocks = -(-node.size_bytes // BLOCK_BYTES)
        entry.st_atime_ns = node.mtime_ns
        entry.st_mtime_ns = node.mtime_ns
        entry.st_ctime_ns = node.ctime_ns
        return entry
