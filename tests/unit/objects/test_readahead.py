"""The window: nothing at first, doubling forward, nothing after a jump."""

from stagefs.model import GIB, KIB, MIB, Span
from stagefs.objects.readahead import NEVER, ReadAhead


def read_ahead(size_bytes: int = GIB) -> ReadAhead:
    return ReadAhead(
        size_bytes=size_bytes, window_bytes_max=64 * MIB, seek_tolerance_bytes=16 * MIB
    )


def read(ahead: ReadAhead, start: int, length: int = 128 * KIB) -> Span:
    return ahead.wanted(Span(start, length))


def test_first_read_wants_no_more_than_it_asks() -> None:
    assert read(read_ahead(), 10 * MIB) == Span(10 * MIB, 128 * KIB)


def test_sequential_reads_double_the_window_to_its_limit() -> None:
    ahead = read_ahead()
    read(ahead, 0)
    windows, stops = [], []
    for step in range(1, 10):
        wanted = read(ahead, step * 128 * KIB)
        windows.append(ahead.window_bytes)
        stops.append(wanted.stop)
    assert windows == [m * MIB for m in (1, 2, 4, 8, 16, 32, 64, 64, 64)]
    # Rounded up to whole steps, so that the next read changes nothing.
    assert stops == [m * MIB for m in (2, 4, 8, 16, 32, 48, 80, 80, 80)]


def test_a_jump_shrinks_the_window_to_nothing() -> None:
    ahead = read_ahead()
    for step in range(5):
        read(ahead, step * 128 * KIB)
    assert read(ahead, 500 * MIB).length == 128 * KIB
    assert read(ahead, 100 * MIB).length == 128 * KIB


def test_a_window_that_was_read_through_is_no_jump() -> None:
    """What is cached is read without a word, up to the trigger."""
    ahead = read_ahead()
    for step in range(10):
        read(ahead, step * 128 * KIB)
    assert ahead.trigger - 10 * 128 * KIB > 16 * MIB, "farther than a jump that is forgiven"
    read(ahead, ahead.trigger)
    assert ahead.window_bytes == 64 * MIB


def test_a_jump_beyond_the_window_begins_anew() -> None:
    ahead = read_ahead()
    for step in range(10):
        read(ahead, step * 128 * KIB)
    read(ahead, 100 * MIB)
    assert ahead.window_bytes == 0


def test_a_short_jump_forward_goes_on() -> None:
    ahead = read_ahead()
    for step in range(3):
        read(ahead, step * 128 * KIB)
    assert read(ahead, 8 * MIB).length > 128 * KIB


def test_requests_in_the_kernels_own_order_count_as_sequential() -> None:
    ahead = read_ahead()
    read(ahead, 0)
    read(ahead, 256 * KIB)
    read(ahead, 128 * KIB)
    assert ahead.window_bytes >= MIB


def test_never_beyond_the_end() -> None:
    ahead = read_ahead(size_bytes=2 * MIB)
    read(ahead, 0)
    read(ahead, 128 * KIB)
    wanted = read(ahead, 256 * KIB)
    assert wanted.stop == 2 * MIB
    assert ahead.trigger == NEVER


def test_what_fits_into_one_fetch_has_nothing_ahead() -> None:
    assert read_ahead(size_bytes=MIB).trigger == NEVER


def test_trigger_comes_before_the_window_is_used_up() -> None:
    ahead = read_ahead()
    read(ahead, 0)
    wanted = read(ahead, 128 * KIB)
    assert 256 * KIB < ahead.trigger < wanted.stop
