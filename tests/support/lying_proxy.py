"""An HTTP proxy on loopback that lies: in what a real server answers, or by answering itself.

A lie is armed for a number of requests of a method whose target contains a name; ``hits`` counts
those that it met, and a test asserts that there were some.  Everything else passes as it is, so
signatures stay right.  What is lied about must have a Content-Length.  Controlled from any
thread; one thread per connection, all ended by ``stop``.
"""

import contextlib
import dataclasses
import re
import socket
import struct
import threading
from collections.abc import Iterator
from io import BufferedReader
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["answer", "short", "shifted", "flip", "reset", "trickle"]
PIECE_BYTES = 64 << 10
TRICKLE_S = 0.05
_LENGTH = re.compile(rb"(?i)content-length: *([0-9]+)")
_CHUNKED = re.compile(rb"(?i)transfer-encoding: *chunked")
_RANGE = re.compile(rb"(?i)content-range: *bytes ([0-9]+)-([0-9]+)/([0-9]+)")


@dataclasses.dataclass
class _Lie:
    kind: Kind
    name: str
    method: str
    times: int
    answer: bytes = b""


class _Ended(Exception):
    """The connection is to be closed."""


class LyingProxy:
    def __init__(self, target_port: int) -> None:
        self._target = ("127.0.0.1", target_port)
        self._lock = threading.Lock()
        self._lie: _Lie | None = None
        self._ended = threading.Event()
        self._sockets: set[socket.socket] = set()
        self.hits = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    # What shall happen

    def answer(
        self, status: str, headers: str = "", *, name: str, method: str = "GET", times: int = 1
    ) -> None:
        """Instead of the server: ``503 Slow Down`` with ``Retry-After: 1``."""
        lines = [f"HTTP/1.1 {status}", *filter(None, [headers]), "Content-Length: 0", "", ""]
        self._arm(_Lie("answer", name, method, times, "\r\n".join(lines).encode()))

    def lie(self, kind: Kind, *, name: str, method: str = "GET", times: int = 1) -> None:
        """``short``: half the body, and the length that it has; ``shifted``: a Content-Range that
        begins a byte later; ``flip``: one bit of the body; ``reset``: RST within the header;
        ``trickle``: the header byte by byte, without end."""
        self._arm(_Lie(kind, name, method, times))

    def _arm(self, lie: _Lie) -> None:
        with self._lock:
            self._lie = lie
            self.hits = 0

    def stop(self) -> None:
        self._ended.set()
        with self._lock:
            sockets = [self._listener, *self._sockets]
        for one in sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join(10)

    # Passing on

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, _Ended):
            server = socket.create_connection(self._target, timeout=10)
            server.settimeout(None)
            with self._lock:
                self._sockets |= {client, server}
            try:
                with client.makefile("rb") as requests, server.makefile("rb") as answers:
                    while True:
                        self._pass_one(client, server, requests, answers)
            finally:
                with self._lock:
                    self._sockets -= {client, server}
                server.close()
                client.close()

    def _pass_one(
        self,
        client: socket.socket,
        server: socket.socket,
        requests: BufferedReader,
        answers: BufferedReader,
    ) -> None:
        head = _head(requests)
        method, target = head.split(b" ", 2)[:2]
        lie = self._met(method.decode(), target.decode("latin-1"))
        if lie is not None and lie.kind == "answer":
            requests.read(_length(head))
            client.sendall(lie.answer)
            return
        server.sendall(head)
        _copy(requests, server, _length(head))
        head = _head(answers)
        length = 0 if method == b"HEAD" else _length(head)
        if _CHUNKED.search(head):
            client.sendall(head)
            _copy_chunks(answers, client)
        elif lie is None:
            client.sendall(head)
            _copy(answers, client, length)
        else:
            self._tell(lie.kind, client, head, answers.read(length))

    def _tell(self, kind: Kind, client: socket.socket, head: bytes, body: bytes) -> None:
        half = len(body) // 2
        if kind == "short":
            client.sendall(_LENGTH.sub(b"content-length: %d" % half, head) + body[:half])
        elif kind == "shifted":
            client.sendall(_RANGE.sub(_shifted, head) + body)
        elif kind == "flip":
            client.sendall(head + body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :])
        elif kind == "reset":
            client.sendall(head[: len(head) // 2])
            linger = struct.pack("ii", 1, 0)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            raise _Ended
        else:
            client.sendall(head[:-2] + b"X-More: ")
            while not self._ended.wait(TRICKLE_S):
                client.sendall(b"x")

    def _met(self, method: str, target: str) -> _Lie | None:
        with self._lock:
            lie = self._lie
            if lie is None or not lie.times or method != lie.method or lie.name not in target:
                return None
            lie.times -= 1
            self.hits += 1
            return lie


def _head(stream: BufferedReader) -> bytes:
    lines = []
    while line := stream.readline(PIECE_BYTES):
        lines.append(line)
        if line == b"\r\n":
            return b"".join(lines)
    raise _Ended


def _length(head: bytes) -> int:
    found = _LENGTH.search(head)
    return int(found[1]) if found else 0


def _shifted(found: re.Match[bytes]) -> bytes:
    first, last, size = (int(number) for number in found.groups())
    return b"content-range: bytes %d-%d/%d" % (first + 1, last + 1, size)


def _copy_chunks(source: BufferedReader, sink: socket.socket) -> None:
    while True:
        line = source.readline(PIECE_BYTES)
        sink.sendall(line)
        count = int(line.partition(b";")[0], 16)
        _copy(source, sink, count + 2)
        if not count:
            return


def _copy(source: BufferedReader, sink: socket.socket, count: int) -> None:
    while count:
        data = source.read1(min(count, PIECE_BYTES))
        if not data:
            raise _Ended
        sink.sendall(data)
        count -= len(data)


@contextlib.contextmanager
def lying_proxy(target_port: int) -> Iterator[LyingProxy]:
    proxy = LyingProxy(target_port)
    try:
        yield proxy
    finally:
        proxy.stop()
