"""What a put pipelines: the payload towards the server, and a file back for comparison.

A phase asks when its operation has a turn, and is told the answers.  Engine process only, one
thread; reading the local file may block.
"""

import os
from typing import Protocol

from stagefs.remote import sftp_protocol as protocol
from stagefs.remote.digest import hasher
from stagefs.remote.sftp_messages import FailureKind, Put
from stagefs.remote.sftp_operations import refusal
from stagefs.remote.sftp_protocol import Kind, ProtocolError, Status
from stagefs.remote.sftp_session import Failure, Operation, Session

# So much is sent before the server is asked to make it durable: one request for everything
# could take it longer than it may be silent.
SYNC_BYTES = 64 << 20


class Answer:
    """What the server answered to one question."""

    def __init__(self, kind: int, body: memoryview) -> None:
        self.kind = kind
        self.body = memoryview(bytes(body))

    @property
    def code(self) -> int:
        """The status; OK for every other answer."""
        return protocol.status(self.body)[0] if self.kind == Kind.STATUS else Status.OK

    def refusal(self) -> Failure:
        return refusal(*protocol.status(self.body))

    def check(self) -> None:
        """Raises Failure unless it is a status of OK."""
        if self.kind != Kind.STATUS:
            raise ProtocolError(f"a packet of type {self.kind} in answer to a change")
        if self.code != Status.OK:
            raise self.refusal()


class Piece:
    """Tag of a pipelined request."""

    __slots__ = ("length", "offset")

    def __init__(self, offset: int, length: int) -> None:
        self.offset = offset
        self.length = length


class Phase(Protocol):
    """Pipelined requests."""

    def ask(self, session: Session, operation: Operation) -> bool:
        """Send the next one; whether there are more."""
        ...

    def answered(
        self, session: Session, operation: Operation, tag: Piece, answer: Answer
    ) -> None: ...

    @property
    def over(self) -> bool: ...


class Payload:
    """The local file.  The descriptor is this object's own."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes.  Raises Failure."""
        try:
            data = os.pread(self._fd, length, offset)
            while len(data) < length:
                more = os.pread(self._fd, length - len(data), offset + len(data))
                if not more:
                    reason = (
                        f"its local copy ends after {offset + len(data)} bytes, declared were "
                        f"{self.size}"
                    )
                    raise Failure(FailureKind.CHECKSUM, reason)
                data += more
        except OSError as exc:
            reason = f"its local copy cannot be read ({exc.strerror})"
            raise Failure(FailureKind.SOURCE, reason) from exc
        return data

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Writing:
    """All bytes, in order; ``refused`` is the first answer that is not OK."""

    def __init__(self, put: Put, payload: Payload, handle: bytes) -> None:
        self._payload = payload
        self._handle = handle
        self._checksum = put.checksum
        self._hasher = None if put.checksum is None else hasher(put.checksum.kind)
        self._next = 0
        self._unanswered = 0
        self._unsynced = 0
        self.taken = 0
        self.refused: Answer | None = None

    @property
    def over(self) -> bool:
        sent_all = self._next == self._payload.size or self.refused is not None
        return sent_all and not self._unanswered

    def ask(self, session: Session, operation: Operation) -> bool:
        length = min(session.write_bytes, self._payload.size - self._next)
        if length <= 0 or self.refused is not None:
            return False
        data = self._payload.read(self._next, length)
        if self._hasher is not None:
            self._hasher.update(data)
        request = session.expect(operation, Piece(self._next, length), reserve=length)
        session.send(protocol.write_header(request, self._handle, self._next, length))
        session.send(data)
        self._next += length
        self._unanswered += 1
        self._unsynced += length
        if self._unsynced >= SYNC_BYTES and protocol.FSYNC_EXTENSION in session.extensions:
            self._unsynced = 0
            self._unanswered += 1
            request = session.expect(operation, Piece(self._next, 0))
            session.send(protocol.extended(request, protocol.FSYNC_EXTENSION, self._handle))
        return self._next < self._payload.size

    def answered(self, session: Session, operation: Operation, tag: Piece, answer: Answer) -> None:
        del session, operation
        self._unanswered -= 1
        if answer.code != Status.OK:
            self.refused = self.refused or answer
        else:
            self.taken += tag.length

    def check_digest(self) -> None:
        """Whether what was sent is what was declared.  Raises Failure."""
        if self._hasher is None or self._checksum is None:
            return
        found = self._hasher.hexdigest()
        if found != self._checksum.digest:
            reason = (
                f"the {self._checksum.kind} of its local copy is {found}, declared was "
                f"{self._checksum.digest}"
            )
            raise Failure(FailureKind.CHECKSUM, reason)


class Comparing:
    """Reads a file of the payload's size; ``equal`` until a byte differs."""

    def __init__(self, payload: Payload, handle: bytes) -> None:
        self._payload = payload
        self._handle = handle
        self._next = 0
        self._missing: list[Piece] = []
        self._unanswered = 0
        self.equal = True

    @property
    def over(self) -> bool:
        asked_all = self._next == self._payload.size and not self._missing
        return (asked_all or not self.equal) and not self._unanswered

    def ask(self, session: Session, operation: Operation) -> bool:
        if not self.equal:
            return False
        if self._missing:
            piece = self._missing.pop()
        else:
            length = min(session.limits.read_bytes, self._payload.size - self._next)
            if length <= 0:
                return False
            piece = Piece(self._next, length)
            self._next += length
        request = session.expect(operation, piece, reserve=piece.length)
        session.send(protocol.read(request, self._handle, piece.offset, piece.length))
        self._unanswered += 1
        return bool(self._missing) or self._next < self._payload.size

    def answered(self, session: Session, operation: Operation, tag: Piece, answer: Answer) -> None:
        self._unanswered -= 1
        if answer.kind != Kind.DATA:
            if answer.code != Status.EOF:
                raise answer.refusal()
            self.equal = False
            return
        data = protocol.string(answer.body)[0]
        if not data or data != self._payload.read(tag.offset, len(data)):
            self.equal = False
        elif len(data) < tag.length:
            self._missing.append(Piece(tag.offset + len(data), tag.length - len(data)))
            session.want_turn(operation, first=True)
