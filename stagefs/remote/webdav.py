"""``webdav://`` and ``webdavs://``: WebDAV servers (RFC 4918), over http and https.

Reading is ``http``'s; this adds what WebDAV can do more: properties in place of HEAD, listing with
sizes and versions, and writing.  A put sends the bytes under a temporary name beside the object,
compares the size that the server then tells, and gives it its name with MOVE, whose
``Overwrite: F`` has the server refuse to replace.  Writers of this process take turns with that;
how closely those of two nodes may follow each other is the server's to guarantee.  What answers
mean is decided in ``webdav_answers``.
"""

import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import trio

from stagefs.errors import (
    AccessDenied,
    CredentialsExpired,
    ObjectMissing,
    RemoteError,
    StageFSError,
)
from stagefs.model import MIB, Checksum, ListedEntry, ObjectInfo
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.http import INDEX_BYTES_MAX, LIST_PAGE_NAMES, HttpRemote
from stagefs.remote.http_access import wants_token
from stagefs.remote.http_answers import check_encoding
from stagefs.remote.http_client import translated
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.source import Source, exists, prove
from stagefs.remote.temporaries import NAMES_MAX, Leftovers, temporary_name, token_of
from stagefs.remote.threads import Call, SourceCall
from stagefs.remote.url import RemoteUrl, decode_path, name_to_write, quote_path
from stagefs.remote.webdav_answers import Resource, entries, info_of, resources, write_refusal

PIECE_BYTES = 256 << 10
# Removing what a put could not finish may take no longer: the caller has been told already.
CLEANING_S = 5.0
# A thread that waits for another's MOVE looks so often whether anybody waits for it.
STOPPED_CHECK_S = 0.1
_ASKED = (
    b'<?xml version="1.0" encoding="utf-8"?><propfind xmlns="DAV:"><prop><resourcetype/>'
    b"<getcontentlength/><getetag/><getlastmodified/></prop></propfind>"
)


