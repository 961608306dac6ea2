"""A TCP proxy on loopback that lets through so many bytes a second from a server, of all
connections together.  Two threads per connection, all ended by ``running_throttle``.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

PIECE_BYTES = 32 << 10


class Throttle:
    def __init__(self, target_port: int, *, bytes_per_s: int) -> None:
        self._target = ("127.0.0.1", target_port)
        self._bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0
        self._ended = threading.Event()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

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

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket()
                # Or the kernel takes mebibytes from the server that nobody has asked for yet.
                server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, PIECE_BYTES)
                server.connect(self._target)
                with self._lock:
                    self._sockets += [client, server]
                for source, sink, waits in ((client, server, False), (server, client, True)):
                    thread = threading.Thread(
                        target=self._copy, args=(source, sink, waits), daemon=True
                    )
                    self._threads.append(thread)
                    thread.start()

    def _copy(self, source: socket.socket, sink: socket.socket, waits: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(PIECE_BYTES):
                if waits and self._ended.wait(self._turn(len(data))):
                    return
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _turn(self, count: int) -> float:
        """How long these bytes have to wait."""
        with self._lock:
            now_s = time.monotonic()
            begin_s = max(now_s, self._free_at)
            self._free_at = begin_s + count / self._bytes_per_s
            return begin_s - now_s


@contextlib.contextmanager
def running_throttle(target_port: int, *, bytes_per_s: int) -> Iterator[Throttle]:
    throttle = Throttle(target_port, bytes_per_s=bytes_per_s)
    try:
        yield throttle
    finally:
        throttle.stop()
