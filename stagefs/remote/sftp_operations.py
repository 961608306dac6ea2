"""What the daemon can ask of an engine, as sequences of SFTP requests: stat, list, fetch.

An operation begins on a session, is told the answers, and ends once: with its last report or
as failed.  It may begin again on another session when the first one breaks; what it has
reported stays reported.  An operation that ended may still have unanswered requests: their
answers close what they opened and are dropped otherwise.  Engine process only, one thread.

Versions: SFTP cannot ask for one, so every span is followed by an FSTAT on the same handle,
and bytes are reported only when an FSTAT that was sent after their READ says that the file is
still what it was (requests on one file are executed in the order they were sent: section 6.1
of the draft).  A file that was replaced by rename stays readable as it was.
"""

import abc
from typing import Protocol

from stagefs.remote import sftp_protocol as protocol
from stagefs.remote.sftp_messages import (
    LISTING_PAGES_AHEAD,
    AnyReport,
    Attributes,
    Failed,
    FailureKind,
    Fetch,
    Found,
    Landed,
    List,
    Page,
    Remove,
    Removed,
    SetTimes,
    Stat,
    TimesSet,
    Version,
)
from stagefs.remote.sftp_protocol import Kind, ProtocolError, Status
from stagefs.remote.sftp_session import Failure, Session
from stagefs.remote.sftp_stream import SinkFile

# The version is checked whenever a multiple of this was asked for: chunks end there.
CHECKPOINT_BYTES = 1 << 20
NAME_BYTES_MAX = 255
# A page is sent on when it has so many entries: as many as surely fit into one packet.
PAGE_ENTRIES = 200


class Reporter(Protocol):
    """Where operations tell of themselves."""

    def report(self, report: AnyReport) -> None: ...

    def ended(self, op: int) -> None:
        """The operation has sent its last report."""
        ...


def refusal(code: int, message: str) -> Failure:
    """What a STATUS answer means."""
    match code:
        case Status.NO_SUCH_FILE:
            return Failure(FailureKind.MISSING, "no such file at the server")
        case Status.PERMISSION_DENIED:
            return Failure(FailureKind.DENIED, "the server's file permissions forbid it")
        case Status.NO_CONNECTION | Status.CONNECTION_LOST:
            return Failure(FailureKind.UNAVAILABLE, f"the server lost its storage ({message})")
        case _:
            return Failure(FailureKind.REFUSED, f"the server says {message or code!r}")


def not_a_file(found: protocol.Attributes) -> Failure | None:
    if found.is_directory:
        return Failure(FailureKind.REFUSED, "it is a directory")
    if not found.is_regular:
        return Failure(FailureKind.REFUSED, "it is not a regular file")
    return None


def reported(found: protocol.Attributes) -> Attributes:
    return Attributes(found.size or 0, found.validator, found.mtime_s, found.mode)


def parse_attributes(kind: int, body: memoryview) -> protocol.Attributes:
    """The attributes in an answer.  Raises Failure, ProtocolError."""
    if kind == Kind.STATUS:
        raise refusal(*protocol.status(body))
    if kind != Kind.ATTRS:
        raise ProtocolError(f"a packet of type {kind} in answer to a question for attributes")
    return protocol.attributes(body)[0]


def parse_handle(kind: int, body: memoryview) -> bytes:
    """The handle in an answer.  Raises Failure, ProtocolError."""
    if kind == Kind.STATUS:
        raise refusal(*protocol.status(body))
    if kind != Kind.HANDLE:
        raise ProtocolError(f"a packet of type {kind} in answer to an open")
    return protocol.string(body)[0]


