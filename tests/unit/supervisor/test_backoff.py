import pytest

from stagefs.supervisor.backoff import GOOD_LIFE_S, MAX_S, WORKING_LIFE_S, WORKING_MAX_S, Backoff


def pauses(lives_s: list[float], *, worked: bool) -> list[float]:
    backoff, found = Backoff(), []
    for lived_s in lives_s:
        backoff.note_life(lived_s, worked=worked)
        found.append(backoff.next_pause_s(worked=worked))
    return found


@pytest.mark.parametrize(("worked", "longest"), [(True, WORKING_MAX_S), (False, MAX_S)])
def test_pauses_double_from_death_to_death_up_to_a_bound(worked: bool, longest: float) -> None:
    found = pauses([0.5] * 12, worked=worked)
    assert found[:4] == [0.0, 0.1, 0.2, 0.4]
    assert found[-1] == longest


@pytest.mark.parametrize(
    ("worked", "lived_s"), [(True, WORKING_LIFE_S), (False, GOOD_LIFE_S)], ids=["worked", "idle"]
)
def test_no_pause_after_a_life_that_was_long_enough(worked: bool, lived_s: float) -> None:
    assert pauses([lived_s] * 20, worked=worked) == [0.0] * 20
    assert pauses([0.5, 0.5, lived_s], worked=worked)[-1] == 0.0
    assert pauses([0.5, 0.5, lived_s - 0.1], worked=worked)[-1] > 0


def test_a_daemon_that_only_lived_is_held_down_longer() -> None:
    assert pauses([WORKING_LIFE_S] * 8, worked=False)[-1] > WORKING_MAX_S
