"""When a failed upload is tried again, and when a host is left alone."""

import pytest

from stagefs.config import StageOutSettings
from stagefs.errors import (
    AccessDenied,
    ChecksumMismatch,
    CredentialsExpired,
    DeadlineExceeded,
    InvalidUrl,
    NameExists,
    NoSpace,
    NotSupported,
    RemoteError,
    RemoteUnavailable,
    StageFSError,
    StateFailed,
)
from stagefs.staging.patience import (
    HOST_PAUSE_S_MAX,
    URGENT_PAUSE_S_MAX,
    Kind,
    Patience,
    kind_of,
)

AWAY = RemoteUnavailable("Nobody answers.")


@pytest.fixture
def patience() -> Patience:
    settings = StageOutSettings(attempts=3, backoff_s=2.0, backoff_s_max=300.0)
    return Patience(settings, jitter=lambda: 1.0)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (AWAY, Kind.PASSING),
        (DeadlineExceeded("Too slow."), Kind.PASSING),
        (NoSpace("Full there."), Kind.PASSING),
        (AccessDenied("No."), Kind.FINAL),
        (CredentialsExpired("No longer."), Kind.PASSING),
        (NameExists("It is there."), Kind.FINAL),
        (NotSupported("Cannot be written."), Kind.FINAL),
        (InvalidUrl("What?"), Kind.FINAL),
        (ChecksumMismatch("Damaged."), Kind.LIMITED),
        (RemoteError("What?"), Kind.LIMITED),
        (StateFailed("The disk here."), Kind.LIMITED),
    ],
)
def test_kinds_of_failures(error: StageFSError, kind: Kind) -> None:
    assert kind_of(error) is kind


def test_pauses_double_up_to_the_longest(patience: Patience) -> None:
    pauses = [patience.pause_s(AWAY, failures, urgent=False) for failures in (1, 2, 3, 8, 9, 10**6)]
    assert pauses == [2.0, 4.0, 8.0, 256.0, 300.0, 300.0]


def test_who_waits_for_the_queue_gets_short_pauses(patience: Patience) -> None:
    assert patience.pause_s(AWAY, 9, urgent=True) == URGENT_PAUSE_S_MAX


def test_jitter_spreads_over_half_of_the_pause() -> None:
    least = Patience(StageOutSettings(backoff_s=2.0), jitter=lambda: 0.0)
    assert least.pause_s(AWAY, 1, urgent=False) == 1.0


def test_only_what_passes_is_tried_for_ever(patience: Patience) -> None:
    damaged, refused = ChecksumMismatch("Damaged."), AccessDenied("No.")
    assert patience.pause_s(damaged, 2, urgent=False) == 4.0
    assert patience.pause_s(damaged, 3, urgent=False) is None
    assert patience.pause_s(refused, 1, urgent=False) is None
    assert patience.pause_s(AWAY, 1000, urgent=False) is not None


def test_one_failure_holds_no_host(patience: Patience) -> None:
    patience.failed_at("ssh://a", AWAY, 100.0, urgent=False)
    assert patience.held(100.0, set()) == {}


def test_host_is_held_after_two_failures_in_a_row(patience: Patience) -> None:
    for _ in range(2):
        patience.failed_at("ssh://a", AWAY, 100.0, urgent=False)
    assert patience.held(100.0, set()) == {"ssh://a": 102.0}
    assert patience.held(102.0, set()) == {}, "after the pause one may ask"
    assert patience.held(102.0, {"ssh://a"}) == {"ssh://a": float("inf")}, "but only one"
    assert patience.doubtful("ssh://a")
    patience.worked_at("ssh://a")
    assert not patience.doubtful("ssh://a")


def test_failures_that_had_begun_before_the_pause_count_once(patience: Patience) -> None:
    for _ in range(20):
        patience.failed_at("ssh://a", AWAY, 100.0, urgent=False)
    assert patience.held(100.0, set()) == {"ssh://a": 102.0}


def test_host_is_asked_every_minute_at_least(patience: Patience) -> None:
    now = 0.0
    for _ in range(50):
        patience.failed_at("ssh://a", AWAY, now, urgent=False)
        now = patience.held(now, set()).get("ssh://a", now)
    patience.failed_at("ssh://a", AWAY, now, urgent=False)
    assert patience.held(now, set()) == {"ssh://a": now + HOST_PAUSE_S_MAX}


def test_answer_of_any_kind_ends_the_doubt(patience: Patience) -> None:
    for _ in range(2):
        patience.failed_at("ssh://a", AWAY, 100.0, urgent=False)
    patience.failed_at("ssh://a", AccessDenied("No."), 102.0, urgent=False)
    assert patience.held(102.0, set()) == {}
    assert not patience.doubtful("ssh://a")
