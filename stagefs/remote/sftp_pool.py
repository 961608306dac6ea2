"""The sessions with one host: started when needed, shared, given up when they stall or break.

Small operations get a session of their own as soon as the first one is busy with large
transfers.  Operations on a session that breaks begin again, once, on another.  Deadlines: a
connection must be ready in ``connect_timeout_s``; an operation that waits for the server fails
when neither it nor its session has moved for its timeout, and its session is given up with it.
A session without operations is probed, so that one that was dropped silently on its way (firewalls
forget) is replaced before somebody waits for it.  A host whose session broke within
``restart_s`` and that refuses the next one is away and not gone.
Engine process only, one thread.
"""

import math
import selectors
from collections.abc import Callable

from stagefs.remote.sftp_messages import Connect, FailureKind
from stagefs.remote.sftp_operations import BaseOperation
from stagefs.remote.sftp_protocol import ProtocolError
from stagefs.remote.sftp_session import Client, Failure, Session, Transport

# A session that moves bytes for others may keep one operation waiting so many timeouts.
PATIENCE = 4
# After the end of its stream a client may say why for so long.
LAST_WORDS_S = 1.0
KILL_AFTER_S = 1.0
IDLE_S = 600.0
IDLE_EXTRA_S = 60.0
# When a further connection was refused, the first one has to do for so long.
EXTRA_BACKOFF_S = 60.0
# A session whose server has said nothing for so long gets no more to do while there is another, and
# for a large transfer another is made: one that is begun anew must not land on what stalled.
SILENT_S = 3.0
BUSY_BYTES = 1 << 20
TICK_S_MAX = 0.25


