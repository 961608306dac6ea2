"""Fetching many small files at once: everything pipelined, no file waits for another.

For each file OPEN is sent; when its handle comes, READ, FSTAT and CLOSE follow together, so a
file costs two round trips however many there are.  Without a known version a further FSTAT
goes before the READ.  A server that sends less than was asked for gets asked again, one
question at a time.  Engine process only, one thread.
"""

from stagefs.remote import sftp_protocol as protocol
from stagefs.remote.sftp_messages import FailureKind, FetchWhole, ItemFailed, Whole
from stagefs.remote.sftp_operations import (
    BaseOperation,
    Reporter,
    not_a_file,
    parse_attributes,
    parse_handle,
    refusal,
    reported,
)
from stagefs.remote.sftp_protocol import Attributes, Kind, ProtocolError, Status
from stagefs.remote.sftp_session import Failure, Session

# A batch takes so many turns at once: its files are small beside the READ of a large one.
ITEMS_PER_TURN = 16


class _Item:
    """One file of the batch.  ``unanswered`` counts its questions; its answers are judged when
    it is zero."""

    __slots__ = (
        "asked_at",
        "before",
        "careful",
        "data",
        "found",
        "handle",
        "index",
        "path",
        "size",
        "unanswered",
        "validator",
    )

    def __init__(self, index: int, path: bytes, validator: str | None, *, size_max: int) -> None:
        self.index = index
        self.path = path
        self.validator = validator
        self.size = _size_of(validator, size_max)
        self.careful = False
        self.forget()

    def forget(self) -> None:
        self.handle: bytes | None = None
        self.before: Attributes | None = None
        self.found: Attributes | None = None
        self.data = b""
        self.asked_at = -1
        self.unanswered = 0


class BatchOperation(BaseOperation):
    def __init__(self, order: FetchWhole, reporter: Reporter, *, now: float) -> None:
        super().__init__(order.op, reporter, now=now, group=b"\0batch %d" % order.op)
        self._size_max = order.size_max
        self._left = {
            index: _Item(index, path, validator, size_max=order.size_max)
            for index, (path, validator) in enumerate(order.items)
        }
        self._waiting: list[_Item] = []

    def begin(self, session: Session) -> None:
        super().begin(session)
        for item in self._left.values():
            item.forget()
        self._waiting = list(reversed(self._left.values()))
        session.want_turn(self)

    def ask_more(self) -> bool:
        session = self.session
        if self.ended or session is None:
            return False
        for _ in range(ITEMS_PER_TURN):
            if not self._waiting:
                return False
            if session.handles_left <= 0:
                session.want_handle(self)
                return False
            item = self._waiting.pop()
            session.open_handles += 1
            request = session.expect(self, (item, Kind.OPEN), reserve=item.size)
            session.send(protocol.open_for_reading(request, item.path))
        return bool(self._waiting)

    def _answered(self, session: Session, tag: object, kind: int, body: memoryview) -> None:
        assert isinstance(tag, tuple)
        item, step = tag
        if item.index not in self._left:
            return
        try:
            self._item_answered(session, item, step, kind, body)
        except Failure as failure:
            self._finish(session, item, failure)

    def _item_answered(
        self, session: Session, item: _Item, step: object, kind: int, body: memoryview
    ) -> None:
        if step is Kind.OPEN:
            try:
                item.handle = parse_handle(kind, body)
            except Failure:
                session.open_handles -= 1
                raise
            self._ask(session, item, item.handle)
            return
        item.unanswered -= 1
        if step is Kind.READ:
            item.data += _payload(kind, body)
        elif step is Kind.STAT:
            item.before = parse_attributes(kind, body)
        else:
            item.found = parse_attributes(kind, body)
        if not item.unanswered:
            self._judge(session, item)

    def _ask(self, session: Session, item: _Item, handle: bytes) -> None:
        if item.validator is None and item.before is None:
            request = session.expect(self, (item, Kind.STAT))
            session.send(protocol.on_handle(Kind.FSTAT, request, handle))
            item.unanswered += 1
        # One byte more than may be, so that a file that grew shows.
        wanted = item.size - len(item.data) + (item.validator is None)
        if wanted > 0:
            length = min(wanted, session.limits.read_bytes)
            request = session.expect(self, (item, Kind.READ), reserve=length)
            session.send(protocol.read(request, handle, len(item.data), length))
            item.unanswered += 1
        request = session.expect(self, (item, Kind.FSTAT))
        session.send(protocol.on_handle(Kind.FSTAT, request, handle))
        item.unanswered += 1
        item.asked_at = len(item.data)
        if not item.careful:
            item.handle = None
            session.close_handle(handle)

    def _judge(self, session: Session, item: _Item) -> None:
        found = item.found
        assert found is not None
        if failure := not_a_file(found):
            raise failure
        expected = item.validator or (item.before and item.before.validator)
        size = found.size or 0
        if size > self._size_max:
            reason = f"it has {size} bytes, more than the {self._size_max} of a small file"
            raise Failure(FailureKind.CHANGED, reason)
        if found.validator != expected or len(item.data) > size:
            raise Failure(FailureKind.CHANGED, "it is not the version it was when registered")
        if len(item.data) == size:
            self._finish(session, item, None)
            return
        if item.handle is not None:
            if len(item.data) == item.asked_at:
                raise Failure(FailureKind.CHANGED, "it is shorter than its size")
            item.size = size
            self._ask(session, item, item.handle)
            return
        item.forget()
        item.careful = True
        self._waiting.append(item)
        session.want_turn(self)

    def _finish(self, session: Session, item: _Item, failure: Failure | None) -> None:
        del self._left[item.index]
        if item.handle is not None:
            session.close_handle(item.handle)
            item.handle = None
        if failure is None:
            assert item.found is not None
            self._reporter.report(Whole(self.op, item.index, reported(item.found), item.data))
        else:
            self._reporter.report(ItemFailed(self.op, item.index, failure.kind, failure.reason))
        if not self._left:
            self.end(None)

    def _late(self, tag: object, kind: int, body: memoryview) -> None:
        assert isinstance(tag, tuple)
        session, step = self.session, tag[1]
        if step is not Kind.OPEN or session is None:
            return
        if kind == Kind.HANDLE:
            session.close_handle(protocol.string(body)[0])
        else:
            session.open_handles -= 1

    def _clean_up(self) -> None:
        if self.session is None:
            return
        for item in self._left.values():
            if item.handle is not None:
                self.session.close_handle(item.handle)
        self._left.clear()


def _size_of(validator: str | None, size_max: int) -> int:
    """How much to ask for: the size that the version tells, at most ``size_max`` and one."""
    if validator is None:
        return size_max
    size = validator.rpartition(":")[2]
    return min(int(size), size_max + 1) if size.isascii() and size.isdigit() else size_max


def _payload(kind: int, body: memoryview) -> bytes:
    if kind == Kind.DATA:
        return protocol.string(body)[0]
    if kind != Kind.STATUS:
        raise ProtocolError(f"a packet of type {kind} in answer to READ")
    code, message = protocol.status(body)
    if code != Status.EOF:
        raise refusal(code, message)
    return b""
