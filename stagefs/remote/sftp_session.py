"""One SFTP conversation: who waits for which answer, and how much is asked for at once.

Operations ask through a session and are told the answers.  READs of large transfers are
handed out in turns: first come first served among transfers of one file, round robin among
files, never more than a window of bytes at a time.  The window adapts: it grows while answers
come quickly and shrinks when they queue, so that a slow link is not filled for seconds ahead.
WRITEs take their turns in the same way.  Engine process only, one thread; nothing here blocks
except writing into a sink and reading a source.
"""

import math
import os
from collections import deque
from itertools import islice
from typing import Protocol

from stagefs.remote import sftp_protocol as protocol
from stagefs.remote.sftp_messages import FailureKind
from stagefs.remote.sftp_protocol import Kind, Limits, ProtocolError
from stagefs.remote.sftp_stream import PacketStream, SinkFile

WINDOW_BYTES_MIN = 1 << 20
WINDOW_BYTES_START = 2 << 20
WINDOW_BYTES_MAX = 16 << 20
# An answer that took longer than this was queued behind too much.
QUEUEING_S = 0.5
OPEN_HANDLES_MAX = 512
HANDLES_SPARED = 8
# Buffers that one system call takes (IOV_MAX).
PARTS_MAX = 1024


class Failure(Exception):
    """Why an operation or a session ended: a kind, and a clause that follows a URL."""

    def __init__(self, kind: FailureKind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


class Transport(Protocol):
    """A started client (ssh, or paramiko's): bytes to and from the server's SFTP subsystem.

    ``errors_fd`` carries what the client says for people, and ends when the client has ended.
    """

    @property
    def read_fd(self) -> int: ...
    @property
    def write_fd(self) -> int: ...
    @property
    def errors_fd(self) -> int: ...

    def verdict(self, said: str) -> Failure:
        """Why the connection ended, from what the client said."""
        ...

    def end(self) -> None:
        """Close the descriptors and tell the client to stop, without waiting for it."""
        ...

    def ended(self) -> bool:
        """Whether nothing is left of the client."""
        ...

    def kill(self) -> None:
        """For a client that ``end`` did not end."""
        ...


class Client(Protocol):
    def start(self) -> Transport:
        """Begin a connection.  Raises Failure."""
        ...


class Operation(Protocol):
    """Something that asks.  ``group`` is shared by those that should be served in order."""

    group: bytes
    spreads: bool
    last_progress: float

    def answered(self, tag: object, kind: int, body: memoryview) -> None: ...
    def payload_target(self, tag: object) -> tuple[SinkFile, int] | None: ...
    def payload_ended(self, tag: object, length: int) -> None: ...

    def ask_more(self) -> bool:
        """Send the next READ; False when there is none to send now."""
        ...


class _Expected:
    __slots__ = ("asked", "operation", "reserved", "tag")

    def __init__(
        self, operation: Operation | None, tag: object, reserved: int, asked: float
    ) -> None:
        self.operation = operation
        self.tag = tag
        self.reserved = reserved
        self.asked = asked


class Session:
    """Invariant: ``in_flight_bytes`` is the sum of what is reserved for unanswered requests."""

    def __init__(self, transport: Transport, *, now: float) -> None:
        self.transport = transport
        self.ready = False
        self.started = now
        # A greeting is no answer: a server may greet and then say nothing.
        self.last_answered = -math.inf
        self.limits = Limits(read_bytes=protocol.READ_BYTES_UNLIMITED, open_handles=0)
        self.in_flight_bytes = 0
        self.open_handles = 0
        self.operations: dict[int, Operation] = {}
        self.said = bytearray()
        self._now = now
        self._window = WINDOW_BYTES_START
        self._stream = PacketStream(transport.read_fd, self)
        self._expected: dict[int, _Expected] = {}
        self._next_request = 1
        self._version_known = False
        self._outgoing: deque[bytes | memoryview] = deque([protocol.initialize()])
        self.extensions: frozenset[bytes] = frozenset()
        self.ending_since: float | None = None
        self.said_all = False
        self.was_ready = False
        self.ready_since = now
        self.last_used = now
        self._probed: float | None = None
        self._turns: deque[bytes] = deque()
        self._groups: dict[bytes, deque[Operation]] = {}
        self._wanting_handles: list[Operation] = []

    # For operations

    def expect(self, operation: Operation | None, tag: object = None, *, reserve: int = 0) -> int:
        """A request id whose answer goes to ``operation`` (None: to nobody)."""
        request = self._next_request
        self._next_request = request % 0xFFFFFFFF + 1
        self._expected[request] = _Expected(operation, tag, reserve, self._now)
        self.in_flight_bytes += reserve
        return request

    @property
    def write_bytes(self) -> int:
        """How much a WRITE should carry: less on a slow link, where each answer is the sign
        that bytes move."""
        return max(min(self.limits.write_bytes, self._window // 16), 1)

    def send(self, packet: bytes) -> None:
        """A packet, or a part of one."""
        self._outgoing.append(packet)

    def close_handle(
        self, handle: bytes, operation: Operation | None = None, tag: object = None
    ) -> None:
        """The answer goes to ``operation``, if to anybody."""
        self.send(protocol.on_handle(Kind.CLOSE, self.expect(operation, tag), handle))
        self.open_handles -= 1
        while self._wanting_handles:
            self.want_turn(self._wanting_handles.pop())

    def want_handle(self, operation: Operation) -> None:
        """The operation gets a turn when a handle was closed."""
        self._wanting_handles.append(operation)

    def want_turn(self, operation: Operation, *, first: bool = False) -> None:
        """``ask_more`` will be called when there is room."""
        group = self._groups.get(operation.group)
        if group is None:
            self._groups[operation.group] = deque([operation])
            self._turns.append(operation.group)
        elif operation in group:
            return
        elif first:
            group.appendleft(operation)
        else:
            group.append(operation)

    @property
    def handles_left(self) -> int:
        """How many more a batch may open; large transfers always find a few."""
        allowed = min(self.limits.open_handles or OPEN_HANDLES_MAX, OPEN_HANDLES_MAX)
        return max(allowed - HANDLES_SPARED, 1) - self.open_handles

    # For the engine

    @property
    def load(self) -> int:
        return self.in_flight_bytes + len(self._turns)

    @property
    def spreads(self) -> bool:
        """Whether anything here would gain by a further connection: the login costs both machines
        more than a batch of small files does, whatever it reserves."""
        return any(operation.spreads for operation in self.operations.values())

    def pump(self, now: float) -> None:
        """Ask for as much as the window allows."""
        self._now = now
        turns = self._turns
        while turns and self.in_flight_bytes < self._window:
            name = turns[0]
            group = self._groups[name]
            if group[0].ask_more():
                turns.rotate(-1)
                continue
            group.popleft()
            if not group:
                turns.popleft()
                del self._groups[name]

    @property
    def owed(self) -> bool:
        """Whether something is unsent or unanswered."""
        return bool(self._outgoing or self._expected)

    def silent_for_s(self, now: float) -> float:
        """How long the server has owed an answer and sent nothing."""
        if not self._expected:
            return 0.0
        # Requests are kept in the order in which they were made.
        oldest = next(iter(self._expected.values()))
        return now - max(self.last_answered, oldest.asked)

    def probe(self, now: float) -> None:
        """Ask something that costs nothing, to learn whether anybody is there."""
        self._now = self._probed = now
        if protocol.LIMITS_EXTENSION in self.extensions:
            request = self.expect(None, Kind.EXTENDED)
            self.send(protocol.extended(request, protocol.LIMITS_EXTENSION))
        else:
            self.send(protocol.on_path(Kind.STAT, self.expect(None), b"."))

    def probed_for_s(self, now: float) -> float | None:
        """How long a probe has been without any answer; None when none is."""
        if self._probed is None or self.last_answered >= self._probed:
            return None
        return now - self._probed

    def flush(self) -> bool:
        """Send what is to be sent.  Returns whether everything went out.  Raises OSError."""
        outgoing = self._outgoing
        while outgoing:
            try:
                written = os.writev(self.transport.write_fd, list(islice(outgoing, PARTS_MAX)))
            except BlockingIOError:
                return False
            while outgoing and written >= len(outgoing[0]):
                written -= len(outgoing.popleft())
            if written:
                outgoing[0] = memoryview(outgoing[0])[written:]
        return True

    def pull(self, now: float) -> bool:
        """Take what the server sent.  False at the end of the stream.  Raises ProtocolError,
        OSError."""
        self._now = now
        try:
            count = self._stream.pull()
        except BlockingIOError:
            return True
        if count and self.was_ready:
            self.last_answered = now
        return count > 0

    def listen(self) -> bool:
        """Take what the client says for people.  False when it has ended."""
        try:
            said = os.read(self.transport.errors_fd, 4096)
        except BlockingIOError:
            return True
        self.said += said
        del self.said[:-8192]
        return bool(said)

    def verdict(self) -> Failure:
        return self.transport.verdict(self.said.decode("utf-8", "replace"))

    # For the stream

    def packet(self, kind: int, request: int, body: memoryview) -> None:
        if not self._version_known:
            self._greeted(kind, request, body)
            return
        expected = self._take(request)
        if expected.operation is not None:
            expected.operation.last_progress = self._now
            expected.operation.answered(expected.tag, kind, body)
        elif expected.tag is Kind.EXTENDED:
            if kind == Kind.EXTENDED_REPLY:
                self.limits = protocol.limits(body)
            self.ready = True

    def payload_target(self, request: int, length: int) -> tuple[SinkFile, int] | None:
        expected = self._expected.get(request)
        if expected is None or expected.operation is None:
            return None
        if expected.reserved and length > expected.reserved:
            raise ProtocolError("more data than was asked for")
        # Progress is when bytes move, not when a packet is whole.
        expected.operation.last_progress = self._now
        return expected.operation.payload_target(expected.tag)

    def payload_ended(self, request: int, length: int) -> None:
        expected = self._take(request)
        if expected.operation is not None:
            expected.operation.last_progress = self._now
            expected.operation.payload_ended(expected.tag, length)

    def _greeted(self, kind: int, version: int, body: memoryview) -> None:
        if kind != Kind.VERSION or version < protocol.PROTOCOL_VERSION:
            raise ProtocolError("no SFTP version 3 in the server's greeting")
        self._version_known = True
        self.extensions = frozenset(protocol.extensions(body))
        if protocol.LIMITS_EXTENSION in self.extensions:
            request = self.expect(None, Kind.EXTENDED)
            self.send(protocol.extended(request, protocol.LIMITS_EXTENSION))
        else:
            self.ready = True

    def _take(self, request: int) -> _Expected:
        try:
            expected = self._expected.pop(request)
        except KeyError:
            raise ProtocolError("an answer to a question that nobody asked") from None
        if expected.reserved:
            self.in_flight_bytes -= expected.reserved
            if self._now - expected.asked > QUEUEING_S:
                self._window = max(self._window - expected.reserved, WINDOW_BYTES_MIN)
            else:
                self._window = min(self._window + expected.reserved, WINDOW_BYTES_MAX)
        return expected
