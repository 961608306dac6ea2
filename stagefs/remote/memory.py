"""``memory://store/path``: a remote in this process, for tests that need no server.

It behaves like the others (versions, ranges, listing, errors) and adds what tests want to
do to a server: change objects, count requests, fail, stall.  Lives in the trio thread alone.
"""

import contextlib
import os
from collections.abc import AsyncIterator, Callable, Sequence

import msgspec
import trio

from stagefs.errors import ObjectMissing, RangesRefused, RemoteError, StageFSError
from stagefs.model import (
    MIB,
    Checksum,
    EntryKind,
    ListedEntry,
    ObjectInfo,
    Span,
    WholeObject,
)
from stagefs.remote.base import WHOLE_OBJECT_BYTES_MAX, BatchItem, Results, Sink
from stagefs.remote.batch import not_the_version, shorter, too_large
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.source import Proof, Source, exists
from stagefs.remote.threads import VersionSink
from stagefs.remote.url import is_file_name, join, name_to_write, normalize, parse

LIST_PAGE_NAMES = 1000


class Request(msgspec.Struct, frozen=True):
    """One request that arrived."""

    kind: str
    url: str
    span: Span | None = None


class _Object(msgspec.Struct):
    data: bytes
    revision: int
    mtime_ns: int


class MemoryRemote:
    """The driver of ``memory://``; one instance holds one store's objects.

    ``requests`` is what arrived so far.  ``ranges`` False makes it send whole objects only.
    ``failures`` are raised by the next requests, one each; ``cut_after_bytes`` with a failure
    raises it in mid-transfer.  ``gate``, when it is not set, stalls every request.
    """

    def __init__(
        self,
        host_url: str = "memory://store",
        settings: RemoteSettings | None = None,
        credentials: CredentialStore | None = None,
    ) -> None:
        del settings, credentials
        self.host_url = host_url
        self.requests: list[Request] = []
        self.failures: list[StageFSError] = []
        self.cut_after_bytes: int | None = None
        self.ranges = True
        self.gate = trio.Event()
        self.gate.set()
        self._objects: dict[str, _Object] = {}
        self._forbidden: dict[str, StageFSError] = {}
        self._revision = 0

    # What tests do to the server.

    def store(self, path: str, data: bytes) -> str:
        """Store an object under a decoded path; returns its URL.  Replacing makes a version."""
        self._revision += 1
        self._objects[path] = _Object(data, self._revision, 1_700_000_000_000_000_000)
        return self.url(path)

    def content(self, path: str) -> bytes:
        return self._objects[path].data

    def paths(self) -> list[str]:
        return list(self._objects)

    def remove(self, path: str) -> None:
        del self._objects[path]

    def forbid(self, path: str, error: StageFSError) -> None:
        """Every request for the object raises ``error``."""
        self._forbidden[path] = error

    def url(self, path: str) -> str:
        base, *names = [self.host_url + "/", *path.strip("/").split("/")]
        for name in names:
            base = join(base, name)
        return normalize(base)

    def bytes_requested(self) -> int:
        return sum(request.span.length for request in self.requests if request.span)

    # The interface.

    async def stat(self, url: str) -> ObjectInfo:
        await self._request(Request("stat", url))
        return self._described(url)

    async def list(self, url: str) -> AsyncIterator[Sequence[ListedEntry]]:
        await self._request(Request("list", url))
        prefix = parse(url).path.rstrip("/") + "/"
        entries: dict[str, ListedEntry] = {}
        for path in sorted(self._objects):
            name, slash, _ = path.removeprefix(prefix).partition("/")
            if not path.startswith(prefix) or not is_file_name(name):
                continue
            child = join(url, name)
            if slash:
                entries[name] = ListedEntry(name, EntryKind.DIRECTORY, child)
            else:
                entries[name] = ListedEntry(name, EntryKind.FILE, child, self._described(child))
        if not entries:
            raise ObjectMissing(f"{url} does not exist.")
        page = list(entries.values())
        for start in range(0, len(page), LIST_PAGE_NAMES):
            yield page[start : start + LIST_PAGE_NAMES]

    async def fetch(self, url: str, span: Span, *, sink: Sink, validator: str | None) -> ObjectInfo:
        await self._request(Request("fetch", url, span), at_once=self.cut_after_bytes is None)
        info = self._checked(url, validator)
        if span.stop > info.size_bytes:
            raise shorter(url, span.stop, info.size_bytes)
        if not self.ranges and span != Span(0, info.size_bytes):
            raise RangesRefused(f"The server of {url} sends whole objects only.")
        if isinstance(sink, VersionSink):
            sink.found = info
        data = self._object(url).data[span.start : span.stop]
        position = 0
        while position < span.length:
            await trio.lowlevel.checkpoint()
            end = min(position + MIB, span.length)
            cut = self.cut_after_bytes
            if self.failures and cut is not None:
                end = min(end, max(cut, position))
            if end > position:
                os.pwrite(sink.fd, data[position:end], span.start + position - sink.shift)
                sink.landed(Span(span.start + position, end - position))
                position = end
            if self.failures and cut is not None and position >= cut:
                raise self.failures.pop(0)
        self._checked(url, info.validator)
        return info

    async def fetch_batch(self, items: Sequence[BatchItem]) -> Results:
        results: Results = []
        for item in items:
            try:
                await self._request(Request("whole", item.url))
                info = self._checked(item.url, item.validator)
                if info.size_bytes > WHOLE_OBJECT_BYTES_MAX:
                    raise too_large(item.url, info.size_bytes)
                results.append(WholeObject(info=info, data=self._object(item.url).data))
            except StageFSError as exc:
                results.append(exc)
        return results

    async def put(
        self,
        url: str,
        *,
        source: int,
        size_bytes: int,
        overwrite: bool,
        checksum: Checksum | None,
        mode: int | None,
        progress: Callable[[int], None],
    ) -> ObjectInfo:
        del mode
        name_to_write(url)
        await self._request(Request("put", url), at_once=self.cut_after_bytes is None)
        file = Source(source, url=url, size_bytes=size_bytes)
        proof = Proof(checksum, url=url)
        data = bytearray()
        while len(data) < size_bytes:
            await trio.lowlevel.checkpoint()
            cut = self.cut_after_bytes
            if self.failures and cut is not None and len(data) >= cut:
                raise self.failures.pop(0)
            data += file.read(len(data), min(MIB, size_bytes - len(data)))
            progress(len(data))
        proof.update(memoryview(data))
        proof.check()
        try:
            found = self._object(url)
        except ObjectMissing:
            found = None
        if found is None or overwrite:
            self.store(parse(url).path, bytes(data))
        elif found.data != data:
            raise exists(url)
        return self._described(url)

    async def delete(self, url: str) -> None:
        name_to_write(url)
        await self._request(Request("delete", url))
        with contextlib.suppress(ObjectMissing):
            self._object(url)
            self.remove(parse(url).path)

    async def aclose(self) -> None:
        """Nothing is kept open."""

    async def _request(self, request: Request, *, at_once: bool = True) -> None:
        self.requests.append(request)
        await trio.lowlevel.checkpoint()
        await self.gate.wait()
        if self.failures and at_once:
            raise self.failures.pop(0)
        if error := self._forbidden.get(parse(request.url).path):
            raise error

    def _object(self, url: str) -> _Object:
        path = parse(url).path
        found = self._objects.get(path)
        if found is None:
            if any(other.startswith(path.rstrip("/") + "/") for other in self._objects):
                raise RemoteError(f"{url} is a directory: name a file, or bind the directory.")
            raise ObjectMissing(f"{url} does not exist.")
        return found

    def _described(self, url: str) -> ObjectInfo:
        found = self._object(url)
        return ObjectInfo(
            url=url,
            size_bytes=len(found.data),
            validator=f"revision:{found.revision}",
            mtime_ns=found.mtime_ns,
            ranges=self.ranges,
        )

    def _checked(self, url: str, validator: str | None) -> ObjectInfo:
        info = self._described(url)
        if validator is not None and info.validator != validator:
            raise not_the_version(url, validator, info.validator)
        return info
