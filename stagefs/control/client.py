"""The synchronous client of a mount's daemon: what commands and integrations call.

    daemon = Client(Path("/var/tmp/stagefs-1000/mnt-1a2b3c4d/control.sock"))
    daemon.stage_in(["https://host/ref.fa"], "staging:///ref.fa")

One method for each operation of ``control.api``, with its values.  Long operations take a
``progress`` callback, called in the caller's thread.  Failures of the daemon come back as
``Refused`` (its sentence, exit code and errno); no daemon at the socket is ``NoDaemon``.

The standard library's http.client, not httpx: httpx imports trio and takes 300 ms to start,
six times what a short command may cost.
"""

import contextlib
import errno as errno_names
import http.client
import os
import socket
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from stagefs.control.api import (
    HEARTBEAT_S,
    METRICS_PATH,
    Failure,
    Line,
    Operation,
    Operations,
    Result,
    decode,
    encode,
)
from stagefs.errors import NoDaemon, StageFSError
from stagefs.model import Checksum
from stagefs.remote.access import Access
from stagefs.remote.health import RemoteStatus
from stagefs.staging import queue_values, remote_values, replica_values, values
from stagefs.staging.manifest import Manifest, Output, checked, expand_mirrors, with_more
from stagefs.staging.values import Progress, ProgressCallback
from stagefs.staging.workers import worker_of

CONNECT_TIMEOUT_S = 10.0
# Short operations: longer than any deadline that the daemon keeps for them.
ANSWER_TIMEOUT_S = 60.0
# In each mount: a link to its daemon's socket.
CONTROL_LINK = ".stagefs/control"
LINE_BYTES_MAX = 16 << 20

_Answer = TypeVar("_Answer", bound=msgspec.Struct)


class Refused(StageFSError):
    """The daemon's refusal: its sentence, and the exit code and errno that belong to it."""

    def __init__(self, refusal: Failure) -> None:
        super().__init__(refusal.error)
        self.exit_code = refusal.exit_code
        self.errno = getattr(errno_names, refusal.errno, errno_names.EIO)


class _Wrapped(msgspec.Struct, frozen=True):
    """Gives the union of lines a class that can be named as a type."""

    line: Line


def _ignore(_progress: Progress) -> None:
    """For callers that want no progress."""


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=CONNECT_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(CONNECT_TIMEOUT_S)
            # Through the directory: the whole path may be longer than sun_path's 108 bytes.
            parent, name = os.path.split(os.path.realpath(self._path))
            directory = os.open(parent, os.O_PATH)
            try:
                sock.connect(f"/proc/self/fd/{directory}/{name}")
            finally:
                os.close(directory)
        except BaseException:
            sock.close()
            raise
        self.sock = sock


