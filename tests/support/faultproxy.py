"""A TCP proxy that breaks connections on demand, and says whether it did.

Faults act on what the server sends, or with ``upwards`` on what it is sent: each is armed for a
number of connections and strikes when a connection has passed so many bytes since then.
``hits`` counts the strikes; a test asserts that its fault hit.  Controlled from any thread
while connections run; two threads per connection, all ended by ``stop``.
"""

import contextlib
import dataclasses
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["cut", "reset", "stall", "flip", "trickle"]
BUFFER_BYTES = 256 << 10
TRICKLE_S = 0.05


@dataclasses.dataclass
class _Fault:
    kind: Kind
    after_bytes: int
    times: int
    upwards: bool


class _Link:
    """One connection through the proxy."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.passed_bytes = {True: 0, False: 0}
        """By whether they went upwards."""

    def close(self) -> None:
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class FaultProxy:
    """Listens on ``port`` and forwards to ``target_port``, both on loopback."""

    def __init__(self, target_port: int) -> None:
        self._target = ("127.0.0.1", target_port)
        self._lock = threading.Lock()
        self._fault: _Fault | None = None
        self._links: set[_Link] = set()
        self._released = threading.Event()
        self._stopped = False
        self._hits = 0
        self._bytes_down = 0
        self._connections = 0
        self._struck = threading.Event()
        self._threads: list[threading.Thread] = []
        self._fillers: list[socket.socket] = []
        self._listener = self._listen(0)
        self.port: int = self._listener.getsockname()[1]

    # What has happened.

    @property
    def hits(self) -> int:
        """How often a fault has struck."""
        return self._hits

    @property
    def bytes_down(self) -> int:
        """Bytes that reached clients, protocol and all."""
        return self._bytes_down

    @property
    def connections(self) -> int:
        return self._connections

    @property
    def open_connections(self) -> int:
        return len(self._links)

    def wait_for_hit(self, deadline_s: float = 20.0) -> None:
        assert self._struck.wait(deadline_s), "the fault did not strike"

    # What shall happen.

    def cut(self, *, after_bytes: int, times: int = 1, upwards: bool = False) -> None:
        """Close the connection in good order, as a server does that was told to restart."""
        self._arm("cut", after_bytes, times, upwards)

    def reset(self, *, after_bytes: int, times: int = 1, upwards: bool = False) -> None:
        """RST, as from a machine that lost its memory."""
        self._arm("reset", after_bytes, times, upwards)

    def stall(self, *, after_bytes: int, times: int = 1, upwards: bool = False) -> None:
        """Keep the connection open and send nothing more until ``release``."""
        self._arm("stall", after_bytes, times, upwards)

    def flip(self, *, after_bytes: int, times: int = 1, upwards: bool = False) -> None:
        """Turn one bit over."""
        self._arm("flip", after_bytes, times, upwards)

    def trickle(self, *, after_bytes: int, times: int = 1, upwards: bool = False) -> None:
        """A byte now and then, until ``release``."""
        self._arm("trickle", after_bytes, times, upwards)

    def release(self) -> None:
        """Let stalled connections go on, and disarm."""
        with self._lock:
            self._fault = None
            self._released.set()

    def refuse(self) -> None:
        """New connections are refused, running ones go on."""
        _hang_up(self._listener)

    def swallow(self) -> None:
        """New connections get no answer at all, not even that they are refused."""
        self.refuse()
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", self.port))
        self._listener.listen(0)
        # A full queue makes the kernel drop what asks for a connection.
        for _ in range(2):
            client = socket.socket()
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", self.port))
            self._fillers.append(client)

    def unanswered(self) -> int:
        """How many ask for a connection now and get no answer, those of ``swallow`` left out."""
        lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
        wanted = f":{self.port:04X}"
        fields = [line.split() for line in lines]
        asking = sum(one[2].endswith(wanted) and one[3] == "02" for one in fields)
        return asking - (len(self._fillers) - 1 if self._fillers else 0)

    def hang_up(self) -> None:
        """End every connection, as a server does that ends."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.close()

    def accept_again(self) -> None:
        _hang_up(self._listener)
        for client in self._fillers:
            client.close()
        self._fillers.clear()
        self._listener = self._listen(self.port)

    def stop(self) -> None:
        self._stopped = True
        self.release()
        _hang_up(self._listener)
        for client in self._fillers:
            client.close()
        self.hang_up()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive(), "a thread of the proxy did not end"

    def _arm(self, kind: Kind, after_bytes: int, times: int, upwards: bool) -> None:
        with self._lock:
            self._fault = _Fault(kind, after_bytes, times, upwards)
            self._released = threading.Event()
            self._struck.clear()
            for link in self._links:
                link.passed_bytes = {True: 0, False: 0}

    def _listen(self, port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(512)
        self._start(self._accept, listener)
        return listener

    def _start(self, run: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=run, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not self._stopped:
                client, _ = listener.accept()
                try:
                    server = socket.create_connection(self._target, timeout=10)
                except OSError:
                    client.close()
                    continue
                server.settimeout(None)
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                link = _Link(client, server)
                with self._lock:
                    self._links.add(link)
                    self._connections += 1
                self._start(self._pump_up, link)
                self._start(self._pump_down, link)

    def _pump_up(self, link: _Link) -> None:
        try:
            while data := link.client.recv(BUFFER_BYTES):
                if not self._pass(link, data, upwards=True):
                    link.close()
                    return
            link.server.shutdown(socket.SHUT_WR)
        except OSError:
            link.close()

    def _pump_down(self, link: _Link) -> None:
        with contextlib.suppress(OSError):
            while data := link.server.recv(BUFFER_BYTES):
                if not self._pass(link, data, upwards=False):
                    break
        link.close()
        with self._lock:
            self._links.discard(link)

    def _pass(self, link: _Link, data: bytes, *, upwards: bool) -> bool:
        """Send one piece on, faults applied; False when the connection ends here."""
        with self._lock:
            kind, place = self._strike(link, len(data), upwards)
            link.passed_bytes[upwards] += len(data)
            released = self._released
        if kind is None:
            self._send(link, data, upwards)
            return True
        if kind == "flip":
            self._send(link, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :], upwards)
            self._struck.set()
            return True
        self._send(link, data[:place], upwards)
        self._struck.set()
        if kind == "trickle":
            while place < len(data) and not released.wait(TRICKLE_S):
                self._send(link, data[place : place + 1], upwards)
                place += 1
            self._send(link, data[place:], upwards)
            return not self._stopped
        if kind == "stall":
            released.wait()
            self._send(link, data[place:], upwards)
            return not self._stopped
        if kind == "reset":
            linger = struct.pack("ii", 1, 0)
            link.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            link.client.close()
        return False

    def _strike(self, link: _Link, size_bytes: int, upwards: bool) -> tuple[Kind | None, int]:
        """Whether the armed fault strikes within the next piece, and where.  Under the lock."""
        fault = self._fault
        if fault is None or not fault.times or fault.upwards is not upwards:
            return None, 0
        place = fault.after_bytes - link.passed_bytes[upwards]
        if not 0 <= place < size_bytes:
            return None, 0
        fault.times -= 1
        self._hits += 1
        return fault.kind, place

    def _send(self, link: _Link, data: bytes, upwards: bool) -> None:
        if upwards:
            link.server.sendall(data)
            return
        link.client.sendall(data)
        with self._lock:
            self._bytes_down += len(data)


@contextlib.contextmanager
def fault_proxy(target_port: int) -> Iterator[FaultProxy]:
    proxy = FaultProxy(target_port)
    try:
        yield proxy
    finally:
        proxy.stop()


def _hang_up(listener: socket.socket) -> None:
    """Close a listening socket under the thread that waits on it."""
    with contextlib.suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()