class BaseOperation(abc.ABC):
    """What all have: an end, a session, and no payload unless they say otherwise."""

    bulk = False
    """Moves so much that small operations had better use another session."""
    spreads = False
    """Worth a further connection when its session is busy."""

    def __init__(self, op: int, reporter: Reporter, *, now: float, group: bytes = b"") -> None:
        self.op = op
        self.group = group
        self.started = now
        self.last_progress = now
        self.restarts = 0
        self.ended = False
        self.session: Session | None = None
        self._reporter = reporter

    def begin(self, session: Session) -> None:
        self.session = session
        session.operations[self.op] = self

    def may_restart(self) -> bool:
        """Whether it can begin again when its session broke."""
        return self.restarts == 0

    def waits_for_server(self) -> bool:
        """Whether silence is the server's fault."""
        return True

    def answered(self, tag: object, kind: int, body: memoryview) -> None:
        assert self.session is not None
        if self.ended:
            self._late(tag, kind, body)
            return
        try:
            self._answered(self.session, tag, kind, body)
        except Failure as failure:
            self.fail(failure)

    @abc.abstractmethod
    def _answered(self, session: Session, tag: object, kind: int, body: memoryview) -> None: ...

    def _late(self, tag: object, kind: int, body: memoryview) -> None:
        """An answer after the end."""

    def payload_target(self, tag: object) -> tuple[SinkFile, int] | None:
        return None

    def payload_ended(self, tag: object, length: int) -> None:
        raise AssertionError("payload for an operation without a sink")

    def ask_more(self) -> bool:
        return False

    def fail(self, failure: Failure) -> None:
        self.end(Failed(self.op, failure.kind, failure.reason))

    def end(self, last: AnyReport | None) -> None:
        """Nothing is written or reported after this."""
        if self.ended:
            return
        self.ended = True
        if self.session is not None:
            self.session.operations.pop(self.op, None)
        self._clean_up()
        if last is not None:
            self._reporter.report(last)
        self._reporter.ended(self.op)

    def _clean_up(self) -> None:
        pass


class StatOperation(BaseOperation):
    def __init__(self, order: Stat, reporter: Reporter, *, now: float) -> None:
        super().__init__(order.op, reporter, now=now)
        self._path = order.path

    def begin(self, session: Session) -> None:
        super().begin(session)
        session.send(protocol.on_path(Kind.STAT, session.expect(self), self._path))

    def _answered(self, session: Session, tag: object, kind: int, body: memoryview) -> None:
        found = parse_attributes(kind, body)
        if failure := not_a_file(found):
            raise failure
        self.end(Found(self.op, reported(found)))


class RemoveOperation(BaseOperation):
    """Sent again when the session breaks; what is gone then was removed the first time."""

    def __init__(self, order: Remove, reporter: Reporter, *, now: float) -> None:
        super().__init__(order.op, reporter, now=now)
        self._path = order.path

    def begin(self, session: Session) -> None:
        super().begin(session)
        session.send(protocol.on_path(Kind.REMOVE, session.expect(self), self._path))

    def _answered(self, session: Session, tag: object, kind: int, body: memoryview) -> None:
        if kind != Kind.STATUS:
            raise ProtocolError(f"a packet of type {kind} in answer to REMOVE")
        code, message = protocol.status(body)
        if code not in (Status.OK, Status.NO_SUCH_FILE):
            raise refusal(code, message)
        self.end(Removed(self.op))


class SetTimesOperation(BaseOperation):
    """Sent again when the session breaks: the second time changes nothing."""

    def __init__(self, order: SetTimes, reporter: Reporter, *, now: float) -> None:
        super().__init__(order.op, reporter, now=now)
        self._order = order

    def begin(self, session: Session) -> None:
        super().begin(session)
        order = self._order
        session.send(protocol.set_times(session.expect(self), order.path, order.mtime_s))

    def _answered(self, session: Session, tag: object, kind: int, body: memoryview) -> None:
        if kind != Kind.STATUS:
            raise ProtocolError(f"a packet of type {kind} in answer to SETSTAT")
        code, message = protocol.status(body)
        if code != Status.OK:
            raise refusal(code, message)
        self.end(TimesSet(self.op))


