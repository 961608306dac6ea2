"""When sessions are opened, shared and given up, on a clock that the tests turn."""

import os
import selectors
import struct
from collections.abc import Iterator

import pytest

from stagefs.remote import sftp_pool
from stagefs.remote.sftp_batch import BatchOperation
from stagefs.remote.sftp_messages import (
    AnyReport,
    Connect,
    Failed,
    FailureKind,
    Fetch,
    FetchWhole,
    Stat,
)
from stagefs.remote.sftp_operations import FetchOperation, StatOperation
from stagefs.remote.sftp_pool import Pool
from stagefs.remote.sftp_session import Failure, Session

VERSION = struct.pack(">IBI", 5, 2, 3)


class FakeTransport:
    """Pipes; ``server`` holds the ends that the other side would have."""

    def __init__(self) -> None:
        self.read_fd, self.answers = os.pipe()
        self.requests, self.write_fd = os.pipe()
        self.errors_fd, self.errors = os.pipe()
        for fd in (self.read_fd, self.write_fd, self.errors_fd, self.requests):
            os.set_blocking(fd, False)
        self.told_to_end = self.killed = False

    def verdict(self, said: str) -> Failure:
        return Failure(FailureKind.UNAVAILABLE, said)

    def end(self) -> None:
        self.told_to_end = True
        for fd in (self.read_fd, self.write_fd, self.errors_fd):
            os.close(fd)

    def ended(self) -> bool:
        return self.killed

    def kill(self) -> None:
        self.killed = True

    def close(self) -> None:
        if not self.told_to_end:
            self.end()
        for fd in (self.answers, self.requests, self.errors):
            os.close(fd)


class Bench:
    """A pool, its clock, and everything it did."""

    def __init__(self, *, connections: int = 2) -> None:
        self.now = 1000.0
        self.selector = selectors.DefaultSelector()
        self.transports: list[FakeTransport] = []
        self.refusal: Failure | None = None
        self.reports: list[AnyReport] = []
        self.notes: list[str] = []
        self.order = Connect(
            op=0,
            host="host",
            port=None,
            user=None,
            password=None,
            config=None,
            client="openssh",
            program="ssh",
            connections=connections,
            ciphers=None,
            connect_timeout_s=10,
            answer_timeout_s=20,
            progress_timeout_s=20,
            keepalive_s=15,
            restart_s=30,
        )
        self.pool = Pool(self, self.order, self.selector, self.notes.append, now=self.now)
        self.ops = 0

    def start(self) -> FakeTransport:
        if self.refusal is not None:
            raise self.refusal
        self.transports.append(FakeTransport())
        return self.transports[-1]

    def report(self, report: AnyReport) -> None:
        self.reports.append(report)

    def ended(self, op: int) -> None:
        pass

    def ask(self) -> StatOperation:
        self.ops += 1
        operation = StatOperation(Stat(self.ops, b"/x"), self, now=self.now)
        self.pool.submit(operation, self.now)
        self.turn()
        return operation

    def turn(self, seconds: float = 0.0) -> None:
        """Let time pass, and let the pool see what has come in."""
        self.now += seconds
        for key, mask in self.selector.select(0):
            key.data(mask)
        self.pool.work(self.now)
        self.pool.tick(self.now)

    def failures(self) -> list[FailureKind]:
        return [report.kind for report in self.reports if isinstance(report, Failed)]


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.pool.close()
    for transport in made.transports:
        transport.close()
    made.selector.close()


def test_one_connection_serves_all_that_wait_for_it(bench: Bench) -> None:
    operations = [bench.ask() for _ in range(5)]
    assert len(bench.transports) == 1
    os.write(bench.transports[0].answers, VERSION)
    bench.turn()
    assert all(isinstance(operation.session, Session) for operation in operations)


