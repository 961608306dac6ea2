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
    FIFO = 4
    SOCKET = 5
    CHARACTER_DEVICE = 6
    BLOCK_DEVICE = 7


SPECIAL_KINDS = frozenset(
    {NodeKind.FIFO, NodeKind.SOCKET, NodeKind.CHARACTER_DEVICE, NodeKind.BLOCK_DEVICE}
)


class ContentKind(enum.IntEnum):
    """Where the bytes of a file are.  Kept on disk: numbers stay.

    PRIVATE and PUBLISHED files are real files named by inode.  A published one never changes:
    writing to it through any name makes a private copy for that name.
    """

    OBJECT = 0
    PRIVATE = 1
    PUBLISHED = 2


class OutgoingState(enum.IntEnum):
    """How far what a writable binding owes its remote is.  Kept on disk: numbers stay.

    DUE: nobody outside knows of it yet.  LEAVING: it is being handed to the stage-out queue under
    the name ``commit``.  From then on it is as the queue says.
    """

    DUE = 0
    LEAVING = 1
    QUEUED = 2
    DONE = 3
    FAILED = 4
    CANCELLED = 5


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
    to bound directories, and ``writable`` (what is made in them is uploaded), ``overwrites`` and
    ``deletes`` (it may replace objects; removing a name removes its object).  ``lower`` is the
    directory that this one shows, 0 for none.

    A private copy of a file shows through what it was made of, its base: of an object it has
    ``object_id`` and what goes with it, of a local file ``lower`` is the inode.  ``size_bytes`` is
    then the size of the base, ``base_bytes`` how much of that can still be seen.  Sizes and times
    of local files are these until there is a real file.

    ``uid`` and ``gid`` -1: whoever mounted.  ``atime_ns`` 0: the same as ``mtime_ns``.
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
    uid: int = -1
    gid: int = -1
    atime_ns: int = 0
    rdev: int = 0
    content: ContentKind = ContentKind.OBJECT
    base_bytes: int = 0
    has_xattrs: bool = False
    writable: bool = False
    overwrites: bool = False
    deletes: bool = False


class OutgoingUpload(msgspec.Struct, frozen=True, kw_only=True):
    """A published file that is to be an object at ``url``; or the object that is to be removed
    there (``inode`` 0).  ``since_ns``: when it was closed or removed."""

    id: int
    inode: Inode
    url: str
    overwrite: bool
    state: OutgoingState
    since_ns: int
    commit: str | None = None
    reason: str | None = None


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


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """Another URL with the same content, and where that is: ``datacenter/machine``, empty when
    nobody said.  ``validator``: what its remote said when it was compared."""

    url: str
    affinity: str = ""
    validator: str | None = None


class SandboxRow(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the sandbox that a directory is.  The namespace only keeps it; times are
    set by the change that stores it."""

    inode: Inode = Inode(0)
    state: str
    on_write: str
    record: bool = False
    persistent: bool = False
    lifetime: str = ""
    manifest: str = ""
    created_ns: int = 0
    changed_ns: int = 0


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    """What a recording sandbox did with one object.  ``name`` is the path in the sandbox under
    which it was first opened.  ``served_bytes`` were answered to it, of which ``fetched_bytes``
    were not in the cache; what the kernel had in its page cache is not seen."""

    inode: Inode
    name: str
    url: str
    version: str
    size_bytes: int
    first_ns: int = 0
    opens: int = 0
    served_bytes: int = 0
    fetched_bytes: int = 0
    blocked_ns: int = 0


class CommitRow(msgspec.Struct, frozen=True, kw_only=True):
    """What one commit made visible.  ``sandbox`` is the path it had then."""

    id: str
    sandbox: str
    time_ns: int
    record: str


class Statistics(msgspec.Struct, frozen=True):
    """Counts of what has a name.  ``size_bytes`` is what all files would take."""

    directories: int
    files: int
    symlinks: int
    specials: int
    size_bytes: int
    changes: int

    @property
    def nodes(self) -> int:
        return self.directories + self.files + self.symlinks + self.specials


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
