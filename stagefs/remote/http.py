"""``http://`` and ``https://``: objects on web servers, through urllib3 in worker threads.

One instance serves one host; connections are kept and shared by its calls.  A redirect may
lead to another host, at most REDIRECTS_MAX times, never from https to http, and takes no
credentials along.  Never asks for an encoded body.  What answers mean is decided in
``http_answers``, directory pages are read in ``http_index``; this module moves bytes.
"""

import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar
from urllib.parse import urldefrag, urljoin

import msgspec
import trio
import urllib3
import urllib3.connection
import urllib3.exceptions

from stagefs.errors import (
    InvalidUrl,
    NotSupported,
    RemoteError,
)
from stagefs.model import Checksum, ListedEntry, ObjectInfo, Span, WholeObject
from stagefs.remote.base import (
    WHOLE_OBJECT_BYTES_MAX,
    WHOLE_OBJECT_PIECE_BYTES,
    BatchItem,
    Results,
    Sink,
)
from stagefs.remote.batch import fetch_each, too_large
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.http_access import authorization, trusting
from stagefs.remote.http_answers import (
    answer_to_range,
    check_encoding,
    check_version,
    content_length,
    described,
    refusal,
    size_of_partial,
    strong_etag,
)
from stagefs.remote.http_client import HttpClient, cut, receive, translated
from stagefs.remote.http_index import html_entries, json_entries
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.threads import Call, SinkCall
from stagefs.remote.url import RemoteUrl, check_writable, parse

T = TypeVar("T")

REDIRECTS_MAX = 5
REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
# Data servers redirect to signed addresses; following anew for each span doubles the requests.
MOVED_LIFETIME_S = 60.0
MOVED_MAX = 1000
INDEX_BYTES_MAX = 64 << 20
LIST_PAGE_NAMES = 1000
# Statuses of a HEAD that do not speak for a GET: signed URLs allow one method only, and some
# servers know no HEAD.
UNAUTHORIZED = frozenset({401, 403})
HEAD_REFUSED = frozenset({400, 403, 405, 406, 501})


class _Moved(msgspec.Struct, frozen=True):
    """Where a redirect led, with its secrets."""

    target: RemoteUrl
    until_s: float

    @property
    def fresh(self) -> bool:
        return time.monotonic() < self.until_s