def test_large_transfers_get_a_further_connection_and_small_files_do_not(bench: Bench) -> None:
    many: list[tuple[bytes, str | None]] = [(b"/%d" % number, None) for number in range(100)]
    bench.pool.submit(
        BatchOperation(FetchWhole(1, many, 64 << 10), bench, now=bench.now), bench.now
    )
    bench.turn()
    os.write(bench.transports[0].answers, VERSION)
    bench.turn()
    bench.ask()
    assert len(bench.transports) == 1
    fd = os.memfd_create("sink")
    large = FetchOperation(Fetch(2, b"/l", 0, 64 << 20, 0, None), fd, bench, now=bench.now)
    bench.pool.submit(large, bench.now)
    bench.turn()
    assert len(bench.transports) == 2
    large.end(None)


def test_a_connection_that_is_not_made_in_time_fails_all(bench: Bench) -> None:
    bench.ask()
    bench.ask()
    bench.turn(10.5)
    assert bench.failures() == [FailureKind.DEADLINE] * 2
    assert bench.transports[0].told_to_end


def test_time_spent_connecting_is_not_the_operations(bench: Bench) -> None:
    bench.ask()
    bench.turn(9)
    os.write(bench.transports[0].answers, VERSION)
    bench.turn()
    bench.turn(19)
    assert bench.failures() == []
    bench.turn(2)
    assert bench.failures() == [FailureKind.DEADLINE]


def test_a_stalled_session_is_given_up_and_the_young_get_another(bench: Bench) -> None:
    old = bench.ask()
    os.write(bench.transports[0].answers, VERSION)
    bench.turn()
    bench.turn(15)
    young = bench.ask()
    bench.turn(6)
    assert (old.ended, young.ended) == (True, False)
    assert bench.transports[0].told_to_end
    assert len(bench.transports) == 2
    # A second chance does not come with a second deadline.
    bench.turn(5)
    os.write(bench.transports[1].answers, VERSION)
    bench.turn()
    bench.turn(10)
    assert young.ended


def test_a_broken_session_is_replaced_once(bench: Bench) -> None:
    operation = bench.ask()
    for attempt in range(2):
        transport = bench.transports[attempt]
        os.write(transport.answers, VERSION)
        bench.turn()
        assert not operation.ended
        os.close(transport.answers)
        os.write(transport.errors, b"cut")
        os.close(transport.errors)
        bench.turn()
        bench.turn()
        transport.answers, transport.errors = os.dup(0), os.dup(0)  # closed at the end
    assert bench.failures() == [FailureKind.UNAVAILABLE]
    assert len(bench.transports) == 2


def test_the_client_may_say_why_after_the_end(bench: Bench) -> None:
    bench.ask()
    transport = bench.transports[0]
    os.close(transport.answers)
    bench.turn()
    assert bench.failures() == []
    os.write(transport.errors, b"the reason")
    bench.turn(sftp_pool.LAST_WORDS_S / 2)
    bench.turn(sftp_pool.LAST_WORDS_S)
    (failed,) = bench.reports
    assert isinstance(failed, Failed)
    assert failed.reason == "the reason"
    transport.answers = os.dup(0)


def test_a_client_that_does_not_end_is_killed(bench: Bench) -> None:
    bench.ask()
    bench.turn(10.5)
    assert bench.transports[0].told_to_end
    assert [transport.killed for transport in bench.transports] == [False]
    bench.turn(sftp_pool.KILL_AFTER_S + 0.1)
    assert [transport.killed for transport in bench.transports] == [True]
    assert bench.pool.tick_s is None


def test_idle_sessions_are_closed(bench: Bench) -> None:
    operation = bench.ask()
    os.write(bench.transports[0].answers, VERSION)
    bench.turn()
    operation.end(None)
    bench.turn(sftp_pool.IDLE_S - 1)
    assert not bench.transports[0].told_to_end
    bench.turn(2)
    assert bench.transports[0].told_to_end


