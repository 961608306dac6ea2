"""How a remote is judged: the circuit, damping and slowness, on plain times."""

import math

import pytest

from stagefs.errors import (
    DeadlineExceeded,
    ObjectMissing,
    RemoteAway,
    RemoteUnavailable,
    StageFSError,
)
from stagefs.model import MIB
from stagefs.remote.health import (
    AWAY_SPAN_S,
    BUSY_PAUSE_S,
    CIRCUIT_FAILURES,
    CIRCUIT_SPAN_S,
    PAUSE_S,
    PAUSE_S_MAX,
    RATES_MIN,
    SLOW_FLOOR_S,
    Health,
)

AWAY = RemoteUnavailable("it is away.")
BUSY = RemoteUnavailable("it is busy.", busy=True)


def health(places: int = 16) -> Health:
    return Health(places, jitter=lambda: 1.0)


def attempt(one: Health, error: StageFSError | None, now_s: float, *, at_once: int = 1) -> None:
    one.begun()
    if error is None:
        one.succeeded()
    else:
        one.failed(error, now_s, at_once=at_once)


def down(one: Health, since_s: float = 0.0) -> float:
    """Fails until the circuit opens; when."""
    for number in range(CIRCUIT_FAILURES):
        now_s = since_s + number * CIRCUIT_SPAN_S
        attempt(one, AWAY, now_s)
    assert one.status("x", now_s).state == "down"
    return now_s


def test_many_failures_in_a_row_open_the_circuit() -> None:
    one = health()
    for number in range(CIRCUIT_FAILURES - 1):
        attempt(one, AWAY, number * CIRCUIT_SPAN_S)
        assert not one.down_for_s(number * CIRCUIT_SPAN_S)
    assert one.status("x", 50).state == "failing"
    attempt(one, DeadlineExceeded("it is slow."), 50)
    assert one.down_for_s(50) == PAUSE_S
    assert one.status("x", 51).reason == "it is slow."
    assert one.status("x", 51).reason_age_s == 1


def test_failures_of_one_moment_do_not() -> None:
    """As when a server restarts under many transfers."""
    one = health()
    for _ in range(10 * CIRCUIT_FAILURES):
        attempt(one, AWAY, 1.0)
    assert not one.down_for_s(1.0)


def test_a_server_that_is_away_is_down_only_when_that_lasts() -> None:
    one = health()
    for begun_s in (0.0, 1000.0):
        for second in range(int(AWAY_SPAN_S)):
            attempt(one, RemoteAway("it is restarted."), begun_s + second)
            assert not one.down_for_s(begun_s + second)
        assert one.status("x", begun_s).state == "failing"
        attempt(one, None, begun_s + AWAY_SPAN_S)
    for second in range(int(AWAY_SPAN_S + CIRCUIT_SPAN_S + CIRCUIT_FAILURES)):
        attempt(one, RemoteAway("it is gone."), 2000.0 + second)
    assert one.status("x", 2000.0).state == "down"


@pytest.mark.parametrize("answer", [None, ObjectMissing("there is none.")], ids=str)
def test_any_answer_is_a_sign_of_life(answer: StageFSError | None) -> None:
    one = health()
    for number in range(CIRCUIT_FAILURES - 1):
        attempt(one, AWAY, number * CIRCUIT_SPAN_S)
    attempt(one, answer, 100)
    attempt(one, AWAY, 101)
    assert not one.down_for_s(101)


def test_after_the_pause_one_attempt_decides() -> None:
    one = health()
    now_s = down(one)
    now_s += one.down_for_s(now_s)
    assert not one.down_for_s(now_s)
    one.begun()
    assert one.down_for_s(now_s), "a second attempt was let in beside the first"
    one.failed(AWAY, now_s, at_once=1)
    assert one.down_for_s(now_s) == 2 * PAUSE_S
    now_s += 2 * PAUSE_S
    attempt(one, None, now_s)
    assert not one.down_for_s(now_s)
    assert one.status("x", now_s).state == "well"


def test_an_attempt_that_nobody_waited_for_decides_nothing() -> None:
    one = health()
    now_s = down(one) + PAUSE_S
    one.begun()
    one.given_up()
    assert not one.down_for_s(now_s), "nobody may ask any more"


def test_the_pause_has_a_limit() -> None:
    one = health()
    now_s = down(one)
    for _ in range(20):
        now_s += one.down_for_s(now_s)
        attempt(one, AWAY, now_s)
    assert one.down_for_s(now_s) == PAUSE_S_MAX


def test_a_busy_server_is_asked_less_and_later() -> None:
    one = health(16)
    one.failed(BUSY, 10.0, at_once=12)
    assert one.allowed == 6
    assert one.busy_for_s(10.0) == BUSY_PAUSE_S
    # The other eleven of that moment say nothing new.
    for _ in range(11):
        one.failed(BUSY, 10.1, at_once=12)
    assert one.allowed == 6
    one.failed(BUSY, 20.0, at_once=6)
    assert one.allowed == 3
    assert one.busy_for_s(20.0) == 2 * BUSY_PAUSE_S
    assert one.status("x", 20.0).state == "busy"
    assert not one.down_for_s(20.0)


def test_the_wish_of_a_busy_server_is_honoured() -> None:
    one = health()
    one.failed(RemoteUnavailable("busy.", busy=True, retry_after_s=7.0), 10.0, at_once=1)
    assert one.busy_for_s(10.0) == 7.0
    one.failed(RemoteUnavailable("busy.", busy=True, retry_after_s=1.0), 11.0, at_once=1)
    assert one.busy_for_s(11.0) == 6.0, "a later answer shortened the wish"


def test_a_busy_server_is_never_left_alone_altogether_and_recovers() -> None:
    one = health(4)
    for number in range(10):
        one.failed(BUSY, 1000.0 * number, at_once=4)
    assert one.allowed == 1
    for _ in range(100):
        attempt(one, None, 20_000)
    assert one.allowed == 4
    assert one.status("x", 20_000).state == "well"


def test_slowness_is_measured_against_the_past() -> None:
    one = health()
    for _ in range(RATES_MIN - 1):
        one.transferred(MIB, 1.0)
    assert one.patience_s(MIB) == math.inf, "judged after too few transfers"
    one.transferred(MIB, 4.0)
    assert one.patience_s(100 * MIB) == 400.0
    for _ in range(1000):
        one.transferred(MIB, 0.01)
    assert one.patience_s(MIB) == SLOW_FLOOR_S, "no floor"
    assert one.patience_s(4096) == SLOW_FLOOR_S
    assert one.status("x", 0).rate_bytes_per_s == pytest.approx(100 * MIB)
