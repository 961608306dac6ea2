"""What is to run just after an answer does so once, in order, and is not lost at the end."""

import functools

import trio
import trio.testing

from stagefs.fuse.soon import Soon


async def test_all_run_in_the_next_round_in_order() -> None:
    soon, seen = Soon(), list[int]()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(soon.run)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(3):
            soon(functools.partial(seen.append, number))
        assert not seen, "nothing runs while the request is still handled"
        await trio.testing.wait_all_tasks_blocked()
        assert seen == [0, 1, 2]
        soon(lambda: seen.append(3))
        await trio.testing.wait_all_tasks_blocked()
        assert seen == [0, 1, 2, 3]
        nursery.cancel_scope.cancel()


async def test_what_is_wanted_while_it_runs_comes_in_a_round_of_its_own() -> None:
    soon, seen = Soon(), list[str]()

    def first() -> None:
        soon(lambda: seen.append("second"))
        seen.append("first")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(soon.run)
        soon(first)
        await trio.testing.wait_all_tasks_blocked()
        assert seen == ["first", "second"]
        nursery.cancel_scope.cancel()


async def test_what_is_left_at_the_end_is_carried_out() -> None:
    soon, seen = Soon(), list[int]()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(soon.run)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        soon(lambda: seen.append(1))
    assert seen == [1]