def idle(bench: Bench) -> FakeTransport:
    """A connection that was used, and is no more."""
    bench.ask()
    transport = bench.transports[-1]
    os.write(transport.answers, VERSION)
    bench.turn()
    os.write(transport.answers, struct.pack(">IBII", 9, 101, 1, 2))  # no such file
    bench.turn()
    assert bench.failures() == [FailureKind.MISSING]
    bench.turn()
    os.read(transport.requests, 4096)
    return transport


def test_an_idle_connection_is_asked_whether_it_stands(bench: Bench) -> None:
    transport = idle(bench)
    for request in range(2, 5):
        bench.turn(14)
        bench.turn(1.5)
        bench.turn()
        assert os.read(transport.requests, 4096), "no probe"
        os.write(transport.answers, struct.pack(">IBII", 9, 101, request, 0))
        bench.turn(19)
        assert not transport.told_to_end


def test_an_idle_connection_that_was_dropped_silently_is_given_up(bench: Bench) -> None:
    transport = idle(bench)
    bench.turn(15)
    bench.turn(19)
    assert [transport.told_to_end] == [False]
    bench.turn(2)
    assert [transport.told_to_end] == [True]
    assert "did not answer" in bench.notes[-1]
    bench.ask()
    assert len(bench.transports) == 2


def lost(bench: Bench) -> None:
    """A connection that stood, and broke while nobody used it."""
    transport = idle(bench)
    os.close(transport.answers)
    os.close(transport.errors)
    bench.turn()
    bench.turn()
    transport.answers, transport.errors = os.dup(0), os.dup(0)  # closed at the end
    bench.reports.clear()


def test_a_server_that_refuses_after_its_connections_broke_is_away(bench: Bench) -> None:
    lost(bench)
    bench.refusal = Failure(FailureKind.UNAVAILABLE, "refused")
    bench.turn(29)
    bench.ask()
    assert bench.failures() == [FailureKind.AWAY]
    bench.turn(2)
    bench.ask()
    assert bench.failures()[1:] == [FailureKind.UNAVAILABLE]


def test_a_refused_login_is_refused_after_a_restart_too(bench: Bench) -> None:
    lost(bench)
    bench.refusal = Failure(FailureKind.DENIED, "key")
    bench.ask()
    assert bench.failures() == [FailureKind.DENIED]


def test_a_client_that_cannot_start_fails_what_was_asked(bench: Bench) -> None:
    bench.refusal = Failure(FailureKind.REFUSED, "no such program")
    assert bench.ask().ended
    assert bench.failures() == [FailureKind.REFUSED]


def test_a_withdrawn_operation_is_forgotten(bench: Bench) -> None:
    operation = bench.ask()
    bench.pool.withdraw(operation)
    operation.end(None)
    os.write(bench.transports[0].answers, VERSION)
    bench.turn()
    bench.turn(30)
    assert bench.reports == []


def test_what_is_begun_anew_does_not_land_on_the_session_that_stalled(bench: Bench) -> None:
    fd = os.memfd_create("sink")

    def large() -> FetchOperation:
        bench.ops += 1
        fetch = Fetch(bench.ops, b"/l", 0, 64 << 20, 0, None)
        operation = FetchOperation(fetch, os.dup(fd), bench, now=bench.now)
        bench.pool.submit(operation, bench.now)
        bench.turn()
        return operation

    slow = large()
    os.write(bench.transports[0].answers, VERSION)
    bench.turn()
    bench.turn(5)
    slow.end(None)
    again, beside = large(), large()
    assert len(bench.transports) == 2, "not one new connection for both"
    os.write(bench.transports[1].answers, VERSION)
    bench.turn()
    assert again.session is beside.session is not None
    assert again.session is not slow.session
    assert bench.ask().session is again.session, "a question went to the silent session"
    again.end(None)
    beside.end(None)
    bench.turn(16)
    assert bench.transports[0].told_to_end, "the silent session is kept"
    os.close(fd)
