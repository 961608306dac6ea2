"""The process that speaks SFTP with one host: ``python -m stagefs.remote.sftp_engine FD HOST``.

It exists because Python code that is busy in the daemon slows every reader there; here it
costs nobody.  FD is a socket to the daemon, over which orders come (with the descriptors to
write into) and reports go.  One thread, one loop: nothing waits for one server, or for one
operation, while another could go on.  The process ends when its socket closes, and its
clients end with it.  It knows neither trio nor the cache.
"""

import array
import importlib
import os
import selectors
import socket
import sys
import time
from collections.abc import Callable

import msgspec

from stagefs.remote import sftp_openssh
from stagefs.remote.sftp_batch import BatchOperation
from stagefs.remote.sftp_messages import (
    PACKET_BYTES_MAX,
    AnyOrder,
    AnyReport,
    Connect,
    Failed,
    FailureKind,
    Fetch,
    FetchWhole,
    List,
    MorePages,
    Noted,
    Page,
    Put,
    Remove,
    SetTimes,
    Stat,
    Stop,
    Stopped,
    Whole,
)
from stagefs.remote.sftp_operations import (
    BaseOperation,
    FetchOperation,
    ListOperation,
    RemoveOperation,
    SetTimesOperation,
    StatOperation,
)
from stagefs.remote.sftp_pool import Pool
from stagefs.remote.sftp_put import PutOperation
from stagefs.remote.sftp_session import Client

# Reports that the daemon has not taken; beyond that nothing is read from servers.
OUTBOX_BYTES_MAX = 8 << 20
PACKET_FILL_BYTES = PACKET_BYTES_MAX - (70 << 10)
DESCRIPTORS_PER_PACKET = 1
ORDERS_PER_TURN = 64
END_WAIT_S = 0.5


class DaemonGone(Exception):
    """The daemon closed its socket."""


