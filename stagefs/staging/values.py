"""What is asked of a staging area, and what it answers: the values of the control API.

Frozen, without behaviour, free of trio, so that commands may import them cheaply.  Paths are
``staging:///name`` or mount-relative (``/tasks/t1/name``); sizes in bytes, times in
nanoseconds of the wall clock.  URLs in answers are public ones: never with credentials.
"""

from collections.abc import Callable

import msgspec

from stagefs.model import Checksum

PAGE_ENTRIES_MAX = 1000


class Progress(msgspec.Struct, frozen=True, tag_field="type", tag="progress"):
    """How far a long operation is.  ``total`` is None while nobody knows."""

    what: str
    done: int
    total: int | None
    unit: str = "bytes"


ProgressCallback = Callable[[Progress], None]


class Empty(msgspec.Struct, frozen=True):
    """A request without arguments, or an answer without content."""


# Names


class NameStat(msgspec.Struct, frozen=True, omit_defaults=True):
    """One name.  ``kind`` is file, directory or symlink; ``state`` of a staged file is absent,
    partial or complete, after what the cache holds of it.
    """

    path: str
    name: str
    kind: str
    inode: int
    size_bytes: int = 0
    mtime_ns: int = 0
    mode: int = 0
    links: int = 1
    url: str | None = None
    version: str | None = None
    checksum: str | None = None
    state: str | None = None
    cached_bytes: int = 0
    immutable: bool = False
    bound: bool = False
    last_error: str | None = None


class ListNames(msgspec.Struct, frozen=True):
    """``cached``: tell what the cache holds of each, which takes a look at each file's entry."""

    path: str
    cached: bool = False
    after: str | None = None
    limit: int = PAGE_ENTRIES_MAX


class NamePage(msgspec.Struct, frozen=True):
    """``after`` continues the listing; None: that was all."""

    entries: list[NameStat]
    after: str | None = None


class OnePath(msgspec.Struct, frozen=True):
    path: str


class RemoveName(msgspec.Struct, frozen=True):
    path: str
    recursive: bool = False


class Removed(msgspec.Struct, frozen=True):
    entries: int


class MoveName(msgspec.Struct, frozen=True):
    source: str
    target: str


# Staging in


class StageIn(msgspec.Struct, frozen=True):
    """Register ``urls`` at ``target``: a name, or (several URLs, trailing slash) a directory."""

    urls: list[str]
    target: str
    checksum: Checksum | None = None
    replace: bool = False
    immutable: bool = False


class StagedIn(msgspec.Struct, frozen=True):
    entries: list[NameStat]


class Bind(msgspec.Struct, frozen=True):
    """Show the remote directory ``url`` at ``target``; listed on demand, believed for ``ttl_s``."""

    url: str
    target: str
    ttl_s: float | None = None


class ImportCatalog(msgspec.Struct, frozen=True):
    """``path`` is a file that the daemon can read."""

    path: str
    prefix: str = "staging:///"
    replace: bool = False


class Imported(msgspec.Struct, frozen=True):
    """``entries``: new names.  ``unchanged`` were there already, just so."""

    entries: int
    replaced: int = 0
    unchanged: int = 0
    directories: int = 0


# Sandboxes


class CreateSandbox(msgspec.Struct, frozen=True):
    """``inputs``: name in the sandbox -> URL or ``staging:///...``."""

    name: str
    inputs: dict[str, str] = {}


class Sandbox(msgspec.Struct, frozen=True):
    name: str
    path: str
    made_ns: int


class Sandboxes(msgspec.Struct, frozen=True):
    sandboxes: list[Sandbox]


class OneSandbox(msgspec.Struct, frozen=True):
    name: str


# The cache


class CacheEntry(msgspec.Struct, frozen=True):
    """What the cache holds of one object.  ``used_ns``: last use, 0 when nothing is cached.
    ``pins``: who wants it kept.
    """

    key: str
    url: str
    version: str
    size_bytes: int
    cached_bytes: int = 0
    disk_bytes: int = 0
    used_ns: int = 0
    pinned: bool = False
    pins: list[str] = []


class ListEntries(msgspec.Struct, frozen=True):
    """In the order of their keys."""

    after: str | None = None
    limit: int = 10 * PAGE_ENTRIES_MAX


class EntryPage(msgspec.Struct, frozen=True):
    entries: list[CacheEntry]
    after: str | None = None


class ShowEntry(msgspec.Struct, frozen=True):
    """``subject``: a path of a file or (where several objects will do) of a directory, a URL, or
    the key of an entry.
    """

    subject: str


class CacheUsage(msgspec.Struct, frozen=True):
    """``used_bytes`` is what the cache takes on disk, ``cached_bytes`` what it holds of objects."""

    directory: str
    capacity_bytes: int
    used_bytes: int
    cached_bytes: int
    entries: int
    leases: int
    free_bytes: int
    free_floor_bytes: int
    index_complete: bool
    counters: dict[str, int]


class Verify(msgspec.Struct, frozen=True):
    """Check every chunk of ``subject``, or of all entries."""

    subject: str | None = None


class Verified(msgspec.Struct, frozen=True):
    """``damaged``: a line for each entry that held damage; it is gone, and fetched anew."""

    entries: int
    chunks: int
    bytes_read: int
    damaged: list[str]


class Evict(msgspec.Struct, frozen=True):
    """Drop what is cached of ``subject``, or ``all`` that is neither pinned nor open."""

    subject: str | None = None
    all: bool = False


class Evicted(msgspec.Struct, frozen=True):
    """``kept``: how many stayed, because they are pinned or open."""

    entries: int
    freed_bytes: int
    kept: int


class Pin(msgspec.Struct, frozen=True):
    """Keep ``subject`` in the cache, fetched or not yet; or no longer."""

    subject: str
    pinned: bool = True


class Pinned(msgspec.Struct, frozen=True):
    objects: int


class Warm(msgspec.Struct, frozen=True):
    """Fetch everything below ``paths`` now."""

    paths: list[str]


class Warmed(msgspec.Struct, frozen=True):
    entries: int
    bytes_total: int


class Capacity(msgspec.Struct, frozen=True):
    """As a request: None asks, a number sets."""

    capacity_bytes: int | None = None


# Seeing it


class TransferStatus(msgspec.Struct, frozen=True):
    url: str
    start: int
    length: int
    landed: int
    age_s: float


class Status(msgspec.Struct, frozen=True):
    """The daemon at one moment.  ``counters`` are of this daemon's life."""

    version: str
    pid: int
    mountpoint: str
    state_directory: str
    log: str
    started_ns: int
    names: int
    cache: CacheUsage | None
    counters: dict[str, int]
    waiting_reads: int
    open_objects: int
    transfers: list[TransferStatus]
