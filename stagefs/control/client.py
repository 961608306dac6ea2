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
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from stagefs.control.api import (
    HEARTBEAT_S,
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
from stagefs.staging import values
from stagefs.staging.values import Progress, ProgressCallback

CONNECT_TIMEOUT_S = 10.0
# Short operations: longer than any deadline that the daemon keeps for them.
ANSWER_TIMEOUT_S = 60.0
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

    def __init__(self, socket_path: Path) -> None:
        self._path = socket_path

    # Seeing

    def status(self) -> values.Status:
        return self._short(Operations.STATUS, values.Empty(), values.Status)

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

    def bind(self, url: str, target: str, *, ttl_s: float | None = None) -> values.NameStat:
        request = values.Bind(url=url, target=target, ttl_s=ttl_s)
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

    # Sandboxes

    def sandbox_create(
        self, name: str, inputs: dict[str, str], *, progress: ProgressCallback = _ignore
    ) -> values.Sandbox:
        request = values.CreateSandbox(name=name, inputs=inputs)
        return self._long(Operations.SANDBOX_CREATE, request, values.Sandbox, progress)

    def sandbox_list(self) -> list[values.Sandbox]:
        return self._short(Operations.SANDBOX_LIST, values.Empty(), values.Sandboxes).sandboxes

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
        self, subject: str | None = None, *, progress: ProgressCallback = _ignore
    ) -> values.Verified:
        request = values.Verify(subject)
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
        self, paths: Sequence[str], *, progress: ProgressCallback = _ignore
    ) -> values.Warmed:
        """Fetch everything below ``paths``, and prove declared checksums."""
        request = values.Warm(list(paths))
        return self._long(Operations.CACHE_WARM, request, values.Warmed, progress)

    def cache_capacity(
        self, capacity_bytes: int | None = None, *, progress: ProgressCallback = _ignore
    ) -> values.CacheUsage:
        """Ask for the capacity, or set it; returns when the cache is within it."""
        request = values.Capacity(capacity_bytes)
        return self._long(Operations.CACHE_CAPACITY, request, values.CacheUsage, progress)

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
            connection.sock.settimeout(4 * HEARTBEAT_S if operation.long else ANSWER_TIMEOUT_S)
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
