"""What is asked of a staging area, and what it answers: the values of the control API.

Frozen, without behaviour, free of trio, so that commands may import them cheaply.  Paths are
``staging:///name`` or mount-relative (``/tasks/t1/name``); sizes in bytes, times in
nanoseconds of the wall clock.  URLs in answers are public ones: never with credentials.
"""

import enum
from collections.abc import Callable

import msgspec

from stagefs.model import Checksum, OnWrite
from stagefs.staging.manifest import LeaseLifetime, Manifest, Mirrored, Output
from stagefs.staging.queue_values import QueueTotals
from stagefs.staging.workers import Worker

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
    partial or complete, after what the cache holds of it.  ``upload``: of a file that a writable
    binding sends to its remote, as ``user.stagefs.upload`` says it.  ``replicas``: URLs with their
    affinity behind a blank, as ``user.stagefs.replicas`` has them in lines.
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
    writable: bool = False
    upload: str | None = None
    last_error: str | None = None
    replicas: list[str] = []


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
    """Show the remote directory ``url`` at ``target``; listed on demand, believed for ``ttl_s``.

    ``writable``: what is closed in it is uploaded; with ``overwrite`` in place of objects that are
    there, and with ``propagate_delete`` what is removed is removed there, too.
    """

    url: str
    target: str
    ttl_s: float | None = None
    writable: bool = False
    overwrite: bool = False
    propagate_delete: bool = False


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
    """``name``: one component, below ``tasks/``, or the path of a new directory in the mount.
    ``mirrored``: what the manifest's mirrors match on this machine now.  ``worker``: the program
    with which the sandbox ends.
    """

    name: str
    manifest: Manifest = Manifest()
    mirrored: list[Mirrored] = []
    worker: Worker | None = None


class CreateSandboxes(msgspec.Struct, frozen=True):
    """``count`` of them from one manifest: NAME.000000, NAME.000001, ..."""

    name: str
    count: int
    manifest: Manifest = Manifest()
    mirrored: list[Mirrored] = []


class SandboxState(enum.StrEnum):
    """Kept on disk: words stay.  ``committing`` is never: it is ``active`` to who comes later."""

    ACTIVE = "active"
    COMMITTING = "committing"
    COMMITTED = "committed"
    FAILED = "failed"


class Sandbox(msgspec.Struct, frozen=True):
    """``name`` is what commands call it, ``path`` where it is in the mount."""

    name: str
    path: str
    state: SandboxState
    on_write: OnWrite
    persistent: bool = False
    created_ns: int = 0
    changed_ns: int = 0


class Sandboxes(msgspec.Struct, frozen=True):
    sandboxes: list[Sandbox]


class SandboxPage(msgspec.Struct, frozen=True):
    """``after`` continues the listing; None: that was all."""

    sandboxes: list[Sandbox]
    after: int | None = None


class ListSandboxes(msgspec.Struct, frozen=True):
    after: int = 0
    limit: int = PAGE_ENTRIES_MAX


class OneSandbox(msgspec.Struct, frozen=True):
    name: str


class ShowSandbox(msgspec.Struct, frozen=True):
    """``hashes``: of the chunks of what it read, too, where it records."""

    name: str
    hashes: bool = False


class InputState(enum.StrEnum):
    """Of a declared input: as it was linked, changed by the task (a copy of its own), replaced by
    another file, or removed."""

    LINKED = "linked"
    MODIFIED = "modified"
    REPLACED = "replaced"
    REMOVED = "removed"


class SandboxInput(msgspec.Struct, frozen=True):
    name: str
    source: str
    state: InputState


class CommittedOutput(msgspec.Struct, frozen=True, omit_defaults=True):
    """``name`` in the sandbox; ``checksums`` of files: xxh3, sha256 and what the remote needs.
    ``queued``: it is uploaded later."""

    name: str
    to: str
    kind: str = "file"
    size_bytes: int = 0
    checksums: list[Checksum] = []
    queued: bool = False


class CommitRecord(msgspec.Struct, frozen=True):
    """What one commit made visible."""

    id: str
    sandbox: str
    time_ns: int
    outputs: list[CommittedOutput]


class ReadObject(msgspec.Struct, frozen=True):
    """One object that a recording sandbox opened, first under ``name``.  ``served_bytes`` were
    answered to it, of which ``fetched_bytes`` were not cached; its reads waited ``blocked_s`` for
    them.  ``chunk_hashes``: number of a cached chunk -> its xxh3-64."""

    name: str
    url: str
    version: str
    size_bytes: int
    first_ns: int = 0
    opens: int = 0
    served_bytes: int = 0
    fetched_bytes: int = 0
    blocked_s: float = 0.0
    chunk_hashes: dict[str, str] = {}


class SandboxReads(msgspec.Struct, frozen=True):
    """What a recording sandbox read.  ``never_opened``: declared inputs."""

    objects: list[ReadObject]
    served_bytes: int
    fetched_bytes: int
    blocked_s: float
    never_opened: list[str]
    note: str = "reads that the kernel answered from its page cache are not seen"


class SandboxDetails(msgspec.Struct, frozen=True):
    """``modified``: the names of files that the task changed its own copy of, declared or not.
    ``reason``: why it failed."""

    sandbox: Sandbox
    manifest: Manifest
    lifetime: LeaseLifetime
    inputs: list[SandboxInput]
    modified: list[str]
    commits: list[CommitRecord]
    leases: int = 0
    reason: str | None = None
    template: bool = False
    reads: SandboxReads | None = None
    worker: Worker | None = None


class CommitSandbox(msgspec.Struct, frozen=True):
    """``outputs``: besides those of the manifest."""

    name: str
    outputs: list[Output] = []


class SandboxDirectory(msgspec.Struct, frozen=True):
    """A sandbox, and a real directory of this machine that a task without a mount works in."""

    name: str
    directory: str


class Copied(msgspec.Struct, frozen=True):
    files: int
    bytes_total: int


class FailSandbox(msgspec.Struct, frozen=True):
    name: str
    reason: str | None = None


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
    """Check every chunk of ``subject``, or of all entries; ``resume``: go on behind those that a
    verify of all entries had reached when it was stopped."""

    subject: str | None = None
    resume: bool = False


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
    """Fetch everything below ``paths`` now.  Of several such requests the files of the one with
    the higher ``priority`` go first."""

    paths: list[str]
    priority: int = 0


class Warmed(msgspec.Struct, frozen=True):
    entries: int
    bytes_total: int


class Capacity(msgspec.Struct, frozen=True):
    """As a request: None asks, a number sets, for later daemons of this cache, too; ``default``
    goes back to what is configured."""

    capacity_bytes: int | None = None
    default: bool = False


class Cleanup(msgspec.Struct, frozen=True):
    """Evict, the least recently used first, until the cache takes ``to_bytes`` at most."""

    to_bytes: int


# Seeing it


class ExplainName(msgspec.Struct, frozen=True):
    """``ask``: the remote, too, when not everything is cached or something failed."""

    path: str
    ask: bool = True


class Why(msgspec.Struct, frozen=True):
    """``state``: cached, partial, remote (nothing is cached), failing, local or directory;
    ``because`` are sentences."""

    path: str
    state: str
    because: list[str]


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
    queue: QueueTotals = QueueTotals()
