"""Writing one file: beside its name, checked, made durable, then given its name.

The steps are a generator that yields one question at a time and is sent its answer; only the
payload, and what is read back, is pipelined, as a phase of its own that takes turns with the
other transfers of the session.  Without ``overwrite`` the name is given with
hardlink@openssh.com, or with RENAME, which version 3 of the protocol forbids to replace; with
it with posix-rename@openssh.com, or where the server lacks that, by removing the old file
first.  What ends early removes its temporary file, and an operation that failed says so only
when that was answered.  Engine process only, one thread.
"""

from collections.abc import Generator
from typing import TypeAlias, TypeVar

from stagefs.remote import sftp_protocol as protocol
from stagefs.remote.sftp_messages import FailureKind, Found, Put, Sent
from stagefs.remote.sftp_operations import (
    BaseOperation,
    Reporter,
    not_a_file,
    parse_attributes,
    parse_handle,
    reported,
)
from stagefs.remote.sftp_phases import Answer, Comparing, Payload, Phase, Piece, Writing
from stagefs.remote.sftp_protocol import Attributes, Kind, Status
from stagefs.remote.sftp_session import Failure, Session

# Objects up to this size are read back when a checksum was declared.
READ_BACK_BYTES_MAX = 64 << 20
REPORT_BYTES = 1 << 20
REPORT_INTERVAL_S = 0.25


T = TypeVar("T")
# Yields a packet to send, or None when the next answer is to one that was sent already, or the
# end of a phase.
Steps: TypeAlias = Generator[bytes | None, Answer | None, T]
# Tag of every question that is not a Piece.
STEP = "step"


