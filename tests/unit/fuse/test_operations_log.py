"""What a daemon leaves behind, as the next one finds it.  Both are simulated on one memory."""

import os
import time
from collections.abc import Callable, Sequence

import pytest

from stagefs.errors import NewerFormat
from stagefs.fuse import operations_log
from stagefs.fuse.operations_log import NameBefore, PendingKind, SharedMemory
from stagefs.model import Inode
from stagefs.supervisor import memory as supervisors
from stagefs.supervisor.wire import RESENT_BIT, Request

MKDIR, READ = 9, 15
THREAD, OTHER = 1234, 1235
MAKE_A, MAKE_B = b"a" * 16, b"b" * 16
FILE = Inode(77)
PARENT = Inode(6)


class Lives:
    """The memory of one mount, with one daemon after the other on it."""

    def __init__(self, *, can_resend: bool = True) -> None:
        self.supervisor = supervisors.SharedMemory(can_resend=can_resend)
        self.supervisor.begin_generation(None, first=True)
        self.scheduled: list[Callable[[], None]] = []

    def daemon(self) -> SharedMemory:
        self.scheduled.clear()
        return SharedMemory(self.supervisor.fd, call_soon=self.scheduled.append)

    def dies(self, in_flight: Sequence[tuple[int, int]] | None) -> None:
        """``in_flight``: (thread, opcode) of what is sent again; None when nobody knows."""
        requests = None
        if in_flight is not None:
            requests = [Request(opcode, RESENT_BIT | 8, thread) for thread, opcode in in_flight]
        self.supervisor.begin_generation(requests, first=False)

    def write_answers(self) -> None:
        for action in self.scheduled:
            action()
        self.scheduled.clear()


def test_the_layout_is_the_supervisors() -> None:
    ours, theirs = vars(operations_log), vars(supervisors)
    shared = [name for name in theirs if name.isupper() and name in ours]
    assert len(shared) >= 15, shared
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


def test_the_tables_do_not_overlap() -> None:
    log = operations_log
    assert log.RESENT_OFFSET + log.RESENT_MAX * 8 <= log.NOTES_OFFSET
    assert log.NOTES_OFFSET + log.NOTES_MAX * log.NOTE_WORDS * 8 <= log.PENDING_OFFSET
    assert log.PENDING_OFFSET + log.PENDING_MAX * log.PENDING_WORDS * 8 <= log.MEMORY_BYTES


def test_another_layout_is_refused() -> None:
    fd = os.memfd_create("test")
    os.ftruncate(fd, operations_log.MEMORY_BYTES)
    with pytest.raises(NewerFormat, match="unmount and mount again"):
        SharedMemory(fd, call_soon=lambda _action: None)
    os.close(fd)


def test_operation_numbers_go_on_in_the_next_daemon_and_the_next_mount() -> None:
    lives = Lives()
    numbers = [lives.daemon().notes.begin(THREAD, MAKE_A)]
    lives.dies([])
    numbers.append(lives.daemon().notes.begin(THREAD, MAKE_A))
    numbers.append(Lives().daemon().notes.begin(THREAD, MAKE_A))
    assert numbers == sorted(set(numbers)), numbers


def test_a_request_that_is_sent_again_finds_its_number() -> None:
    lives = Lives()
    number = lives.daemon().notes.begin(THREAD, MAKE_A)
    lives.dies([(THREAD, MKDIR)])
    second = lives.daemon()
    assert second.generation == 1
    assert second.notes.resent(OTHER, MAKE_A) is None
    assert second.notes.resent(THREAD, MAKE_A) == number
    assert second.notes.resent(THREAD, MAKE_A) is None, "only once"


def test_a_note_survives_daemons_that_do_not_get_to_its_request() -> None:
    lives = Lives()
    number = lives.daemon().notes.begin(THREAD, MAKE_A)
    for _ in range(3):
        lives.dies([(THREAD, MKDIR)])
        survivor = lives.daemon()
    assert survivor.notes.resent(THREAD, MAKE_A) == number


def test_a_daemon_that_dies_before_it_answers_a_repetition_leaves_the_note() -> None:
    lives = Lives()
    number = lives.daemon().notes.begin(THREAD, MAKE_A)
    lives.dies([(THREAD, MKDIR)])
    second = lives.daemon()
    second.notes.resent(THREAD, MAKE_A)
    second.notes.finish(THREAD)
    lives.dies([(THREAD, MKDIR)])
    assert lives.daemon().notes.resent(THREAD, MAKE_A) == number


@pytest.mark.parametrize(
    "in_flight",
    [[], [(OTHER, MKDIR)], [(THREAD, READ)]],
    ids=["nothing", "another thread", "another request"],
)
def test_what_is_not_sent_again_does_not_match(in_flight: list[tuple[int, int]]) -> None:
    lives = Lives()
    lives.daemon().notes.begin(THREAD, MAKE_A)
    lives.dies(in_flight)
    assert lives.daemon().notes.resent(THREAD, MAKE_A) is None


def test_another_operation_of_the_thread_does_not_match() -> None:
    lives = Lives()
    lives.daemon().notes.begin(THREAD, MAKE_A)
    lives.dies([(THREAD, MKDIR)])
    notes = lives.daemon().notes
    assert notes.resent(THREAD, MAKE_B) is None
    assert notes.resent(THREAD, MAKE_A) is None, "its next request was another one"