class HttpRemote:
    """The driver of ``http://`` and ``https://`` for one host."""

    def __init__(
        self, host_url: str, settings: RemoteSettings, credentials: CredentialStore
    ) -> None:
        self._settings = settings
        self._credentials = credentials
        self._answer_timeout_s = settings.connect_timeout_s + settings.answer_timeout_s
        self._threads = trio.CapacityLimiter(settings.concurrency * 2)
        self._lookup_threads = trio.CapacityLimiter(settings.lookups * 2)
        ca_file = settings.http.ca_file
        self._client = HttpClient(
            settings, trust=None if ca_file is None else functools.partial(trusting, ca_file)
        )
        # Used from several threads, in single steps only.
        self._moved: dict[str, _Moved] = {}

    async def stat(self, url: str) -> ObjectInfo:
        def work(call: Call[ObjectInfo]) -> ObjectInfo:
            with translated(url):
                return self._probe(call, url)

        return await self._call(work, url).run(self._lookup_threads)

    async def list(self, url: str) -> AsyncIterator[Sequence[ListedEntry]]:
        def work(call: Call[tuple[ListedEntry, ...]]) -> tuple[ListedEntry, ...]:
            with translated(url):
                return tuple(self._index(call, url))

        entries = await self._call(work, url).run(self._lookup_threads)
        for start in range(0, len(entries), LIST_PAGE_NAMES):
            yield entries[start : start + LIST_PAGE_NAMES]

    async def fetch(self, url: str, span: Span, *, sink: Sink, validator: str | None) -> ObjectInfo:
        def work(call: SinkCall[ObjectInfo]) -> ObjectInfo:
            with translated(url):
                return self._fetch(call, url, span, validator)

        call = SinkCall(
            work,
            url=url,
            span=span,
            sink=sink,
            answer_timeout_s=self._answer_timeout_s,
            progress_timeout_s=self._settings.progress_timeout_s,
        )
        return await call.run(self._threads)

    async def fetch_batch(self, items: Sequence[BatchItem]) -> Results:
        async def fetch_whole(item: BatchItem) -> WholeObject:
            def work(call: Call[WholeObject]) -> WholeObject:
                with translated(item.url):
                    return self._fetch_whole(call, item)

            return await self._call(work, item.url).run(self._threads)

        return await fetch_each(fetch_whole, items)

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
        """Web servers are read only here: HTTP has no way to tell, before the bytes are sent,
        whether PUT makes an object, replaces one, or is taken for something else."""
        del source, size_bytes, overwrite, checksum, mode, progress
        check_writable(url)
        raise AssertionError(f"{url} is none of this driver's")

    async def delete(self, url: str) -> None:
        """As ``put``."""
        check_writable(url)

    async def aclose(self) -> None:
        self._client.close()

    def _call(self, work: Callable[[Call[T]], T], url: str) -> Call[T]:
        return Call(
            work,
            url=url,
            answer_timeout_s=self._answer_timeout_s,
            progress_timeout_s=self._settings.progress_timeout_s,
        )

    # In worker threads.

    def _probe(self, call: Call[Any], url: str) -> ObjectInfo:
        if parse(url).path.endswith("/"):
            raise RemoteError(f"{url} names a directory: name a file, or bind the directory.")
        with self._request(call, "HEAD", url) as response:
            status, headers = response.status, response.headers
            if status == 200:
                check_encoding(url, headers)
                size_bytes = content_length(headers)
                ranges = headers.get("Accept-Ranges", "").strip().lower()
                if size_bytes is not None and (ranges or size_bytes == 0):
                    return described(url, headers, size_bytes, ranges=ranges == "bytes")
            elif status not in HEAD_REFUSED:
                raise refusal(url, status, headers)
        return self._probe_by_get(call, url)

    def _probe_by_get(self, call: Call[Any], url: str) -> ObjectInfo:
        with self._request(call, "GET", url, {"Range": "bytes=0-0"}) as response:
            status, headers = response.status, response.headers
            if status not in {200, 206, 416}:
                raise refusal(url, status, headers)
            check_encoding(url, headers)
            size_bytes = content_length(headers) if status == 200 else size_of_partial(headers)
            if status == 416 and size_bytes:
                raise refusal(url, status, headers)
            if size_bytes is None:
                raise RemoteError(
                    f"The server tells no size of {url}: have it serve the file with a "
                    "Content-Length."
                )
            return described(url, headers, size_bytes, ranges=status != 200)

    def _fetch(
        self, call: SinkCall[ObjectInfo], url: str, span: Span, validator: str | None
    ) -> ObjectInfo:
        if not span.length:
            info = self._probe(call, url)
            check_version(info, validator)
            return info
        headers = {"Range": f"bytes={span.start}-{span.stop - 1}"}
        if etag := strong_etag(validator):
            headers["If-Match"] = etag
        with self._request(call, "GET", url, headers) as response:
            if response.status not in {200, 206}:
                raise refusal(url, response.status, response.headers, span=span)
            info = answer_to_range(url, response.status, response.headers, span, validator)
            call.found(info)
            receive(call, response, url)
        return info

    def _fetch_whole(self, call: Call[WholeObject], item: BatchItem) -> WholeObject:
        etag = strong_etag(item.validator)
        with self._request(call, "GET", item.url, {"If-Match": etag} if etag else {}) as response:
            if response.status != 200:
                raise refusal(item.url, response.status, response.headers)
            check_encoding(item.url, response.headers)
            size_bytes = content_length(response.headers)
            if size_bytes is not None and size_bytes > WHOLE_OBJECT_BYTES_MAX:
                raise too_large(item.url, size_bytes)
            call.answered()
            data = b""
            while len(data) <= WHOLE_OBJECT_BYTES_MAX:
                piece = response.read(WHOLE_OBJECT_PIECE_BYTES)
                if not piece:
                    break
                data += piece
                call.answered()
        if size_bytes is not None and len(data) != size_bytes:
            raise cut(item.url)
        if len(data) > WHOLE_OBJECT_BYTES_MAX:
            raise too_large(item.url, len(data))
        info = described(item.url, response.headers, len(data))
        check_version(info, item.validator)
        return WholeObject(info=info, data=data)

    def _index(self, call: Call[Any], url: str) -> Iterator[ListedEntry]:
        directory = parse(url)
        if not directory.path.endswith("/"):
            directory = msgspec.structs.replace(directory, path=directory.path + "/")
        headers = {"Accept": "application/json, text/html;q=0.9"}
        with self._answer(call, "GET", str(directory), headers) as (response, page_url):
            if response.status != 200:
                raise refusal(url, response.status, response.headers)
            check_encoding(url, response.headers)
            kind = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            if kind not in {"application/json", "text/html", "application/xhtml+xml"}:
                raise NotSupported(f"The server has no directory page for {url}.")
            call.answered()
            text = _text(response, url)
        if kind == "application/json":
            return json_entries(str(directory), text)
        return html_entries(str(directory), str(page_url), text)

    @contextlib.contextmanager
    def _request(
        self,
        call: Call[Any],
        method: str,
        url: str,
        headers: dict[str, str] | None = None,
        body: bytes | None = None,
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        with self._answer(call, method, url, headers or {}, body) as (response, _):
            yield response

    def _address(self, url: str) -> RemoteUrl:
        """Where the object of a public URL is asked for, with its secrets."""
        return parse(self._credentials.reveal(url))

    @contextlib.contextmanager
    def _answer(
        self,
        call: Call[Any],
        method: str,
        url: str,
        headers: dict[str, str],
        body: bytes | None = None,
    ) -> Iterator[tuple[urllib3.BaseHTTPResponse, RemoteUrl]]:
        """The answer after redirects, and where it came from.  Its connection goes back to the
        pool when the body was read to its end, and is closed otherwise."""
        first = self._address(url)
        # Where a condition names the version, the last answer's address may be asked again.
        conditional = "If-Match" in headers
        known = self._moved.get(url) if conditional else None
        target = known.target if known is not None and known.fresh else first
        for _ in range(REDIRECTS_MAX + 1):
            sent = self._sent(call, method, first, target, headers, body)
            with contextlib.closing(sent) as response:
                location = response.headers.get("Location")
                if response.status in REDIRECT_STATUSES and location:
                    target = _redirected(url, target, location)
                    continue
                if target is not first and response.status >= 400 and url in self._moved:
                    # A signed address that has expired: the server gives a new one.
                    self._moved.pop(url, None)
                    target = first
                    continue
                if target is not first and conditional:
                    self._remember(url, target)
                yield response, target
                return
        raise RemoteError(f"The server redirects {url} more than {REDIRECTS_MAX} times.")

    def _sent(
        self,
        call: Call[Any],
        method: str,
        first: RemoteUrl,
        target: RemoteUrl,
        headers: dict[str, str],
        body: bytes | Iterable[bytes] | None = None,
    ) -> urllib3.BaseHTTPResponse:
        own = authorization(self._settings, target) if target.host_url == first.host_url else {}
        bare = msgspec.structs.replace(target, user=None, password=None)
        response = self._client.send(call, method, str(bare), {**headers, **own}, body)
        if response.status not in UNAUTHORIZED or not isinstance(body, bytes | None):
            return response
        # They may have been renewed while this was on its way.
        renewed = authorization(self._settings, target) if own else own
        if renewed == own:
            return response
        response.close()
        return self._client.send(call, method, str(bare), {**headers, **renewed}, body)

    def _remember(self, url: str, target: RemoteUrl) -> None:
        if len(self._moved) >= MOVED_MAX:
            self._moved.clear()
        self._moved[url] = _Moved(target, time.monotonic() + MOVED_LIFETIME_S)


def _redirected(url: str, target: RemoteUrl, location: str) -> RemoteUrl:
    """Where a Location header leads.  Raises RemoteError when it must not be followed."""
    location = location.encode("latin-1", "replace").decode("utf-8", "surrogateescape")
    bare = msgspec.structs.replace(target, user=None, password=None)
    try:
        new = parse(urldefrag(urljoin(str(bare), location)).url)
    except (InvalidUrl, ValueError) as exc:
        raise RemoteError(f"The server redirects {url} to something that is no URL.") from exc
    if new.scheme not in {"http", "https"} or (target.scheme, new.scheme) == ("https", "http"):
        raise RemoteError(
            f"The server redirects {url} to {new.host_url}, which is not followed: "
            f"a {target.scheme} URL may lead to https only."
            if target.scheme == "https"
            else f"The server redirects {url} to a {new.scheme} URL, which is not followed."
        )
    same_host = new.host_url == bare.host_url
    if same_host and new.path == target.path + "/":
        raise RemoteError(f"{url} names a directory: name a file, or bind the directory.")
    return msgspec.structs.replace(
        new,
        user=target.user if same_host else None,
        password=target.password if same_host else None,
    )


def _text(response: urllib3.BaseHTTPResponse, url: str) -> str:
    data = response.read(INDEX_BYTES_MAX + 1)
    if len(data) > INDEX_BYTES_MAX:
        raise RemoteError(f"The directory page of {url} is larger than {INDEX_BYTES_MAX} bytes.")
    return data.decode("utf-8", "surrogateescape")