class Client:
    """See the module.  ``socket_path`` is STATE/control.sock, or a link to it.

    Each request has a connection of its own, so a client may be kept, shared between threads,
    and used again after the daemon was restarted.
    """

    def __init__(self, socket_path: Path, *, answer_timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        self._path = socket_path
        self._answer_timeout_s = answer_timeout_s

    @classmethod
    def of(cls, mountpoint: str | Path) -> "Client":
        """The client of the mount at ``mountpoint``, found through the mount itself."""
        return cls(Path(mountpoint) / CONTROL_LINK)

    # Seeing

    def status(self) -> values.Status:
        return self._short(Operations.STATUS, values.Empty(), values.Status)

    def metrics(self) -> str:
        """The daemon's figures as Prometheus reads them (docs/METRICS.md)."""
        connection = _Connection(self._path)
        try:
            with contextlib.closing(connection):
                connection.connect()
                connection.sock.settimeout(self._answer_timeout_s)
                connection.request("GET", METRICS_PATH, headers={"Connection": "close"})
                response = connection.getresponse()
                body = response.read()
        except (OSError, http.client.HTTPException) as exc:
            raise self._gone(exc) from exc
        if response.status != 200:
            raise Refused(self._decode(body, Failure))
        return body.decode("utf-8", "replace")

    # Names

    def stage_in(
        self,
        urls: Sequence[str],
        target: str,
        *,
        checksum: Checksum | None = None,
        replace: bool = False,
        immutable: bool = False,
        wait: bool = False,
        progress: ProgressCallback = _ignore,
    ) -> list[values.NameStat]:
        """Register URLs; with ``wait``, fetch them too and prove the declared checksum."""
        request = values.StageIn(
            urls=list(urls),
            target=target,
            checksum=checksum,
            replace=replace,
            immutable=immutable,
        )
        staged = self._long(Operations.STAGE_IN, request, values.StagedIn, progress).entries
        if not wait:
            return staged
        self.cache_warm([entry.path for entry in staged], progress=progress)
        return [self.stat(entry.path) for entry in staged]

    def bind(
        self,
        url: str,
        target: str,
        *,
        ttl_s: float | None = None,
        writable: bool = False,
        overwrite: bool = False,
        propagate_delete: bool = False,
    ) -> values.NameStat:
        """Show a remote directory.  ``writable``: what is closed in it is uploaded, and replaces
        what is there only with ``overwrite``; what is removed from it is removed at the remote
        only with ``propagate_delete``."""
        request = values.Bind(
            url=url,
            target=target,
            ttl_s=ttl_s,
            writable=writable,
            overwrite=overwrite,
            propagate_delete=propagate_delete,
        )
        return self._short(Operations.BIND, request, values.NameStat)

    def import_catalog(
        self,
        path: str,
        *,
        prefix: str = "staging:///",
        replace: bool = False,
        progress: ProgressCallback = _ignore,
    ) -> values.Imported:
        request = values.ImportCatalog(path=path, prefix=prefix, replace=replace)
        return self._long(Operations.IMPORT_CATALOG, request, values.Imported, progress)

    def list_names(self, path: str, *, cached: bool = False) -> Iterator[values.NameStat]:
        """The entries of a directory, fetched page by page; with what is ``cached`` of each."""
        after: str | None = None
        while True:
            request = values.ListNames(path=path, cached=cached, after=after)
            page = self._short(Operations.LIST_NAMES, request, values.NamePage)
            yield from page.entries
            after = page.after
            if after is None:
                return

    def why(
        self, path: str, *, ask: bool = True, progress: ProgressCallback = _ignore
    ) -> values.Why:
        """Why a file is cached, absent, kept, evicted or failing; ``ask``: its remote, too."""
        request = values.ExplainName(path, ask)
        return self._long(Operations.WHY, request, values.Why, progress)

    def stat(self, path: str) -> values.NameStat:
        return self._short(Operations.STAT, values.OnePath(path), values.NameStat)

    def remove(
        self, path: str, *, recursive: bool = False, progress: ProgressCallback = _ignore
    ) -> values.Removed:
        request = values.RemoveName(path=path, recursive=recursive)
        return self._long(Operations.REMOVE, request, values.Removed, progress)

    def move(self, source: str, target: str) -> values.NameStat:
        request = values.MoveName(source=source, target=target)
        return self._short(Operations.MOVE, request, values.NameStat)

    # Replicas

    def replica_add(
        self,
        path: str,
        url: str,
        *,
        affinity: str = "",
        trust: bool = False,
        progress: ProgressCallback = _ignore,
    ) -> replica_values.ReplicaList:
        """``url`` has the content of the file at ``path`` (``trust``: it is not compared);
        ``affinity``, ``datacenter/machine``, is where that is."""
        request = replica_values.AddReplica(path, url, affinity, trust)
        return self._long(Operations.REPLICA_ADD, request, replica_values.ReplicaList, progress)

    def replica_list(self, path: str) -> replica_values.ReplicaList:
        """In the order in which they would be asked now, the object's own URL among them."""
        request = values.OnePath(path)
        return self._short(Operations.REPLICA_LIST, request, replica_values.ReplicaList)

    def replica_remove(self, path: str, url: str) -> replica_values.ReplicaList:
        request = replica_values.RemoveReplica(path, url)
        return self._short(Operations.REPLICA_REMOVE, request, replica_values.ReplicaList)

    # Sandboxes

    def sandbox_create(
        self,
        name: str,
        manifest: Manifest | None = None,
        *,
        inputs: Mapping[str, str] | None = None,
        outputs: Mapping[str, str] | Sequence[Output] = (),
        worker_pid: int | None = None,
        progress: ProgressCallback = _ignore,
    ) -> values.Sandbox:
        """A directory with virtual links to its inputs.  ``inputs`` (name -> URL) and ``outputs``
        (pattern -> URL) are added to those of the manifest; ``name`` is one component, below
        ``tasks/``, or the path of a new directory in the mount.  ``worker_pid``: a program; when it
        has ended, the next mount removes the sandbox, and it may be made anew at once.
        """
        wanted = with_more(manifest or Manifest(), inputs=inputs or {}, outputs=outputs)
        worker = None if worker_pid is None else worker_of(worker_pid)
        request = values.CreateSandbox(name, wanted, expand_mirrors(wanted.mirrors), worker)
        return self._long(Operations.SANDBOX_CREATE, request, values.Sandbox, progress)

    def sandbox_create_many(
        self, name: str, count: int, manifest: Manifest, *, progress: ProgressCallback = _ignore
    ) -> list[values.Sandbox]:
        """``count`` sandboxes NAME.000000, NAME.000001, ... from one manifest, at once."""
        wanted = checked(manifest)
        request = values.CreateSandboxes(name, count, wanted, expand_mirrors(wanted.mirrors))
        return self._long(
            Operations.SANDBOX_CREATE_MANY, request, values.Sandboxes, progress
        ).sandboxes

    def sandbox_list(self) -> Iterator[values.Sandbox]:
        """All sandboxes of the mount, fetched page by page."""
        after: int | None = 0
        while after is not None:
            request = values.ListSandboxes(after=after)
            page = self._short(Operations.SANDBOX_LIST, request, values.SandboxPage)
            yield from page.sandboxes
            after = page.after

    def sandbox_show(
        self, name: str, *, hashes: bool = False, progress: ProgressCallback = _ignore
    ) -> values.SandboxDetails:
        """``hashes``: of the chunks of what a recording sandbox read, too."""
        request = values.ShowSandbox(name, hashes)
        return self._long(Operations.SANDBOX_SHOW, request, values.SandboxDetails, progress)

    def sandbox_commit(
        self,
        name: str,
        *,
        outputs: Mapping[str, str] | Sequence[Output] = (),
        progress: ProgressCallback = _ignore,
    ) -> values.CommitRecord:
        """Make the declared outputs (and ``outputs``, pattern -> URL) visible, all or none, and
        queue those that go to a remote.  Committing what is committed answers its record.
        """
        more = with_more(Manifest(), inputs={}, outputs=outputs).outputs
        request = values.CommitSandbox(name, more)
        return self._long(Operations.SANDBOX_COMMIT, request, values.CommitRecord, progress)

    def sandbox_materialize(
        self, name: str, directory: str, *, progress: ProgressCallback = _ignore
    ) -> values.Copied:
        """Write everything in the sandbox into a real, empty directory of this machine."""
        request = values.SandboxDirectory(name, directory)
        return self._long(Operations.SANDBOX_MATERIALIZE, request, values.Copied, progress)

    def sandbox_absorb(
        self, name: str, directory: str, *, progress: ProgressCallback = _ignore
    ) -> values.Copied:
        """Take what the sandbox's outputs match in that directory into the sandbox."""
        request = values.SandboxDirectory(name, directory)
        return self._long(Operations.SANDBOX_ABSORB, request, values.Copied, progress)

    def sandbox_fail(self, name: str, reason: str | None = None) -> values.Sandbox:
        """The task failed: nothing is published, and everything stays for inspection."""
        request = values.FailSandbox(name, reason)
        return self._short(Operations.SANDBOX_FAIL, request, values.Sandbox)

    def sandbox_remove(self, name: str, *, progress: ProgressCallback = _ignore) -> values.Removed:
        request = values.OneSandbox(name)
        return self._long(Operations.SANDBOX_REMOVE, request, values.Removed, progress)

    # The cache

    def cache_list(self) -> list[values.CacheEntry]:
        """All entries, the most recently used first."""
        entries: list[values.CacheEntry] = []
        after: str | None = None
        while True:
            request = values.ListEntries(after=after)
            page = self._short(Operations.CACHE_LIST, request, values.EntryPage)
            entries += page.entries
            after = page.after
            if after is None:
                return sorted(entries, key=lambda entry: entry.used_ns, reverse=True)

    def cache_show(self, subject: str) -> values.CacheEntry:
        return self._short(Operations.CACHE_SHOW, values.ShowEntry(subject), values.CacheEntry)

    def cache_usage(self) -> values.CacheUsage:
        return self._short(Operations.CACHE_USAGE, values.Empty(), values.CacheUsage)

    def cache_verify(
        self,
        subject: str | None = None,
        *,
        resume: bool = False,
        progress: ProgressCallback = _ignore,
    ) -> values.Verified:
        request = values.Verify(subject, resume=resume)
        return self._long(Operations.CACHE_VERIFY, request, values.Verified, progress)

    def cache_evict(
        self,
        subject: str | None = None,
        *,
        everything: bool = False,
        progress: ProgressCallback = _ignore,
    ) -> values.Evicted:
        request = values.Evict(subject=subject, all=everything)
        return self._long(Operations.CACHE_EVICT, request, values.Evicted, progress)

    def cache_pin(
        self, subject: str, *, pinned: bool = True, progress: ProgressCallback = _ignore
    ) -> values.Pinned:
        request = values.Pin(subject=subject, pinned=pinned)
        return self._long(Operations.CACHE_PIN, request, values.Pinned, progress)

    def cache_warm(
        self, paths: Sequence[str], *, priority: int = 0, progress: ProgressCallback = _ignore
    ) -> values.Warmed:
        """Fetch everything below ``paths``, and prove declared checksums.  Files of requests with a
        higher ``priority`` go first."""
        request = values.Warm(list(paths), priority)
        return self._long(Operations.CACHE_WARM, request, values.Warmed, progress)

    def cache_cleanup(
        self, to_bytes: int, *, progress: ProgressCallback = _ignore
    ) -> values.CacheUsage:
        """Evict, the least recently used first, until at most so much is left."""
        request = values.Cleanup(to_bytes)
        return self._long(Operations.CACHE_CLEANUP, request, values.CacheUsage, progress)

    def cache_capacity(
        self,
        capacity_bytes: int | None = None,
        *,
        default: bool = False,
        progress: ProgressCallback = _ignore,
    ) -> values.CacheUsage:
        """Ask for the capacity, or set it (``default``: as configured) for this daemon and later
        ones; returns when the cache is within it."""
        request = values.Capacity(capacity_bytes, default)
        return self._long(Operations.CACHE_CAPACITY, request, values.CacheUsage, progress)

    def remote_list(self) -> list[RemoteStatus]:
        """How each remote in use fares, by URL."""
        return self._short(Operations.REMOTE_LIST, values.Empty(), remote_values.RemoteList).remotes

    def remote_access(self, url: str, access: Access) -> None:
        """Reach the host of ``url`` with these keys from now on.  They are kept with the mount's
        other secrets and shown to nobody."""
        request = remote_values.SetAccess(url, access)
        self._short(Operations.REMOTE_ACCESS, request, values.Empty)

    # The stage-out queue

    def queue_list(
        self, states: Sequence[str] | None = None
    ) -> Iterator[queue_values.UploadStatus]:
        """The uploads in these states (None: all), fetched page by page."""
        after: int | None = 0
        while after is not None:
            request = queue_values.ListUploads(list(states) if states else None, after)
            page = self._short(Operations.QUEUE_LIST, request, queue_values.UploadPage)
            yield from page.uploads
            after = page.after

    def queue_retry(self, ids: Sequence[int] | None = None) -> queue_values.UploadsChanged:
        """Try these again now; None: everything that waits or failed.  How many."""
        request = queue_values.RetryUploads(list(ids or ()), all=ids is None)
        return self._short(Operations.QUEUE_RETRY, request, queue_values.UploadsChanged)

    def queue_cancel(
        self, ids: Sequence[int] | None = None, *, discard: bool = False
    ) -> queue_values.UploadsChanged:
        """Give these up; None: everything that waits or failed.  How many."""
        request = queue_values.CancelUploads(list(ids or ()), all=ids is None, discard=discard)
        return self._short(Operations.QUEUE_CANCEL, request, queue_values.UploadsChanged)

    def flush(
        self, deadline_s: float | None = None, *, progress: ProgressCallback = _ignore
    ) -> queue_values.Flushed:
        """Upload what is queued.  The answer tells what is left: that is no failure here."""
        request = queue_values.Flush(deadline_s)
        return self._long(Operations.QUEUE_FLUSH, request, queue_values.Flushed, progress)

    # How it is asked

    def _short(
        self, operation: Operations, request: msgspec.Struct, kind: type[_Answer]
    ) -> _Answer:
        try:
            with self._asked(operation.value, request) as response:
                body = response.read()
        except (OSError, http.client.HTTPException) as exc:
            raise self._gone(exc) from exc
        if response.status != 200:
            raise Refused(self._decode(body, Failure))
        return self._decode(body, kind)

    def _long(
        self,
        operation: Operations,
        request: msgspec.Struct,
        kind: type[_Answer],
        progress: ProgressCallback,
    ) -> _Answer:
        # Leaving early closes the connection, and then the daemon gives the operation up.
        with contextlib.closing(self._lines(operation.value, request)) as lines:
            for text in lines:
                line = self._decode_line(text)
                if isinstance(line, Failure):
                    raise Refused(line)
                if isinstance(line, Result):
                    return msgspec.convert(line.value, kind)
                progress(line)
        raise self._gone(ConnectionError("it ended in the middle of an answer"))

    def _lines(self, operation: Operation, request: msgspec.Struct) -> Generator[bytes, None, None]:
        try:
            with self._asked(operation, request) as response:
                while text := response.readline(LINE_BYTES_MAX):
                    yield text
        except (OSError, http.client.HTTPException) as exc:
            raise self._gone(exc) from exc

    @contextlib.contextmanager
    def _asked(
        self, operation: Operation, request: msgspec.Struct
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer to one request on a connection of its own."""
        connection = _Connection(self._path)
        with contextlib.closing(connection):
            connection.connect()
            connection.sock.settimeout(
                4 * HEARTBEAT_S if operation.long else self._answer_timeout_s
            )
            headers = {"Content-Type": "application/json", "Connection": "close"}
            connection.request("POST", f"/v1/{operation.path}", encode(request), headers)
            yield connection.getresponse()

    def _decode(self, text: bytes, kind: type[_Answer]) -> _Answer:
        try:
            return decode(text, kind)
        except ValueError as exc:
            raise NoDaemon(f"What answers at {self._path} is no StageFS daemon: {exc}.") from exc

    def _decode_line(self, text: bytes) -> Line:
        return self._decode(b'{"line":%b}' % text.rstrip(), _Wrapped).line

    def _gone(self, why: Exception) -> NoDaemon:
        if isinstance(why, FileNotFoundError | ConnectionRefusedError):
            return NoDaemon(
                f"No daemon answers at {self._path}: the mount is gone, or its daemon is being"
                " restarted; see the log beside it, or mount again."
            )
        if isinstance(why, PermissionError):
            return NoDaemon(f"The daemon at {self._path} belongs to another user.")
        reason = "no answer in time" if isinstance(why, TimeoutError) else str(why) or repr(why)
        return NoDaemon(f"The daemon at {self._path} does not answer ({reason}): see its log.")
