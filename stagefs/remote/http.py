"""``http://`` and ``https://``: objects on web servers, through urllib3 in worker threads.

One instance serves one host; connections are kept and shared by its calls.  A redirect may
lead to another host, at most REDIRECTS_MAX times, never from https to http, and takes no
credentials along.  Never asks for an encoded body.  What answers mean is decided in
``http_answers``, directory pages are read in ``http_index``; this module moves bytes.
"""

import contextlib
import http.client
import logging
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, TypeVar
from urllib.parse import urldefrag, urljoin

import msgspec
import trio
import urllib3
import urllib3.connection
import urllib3.exceptions

from stagefs.errors import (
    DeadlineExceeded,
    InvalidUrl,
    NotSupported,
    RemoteError,
    RemoteUnavailable,
    StageFSError,
)
from stagefs.model import ListedEntry, ObjectInfo, Span, WholeObject
from stagefs.remote.base import WHOLE_OBJECT_BYTES_MAX, BatchItem, Results, Sink
from stagefs.remote.batch import fetch_each, too_large
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.http_access import authorization, proxy_of, trusting
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
from stagefs.remote.http_index import html_entries, json_entries
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.threads import PIECE_BYTES, Call, SinkCall
from stagefs.remote.url import RemoteUrl, parse

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
HEAD_REFUSED = frozenset({400, 403, 405, 406, 501})

_serving = threading.local()

# It logs each request with its query, and so with signatures and tokens.
logging.getLogger("urllib3.connectionpool").setLevel(logging.WARNING)


class _WakeableConnection(urllib3.connection.HTTPConnection):
    """A connection that the call which uses it can shut from the trio thread."""

    _served: Call[Any] | None = None

    def connect(self) -> None:
        super().connect()
        call: Call[Any] = _serving.call
        call.checkpoint()

    def putrequest(
        self,
        method: str,
        url: str,
        skip_host: bool = False,
        skip_accept_encoding: bool = False,
    ) -> None:
        call: Call[Any] = _serving.call
        self._served = call

        def wake() -> bool:
            if self._served is not call or self.sock is None:
                return False
            # Not SSLSocket.shutdown, which pulls the TLS state away under a thread that reads.
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self.sock, socket.SHUT_RDWR)
            return True

        call.interruptible(wake)
        super().putrequest(method, url, skip_host, skip_accept_encoding)


class _WakeableTlsConnection(_WakeableConnection, urllib3.connection.HTTPSConnection):
    pass


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _WakeableConnection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _WakeableTlsConnection


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
        self._clients: dict[str | None, urllib3.PoolManager] = {}
        # Used from several threads, in single steps only.
        self._moved: dict[str, _Moved] = {}
        self._clients_lock = threading.Lock()

    async def stat(self, url: str) -> ObjectInfo:
        def work(call: Call[ObjectInfo]) -> ObjectInfo:
            with _translated(url):
                return self._probe(call, url)

        return await self._call(work, url).run(self._lookup_threads)

    async def list(self, url: str) -> AsyncIterator[Sequence[ListedEntry]]:
        def work(call: Call[tuple[ListedEntry, ...]]) -> tuple[ListedEntry, ...]:
            with _translated(url):
                return tuple(self._index(call, url))

        entries = await self._call(work, url).run(self._lookup_threads)
        for start in range(0, len(entries), LIST_PAGE_NAMES):
            yield entries[start : start + LIST_PAGE_NAMES]

    async def fetch(self, url: str, span: Span, *, sink: Sink, validator: str | None) -> ObjectInfo:
        def work(call: SinkCall[ObjectInfo]) -> ObjectInfo:
            with _translated(url):
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
                with _translated(item.url):
                    return self._fetch_whole(call, item)

            return await self._call(work, item.url).run(self._threads)

        return await fetch_each(fetch_whole, items)

    async def aclose(self) -> None:
        with self._clients_lock:
            clients, self._clients = self._clients, {}
        for client in clients.values():
            client.clear()

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
            while call.missing_bytes:
                piece = response.read1(min(PIECE_BYTES, call.missing_bytes))
                if not piece:
                    raise _cut(url)
                call.write(piece)
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
            data = response.read(WHOLE_OBJECT_BYTES_MAX + 1)
        if size_bytes is not None and len(data) != size_bytes:
            raise _cut(item.url)
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
        self, call: Call[Any], method: str, url: str, headers: dict[str, str] | None = None
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        with self._answer(call, method, url, headers or {}) as (response, _):
            yield response

    @contextlib.contextmanager
    def _answer(
        self, call: Call[Any], method: str, url: str, headers: dict[str, str]
    ) -> Iterator[tuple[urllib3.BaseHTTPResponse, RemoteUrl]]:
        """The answer after redirects, and where it came from.  Its connection goes back to the
        pool when the body was read to its end, and is closed otherwise."""
        _serving.call = call
        first = parse(self._credentials.reveal(url))
        # Where a condition names the version, the last answer's address may be asked again.
        conditional = "If-Match" in headers
        known = self._moved.get(url) if conditional else None
        target = known.target if known is not None and known.fresh else first
        for _ in range(REDIRECTS_MAX + 1):
            with contextlib.closing(self._sent(method, first, target, headers)) as response:
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
        self, method: str, first: RemoteUrl, target: RemoteUrl, headers: dict[str, str]
    ) -> urllib3.BaseHTTPResponse:
        own = authorization(self._settings, target) if target.host_url == first.host_url else {}
        return self._client(target).urlopen(
            method,
            str(msgspec.structs.replace(target, user=None, password=None)),
            headers={"Accept-Encoding": "identity", "User-Agent": "stagefs", **headers, **own},
            redirect=False,
            retries=False,
            preload_content=False,
            decode_content=False,
        )

    def _remember(self, url: str, target: RemoteUrl) -> None:
        if len(self._moved) >= MOVED_MAX:
            self._moved.clear()
        self._moved[url] = _Moved(target, time.monotonic() + MOVED_LIFETIME_S)

    def _client(self, target: RemoteUrl) -> urllib3.PoolManager:
        proxy = proxy_of(self._settings, target)
        with self._clients_lock:
            if proxy not in self._clients:
                self._clients[proxy] = _new_client(self._settings, proxy)
            return self._clients[proxy]