class Pool:
    """Invariant: an operation that has not ended is in ``_waiting`` or in exactly one session."""

    def __init__(
        self,
        client: Client,
        order: Connect,
        selector: selectors.BaseSelector,
        note: Callable[[str], None],
        *,
        now: float,
    ) -> None:
        self._client = client
        self._order = order
        self._selector = selector
        self._note = note
        self._now = now
        self._sessions: list[Session] = []
        self._waiting: list[BaseOperation] = []
        self._dying: list[tuple[float, Transport]] = []
        self._extra_after = now
        self._lost_at = -math.inf
        self._held = False

    @property
    def tick_s(self) -> float | None:
        """How often ``tick`` wants to be called; None when there is nothing to watch."""
        order = self._order
        if self._waiting or self._dying or any(s.operations or not s.ready for s in self._sessions):
            shortest = min(
                order.connect_timeout_s, order.answer_timeout_s, order.progress_timeout_s
            )
            return min(TICK_S_MAX, max(shortest / 20, 0.01))
        if not self._sessions:
            return None
        probing = order.keepalive_s or IDLE_EXTRA_S
        return max(min(IDLE_EXTRA_S, probing, order.answer_timeout_s) / 4, 0.01)

    @property
    def owed(self) -> bool:
        """Whether a working session has something unsent or unanswered."""
        return any(session.ready and session.owed for session in self._sessions)

    def submit(self, operation: BaseOperation, now: float) -> None:
        self._now = now
        ready = [session for session in self._sessions if session.ready]
        if not ready:
            self._waiting.append(operation)
            if not any(session.ending_since is None for session in self._sessions):
                self._connect()
            return
        lively = [session for session in ready if session.silent_for_s(now) <= SILENT_S]
        if operation.bulk and not lively and self._may_replace(now):
            self._waiting.append(operation)
            return
        chosen = _choose(lively or ready, operation)
        operation.begin(chosen)
        busy = chosen.in_flight_bytes > BUSY_BYTES and chosen.spreads
        if busy and len(self._sessions) < self._order.connections and now >= self._extra_after:
            self._connect()

    def _may_replace(self, now: float) -> bool:
        """All sessions are silent: whether there is, or now will be, one that connects."""
        if self._is_connecting:
            return True
        if len(self._sessions) > self._order.connections or now < self._extra_after:
            return False
        self._connect()
        return self._is_connecting

    @property
    def _is_connecting(self) -> bool:
        return any(not session.ready and session.ending_since is None for session in self._sessions)

    def withdraw(self, operation: BaseOperation) -> None:
        """An operation that ended before it had a session."""
        if operation in self._waiting:
            self._waiting.remove(operation)

    def work(self, now: float) -> None:
        """Send what there is to send."""
        self._now = now
        for session in list(self._sessions):
            if session.ready:
                session.pump(now)
            if session.ending_since is not None:
                continue
            try:
                flushed = session.flush()
            except OSError:
                self._ending(session)
                continue
            self._watch_writing(session, not flushed)

    def hold(self, held: bool) -> None:
        """Stop reading from servers while the daemon does not take what was read."""
        if held is self._held:
            return
        self._held = held
        for session in self._sessions:
            if session.ending_since is None:
                if held:
                    self._selector.unregister(session.transport.read_fd)
                else:
                    self._watch_reading(session)

    def tick(self, now: float) -> None:
        """Judge what time has passed."""
        self._now = now
        for session in list(self._sessions):
            self._judge(session)
        order = self._order
        for operation in list(self._waiting):
            quiet = now - operation.last_progress
            if operation.restarts and quiet > order.progress_timeout_s:
                self._waiting.remove(operation)
                operation.fail(self._silence(order.progress_timeout_s))
        for entry in list(self._dying):
            since, transport = entry
            if not transport.ended():
                if now - since < KILL_AFTER_S:
                    continue
                transport.kill()
            self._dying.remove(entry)

    def close(self) -> list[Transport]:
        """End all sessions; returns the transports that were told to end."""
        for session in list(self._sessions):
            self._drop(session)
        return [transport for _, transport in self._dying]

    # Sessions

    def _connect(self) -> None:
        try:
            transport = self._client.start()
        except Failure as failure:
            self._not_connected(failure)
            return
        session = Session(transport, now=self._now)
        self._sessions.append(session)
        if not self._held:
            self._watch_reading(session)
        self._selector.register(
            transport.errors_fd, selectors.EVENT_READ, lambda _: self._listen(session)
        )

    def _watch_reading(self, session: Session) -> None:
        self._selector.register(
            session.transport.read_fd, selectors.EVENT_READ, lambda _: self._pull(session)
        )

    def _watch_writing(self, session: Session, wanted: bool) -> None:
        fd = session.transport.write_fd
        watched = fd in self._selector.get_map()
        if wanted and not watched:
            self._selector.register(fd, selectors.EVENT_WRITE, lambda _: None)
        elif watched and not wanted:
            self._selector.unregister(fd)

    def _pull(self, session: Session) -> None:
        if session not in self._sessions:
            return
        was_ready = session.ready
        try:
            more = session.pull(self._now)
        except ProtocolError as exc:
            self._lost(session, self._nonsense(exc))
            return
        except OSError:
            more = False
        if not more:
            self._ending(session)
        elif session.ready and not was_ready:
            self._now_ready(session)

    def _now_ready(self, session: Session) -> None:
        session.was_ready = True
        session.ready_since = session.last_used = self._now
        self._note(f"session {len(self._sessions)} with {self._order.host} is ready")
        waiting, self._waiting = self._waiting, []
        for operation in waiting:
            if not operation.restarts:
                operation.started = operation.last_progress = self._now
            operation.begin(session)

    def _listen(self, session: Session) -> None:
        if session in self._sessions and not session.listen():
            self._selector.unregister(session.transport.errors_fd)
            session.said_all = True
            if session.ending_since is not None:
                self._lost(session, session.verdict())

    def _ending(self, session: Session) -> None:
        """The stream is over.  Why, the client may still say."""
        if session.ending_since is not None:
            return
        session.ready = False
        session.ending_since = self._now
        for fd in (session.transport.read_fd, session.transport.write_fd):
            if fd in self._selector.get_map():
                self._selector.unregister(fd)
        if session.said_all:
            self._lost(session, session.verdict())

    def _lost(self, session: Session, failure: Failure) -> None:
        self._drop(session)
        operations = [op for op in session.operations.values() if isinstance(op, BaseOperation)]
        session.operations.clear()
        if not session.was_ready:
            self._not_connected(failure)
            return
        self._lost_at = self._now
        self._note(f"session with {self._order.host} lost: {failure.reason}")
        for operation in operations:
            operation.session = None
            if operation.may_restart():
                operation.restarts += 1
                self.submit(operation, self._now)
            else:
                operation.fail(failure)
        # Those that waited for this session while it was ending.
        waiting, self._waiting = self._waiting, []
        for operation in waiting:
            self.submit(operation, self._now)

    def _not_connected(self, failure: Failure) -> None:
        self._note(f"no session with {self._order.host}: {failure.reason}")
        lately = self._now - self._lost_at < self._order.restart_s
        if lately and failure.kind is FailureKind.UNAVAILABLE:
            failure = Failure(FailureKind.AWAY, failure.reason)
        self._extra_after = self._now + EXTRA_BACKOFF_S
        waiting, self._waiting = self._waiting, []
        others = any(session.ending_since is None for session in self._sessions)
        for operation in waiting:
            if others:
                self.submit(operation, self._now)
            else:
                operation.fail(failure)

    def _drop(self, session: Session) -> None:
        self._sessions.remove(session)
        session.ready = False
        transport = session.transport
        for fd in (transport.read_fd, transport.write_fd, transport.errors_fd):
            if fd in self._selector.get_map():
                self._selector.unregister(fd)
        transport.end()
        self._dying.append((self._now, transport))

    def _judge(self, session: Session) -> None:
        now, order = self._now, self._order
        if session.ending_since is not None:
            if now - session.ending_since > LAST_WORDS_S:
                self._lost(session, session.verdict())
        elif not session.ready:
            if now - session.started > order.connect_timeout_s:
                self._lost(session, self._silence(order.connect_timeout_s))
        elif session.operations:
            session.last_used = now
            self._judge_operations(session)
        elif len(self._sessions) > 1 and session.silent_for_s(now) > order.progress_timeout_s:
            self._drop(session)
        else:
            self._judge_idle(session)

    def _judge_idle(self, session: Session) -> None:
        now, order = self._now, self._order
        extra = session is not self._sessions[0]
        silent_s = session.probed_for_s(now)
        if now - session.last_used > (IDLE_EXTRA_S if extra else IDLE_S):
            self._drop(session)
        elif silent_s is not None:
            if silent_s > order.answer_timeout_s:
                self._lost(session, self._silence(order.answer_timeout_s))
        elif order.keepalive_s:
            heard = max(session.last_answered, session.ready_since)
            if now - heard >= order.keepalive_s:
                session.probe(now)

    def _judge_operations(self, session: Session) -> None:
        now, order = self._now, self._order
        quiet = now - session.last_answered
        stalled = False
        for operation in list(session.operations.values()):
            assert isinstance(operation, BaseOperation)
            answered = operation.last_progress > operation.started
            limit = order.progress_timeout_s if answered else order.answer_timeout_s
            waited = now - operation.last_progress
            if waited > limit and operation.waits_for_server():
                stalled = stalled or quiet > limit
                if quiet > limit or waited > limit * PATIENCE:
                    operation.fail(self._silence(limit))
        if stalled:
            self._lost(session, self._silence(order.progress_timeout_s))

    def _silence(self, seconds: float) -> Failure:
        return Failure(
            FailureKind.DEADLINE, f"{self._order.host} did not answer within {seconds:.3g} s"
        )

    def _nonsense(self, exc: ProtocolError) -> Failure:
        return Failure(
            FailureKind.UNAVAILABLE,
            f"{self._order.host} answered with something that is not SFTP ({exc}): "
            "see that its shell start-up files print nothing",
        )


def _choose(ready: list[Session], operation: BaseOperation) -> Session:
    """The least busy session; the last of several is kept free of large transfers."""
    allowed = ready[:-1] if operation.bulk and len(ready) > 1 else ready
    return min(allowed, key=lambda session: session.load)
