"""The choice among replicas: nearest, then fastest, then not lately failed."""

import pytest

from stagefs.errors import ObjectMissing, RemoteUnavailable
from stagefs.model import MIB
from stagefs.objects.replica_choice import (
    DEMOTED_S,
    OBJECT_DEMOTED_S,
    SAMPLE_BYTES,
    SAMPLE_KEPT_S,
    SAMPLES_MIN,
    Choice,
    Source,
    Standing,
    choose,
    closeness,
)

OWN = "vienna/node7"
NOW_S = 1000.0


def source(name: str, affinity: str = "", *, rate_mib: float | None = None) -> Source:
    """One on a server of its own, of which a rate is known or none."""
    standing = Standing()
    if rate_mib is not None:
        standing.landed(64 * MIB, NOW_S)
        for _ in range(SAMPLES_MIN):
            standing.transferred(MIB, 1 / rate_mib, NOW_S)
    return Source(
        f"https://{name}/f", standing, affinity=affinity, own=OWN, validator="v", is_first=False
    )


@pytest.mark.parametrize(
    ("affinity", "shared"),
    [
        ("", 0),
        ("graz", 0),
        ("vienna", 1),
        ("vienna/node8", 1),
        ("vienna/node7", 2),
        ("/vienna//node7/", 2),
        ("vienna/node7/disk1", 2),
        ("graz/node7", 0),
    ],
)
def test_closeness_is_a_common_prefix(affinity: str, shared: int) -> None:
    assert closeness(affinity, OWN) == shared
    assert closeness(affinity, "") == 0


def test_the_nearest_goes_first_however_slow() -> None:
    far = source("far", "graz", rate_mib=500)
    near = source("near", "vienna/node1", rate_mib=5)
    unknown = source("unknown")
    assert choose([far, unknown, near], NOW_S) == Choice(near)


def test_among_equals_the_fastest() -> None:
    slow, fast = source("slow", "vienna", rate_mib=5), source("fast", "vienna", rate_mib=50)
    assert choose([slow, fast], NOW_S) == Choice(fast, 64 * MIB)


def test_what_is_unknown_gets_small_pieces_until_it_is_known() -> None:
    known, fresh = source("known", rate_mib=50), source("fresh")
    for _ in range(SAMPLES_MIN):
        assert choose([known, fresh], NOW_S) == Choice(fresh, SAMPLE_BYTES, is_sample=True)
        fresh.standing.transferred(MIB, 1.0, NOW_S)
    assert choose([known, fresh], NOW_S) == Choice(known, 64 * MIB)
    # While one small piece is on its way, others do not wait for its outcome.
    later_s = NOW_S + SAMPLE_KEPT_S + 1
    known.standing.transferred(MIB, 0.02, later_s)
    assert choose([known, fresh], later_s) == Choice(fresh, SAMPLE_BYTES, is_sample=True)
    fresh.standing.sampling += 1
    assert choose([known, fresh], later_s) == Choice(known, 64 * MIB)


def test_a_connection_that_took_long_once_does_not_count() -> None:
    usual, other = source("usual", rate_mib=20), source("other")
    other.standing.transferred(MIB, 2.0, NOW_S)
    other.standing.transferred(MIB, 0.01, NOW_S)
    assert choose([usual, other], NOW_S).source is other


def test_one_that_failed_is_tried_again_later_and_later() -> None:
    near, far = source("near", "vienna", rate_mib=50), source("far", rate_mib=5)
    now_s, pause_s = NOW_S, DEMOTED_S
    for _ in range(3):
        for _ in range(4):  # of several at once, the first counts
            near.failed(RemoteUnavailable("gone"), now_s)
        assert not near.standing.wants_probe(now_s + pause_s - 1)
        assert near.standing.wants_probe(now_s + pause_s)
        assert choose([near, far], now_s + pause_s).source is far, "a reader was to find out"
        now_s, pause_s = now_s + pause_s, pause_s * 2
    near.standing.answered()
    assert choose([near, far], now_s).source is near
    near.standing.transferred(MIB, 0.1, now_s)
    near.failed(RemoteUnavailable("gone"), now_s)
    assert near.standing.wants_probe(now_s + DEMOTED_S), "success was not a new beginning"


def test_when_all_have_failed_the_first_to_be_tried_again_is_asked() -> None:
    one, other = source("one"), source("other")
    one.failed(RemoteUnavailable("gone"), NOW_S)
    other.failed(RemoteUnavailable("gone"), NOW_S - 5)
    assert choose([one, other], NOW_S).source is other


def test_a_missing_object_says_nothing_of_its_neighbours() -> None:
    standing = Standing()
    missing, neighbour = (
        Source(f"https://h/{n}", standing, affinity="", own=OWN, validator=None, is_first=False)
        for n in "ab"
    )
    missing.failed(ObjectMissing("no"), NOW_S)
    assert missing.demoted_for_s(NOW_S) == OBJECT_DEMOTED_S
    assert not neighbour.demoted_for_s(NOW_S)


def test_one_that_was_fast_for_little_is_not_asked_for_much_at_once() -> None:
    usual, burst = source("usual", rate_mib=20), source("burst", rate_mib=200)
    burst.standing.landed_bytes = 2 * MIB
    assert choose([usual, burst], NOW_S) == Choice(burst, 2 * MIB)
    burst.standing.transferred(2 * MIB, 1.0, NOW_S)
    assert choose([usual, burst], NOW_S).source is usual