class ListOperation(BaseOperation):
    """At most ``LISTING_PAGES_AHEAD`` pages are asked for or untaken at a time.  Each symbolic
    link costs a STAT of its own, because READDIR tells of the link only."""

    def __init__(self, order: List, reporter: Reporter, *, now: float) -> None:
        super().__init__(order.op, reporter, now=now)
        self._path = order.path
        self._handle: bytes | None = None
        self._pages_reported = 0
        self._pages_taken = 0
        self._forget_session()

    def _forget_session(self) -> None:
        self._reading = 0
        self._links = 0
        self._at_end = False
        self._entries: list[tuple[bytes, Attributes | None]] = []

    def begin(self, session: Session) -> None:
        super().begin(session)
        self._handle = None
        self._forget_session()
        session.send(protocol.on_path(Kind.OPENDIR, session.expect(self, Kind.OPENDIR), self._path))

    def waits_for_server(self) -> bool:
        return self._handle is None or bool(self._reading or self._links)

    def page_taken(self, now: float) -> None:
        self._pages_taken += 1
        if not self.waits_for_server():
            self.last_progress = now
        if self._handle is not None and self.session is not None and not self._at_end:
            self._read(self.session, self._handle)

    def may_restart(self) -> bool:
        """Entries that were reported cannot be taken back."""
        return self._pages_reported == 0 and super().may_restart()

    def _read(self, session: Session, handle: bytes) -> None:
        untaken = self._pages_reported - self._pages_taken
        while untaken + self._reading < LISTING_PAGES_AHEAD:
            self._reading += 1
            request = session.expect(self, Kind.READDIR)
            session.send(protocol.on_handle(Kind.READDIR, request, handle))

    def _answered(self, session: Session, tag: object, kind: int, body: memoryview) -> None:
        if tag is Kind.OPENDIR:
            self._handle = parse_handle(kind, body)
            session.open_handles += 1
        elif tag is Kind.READDIR:
            self._reading -= 1
            self._page(session, kind, body)
        else:
            assert isinstance(tag, bytes)
            self._links -= 1
            # A link that leads nowhere, or where we may not look, is left out.
            if kind == Kind.ATTRS:
                self._add(tag, protocol.attributes(body)[0])
        if self._at_end:
            if not self._reading and not self._links:
                self._send_page(last=True)
                self.end(None)
        elif self._handle is not None:
            self._read(session, self._handle)

    def _page(self, session: Session, kind: int, body: memoryview) -> None:
        if kind == Kind.STATUS:
            code, message = protocol.status(body)
            if code != Status.EOF:
                raise refusal(code, message)
            self._at_end = True
            return
        if kind != Kind.NAME:
            raise ProtocolError(f"a packet of type {kind} in answer to READDIR")
        for name, found in protocol.names(body):
            if not 0 < len(name) <= NAME_BYTES_MAX or name in (b".", b".."):
                continue
            if b"/" in name or b"\0" in name:
                continue
            if found.is_symlink or found.mode is None:
                path = self._path.rstrip(b"/") + b"/" + name
                request = session.expect(self, name)
                session.send(protocol.on_path(Kind.STAT, request, path))
                self._links += 1
            else:
                self._add(name, found)
        if self._entries:
            self._send_page(last=False)

    def _add(self, name: bytes, found: protocol.Attributes) -> None:
        if found.is_directory:
            self._entries.append((name, None))
        elif found.is_regular:
            self._entries.append((name, reported(found)))
        if len(self._entries) >= PAGE_ENTRIES:
            self._send_page(last=False)

    def _send_page(self, *, last: bool) -> None:
        self._reporter.report(Page(self.op, self._entries, last))
        self._entries = []
        self._pages_reported += 1

    def _late(self, tag: object, kind: int, body: memoryview) -> None:
        if tag is Kind.OPENDIR and kind == Kind.HANDLE and self.session is not None:
            self.session.open_handles += 1
            self.session.close_handle(protocol.string(body)[0])

    def _clean_up(self) -> None:
        if self._handle is not None and self.session is not None:
            self.session.close_handle(self._handle)
            self._handle = None


class _Read:
    """Tag of a READ: what it asks for, and its place in the order of requests."""

    __slots__ = ("length", "offset", "order")

    def __init__(self, offset: int, length: int, order: int) -> None:
        self.offset = offset
        self.length = length
        self.order = order


