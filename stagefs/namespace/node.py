"""The values of the namespace: what a node is, and what is asked of it.

Frozen and without I/O.  Nothing here knows SQL.
"""

import enum

import msgspec

from stagefs.errors import InvalidName, NameTooLong
from stagefs.model import Checksum, Inode, ObjectId

STAGING_INODE = Inode(2)
TASKS_INODE = Inode(3)
# Holds the directories that sandboxes are made from; no path leads there.
TEMPLATES_INODE = Inode(4)
FIXED_INODES = frozenset({1, 2, 3, 4})

NAME_BYTES_MAX = 255
# A version that can never change (a checksum in the URL, a local output): no need to ask again.
IMMUTABLE_CHECKED_NS = 1 << 62


class NodeKind(enum.IntEnum):
    """Kept on disk: numbers stay."""

    DIRECTORY = 1
    FILE = 2
    SYMLINK = 3


class RenameFlags(enum.IntFlag):
    """As in renameat2(2)."""

    NOREPLACE = 1
    EXCHANGE = 2


class Node(msgspec.Struct, frozen=True, gc=False):
    """What an inode is at one moment.  Sizes in bytes, times in nanoseconds of the wall clock.

    ``nlink`` of a file: the names that lead to it, those that sandboxes show from their
    template included, those that a linked directory shows not (linking a directory of a million
    names is one change).  Of a directory: 2 and its subdirectories; 1, which means "not
    counted", for a directory that shows another one.  0 when the last name is gone.

    ``validator`` is what the remote said at first contact, None before.  ``successor`` is the
    inode of the newer version, 0 when there is none.  ``checked_ns`` is when the remote last
    confirmed the version, 0 for never.  ``bind_url``, ``bind_ttl_s`` and ``listed_ns`` belong
    to bound directories.  ``lower`` is the directory that this one shows, 0 for none.
    """

    inode: Inode
    kind: NodeKind
    mode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    nlink: int
    target: str | None = None
    object_id: ObjectId | None = None
    validator: str | None = None
    checksum: Checksum | None = None
    ranges: bool = True
    successor: Inode = Inode(0)
    checked_ns: int = 0
    bind_url: str | None = None
    bind_ttl_s: float = 0.0
    listed_ns: int = 0
    lower: Inode = Inode(0)
    counted: bool = False
    frozen: bool = False


class StagedObject(msgspec.Struct, frozen=True, kw_only=True):
    """A version of a remote object that a name shall lead to.  ``url`` is the public one."""

    url: str
    version: str
    size_bytes: int
    mtime_ns: int
    mode: int = 0o644
    validator: str | None = None
    checksum: Checksum | None = None
    ranges: bool = True
    checked_ns: int = 0

    @property
    def object_id(self) -> ObjectId:
        return ObjectId(self.url, self.version)


class Statistics(msgspec.Struct, frozen=True):
    """Counts of what has a name.  ``size_bytes`` is what all files would take."""

    directories: int
    files: int
    symlinks: int
    size_bytes: int
    changes: int

    @property
    def nodes(self) -> int:
        return self.directories + self.files + self.symlinks


def encoded_name(name: str) -> bytes:
    """One path component as bytes.  Raises InvalidName, NameTooLong."""
    if name in {"", ".", ".."} or "/" in name or "\0" in name:
        raise InvalidName(
            f"{name!r} cannot be a name: '.', '..', the empty name, slashes and NUL are refused."
        )
    try:
        encoded = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as exc:
        raise InvalidName(f"{name!r} cannot be a name: it is not text that has bytes.") from exc
    if len(encoded) > NAME_BYTES_MAX:
        raise NameTooLong(
            f"The name {name[:40]!r}... has {len(encoded)} bytes: {NAME_BYTES_MAX} are allowed."
        )
    return encoded


def decoded_name(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