class WebDavRemote(HttpRemote):
    """The driver of ``webdav://`` and ``webdavs://`` for one host."""

    def __init__(
        self, host_url: str, settings: RemoteSettings, credentials: CredentialStore
    ) -> None:
        super().__init__(host_url, settings, credentials)
        self._put_threads = trio.CapacityLimiter(settings.concurrency * 2)
        self._leftovers = Leftovers()
        # URLs whose MOVE is under way.
        self._being_named: set[str] = set()
        self._named = threading.Condition()

    async def list(self, url: str) -> AsyncIterator[Sequence[ListedEntry]]:
        def work(call: Call[tuple[ListedEntry, ...]]) -> tuple[ListedEntry, ...]:
            with translated(url):
                return tuple(entries(url, self._properties(call, url, depth=1)))

        found = await self._call(work, url).run(self._lookup_threads)
        for start in range(0, len(found), LIST_PAGE_NAMES):
            yield found[start : start + LIST_PAGE_NAMES]

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
        del mode  # the protocol has none
        name_to_write(url)
        temporary: RemoteUrl | None = None

        def work(call: SourceCall[ObjectInfo]) -> ObjectInfo:
            nonlocal temporary
            local = Source(call.source, url=url, size_bytes=size_bytes)
            with translated(url):
                prove(local, checksum, at_each_step=call.moved)
                if self._is_done(call, url, local, overwrite=overwrite):
                    return self._probe(call, url)
                token = token_of(url, call.source)
                self._remove_leftovers(call, url, token)
                target = self._beside(url, temporary_name(name_to_write(url), token))
                temporary = target
                self._upload(call, url, target, local)
                moved = self._move(call, url, target, overwrite=overwrite)
                if not moved and not self._is_done(call, url, local, overwrite=False):
                    raise ObjectMissing(f"{url} was removed while it was written.")
                if moved:
                    temporary = None
                return self._probe(call, url)

        call = SourceCall(
            work,
            url=url,
            source=source,
            progress=progress,
            answer_timeout_s=self._answer_timeout_s,
            progress_timeout_s=self._settings.progress_timeout_s,
        )
        try:
            return await call.run(self._put_threads)
        except AccessDenied as exc:
            # Servers do not always tell one that has expired from one that may not write.
            if wants_token(self._settings, self._address(url)):
                raise CredentialsExpired(str(exc)) from exc
            raise
        finally:
            if temporary is not None:
                await self._clean(url, temporary)

    async def delete(self, url: str) -> None:
        name_to_write(url)

        def work(call: Call[None]) -> None:
            with translated(url), contextlib.suppress(ObjectMissing):
                # A collection would go with everything in it.
                self._probe(call, url)
                self._remove(call, url, self._address(url))

        await self._call(work, url).run(self._put_threads)

    async def _clean(self, url: str, temporary: RemoteUrl) -> None:
        """Remove what a put left, or remember it for the next try."""
        directory, _, name = str(temporary).rpartition("/")

        def work(call: Call[None]) -> None:
            with translated(url):
                self._remove(call, url, temporary)

        with trio.CancelScope(shield=True, deadline=trio.current_time() + CLEANING_S) as scope:
            try:
                await self._call(work, url).run(self._put_threads)
            except StageFSError:
                self._leftovers.add(directory, [decode_path(name)])
        if scope.cancelled_caught:
            self._leftovers.add(directory, [decode_path(name)])

    # In worker threads.

    def _address(self, url: str) -> RemoteUrl:
        parts = super()._address(url)
        scheme = "https" if parts.scheme == "webdavs" else "http"
        return msgspec.structs.replace(parts, scheme=scheme)

    def _probe(self, call: Call[Any], url: str) -> ObjectInfo:
        (found, *_) = self._properties(call, url, depth=0)
        if found.collection:
            raise RemoteError(f"{url} is a directory: name a file, or bind the directory.")
        info = info_of(url, found)
        return info if info is not None else super()._probe(call, url)

    def _properties(self, call: Call[Any], url: str, *, depth: int) -> Sequence[Resource]:
        headers = {"Depth": str(depth), "Content-Type": "application/xml; charset=utf-8"}
        with self._request(call, "PROPFIND", url, headers, _ASKED) as response:
            if response.status != 207:
                raise write_refusal(url, response.status, response.headers, verb="asked for")
            check_encoding(url, response.headers)
            call.answered()
            data = response.read(INDEX_BYTES_MAX + 1)
        if len(data) > INDEX_BYTES_MAX:
            raise RemoteError(f"The listing of {url} is larger than {INDEX_BYTES_MAX} bytes.")
        found = resources(data.decode("utf-8", "surrogateescape"))
        if not found:
            raise RemoteError(f"The server tells no properties of {url}: it does no WebDAV there.")
        return found

    def _is_done(self, call: SourceCall[Any], url: str, local: Source, *, overwrite: bool) -> bool:
        """Whether an object with this very content is there.  Raises NameExists when one with
        another content is there and may not be replaced."""
        try:
            found = self._probe(call, url)
        except ObjectMissing:
            return False
        if overwrite:
            return False
        if found.size_bytes != local.size_bytes or not self._equals(call, url, local):
            raise exists(url)
        return True

    def _equals(self, call: SourceCall[Any], url: str, local: Source) -> bool:
        offset = 0
        with self._request(call, "GET", url) as response:
            if response.status != 200:
                raise write_refusal(url, response.status, response.headers, verb="read")
            while piece := response.read(min(MIB, local.size_bytes - offset + 1)):
                length = min(len(piece), local.size_bytes - offset)
                if length != len(piece) or piece != local.read(offset, length):
                    return False
                offset += length
                call.moved()
        return offset == local.size_bytes

    def _upload(self, call: SourceCall[Any], url: str, target: RemoteUrl, local: Source) -> None:
        status, headers = self._sent_whole(call, target, local)
        # Servers say it in several ways that the collection above is missing.
        if status in {403, 404, 409}:
            self._make_directories(call, url, target)
            status, headers = self._sent_whole(call, target, local)
        if status not in {200, 201, 204}:
            raise write_refusal(url, status, headers)
        arrived = self._size(call, url, target)
        if arrived != local.size_bytes:
            raise RemoteError(
                f"{url} was not written: {arrived} of its {local.size_bytes} bytes arrived."
            )

    def _sent_whole(
        self, call: SourceCall[Any], target: RemoteUrl, local: Source
    ) -> tuple[int, Mapping[str, str]]:
        call.moved_anew()

        def pieces() -> Iterator[bytes]:
            for offset in range(0, local.size_bytes, PIECE_BYTES):
                piece = local.read(offset, min(PIECE_BYTES, local.size_bytes - offset))
                yield piece
                call.moved(len(piece))

        headers = {"Content-Length": str(local.size_bytes)}
        return self._changed(call, "PUT", target, headers, pieces() if local.size_bytes else b"")

    def _make_directories(self, call: SourceCall[Any], url: str, target: RemoteUrl) -> None:
        """Make the collections above ``target`` that are missing, the highest first."""
        parts = target.path.split("/")[1:-1]
        missing: deque[RemoteUrl] = deque()
        for depth in range(len(parts), 0, -1):
            above = msgspec.structs.replace(target, path="/" + "/".join(parts[:depth]) + "/")
            status, headers = self._changed(call, "PROPFIND", above, {"Depth": "0"}, _ASKED)
            if status == 207:
                break
            if status not in {404, 409}:
                raise write_refusal(url, status, headers)
            missing.append(above)
        for collection in reversed(missing):
            status, headers = self._changed(call, "MKCOL", collection, {})
            # 405: somebody else was faster.
            if status not in {200, 201, 405}:
                raise write_refusal(url, status, headers)

    def _size(self, call: Call[Any], url: str, target: RemoteUrl) -> int:
        with self._open(call, "HEAD", target, {}) as response:
            length = response.headers.get("Content-Length", "")
            if response.status != 200 or not length.isdigit():
                raise write_refusal(url, response.status, response.headers)
            return int(length)

    def _move(self, call: Call[Any], url: str, temporary: RemoteUrl, *, overwrite: bool) -> bool:
        """Give the temporary object its name.  False: one of that name is there."""
        final = msgspec.structs.replace(self._address(url), user=None, password=None)
        headers = {"Destination": str(final), "Overwrite": "T" if overwrite else "F"}
        with self._naming(call, url):
            status, answered = self._changed(call, "MOVE", temporary, headers)
        if status == 412 and not overwrite:
            return False
        if status not in {200, 201, 204}:
            raise write_refusal(url, status, answered)
        return True

    @contextlib.contextmanager
    def _naming(self, call: Call[Any], url: str) -> Iterator[None]:
        """Alone with this name in this process: servers look whether it exists first, and rename
        then (WsgiDAV was seen to let a second rename replace what the first had made)."""
        with self._named:
            while url in self._being_named:
                self._named.wait(STOPPED_CHECK_S)
                call.checkpoint()
            self._being_named.add(url)
        try:
            yield
        finally:
            with self._named:
                self._being_named.discard(url)
                self._named.notify_all()

    def _remove_leftovers(self, call: SourceCall[Any], url: str, token: str) -> None:
        directory = str(self._beside(url, "x")).rpartition("/")[0]
        if self._leftovers.unknown(directory):
            above = url.rpartition("/")[0] + "/"
            with contextlib.suppress(ObjectMissing):
                found = self._properties(call, above, depth=1)
                names = [entry.name for entry in entries(above, found)]
                self._leftovers.add(directory, names[:NAMES_MAX])
            self._leftovers.looked_through(directory)
        for name in self._leftovers.take(directory, token):
            self._remove(call, url, self._beside(url, name))

    def _remove(self, call: Call[Any], url: str, target: RemoteUrl) -> None:
        status, headers = self._changed(call, "DELETE", target, {})
        if status not in {200, 202, 204, 404, 410}:
            raise write_refusal(url, status, headers)

    def _beside(self, url: str, name: str) -> RemoteUrl:
        address = self._address(url)
        directory = address.path.rpartition("/")[0]
        return msgspec.structs.replace(address, path=f"{directory}/{quote_path(name)}", query=None)

    def _changed(
        self,
        call: Call[Any],
        method: str,
        target: RemoteUrl,
        headers: dict[str, str],
        body: bytes | Iterable[bytes] | None = None,
    ) -> tuple[int, Mapping[str, str]]:
        """Status and headers of a request that is not redirected."""
        with self._open(call, method, target, headers, body) as response:
            while response.read(PIECE_BYTES):
                call.checkpoint()
            return response.status, response.headers

    @contextlib.contextmanager
    def _open(
        self,
        call: Call[Any],
        method: str,
        target: RemoteUrl,
        headers: dict[str, str],
        body: bytes | Iterable[bytes] | None = None,
    ) -> Iterator[Any]:
        sent = self._sent(call, method, target, target, headers, body)
        with contextlib.closing(sent) as response:
            yield response