def test_an_answered_operation_is_forgotten_just_after_its_answer() -> None:
    lives = Lives()
    notes = lives.daemon().notes
    number = notes.begin(THREAD, MAKE_A)
    notes.finish(THREAD)
    lives.dies([(THREAD, MKDIR)])
    assert lives.daemon().notes.resent(THREAD, MAKE_A) == number, "the answer was not written yet"

    lives = Lives()
    notes = lives.daemon().notes
    notes.begin(THREAD, MAKE_A)
    notes.finish(THREAD)
    lives.write_answers()
    lives.dies([(THREAD, MKDIR)])
    assert lives.daemon().notes.resent(THREAD, MAKE_A) is None


def test_the_next_request_forgets_what_was_answered() -> None:
    lives = Lives()
    memory = lives.daemon()
    memory.notes.begin(THREAD, MAKE_A)
    memory.notes.finish(THREAD)
    memory.count_answer()
    lives.dies([(THREAD, MKDIR)])
    assert lives.daemon().notes.resent(THREAD, MAKE_A) is None


def test_nobody_is_thread_zero() -> None:
    lives = Lives()
    memory = lives.daemon()
    memory.notes.begin(0, MAKE_A)
    assert not memory.pending.put(0, FILE, PendingKind.COPY_UP)
    lives.dies([(0, MKDIR)])
    second = lives.daemon()
    assert second.notes.resent(0, MAKE_A) is None
    assert second.pending.take(0, FILE) is None


def test_more_threads_than_slots_still_get_numbers() -> None:
    notes = Lives().daemon().notes
    numbers = [notes.begin(thread, MAKE_A) for thread in range(1, operations_log.NOTES_MAX + 10)]
    assert numbers == sorted(set(numbers))


def test_without_resend_the_walk_does_not_see_the_result() -> None:
    lives = Lives(can_resend=False)
    first = lives.daemon().notes
    names = [NameBefore(PARENT, b"old", present=True), NameBefore(PARENT, b"new", present=False)]
    number = first.begin(THREAD, MAKE_A, names)
    assert not first.expects_walks
    lives.dies(None)
    notes = lives.daemon().notes
    assert notes.expects_walks
    assert notes.repeated_lookup(OTHER, PARENT, b"old") is None
    assert notes.repeated_lookup(THREAD, Inode(7), b"old") is None
    assert notes.repeated_lookup(THREAD, PARENT, b"else") is None
    assert notes.repeated_lookup(THREAD, PARENT, b"old") == (number, True)
    assert notes.repeated_lookup(THREAD, PARENT, b"new") == (number, False)
    assert notes.resent(THREAD, MAKE_A) == number
    assert notes.repeated_lookup(THREAD, PARENT, b"new") is None, "the walk is over"
    assert not notes.expects_walks


def test_a_thread_that_goes_on_asking_is_told_the_truth() -> None:
    lives = Lives(can_resend=False)
    lives.daemon().notes.begin(THREAD, MAKE_A, [NameBefore(PARENT, b"new", present=False)])
    lives.dies(None)
    notes = lives.daemon().notes
    answers = [notes.repeated_lookup(THREAD, PARENT, b"new") for _ in range(3)]
    assert answers[2] is None, "that is no walk of a repetition"


def test_with_resend_no_lookup_is_changed() -> None:
    lives = Lives()
    lives.daemon().notes.begin(THREAD, MAKE_A, [NameBefore(PARENT, b"new", present=False)])
    lives.dies([(THREAD, MKDIR)])
    assert not lives.daemon().notes.expects_walks


def test_a_pending_lookup_survives_and_is_taken_once() -> None:
    lives = Lives()
    lives.daemon().pending.put(THREAD, FILE, PendingKind.COPY_UP | PendingKind.NEW_VERSION)
    lives.dies([])
    pending = lives.daemon().pending
    assert pending
    assert pending.take(THREAD, Inode(78)) is None, "another inode"
    assert pending.take(OTHER, FILE) is None, "another thread"
    taken = pending.take(THREAD, FILE)
    assert taken == PendingKind.COPY_UP | PendingKind.NEW_VERSION
    assert pending.take(THREAD, FILE) is None
    assert not pending


def test_a_pending_lookup_is_dropped_and_replaced() -> None:
    pending = Lives().daemon().pending
    pending.put(THREAD, FILE, PendingKind.COPY_UP)
    pending.put(THREAD, Inode(78), PendingKind.RECORD)
    assert pending.take(THREAD, FILE) is None, "one for each thread: the last"
    pending.drop(THREAD)
    assert pending.take(THREAD, Inode(78)) is None


def test_a_pending_lookup_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    pending = Lives().daemon().pending
    pending.put(THREAD, FILE, PendingKind.COPY_UP)
    later = time.monotonic_ns() + operations_log.PENDING_LIFE_NS
    monkeypatch.setattr(time, "monotonic_ns", lambda: later)
    assert pending.take(THREAD, FILE) is None


def test_more_pending_than_slots_drops_the_oldest() -> None:
    pending = Lives().daemon().pending
    for thread in range(1, operations_log.PENDING_MAX + 2):
        assert pending.put(thread, FILE, PendingKind.COPY_UP)
    assert pending.take(1, FILE) is None
    assert pending.take(2, FILE) is PendingKind.COPY_UP


def test_answers_are_counted_for_the_supervisor() -> None:
    lives = Lives()
    memory = lives.daemon()
    memory.count_answer()
    memory.count_answer()
    assert lives.supervisor.answered == 2
