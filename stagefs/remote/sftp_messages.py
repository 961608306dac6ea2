"""What the daemon and an SFTP engine say to each other.

One packet of the SOCK_SEQPACKET socket is one msgpack array: towards the engine one Order,
towards the daemon a list of reports.  Every packet stays below PACKET_BYTES_MAX, because a
kernel with default limits refuses larger ones.  Values only.
"""

import enum
import socket

import msgspec

from stagefs.model import Checksum

PACKET_BYTES_MAX = 160 << 10
# Two packets of the largest kind and their bookkeeping fit: neither side waits for the other
# in the middle of a batch.  Kernels allow this much to everybody (net.core.wmem_default).
SOCKET_BUFFER_BYTES = 208 << 10
# So many pages of a listing may be on their way before the daemon has to ask for more.
LISTING_PAGES_AHEAD = 4


class FailureKind(enum.StrEnum):
    MISSING = "missing"
    DENIED = "denied"
    UNAVAILABLE = "unavailable"
    AWAY = "away"
    DEADLINE = "deadline"
    CHANGED = "changed"
    REFUSED = "refused"
    SINK = "sink"
    EXISTS = "exists"
    NO_SPACE = "no space"
    CHECKSUM = "checksum"
    SOURCE = "source"


class Attributes(msgspec.Struct, frozen=True, array_like=True):
    """Of one file: what ObjectInfo is made of.  ``mode`` includes the file type."""

    size: int
    validator: str
    mtime_s: int | None
    mode: int | None


class Order(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """``op`` names one operation; it is never used again."""

    op: int


class Connect(Order, frozen=True, array_like=True, tag=True, kw_only=True):
    """The first order: how to reach the host.  ``user`` and ``port`` None: as ssh knows.
    ``key_file``: the private key to try first.  ``keepalive_s``, ``restart_s``: as in the
    settings."""

    host: str
    port: int | None
    user: str | None
    password: str | None
    config: str | None
    client: str
    program: str
    connections: int
    ciphers: str | None
    connect_timeout_s: float
    answer_timeout_s: float
    progress_timeout_s: float
    keepalive_s: float = 0.0
    restart_s: float = 0.0
    key_file: str | None = None


class Stat(Order, frozen=True, array_like=True, tag=True):
    path: bytes


class List(Order, frozen=True, array_like=True, tag=True):
    path: bytes


class MorePages(Order, frozen=True, array_like=True, tag=True):
    """One page of a listing was taken."""


class Fetch(Order, frozen=True, array_like=True, tag=True):
    """Comes with the descriptor to write into."""

    path: bytes
    start: int
    length: int
    shift: int
    validator: str | None


class FetchWhole(Order, frozen=True, array_like=True, tag=True):
    """Small objects, each (path, validator or None); larger ones than ``size_max`` fail."""

    items: list[tuple[bytes, str | None]]
    size_max: int


class Put(Order, frozen=True, array_like=True, tag=True):
    """Comes with the descriptor to read from.  The file is written as ``temporaries[0]``, or
    after a broken session as the next of them; ``stale`` ones of earlier tries are removed."""

    path: bytes
    size: int
    overwrite: bool
    checksum: Checksum | None
    mode: int | None
    temporaries: list[bytes]
    stale: list[bytes]


class Remove(Order, frozen=True, array_like=True, tag=True):
    """Of a file; ends in Removed or Failed."""

    path: bytes


class SetTimes(Order, frozen=True, array_like=True, tag=True):
    """Of a file; ends in TimesSet or Failed."""

    path: bytes
    mtime_s: int


class Stop(Order, frozen=True, array_like=True, tag=True):
    """Give the operation up; answered by Stopped when nothing is written for it any more."""


class Report(msgspec.Struct, frozen=True, array_like=True, tag=True):
    op: int


class Found(Report, frozen=True, array_like=True, tag=True):
    """Ends Stat, Fetch and Put."""

    attributes: Attributes


class Version(Report, frozen=True, array_like=True, tag=True):
    """The version that a Fetch without a validator is about to bring."""

    attributes: Attributes


class Page(Report, frozen=True, array_like=True, tag=True):
    """Entries of a directory: (name, attributes or None for a directory)."""

    entries: list[tuple[bytes, Attributes | None]]
    last: bool


class Landed(Report, frozen=True, array_like=True, tag=True):
    """The object's bytes from the span's start up to ``stop`` are in the file."""

    stop: int


class Sent(Report, frozen=True, array_like=True, tag=True):
    """So many bytes of a Put were taken by the server."""

    bytes_taken: int


class Whole(Report, frozen=True, array_like=True, tag=True):
    """One object of FetchWhole.  The operation ends when each item has its report."""

    index: int
    attributes: Attributes
    data: bytes


class ItemFailed(Report, frozen=True, array_like=True, tag=True):
    index: int
    kind: FailureKind
    reason: str


class Removed(Report, frozen=True, array_like=True, tag=True):
    """Ends Remove."""


class TimesSet(Report, frozen=True, array_like=True, tag=True):
    """Ends SetTimes."""


class Failed(Report, frozen=True, array_like=True, tag=True):
    """Ends any operation.  ``reason`` is a clause that follows the URL in a message."""

    kind: FailureKind
    reason: str


class Stopped(Report, frozen=True, array_like=True, tag=True):
    pass


class Noted(Report, frozen=True, array_like=True, tag=True):
    """For the log, about no operation (``op`` 0)."""

    text: str


AnyOrder = Connect | Stat | List | MorePages | Fetch | FetchWhole | Put | Remove | SetTimes | Stop
AnyReport = (
    Found
    | Version
    | Page
    | Landed
    | Sent
    | Whole
    | ItemFailed
    | Removed
    | TimesSet
    | Failed
    | Stopped
    | Noted
)


def socket_pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    return ours, theirs
