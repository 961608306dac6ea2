"""A TCP proxy on loopback behind which a server is as if it were far away: each byte arrives half
a round trip after it was sent, in both directions, none is lost, and the way is wide.

A connection begins with one round trip, as TCP's own does.  One thread for all connections, ended
by ``running_far_away``; root's goes before other programs, as a network does.
"""

import collections
import contextlib
import heapq
import itertools
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator

PIECE_BYTES = 256 << 10
# What one direction of a connection carries at most: 10 ms of several gigabytes a second.
UNDER_WAY_BYTES_MAX = 64 << 20
NICE = -15


class _Way:
    """One direction of a connection.  ``pieces``: (when it arrives, what), in order."""

    def __init__(self, source: "_End", sink: "_End") -> None:
        self.source, self.sink = source, sink
        self.pieces: collections.deque[tuple[float, memoryview]] = collections.deque()
        self.size_bytes = 0
        self.blocked = False
        """Whether the sink takes nothing at the moment."""
        self.ends_at: float | None = None
        """When the end of the stream arrives."""
        self.over = False

    @property
    def is_wanted(self) -> bool:
        return self.ends_at is None and self.size_bytes < UNDER_WAY_BYTES_MAX


class _End:
    """A socket: where the bytes of one way come from, and those of the other go."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.out: _Way
        self.into: _Way


class FarAway:
    """Listens on ``port``.  Made by ``running_far_away``, which also ends it."""

    def __init__(self, target_port: int, *, round_trip_s: float) -> None:
        self._target = ("127.0.0.1", target_port)
        self._round_trip_s = round_trip_s
        self._ends: set[_End] = set()
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        # Not epoll: that waits whole milliseconds.
        self._selector = selectors.SelectSelector()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port: int = self._listener.getsockname()[1]
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._waker.close()
        self._thread.join(10)
        assert not self._thread.is_alive(), "the proxy did not end"

    # All that follows runs in the proxy's own thread.

    def _run(self) -> None:
        with contextlib.suppress(PermissionError):
            own = os.PRIO_PROCESS, threading.get_native_id()
            os.setpriority(*own, min(NICE, os.getpriority(*own)))
        while self._turn():
            pass
        self._selector.close()
        self._listener.close()
        self._woken.close()
        for end in self._ends:
            end.socket.close()

    def _turn(self) -> bool:
        """False: the proxy is to stop."""
        wait_s = None if not self._later else max(0.0, self._later[0][0] - time.monotonic())
        for key, events in self._selector.select(wait_s):
            if key.fileobj is self._woken:
                return False
            if isinstance(key.data, _End):
                self._ready(key.data, events)
            else:
                self._accept()
        while self._later and self._later[0][0] <= time.monotonic():
            heapq.heappop(self._later)[2]()
        return True

    def _at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._later, (when, next(self._numbers), what))

    def _accept(self) -> None:
        client = _End(self._listener.accept()[0])
        self._ends.add(client)
        self._at(time.monotonic() + self._round_trip_s, lambda: self._connect(client))

    def _connect(self, client: _End) -> None:
        server = _End(socket.socket())
        self._ends.add(server)
        client.out = server.into = _Way(client, server)
        server.out = client.into = _Way(server, client)
        try:
            server.socket.connect(self._target)
        except OSError:
            self._cut(client.out)
            return
        for end in (client, server):
            end.socket.setblocking(False)
            end.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._watch(end)

    def _watch(self, end: _End) -> None:
        """Look at what the state of its two ways makes interesting."""
        if end not in self._ends:
            return
        events = selectors.EVENT_READ if end.out.is_wanted else 0
        events |= selectors.EVENT_WRITE if end.into.blocked else 0
        known = self._selector.get_map().get(end.socket)
        if known is not None and known.events == events:
            return
        if known is not None:
            self._selector.unregister(end.socket)
        if events:
            self._selector.register(end.socket, events, end)

    def _ready(self, end: _End, events: int) -> None:
        if events & selectors.EVENT_WRITE and end in self._ends:
            end.into.blocked = False
            self._deliver(end.into)
        if events & selectors.EVENT_READ and end in self._ends:
            self._take(end.out)

    def _take(self, way: _Way) -> None:
        """What was sent: it arrives later."""
        try:
            data = way.source.socket.recv(PIECE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self._cut(way)
            return
        arrives_at = time.monotonic() + self._round_trip_s / 2
        if data:
            way.pieces.append((arrives_at, memoryview(data)))
            way.size_bytes += len(data)
        else:
            way.ends_at = arrives_at
        self._at(arrives_at, lambda: self._deliver(way))
        self._watch(way.source)

    def _deliver(self, way: _Way) -> None:
        """What has arrived by now, as far as the sink takes it."""
        if way.over or way.blocked:
            return
        now = time.monotonic()
        try:
            while way.pieces and way.pieces[0][0] <= now:
                arrived_at, data = way.pieces.popleft()
                sent = way.sink.socket.send(data)
                way.size_bytes -= sent
                if sent < len(data):
                    way.pieces.appendleft((arrived_at, data[sent:]))
        except BlockingIOError:
            way.pieces.appendleft((arrived_at, data))
            way.blocked = True
        except OSError:
            self._cut(way)
            return
        self._watch(way.source)
        self._watch(way.sink)
        if way.ends_at is not None and way.ends_at <= now and not way.pieces:
            self._end(way)

    def _end(self, way: _Way) -> None:
        way.over = True
        with contextlib.suppress(OSError):
            way.sink.socket.shutdown(socket.SHUT_WR)
        if way.sink.out.over:
            self._cut(way)

    def _cut(self, way: _Way) -> None:
        """The connection is over, or broken."""
        for end in (way.source, way.sink):
            end.out.over = True
            if end in self._ends:
                self._ends.discard(end)
                if end.socket in self._selector.get_map():
                    self._selector.unregister(end.socket)
                end.socket.close()


@contextlib.contextmanager
def running_far_away(target_port: int, *, round_trip_s: float) -> Iterator[FarAway]:
    proxy = FarAway(target_port, round_trip_s=round_trip_s)
    try:
        yield proxy
    finally:
        proxy.stop()
