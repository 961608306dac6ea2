"""The HTTP client under the drivers: connections that can be woken, bodies without copies.

For ``http`` and ``store``, whose threads it runs in.  A body goes from the socket through one
buffer into the sink: what urllib3 does in between cost half of all CPU time of a fetch
(measured, docs/BENCHMARKS.md).
"""

import contextlib
import http.client
import logging
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from io import BufferedIOBase
from typing import Any

import msgspec
import urllib3
import urllib3.connection
import urllib3.exceptions

from stagefs.errors import (
    DeadlineExceeded,
    RemoteError,
    RemoteUnavailable,
    StageFSError,
)
from stagefs.model import MIB, ObjectInfo
from stagefs.page_buffer import page_buffer
from stagefs.remote.http_access import proxy_of
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.threads import Call, SinkCall
from stagefs.remote.url import RemoteUrl, parse

# A body is read in pieces that double while they come quickly: a slow one is then told of
# often, a fast one costs few calls.
PIECE_BYTES_MIN = 64 << 10
PIECE_BYTES_MAX = MIB
QUICK_S = 0.1
# A thread is woken when so much can be read, while pieces are large and more is sure to come:
# woken for each packet's worth, threads spend more time on that than on the bytes.
WAKE_BYTES = 256 << 10
# What http.client may have read beyond the head of an answer.
READ_AHEAD_BYTES = 8 << 10

UNSENT_BYTES_MAX = 256 << 10
_serving = threading.local()
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)

# It logs requests with their queries, and so with signatures and tokens: each one at DEBUG, and
# those whose answers have odd headers at WARNING.
logging.getLogger("urllib3.connectionpool").setLevel(logging.WARNING)
logging.getLogger("urllib3.connection").setLevel(logging.ERROR)


def serve(call: Call[Any]) -> None:
    """The connections that this thread uses from now on are the call's."""
    _serving.call = call


class _HeaderLines:
    """The stream of an answer while its header is read.  ``is_cut``: it ended within a line, or
    where one was wanted."""

    def __init__(self, stream: BufferedIOBase) -> None:
        self._stream = stream
        self.is_cut = False

    def readline(self, limit: int = -1) -> bytes:
        line = self._stream.readline(limit)
        self.is_cut = self.is_cut or not line.endswith(b"\n")
        return line

    def close(self) -> None:
        self._stream.close()


class _Answer(http.client.HTTPResponse):
    """http.client takes the end of the stream for the end of the header, and would believe half of
    a number or of an ETag."""

    def begin(self) -> None:
        stream: Any = self.fp
        lines: Any = _HeaderLines(stream)
        self.fp = lines
        try:
            super().begin()
        finally:
            if self.fp is lines:
                self.fp = stream
        if lines.is_cut:
            raise http.client.HTTPException("the header of the answer was cut")


class _WakeableConnection(urllib3.connection.HTTPConnection):
    """A connection that the call which uses it can shut from the trio thread."""

    _served: Call[Any] | None = None
    # Of the last request: its body can be read without urllib3's copies.
    answer: http.client.HTTPResponse | None = None

    def response_class(self, *args: Any, **kwargs: Any) -> http.client.HTTPResponse:  # type: ignore[override]  # noqa: ANN401 - as http.client calls it
        self.answer = _Answer(*args, **kwargs)
        return self.answer

    def connect(self) -> None:
        super().connect()
        # The limit for connecting is none for sending; the call's own deadlines hold there.
        self.sock.settimeout(None)
        # What waits in the kernel looks like progress, and would be waited for at the end.
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES_MAX)
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
            # The thread may end the connection meanwhile.
            sock = self.sock
            if self._served is not call or sock is None:
                return False
            # Not SSLSocket.shutdown, which pulls the TLS state away under a thread that reads.
            with contextlib.suppress(OSError):
                # What the kernel has yet to send is of no use any more.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            return True

        call.interruptible(wake)
        super().putrequest(method, url, skip_host, skip_accept_encoding)


class _WakeableTlsConnection(_WakeableConnection, urllib3.connection.HTTPSConnection):
    pass


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _WakeableConnection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _WakeableTlsConnection


class HttpClient:
    """Connections to any host, kept and shared by the calls of one remote.  For worker threads.

    ``trust`` makes the TLS context, when there is a first connection; None: what the system
    trusts.
    """

    def __init__(
        self, settings: RemoteSettings, *, trust: Callable[[], ssl.SSLContext] | None = None
    ) -> None:
        self._settings = settings
        self._trust = trust
        self._clients: dict[str | None, urllib3.PoolManager] = {}
        self._lock = threading.Lock()

    def send(
        self,
        call: Call[Any],
        method: str,
        url: str,
        headers: dict[str, str],
        body: bytes | Iterable[bytes] | None = None,
    ) -> urllib3.BaseHTTPResponse:
        """The head of the answer; redirects are not followed.  ``url`` holds no password."""
        serve(call)
        return self._client(parse(url)).urlopen(
            method,
            url,
            headers={"Accept-Encoding": "identity", "User-Agent": "stagefs", **headers},
            body=body,
            redirect=False,
            retries=False,
            preload_content=False,
            decode_content=False,
        )

    def close(self) -> None:
        with self._lock:
            clients, self._clients = self._clients, {}
        for client in clients.values():
            client.clear()

    def _client(self, target: RemoteUrl) -> urllib3.PoolManager:
        proxy = proxy_of(self._settings, target)
        with self._lock:
            if proxy not in self._clients:
                trust = None if self._trust is None else self._trust()
                self._clients[proxy] = new_client(self._settings, proxy, trust=trust)
            return self._clients[proxy]