class PutOperation(BaseOperation):
    """Invariant: while ``_temporary`` is set, a file of that name may be at the server and is
    this operation's to remove."""

    def __init__(self, order: Put, fd: int, reporter: Reporter, *, now: float) -> None:
        super().__init__(order.op, reporter, now=now, group=b"\0put %d" % order.op)
        self.bulk = order.size > 256 << 10
        self._order = order
        self._payload = Payload(fd, order.size)
        self._stale = list(order.stale)
        self._temporary: bytes | None = None
        self._failure: Failure | None = None
        self._told = 0
        self._told_at = now
        self._forget_session()

    def _forget_session(self) -> None:
        self._handle: bytes | None = None
        self._phase: Phase | None = None
        if self._temporary is not None:
            self._stale.append(self._temporary)
            self._temporary = None

    def begin(self, session: Session) -> None:
        super().begin(session)
        self._forget_session()
        self._remove_stale(session)
        self._steps = self._write(session)
        self._go_on(session, None)

    def _remove_stale(self, session: Session) -> None:
        for path in self._stale:
            session.send(protocol.on_path(Kind.REMOVE, session.expect(None), path))

    def may_restart(self) -> bool:
        return self._failure is None and super().may_restart()

    # What the session asks

    def ask_more(self) -> bool:
        session, phase = self.session, self._phase
        if self.ended or session is None or phase is None or self._failure is not None:
            return False
        try:
            more = phase.ask(session, self)
        except Failure as failure:
            self._give_up(session, failure)
            return False
        return more

    def answered(self, tag: object, kind: int, body: memoryview) -> None:
        session = self.session
        assert session is not None
        if self.ended:
            self._late(tag, kind, body)
            return
        try:
            self._answered(session, tag, kind, body)
        except Failure as failure:
            self._give_up(session, failure)

    def _answered(self, session: Session, tag: object, kind: int, body: memoryview) -> None:
        if self._failure is not None:
            if tag is Kind.REMOVE:
                self._temporary = None
                self.fail(self._failure)
            else:
                self._late(tag, kind, body)
        elif isinstance(tag, Piece):
            phase = self._phase
            assert phase is not None
            phase.answered(session, self, tag, Answer(kind, body))
            self._tell(phase)
            if phase.over:
                self._phase = None
                self._go_on(session, None)
        else:
            self._go_on(session, Answer(kind, body))

    def _late(self, tag: object, kind: int, body: memoryview) -> None:
        if tag is STEP and kind == Kind.HANDLE and self.session is not None:
            self.session.open_handles += 1
            self.session.close_handle(protocol.string(body)[0])

    def _tell(self, phase: Phase) -> None:
        if not isinstance(phase, Writing) or phase.taken == self._told:
            return
        waited = self.last_progress - self._told_at
        if phase.over or phase.taken - self._told >= REPORT_BYTES or waited >= REPORT_INTERVAL_S:
            self._told, self._told_at = phase.taken, self.last_progress
            self._reporter.report(Sent(self.op, phase.taken))

    # The end

    def _give_up(self, session: Session, failure: Failure) -> None:
        """Failed for a reason of its own: told when the temporary file is gone."""
        self._failure = failure
        self._phase = None
        self._release(session)
        if self._temporary is None:
            self.fail(failure)
            return
        request = session.expect(self, Kind.REMOVE)
        session.send(protocol.on_path(Kind.REMOVE, request, self._temporary))

    def fail(self, failure: Failure) -> None:
        super().fail(self._failure or failure)

    def _clean_up(self) -> None:
        session = self.session
        if session is not None:
            self._release(session)
            if self._temporary is not None:
                request = session.expect(None)
                session.send(protocol.on_path(Kind.REMOVE, request, self._temporary))
        self._payload.close()

    def _release(self, session: Session) -> None:
        if self._handle is not None:
            session.close_handle(self._handle)
            self._handle = None

    # The steps

    def _go_on(self, session: Session, answer: Answer | None) -> None:
        try:
            packet = self._steps.send(answer)
        except StopIteration:
            return
        if packet is not None:
            session.send(packet)

    def _write(self, session: Session) -> Steps[None]:
        order = self._order
        found = yield from self._stat(session, order.path)
        if found is not None:
            if failure := not_a_file(found):
                raise failure
            if not order.overwrite:
                yield from self._must_be_equal(session, found)
                self.end(Found(self.op, reported(found)))
                return
        handle = yield from self._new_file(session)
        writing = Writing(order, self._payload, handle)
        yield from self._phase_of(session, writing)
        if writing.refused is not None:
            yield from self._not_stored(session, writing.refused, writing.taken)
        writing.check_digest()
        yield from self._finish(session, handle)
        yield from self._give_name(session)
        found = yield from self._stat(session, order.path)
        if found is None or found.size != order.size:
            raise Failure(FailureKind.UNAVAILABLE, "somebody else removed or replaced it")
        # Once more: the server may have obeyed the broken session's last request, which made one
        # of them, after it was told to remove it.
        self._remove_stale(session)
        self.end(Found(self.op, reported(found)))

    def _finish(self, session: Session, handle: bytes) -> Steps[None]:
        """Durable, of the right size, and as it was sent."""
        order = self._order
        if order.mode is not None:
            request = session.expect(self, STEP)
            answer = yield from _asked(protocol.set_mode(request, handle, order.mode & 0o777))
            answer.check()
        if protocol.FSYNC_EXTENSION in session.extensions:
            answer = yield from self._extended(session, protocol.FSYNC_EXTENSION, handle)
            if answer.code not in (Status.OK, Status.OP_UNSUPPORTED):
                yield from self._not_stored(session, answer, order.size)
        request = session.expect(self, STEP)
        answer = yield from _asked(protocol.on_handle(Kind.FSTAT, request, handle))
        stored = parse_attributes(answer.kind, answer.body).size
        if stored != order.size:
            reason = f"the server stored {stored} of {order.size} bytes"
            raise Failure(FailureKind.UNAVAILABLE, reason)
        if order.checksum is not None and order.size <= READ_BACK_BYTES_MAX:
            comparing = Comparing(self._payload, handle)
            yield from self._phase_of(session, comparing)
            if not comparing.equal:
                reason = "what the server stored is not what was sent"
                raise Failure(FailureKind.CHECKSUM, reason)
        answer = yield from self._close(session, handle)
        if answer.code != Status.OK:
            yield from self._not_stored(session, answer, order.size)

    def _give_name(self, session: Session) -> Steps[None]:
        order, temporary = self._order, self._temporary
        assert temporary is not None
        if not order.overwrite:
            yield from self._give_new_name(session, temporary)
            return
        if protocol.RENAME_EXTENSION in session.extensions:
            answer = yield from self._extended(
                session, protocol.RENAME_EXTENSION, temporary, order.path
            )
        else:
            answer = yield from self._rename(session, temporary)
            if answer.code != Status.OK:
                yield from self._remove(session, order.path)
                answer = yield from self._rename(session, temporary)
        answer.check()
        self._temporary = None

    def _give_new_name(self, session: Session, temporary: bytes) -> Steps[None]:
        """As the name of nothing else.  Also done when an equal file has it by now."""
        done = False
        if protocol.HARDLINK_EXTENSION in session.extensions:
            answer = yield from self._extended(
                session, protocol.HARDLINK_EXTENSION, temporary, self._order.path
            )
            done = answer.code == Status.OK
            if done:
                yield from self._remove(session, temporary)
        if not done:
            answer = yield from self._rename(session, temporary)
            if answer.code != Status.OK:
                found = yield from self._stat(session, self._order.path)
                if found is None:
                    raise answer.refusal()
                yield from self._must_be_equal(session, found)
                yield from self._remove(session, temporary)
        self._temporary = None

    def _must_be_equal(self, session: Session, found: Attributes) -> Steps[None]:
        other = Failure(FailureKind.EXISTS, "it exists")
        if not found.is_regular or found.size != self._order.size:
            raise other
        request = session.expect(self, STEP)
        answer = yield from _asked(protocol.open_for_reading(request, self._order.path))
        if answer.kind != Kind.HANDLE:
            raise other
        handle = self._opened(session, answer)
        comparing = Comparing(self._payload, handle)
        yield from self._phase_of(session, comparing)
        if not comparing.equal:
            raise other
        yield from self._close(session, handle)

    def _new_file(self, session: Session) -> Steps[bytes]:
        order = self._order
        # Its name differs from that of the session before, where an old request may still be
        # under way.
        self._temporary = order.temporaries[min(self.restarts, len(order.temporaries) - 1)]
        for attempt in range(2):
            request = session.expect(self, STEP)
            packet = protocol.open_new(request, self._temporary, order.mode)
            answer = yield from _asked(packet)
            if answer.code == Status.NO_SUCH_FILE and not attempt:
                yield from self._make_directories(session)
                continue
            break
        if answer.code != Status.OK:
            yield from self._not_stored(session, answer)
        return self._opened(session, answer)

    def _make_directories(self, session: Session) -> Steps[None]:
        missing: list[bytes] = []
        directory = self._order.path.rpartition(b"/")[0]
        while directory:
            found = yield from self._stat(session, directory)
            if found is not None:
                if not found.is_directory:
                    reason = "a name above it is no directory at the server"
                    raise Failure(FailureKind.REFUSED, reason)
                break
            missing.append(directory)
            directory = directory.rpartition(b"/")[0]
        for directory in reversed(missing):
            request = session.expect(self, STEP)
            answer = yield from _asked(protocol.make_directory(request, directory))
            if answer.code == Status.PERMISSION_DENIED:
                raise answer.refusal()
            # Whether somebody else was faster, opening the file will tell.

    def _not_stored(
        self, session: Session, answer: Answer, taken: int | None = None
    ) -> Steps[None]:
        """Raises Failure: why a server refuses bytes, of which it had ``taken`` some, or None: the
        file itself.  The protocol has no word for a full disk."""
        if answer.code != Status.FAILURE:
            raise answer.refusal()
        if protocol.STATVFS_EXTENSION in session.extensions:
            directory = self._order.path.rpartition(b"/")[0] or b"."
            told = yield from self._extended(session, protocol.STATVFS_EXTENSION, directory)
            if told.kind == Kind.EXTENDED_REPLY:
                space = protocol.space(told.body)
                if space.read_only:
                    reason = "the server's file system is read-only"
                    raise Failure(FailureKind.DENIED, reason)
                if space.free_files == 0 or space.free_bytes <= self._order.size - (taken or 0):
                    reason = f"the server's disk is full ({space.free_bytes} bytes are left)"
                    raise Failure(FailureKind.NO_SPACE, reason)
        reason = "the server could not store it: see whether its disk or your quota there is full"
        # An open file takes no bytes for want of space, which statvfs does not show where it is a
        # quota, or where the space became free meanwhile: another upload that failed beside this
        # one removed what it had stored.  A name that cannot be made may stay so.
        kind = FailureKind.REFUSED if taken is None else FailureKind.NO_SPACE
        raise Failure(kind, reason)

    # Single questions

    def _stat(self, session: Session, path: bytes) -> Steps[Attributes | None]:
        request = session.expect(self, STEP)
        answer = yield from _asked(protocol.on_path(Kind.STAT, request, path))
        if answer.code == Status.NO_SUCH_FILE:
            return None
        return parse_attributes(answer.kind, answer.body)

    def _extended(self, session: Session, name: bytes, *arguments: bytes) -> Steps[Answer]:
        request = session.expect(self, STEP)
        return (yield from _asked(protocol.extended(request, name, *arguments)))

    def _rename(self, session: Session, temporary: bytes) -> Steps[Answer]:
        request = session.expect(self, STEP)
        return (yield from _asked(protocol.rename(request, temporary, self._order.path)))

    def _remove(self, session: Session, path: bytes) -> Steps[Answer]:
        request = session.expect(self, STEP)
        return (yield from _asked(protocol.on_path(Kind.REMOVE, request, path)))

    def _opened(self, session: Session, answer: Answer) -> bytes:
        self._handle = parse_handle(answer.kind, answer.body)
        session.open_handles += 1
        return self._handle

    def _close(self, session: Session, handle: bytes) -> Steps[Answer]:
        self._handle = None
        session.close_handle(handle, self, STEP)
        return (yield from _asked(None))

    def _phase_of(self, session: Session, phase: Phase) -> Steps[None]:
        if not phase.over:
            self._phase = phase
            session.want_turn(self)
            yield None


def _asked(packet: bytes | None) -> Steps[Answer]:
    answer = yield packet
    assert answer is not None
    return answer
