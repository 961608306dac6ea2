"""The arithmetic of the bench: rounds, ratios, what is left out, and the table."""

from collections.abc import Callable

import pytest
from bench.measuring import (
    Contender,
    MeasureFailed,
    Samples,
    Sense,
    Unavailable,
    Work,
    interleave,
    ratio,
)
from bench.report import compare, table

MIB = 1 << 20


def samples(**seconds: list[float]) -> Samples:
    made = Samples(Work(MIB))
    made.seconds.update(seconds)
    return made


def silent(_text: str) -> None:
    pass


def race(*contenders: Contender, rounds: int = 3) -> Samples:
    return interleave(contenders, rounds=rounds, work=Work(MIB), say=silent, what="race")


def answering(name: str, order: list[str]) -> Callable[[], float]:
    def measure() -> float:
        order.append(name)
        return 1.0

    return measure


def test_the_order_is_reversed_from_round_to_round() -> None:
    order: list[str] = []
    race(Contender("a", answering("a", order)), Contender("b", answering("b", order)))
    assert order == ["a", "b", "b", "a", "a", "b"]


def test_a_speed_ratio_is_the_median_over_rounds_against_the_fastest_of_each() -> None:
    found = samples(ours=[1.0, 2.0, 1.0], p=[3.0, 2.0, 9.0], q=[2.0, 8.0, 4.0])
    assert ratio(found, "ours", ["p", "q"], Sense.SPEED) == 2.0


def test_a_time_ratio_is_ours_over_theirs() -> None:
    assert ratio(samples(ours=[1.0], peer=[4.0]), "ours", ["peer"], Sense.TIME) == 0.25


@pytest.mark.parametrize("failure", [Unavailable("no peer"), MeasureFailed("it broke")])
def test_a_peer_that_fails_is_left_out_with_one_sentence(failure: Exception) -> None:
    def fail() -> float:
        raise failure

    found = race(Contender("ours", lambda: 1.0, ours=True), Contender("peer", fail))
    assert found.has("ours")
    assert not found.has("peer")
    assert len(found.missing) == 1
    assert str(failure) in found.missing[0]
    assert compare("p", "w", found, ours="ours", peers=["peer"]) == []


def test_a_peer_that_fails_in_a_later_round_leaves_no_half_series() -> None:
    answers = iter([1.0])

    def once() -> float:
        for seconds in answers:
            return seconds
        raise MeasureFailed("gone")

    found = race(Contender("ours", lambda: 1.0, ours=True), Contender("peer", once))
    assert not found.has("peer")
    assert len(found.seconds["ours"]) == 3


def test_our_own_failure_is_no_row_left_out() -> None:
    def fail() -> float:
        raise MeasureFailed("EIO")

    with pytest.raises(MeasureFailed, match="race: ours: EIO"):
        race(Contender("ours", fail, ours=True))


@pytest.mark.parametrize(
    ("sense", "ours", "verdict"),
    [
        (Sense.SPEED, 0.5, "met"),
        (Sense.SPEED, 0.9, "MISSED"),
        (Sense.TIME, 1.5, "met"),
        (Sense.TIME, 1.6, "MISSED"),
    ],
)
def test_the_verdict_stands_in_the_table(sense: Sense, ours: float, verdict: str) -> None:
    found = samples(ours=[ours], peer=[1.0])
    rows = compare("p", "w", found, ours="ours", peers=["peer"], sense=sense, bound=1.5)
    assert table(rows, verdicts=True).splitlines()[1].endswith(verdict)
    assert verdict not in table(rows, verdicts=False)