class FetchOperation(BaseOperation):
    """One span into one file.

    Invariants: ``_done`` maps the start of each piece that is in the file beyond ``_landed`` to
    (its stop, the order of its READ); all before ``_landed`` is in the file and was proved.
    """

    bulk = True
    spreads = True

    def __init__(self, order: Fetch, fd: int, reporter: Reporter, *, now: float) -> None:
        super().__init__(order.op, reporter, now=now, group=order.path)
        self.bulk = order.length > 256 << 10
        self._path = order.path
        self._stop = order.start + order.length
        self._landed = order.start
        self._validator = order.validator
        self._found: protocol.Attributes | None = None
        self._sink = SinkFile(fd, shift=order.shift)
        self._forget_session()

    def _forget_session(self) -> None:
        self._handle: bytes | None = None
        self._next = self._landed
        self._missing: list[tuple[int, int]] = []
        self._done: dict[int, tuple[int, int]] = {}
        self._requests = 0
        self._proved = 0
        self._reading = 0
        self._checking = 0

    def begin(self, session: Session) -> None:
        super().begin(session)
        self._forget_session()
        session.send(protocol.open_for_reading(session.expect(self, Kind.OPEN), self._path))

    def ask_more(self) -> bool:
        session, handle = self.session, self._handle
        if self.ended or session is None or handle is None:
            return False
        if self._missing:
            offset, stop = self._missing.pop()
        else:
            offset, stop = self._next, self._stop
        length = min(stop - offset, session.limits.read_bytes)
        if length <= 0:
            return False
        if offset == self._next:
            self._next += length
        elif offset + length < stop:
            self._missing.append((offset + length, stop))
        self._requests += 1
        self._reading += 1
        tag = _Read(offset, length, self._requests)
        request = session.expect(self, tag, reserve=length)
        session.send(protocol.read(request, handle, offset, length))
        more = bool(self._missing) or self._next < self._stop
        if not more or offset // CHECKPOINT_BYTES != (offset + length) // CHECKPOINT_BYTES:
            self._check(session, handle)
        return more

    def _check(self, session: Session, handle: bytes) -> None:
        self._checking += 1
        self._requests += 1
        request = session.expect(self, self._requests)
        session.send(protocol.on_handle(Kind.FSTAT, request, handle))

    def _answered(self, session: Session, tag: object, kind: int, body: memoryview) -> None:
        if tag is Kind.OPEN:
            self._handle = parse_handle(kind, body)
            session.open_handles += 1
            self._check(session, self._handle)
            if self._landed < self._stop:
                session.want_turn(self)
        elif isinstance(tag, _Read):
            self._read_refused(kind, body)
        else:
            assert isinstance(tag, int)
            self._checking -= 1
            self._checked(parse_attributes(kind, body))
            self._proved = max(self._proved, tag)
            self._advance(session)

    def _read_refused(self, kind: int, body: memoryview) -> None:
        if kind != Kind.STATUS:
            raise ProtocolError(f"a packet of type {kind} in answer to READ")
        code, message = protocol.status(body)
        if code == Status.EOF:
            raise Failure(FailureKind.CHANGED, "it is shorter than it was")
        raise refusal(code, message)

    def _checked(self, found: protocol.Attributes) -> None:
        if failure := not_a_file(found):
            raise failure
        expected = self._validator or (self._found and self._found.validator)
        if expected and found.validator != expected:
            raise Failure(FailureKind.CHANGED, "it is not the version it was when registered")
        if found.size is None or found.size < self._stop:
            raise Failure(FailureKind.CHANGED, "it is shorter than it was")
        if not expected:
            self._reporter.report(Version(self.op, reported(found)))
        self._found = found

    def payload_target(self, tag: object) -> tuple[SinkFile, int] | None:
        return (self._sink, tag.offset) if isinstance(tag, _Read) else None

    def payload_ended(self, tag: object, length: int) -> None:
        if self.ended:
            return
        assert isinstance(tag, _Read)
        assert self.session is not None
        if self._sink.error is not None:
            reason = f"its bytes cannot be stored ({self._sink.error.strerror})"
            self.fail(Failure(FailureKind.SINK, reason))
            return
        self._reading -= 1
        self._done[tag.offset] = (tag.offset + length, tag.order)
        if length < tag.length:
            self._missing.append((tag.offset + length, tag.offset + tag.length))
            self.session.want_turn(self, first=True)
        self._advance(self.session)

    def _advance(self, session: Session) -> None:
        """Report what is proved by now, and end when that is all."""
        landed = self._landed
        while landed in self._done and self._done[landed][1] < self._proved:
            landed = self._done.pop(landed)[0]
        if landed > self._landed:
            self._landed = landed
            self._reporter.report(Landed(self.op, landed))
        if landed == self._stop and self._found is not None:
            self.end(Found(self.op, reported(self._found)))
        elif not (self._reading or self._checking or self._missing) and self._next == self._stop:
            # The last READs were answered only in part, and their rest came after the check.
            assert self._handle is not None
            self._check(session, self._handle)

    def _late(self, tag: object, kind: int, body: memoryview) -> None:
        if tag is Kind.OPEN and kind == Kind.HANDLE and self.session is not None:
            self.session.open_handles += 1
            self.session.close_handle(protocol.string(body)[0])

    def _clean_up(self) -> None:
        self._sink.close()
        if self._handle is not None and self.session is not None:
            self.session.close_handle(self._handle)
            self._handle = None