def new_client(
    settings: RemoteSettings, proxy: str | None, *, trust: ssl.SSLContext | None
) -> urllib3.PoolManager:
    """A pool of connections whose calls can be woken."""
    options: dict[str, Any] = {
        "num_pools": 8,
        "maxsize": settings.concurrency + settings.lookups,
        "block": False,
        "timeout": urllib3.Timeout(
            connect=settings.connect_timeout_s,
            read=max(settings.answer_timeout_s, settings.progress_timeout_s),
        ),
    }
    if trust is not None:
        options["ssl_context"] = trust
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


def receive(call: SinkCall[ObjectInfo], response: urllib3.BaseHTTPResponse, url: str) -> None:
    """Move the body into the sink.  Raises RemoteUnavailable when it ends too early.

    Its connection then goes back to the pool if the body was all that was to come on it.
    """
    connection = response.connection
    assert isinstance(connection, _WakeableConnection)
    answer = connection.answer
    assert answer is not None
    waking = _Waking(connection, answer)
    buffer = _buffer()
    size = PIECE_BYTES_MIN
    while missing := call.missing_bytes:
        begun = time.monotonic()
        wanted = min(size, missing)
        waking.at(WAKE_BYTES if _is_plenty(wanted, missing) else 1)
        if size == PIECE_BYTES_MIN:
            # Returns with what there is: a slow body is written as it comes.
            piece = memoryview(answer.read1(wanted))
        else:
            piece = buffer[: answer.readinto(buffer[:wanted])]
        if not piece:
            raise cut(url)
        quick = time.monotonic() - begun < QUICK_S
        call.write(piece)
        size = min(size * 2, PIECE_BYTES_MAX) if quick else PIECE_BYTES_MIN
    waking.at(1)
    if answer.length == 0:
        answer.close()
        response.release_conn()


def _buffer() -> memoryview:
    """One for each thread, because the system hands out fresh pages for each new one."""
    kept: memoryview | None = getattr(_serving, "buffer", None)
    if kept is None:
        kept = _serving.buffer = page_buffer(PIECE_BYTES_MAX)
    return kept


def _is_plenty(wanted: int, missing: int) -> bool:
    """Whether a thread that has read all but the last byte of a piece can still be woken."""
    return wanted >= 2 * WAKE_BYTES and missing - wanted >= WAKE_BYTES + READ_AHEAD_BYTES


class _Waking:
    """How many bytes must have come before a thread that waits for a connection is woken.

    Not over TLS, whose records do not tell what is to come, nor when the length is unknown.
    """

    def __init__(self, connection: _WakeableConnection, answer: http.client.HTTPResponse) -> None:
        sock = connection.sock
        usable = type(sock) is socket.socket and answer.length is not None
        self._socket = sock if usable else None
        self._bytes = 1

    def at(self, count: int) -> None:
        if self._socket is not None and count != self._bytes:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
            self._bytes = count


def cut(url: str) -> RemoteUnavailable:
    return RemoteUnavailable(f"The connection to {url} ended before the last byte: try again.")


@contextlib.contextmanager
def translated(url: str, *, ca_setting: str = "[remote.http] ca_file") -> Iterator[None]:
    """Foreign exceptions into StageFS's.  Their texts may quote the request with its secrets,
    so only what the system said of a socket is kept."""
    try:
        yield
    # Before TimeoutError: a refused connection is a kind of it there.
    except urllib3.exceptions.NewConnectionError as exc:
        raise RemoteUnavailable(
            f"There is no connection to {url} ({_reason(exc)}): check host, port and network."
        ) from exc
    except (urllib3.exceptions.TimeoutError, TimeoutError) as exc:
        raise DeadlineExceeded(
            f"{url} did not answer in time: the server or the way to it is stalled; "
            "try again later."
        ) from exc
    except (urllib3.exceptions.SSLError, ssl.SSLError) as exc:
        raise _tls_error(url, exc, ca_setting) from exc
    except (urllib3.exceptions.ProtocolError, urllib3.exceptions.ProxyError) as exc:
        raise RemoteUnavailable(f"The connection to {url} broke ({_reason(exc)}).") from exc
    except urllib3.exceptions.HTTPError as exc:
        # Not even as a cause, which a traceback would print: some quote the URL with its secrets.
        raise RemoteError(f"{url} cannot be asked for ({type(exc).__name__}).") from None
    except (OSError, http.client.HTTPException) as exc:
        raise RemoteUnavailable(f"The connection to {url} broke ({_reason(exc)}).") from exc


def _tls_error(url: str, exc: Exception, ca_setting: str) -> StageFSError:
    causes = [exc, exc.__cause__, exc.__context__, *exc.args]
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return RemoteError(
                f"The certificate of {url} is not trusted ({cause.verify_message}): "
                f"name the certificates to trust in {ca_setting}."
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
