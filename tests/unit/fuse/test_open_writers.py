"""Counts of open writers, as one daemon after the other finds them in the shared memory."""

from collections.abc import Callable, Sequence

import pytest

from stagefs.errors import NoSpace
from stagefs.fuse import open_writers
from stagefs.fuse.open_writers import OpenWriters
from stagefs.fuse.operations_log import MEMORY_BYTES, PENDING_MAX, PENDING_OFFSET, SharedMemory
from stagefs.model import Handle, Inode
from stagefs.supervisor import memory as supervisors
from stagefs.supervisor.wire import RESENT_BIT, Request

OPEN, READ, CREATE = 14, 15, 35
FILE, OTHER = Inode(77), Inode(78)
THREAD, ANOTHER = 1234, 1235


def handle(serial: int, inode: Inode = FILE) -> Handle:
    return Handle(serial << 40 | inode)


class Lives:
    """The memory of one mount, with one daemon after the other on it."""

    def __init__(self) -> None:
        self.supervisor = supervisors.SharedMemory(can_resend=True)
        self.supervisor.begin_generation(None, first=True)
        self._scheduled: list[Callable[[], object]] = []

    def daemon(self) -> OpenWriters:
        self._scheduled.clear()
        words = SharedMemory(self.supervisor.fd, call_soon=self._scheduled.append).words
        return OpenWriters(words, call_soon=self._scheduled.append)

    def write_answers(self) -> None:
        for action in self._scheduled:
            action()
        self._scheduled.clear()

    def dies(self, in_flight: Sequence[tuple[int, int]] | None = ()) -> None:
        requests = None
        if in_flight is not None:
            requests = [Request(opcode, RESENT_BIT | 8, thread) for thread, opcode in in_flight]
        self.supervisor.begin_generation(requests, first=False)


def test_the_table_lies_behind_the_others() -> None:
    assert PENDING_OFFSET + PENDING_MAX * 4 * 8 <= open_writers.WRITERS_OFFSET < MEMORY_BYTES


def test_counts_by_file() -> None:
    writers = Lives().daemon()
    writers.add(handle(1), THREAD)
    writers.add(handle(2), THREAD)
    writers.add(handle(3, OTHER), THREAD)
    assert (writers.count(FILE), writers.count(OTHER)) == (2, 1)
    assert handle(1) in writers
    writers.remove(handle(1))
    writers.remove(handle(1))
    assert handle(1) not in writers
    assert writers.count(FILE) == 1
    assert sorted(writers.inodes()) == [FILE, OTHER]


def test_writers_outlive_daemons() -> None:
    lives = Lives()
    first = lives.daemon()
    first.add(handle(1), THREAD)
    first.add(handle(2), THREAD)
    lives.write_answers()
    first.remove(handle(2))
    for _ in range(3):
        lives.dies()
        next_one = lives.daemon()
        assert next_one.count(FILE) == 1
        assert handle(1) in next_one
    next_one.remove(handle(1))
    lives.dies()
    assert lives.daemon().count(FILE) == 0


def test_what_was_closed_is_left_to_the_next_daemon_until_it_is_removed() -> None:
    lives = Lives()
    first = lives.daemon()
    for serial in (1, 2, 3):
        first.add(handle(serial), THREAD)
    lives.write_answers()
    first.close(handle(1))
    first.close(handle(2))
    assert first.count(FILE) == 1
    first.remove(handle(2))
    for _ in range(2):
        lives.dies(None)
        survivor = lives.daemon()
        assert survivor.closed() == [handle(1)]
        assert survivor.count(FILE) == 1
    survivor.remove(handle(1))
    lives.dies(None)
    assert lives.daemon().closed() == []
    assert lives.daemon().count(FILE) == 1


@pytest.mark.parametrize("opcode", [OPEN, CREATE])
def test_an_open_that_comes_again_is_counted_once(opcode: int) -> None:
    lives = Lives()
    lives.daemon().add(handle(1), THREAD)
    lives.dies([(THREAD, opcode)])
    second = lives.daemon()
    assert second.count(FILE) == 0
    second.add(handle(2), THREAD)
    assert second.count(FILE) == 1


@pytest.mark.parametrize("in_flight", [[], [(ANOTHER, OPEN)], [(THREAD, READ)]])
def test_an_answer_that_was_written_just_before_the_death_counts(
    in_flight: list[tuple[int, int]],
) -> None:
    """The daemon had no time to note that its answer was out, but nothing comes again."""
    lives = Lives()
    lives.daemon().add(handle(1), THREAD)
    lives.dies(in_flight)
    assert lives.daemon().count(FILE) == 1


def test_an_answered_open_of_a_thread_that_opens_again_counts() -> None:
    lives = Lives()
    writers = lives.daemon()
    writers.add(handle(1), THREAD)
    lives.write_answers()
    writers.add(handle(2), THREAD)
    lives.dies([(THREAD, OPEN)])
    survivor = lives.daemon()
    assert survivor.count(FILE) == 1
    assert handle(1) in survivor


def test_without_resend_only_answered_opens_count() -> None:
    lives = Lives()
    writers = lives.daemon()
    writers.add(handle(1), THREAD)
    lives.write_answers()
    writers.add(handle(2), ANOTHER)
    lives.dies(None)
    assert lives.daemon().count(FILE) == 1


def test_a_full_table_refuses_and_recovers() -> None:
    writers = Lives().daemon()
    for serial in range(open_writers.WRITERS_MAX):
        writers.add(handle(serial + 1), THREAD)
    with pytest.raises(NoSpace, match="close some"):
        writers.add(handle(1, OTHER), THREAD)
    assert writers.count(OTHER) == 0
    writers.remove(handle(5))
    writers.add(handle(1, OTHER), THREAD)
    assert writers.count(OTHER) == 1