class DaemonPort:
    """Orders in, reports out, in packets.  Reports wait here until ``flush`` can send them."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        sock.setblocking(False)
        self._decoder = msgspec.msgpack.Decoder(AnyOrder)
        self._encoder = msgspec.msgpack.Encoder()
        self._reports: list[AnyReport] = []
        self._packets: list[bytes] = []
        self._sizes = 0
        self.waiting_bytes = 0

    def receive(self) -> tuple[AnyOrder, int | None] | None:
        """The next order and its descriptor; None when there is none now.  Raises DaemonGone."""
        descriptors = array.array("i")
        space = socket.CMSG_SPACE(DESCRIPTORS_PER_PACKET * descriptors.itemsize)
        try:
            packet, ancillary, _, _ = self.socket.recvmsg(
                PACKET_BYTES_MAX, space, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        except ConnectionError as exc:
            raise DaemonGone from exc
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
        if not packet:
            raise DaemonGone
        return self._decoder.decode(packet), descriptors[0] if descriptors else None

    def report(self, report: AnyReport) -> None:
        size = _size(report)
        if self._sizes + size > PACKET_FILL_BYTES:
            self._pack()
        self._reports.append(report)
        self._sizes += size

    def flush(self) -> bool:
        """Send what waits.  Returns whether everything went out.  Raises DaemonGone."""
        self._pack()
        while self._packets:
            try:
                self.socket.send(self._packets[0])
            except BlockingIOError:
                return False
            except ConnectionError as exc:
                raise DaemonGone from exc
            self.waiting_bytes -= len(self._packets.pop(0))
        return True

    def _pack(self) -> None:
        if self._reports:
            packet = self._encoder.encode(self._reports)
            self._packets.append(packet)
            self.waiting_bytes += len(packet)
            self._reports = []
            self._sizes = 0


class Engine:
    def __init__(self, port: DaemonPort, order: Connect, client: Client) -> None:
        self._port = port
        self._selector = selectors.DefaultSelector()
        self._operations: dict[int, BaseOperation] = {}
        self._now = time.monotonic()
        self._pool = Pool(client, order, self._selector, self._note, now=self._now)
        self._selector.register(port.socket, selectors.EVENT_READ, self._take_orders)
        self._events = selectors.EVENT_READ

    def run(self) -> None:
        """Until the daemon is gone."""
        try:
            next_tick = 0.0
            while True:
                self._turn(self._pool.tick_s)
                if self._now >= next_tick:
                    self._pool.tick(self._now)
                    next_tick = self._now + (self._pool.tick_s or 0.0) / 2
        except DaemonGone:
            self._end()

    def report(self, report: AnyReport) -> None:
        self._port.report(report)

    def ended(self, op: int) -> None:
        self._operations.pop(op, None)

    def _turn(self, timeout: float | None) -> None:
        self._pool.work(self._now)
        flushed = self._port.flush()
        self._pool.hold(self._port.waiting_bytes > OUTBOX_BYTES_MAX)
        events = selectors.EVENT_READ | (0 if flushed else selectors.EVENT_WRITE)
        if events != self._events:
            self._selector.modify(self._port.socket, events, self._take_orders)
            self._events = events
        ready = self._selector.select(timeout)
        self._now = time.monotonic()
        for key, mask in ready:
            react: Callable[[int], None] = key.data
            react(mask)

    def _take_orders(self, mask: int) -> None:
        if not mask & selectors.EVENT_READ:
            return
        for _ in range(ORDERS_PER_TURN):
            received = self._port.receive()
            if received is None:
                return
            self._obey(*received)

    def _obey(self, order: AnyOrder, fd: int | None) -> None:
        match order:
            case MorePages():
                listing = self._operations.get(order.op)
                if isinstance(listing, ListOperation):
                    listing.page_taken(self._now)
            case Stop():
                operation = self._operations.get(order.op)
                if operation is not None:
                    self._pool.withdraw(operation)
                    operation.end(None)
                self.report(Stopped(order.op))
            case Connect():
                raise AssertionError("a second Connect")
            case Fetch() | Put() if fd is None:
                reason = "its descriptor did not arrive (too many open files)"
                kind = FailureKind.SINK if isinstance(order, Fetch) else FailureKind.SOURCE
                self.report(Failed(order.op, kind, reason))
            case _:
                begun = self._operation(order, -1 if fd is None else fd)
                self._operations[begun.op] = begun
                self._pool.submit(begun, self._now)

    def _operation(  # noqa: PLR0911 - one for each kind
        self, order: Stat | List | Fetch | FetchWhole | Put | Remove | SetTimes, fd: int
    ) -> BaseOperation:
        match order:
            case Stat():
                return StatOperation(order, self, now=self._now)
            case List():
                return ListOperation(order, self, now=self._now)
            case Fetch():
                return FetchOperation(order, fd, self, now=self._now)
            case FetchWhole():
                return BatchOperation(order, self, now=self._now)
            case Put():
                return PutOperation(order, fd, self, now=self._now)
            case Remove():
                return RemoveOperation(order, self, now=self._now)
            case SetTimes():
                return SetTimesOperation(order, self, now=self._now)

    def _note(self, text: str) -> None:
        self.report(Noted(0, text))

    def _end(self) -> None:
        for operation in list(self._operations.values()):
            operation.end(None)
        self._settle_debts()
        transports = self._pool.close()
        deadline = time.monotonic() + END_WAIT_S
        for transport in transports:
            while not transport.ended() and time.monotonic() < deadline:
                self._selector.select(0.01)
            if not transport.ended():
                transport.kill()

    def _settle_debts(self) -> None:
        """What operations do at their end, such as removing half a file, is seen through for a
        moment."""
        self._selector.unregister(self._port.socket)
        self._pool.hold(False)
        deadline = self._now + END_WAIT_S
        while self._pool.owed and self._now < deadline:
            self._pool.work(self._now)
            for key, mask in self._selector.select(0.05):
                react: Callable[[int], None] = key.data
                react(mask)
            self._now = time.monotonic()


def _size(report: AnyReport) -> int:
    """About how many bytes it takes in a packet, rather too many."""
    if isinstance(report, Whole):
        return len(report.data) + 128
    if isinstance(report, Page):
        return sum(len(name) + 80 for name, _ in report.entries) + 64
    return 512


def main() -> None:
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.setblocking(True)
    os.set_inheritable(sock.fileno(), False)
    port = DaemonPort(sock)
    sock.setblocking(True)
    try:
        received = port.receive()
    except DaemonGone:
        return
    sock.setblocking(False)
    assert received is not None
    order, _ = received
    assert isinstance(order, Connect)
    Engine(port, order, _client(order)).run()


def _client(order: Connect) -> Client:
    """OpenSSH unless it is not there, a password is needed, or the settings say otherwise."""
    openssh = sftp_openssh.available(order.program) and order.password is None
    if order.client == "openssh" or (order.client == "auto" and openssh):
        return sftp_openssh.OpenSshClient(order)
    # Costs 0.1 s and 20 MB, for few.
    client: Client = importlib.import_module("stagefs.remote.sftp_paramiko").ParamikoClient(order)
    return client


if __name__ == "__main__":
    main()