def _new_client(settings: RemoteSettings, proxy: str | None) -> urllib3.PoolManager:
    options: dict[str, Any] = {
        "num_pools": 8,
        "maxsize": settings.concurrency + settings.lookups,
        "block": False,
        "timeout": urllib3.Timeout(
            connect=settings.connect_timeout_s,
            read=max(settings.answer_timeout_s, settings.progress_timeout_s),
        ),
    }
    if settings.http.ca_file is not None:
        options["ssl_context"] = trusting(settings.http.ca_file)
    client: urllib3.PoolManager
    if proxy is None:
        client = urllib3.PoolManager(**options)
    else:
        parts = parse(proxy)
        if parts.user is not None:
            options["proxy_headers"] = urllib3.make_headers(
                proxy_basic_auth=f"{parts.user}:{parts.password or ''}"
            )
        bare = msgspec.structs.replace(parts, user=None, password=None)
        client = urllib3.ProxyManager(str(bare), **options)
    client.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
    return client


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


def _cut(url: str) -> RemoteUnavailable:
    return RemoteUnavailable(f"The connection to {url} ended before the last byte: try again.")


@contextlib.contextmanager
def _translated(url: str) -> Iterator[None]:
    """Foreign exceptions into StageFS's.  Their texts may quote the request with its secrets,
    so only what the system said of a socket is kept."""
    try:
        yield
    # Before TimeoutError: a refused connection is a kind of it there.
    except urllib3.exceptions.NewConnectionError as exc:
        raise RemoteUnavailable(
            f"There is no connection to {url} ({_reason(exc)}): check host, port and network."
        ) from exc
    except urllib3.exceptions.TimeoutError as exc:
        raise DeadlineExceeded(
            f"{url} did not answer in time: the server or the way to it is stalled; "
            "try again later."
        ) from exc
    except (urllib3.exceptions.SSLError, ssl.SSLError) as exc:
        raise _tls_error(url, exc) from exc
    except (urllib3.exceptions.ProtocolError, urllib3.exceptions.ProxyError) as exc:
        raise RemoteUnavailable(f"The connection to {url} broke ({_reason(exc)}).") from exc
    except urllib3.exceptions.HTTPError as exc:
        # Not even as a cause, which a traceback would print: some quote the URL with its secrets.
        raise RemoteError(f"{url} cannot be asked for ({type(exc).__name__}).") from None
    except (OSError, http.client.HTTPException) as exc:
        raise RemoteUnavailable(f"The connection to {url} broke ({_reason(exc)}).") from exc


def _tls_error(url: str, exc: Exception) -> StageFSError:
    causes = [exc, exc.__cause__, exc.__context__, *exc.args]
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return RemoteError(
                f"The certificate of {url} is not trusted ({cause.verify_message}): "
                "name the certificates to trust in [remote.http] ca_file."
            )
    return RemoteUnavailable(f"The TLS connection to {url} broke.")


def _reason(exc: BaseException) -> str:
    """The system's word for the innermost cause, else its class."""
    seen: BaseException | None = exc
    name = type(exc).__name__
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        nested = [arg for arg in seen.args if isinstance(arg, BaseException)]
        seen = seen.__cause__ or (nested[0] if nested else seen.__context__)
    return name
