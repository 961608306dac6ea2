"""Slots of chunks that pass through memory are those that the file would give."""

import os
from pathlib import Path

import pytest

from stagefs.cache.hashing import PassingSlots, slot_of

CHUNK = 1 << 12
SIZE = 3 * CHUNK + 1000
DATA = os.urandom(SIZE)


@pytest.fixture
def slots() -> PassingSlots:
    return PassingSlots(size_bytes=SIZE, chunk_bytes=CHUNK)


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    path: Path = tmp_path_factory.mktemp("slots") / "data"
    path.write_bytes(DATA)
    with path.open("rb") as file:
        return [
            slot_of(file.fileno(), start, min(CHUNK, SIZE - start))
            for start in range(0, SIZE, CHUNK)
        ]


def show(slots: PassingSlots, start: int, stop: int, piece: int) -> None:
    for at in range(start, stop, piece):
        slots.passed(at, memoryview(DATA)[at : min(at + piece, stop)])


@pytest.mark.parametrize("piece", [1, 100, CHUNK - 1, CHUNK, CHUNK + 1, SIZE])
def test_pieces_of_any_size(slots: PassingSlots, right: list[int], piece: int) -> None:
    show(slots, 0, SIZE, piece)
    assert [slots.take(chunk) for chunk in range(4)] == right


def test_a_slot_is_given_once(slots: PassingSlots) -> None:
    show(slots, 0, SIZE, CHUNK)
    assert slots.take(1) is not None
    assert slots.take(1) is None


def test_a_chunk_that_is_not_seen_whole_has_none(slots: PassingSlots, right: list[int]) -> None:
    show(slots, 100, 2 * CHUNK + 5, 1000)
    assert [slots.take(chunk) for chunk in range(4)] == [None, right[1], None, None]


def test_a_gap_within_a_chunk(slots: PassingSlots) -> None:
    show(slots, 0, 100, 100)
    show(slots, 101, CHUNK, CHUNK)
    assert slots.take(0) is None


def test_other_bytes_that_come_later_count(slots: PassingSlots, right: list[int]) -> None:
    other = bytes(CHUNK)
    slots.passed(0, memoryview(other))
    show(slots, 0, CHUNK, 77)
    assert slots.take(0) == right[0]


def test_a_fetch_that_goes_on_within_a_chunk_that_was_complete(slots: PassingSlots) -> None:
    """Its rest is written anew, perhaps with other bytes: what was seen before says nothing."""
    show(slots, 0, CHUNK, CHUNK)
    slots.passed(1000, memoryview(bytes(CHUNK - 1000)))
    assert slots.take(0) is None


def test_a_fetch_that_begins_a_complete_chunk_anew(slots: PassingSlots) -> None:
    show(slots, 0, CHUNK, CHUNK)
    show(slots, 0, 100, 100)
    assert slots.take(0) is None
