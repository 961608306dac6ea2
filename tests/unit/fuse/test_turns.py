"""The readers' turns: one at a time, nobody starves, a reader that blocks lets the next one in."""

import os
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from stagefs.fuse.turns import RUN_MAX, Turns


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    receiving, sending = os.pipe()
    yield receiving, sending
    os.close(receiving)
    os.close(sending)


async def test_one_reader_has_the_turn_and_the_next_gets_it() -> None:
    turn = Turns.Lock()
    inside: list[str] = []

    async def reader(name: str, release: trio.Event) -> None:
        async with turn:
            inside.append(name)
            await release.wait()
            inside.remove(name)

    first, second = trio.Event(), trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reader, "first", first)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(reader, "second", second)
        await trio.testing.wait_all_tasks_blocked()
        assert inside == ["first"]
        first.set()
        await trio.testing.wait_all_tasks_blocked()
        assert inside == ["second"]
        second.set()


async def test_a_reader_that_was_cancelled_does_not_hold_up_the_next() -> None:
    turn = Turns.Lock()
    reached = trio.Event()

    async def wait_in_vain(scope: trio.CancelScope) -> None:
        with scope:
            async with turn:
                raise AssertionError("the turn was taken twice")

    async def wait() -> None:
        async with turn:
            reached.set()

    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        async with turn:
            nursery.start_soon(wait_in_vain, scope)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(10):
            await reached.wait()


async def test_waiting_requests_are_taken_at_once_but_others_get_their_turn(
    pipe: tuple[int, int],
) -> None:
    receiving, sending = pipe
    turns = Turns()
    os.write(sending, b"x")
    others = 0

    async def count() -> None:
        nonlocal others
        while True:
            others += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        for _ in range(RUN_MAX):
            await turns.lowlevel.wait_readable(receiving)
        assert others == 0, "a waiting request went through the scheduler"
        # Of two tasks that can run trio may take either first, once.
        for _ in range(RUN_MAX + 2):
            await turns.lowlevel.wait_readable(receiving)
        assert others > 0, "the other tasks never ran"
        nursery.cancel_scope.cancel()


async def test_without_a_request_it_waits_as_trio_does(pipe: tuple[int, int]) -> None:
    receiving, sending = pipe
    turns = Turns()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.lowlevel.wait_readable, receiving)
        await trio.testing.wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 1
        os.write(sending, b"x")
        with trio.fail_after(10):
            await trio.testing.wait_all_tasks_blocked()


def test_everything_else_is_trios() -> None:
    turns = Turns()
    assert turns.open_nursery is trio.open_nursery
    assert turns.ClosedResourceError is trio.ClosedResourceError
    assert turns.lowlevel.notify_closing is trio.lowlevel.notify_closing
