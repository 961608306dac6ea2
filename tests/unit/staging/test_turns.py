"""Who goes next."""

import trio
import trio.testing

from stagefs.staging.turns import Turns


async def test_the_highest_goes_next_and_of_equals_the_first() -> None:
    order: list[str] = []
    turns, begun = Turns(1), trio.Event()

    async def work(name: str, priority: int) -> None:
        async with turns.turn(priority):
            order.append(name)
            await begun.wait()

    async with trio.open_nursery() as nursery:
        for name, priority in (("a", 0), ("c", -5), ("d", 1), ("e", 1), ("f", 9)):
            nursery.start_soon(work, name, priority)
            await trio.testing.wait_all_tasks_blocked()
        assert order == ["a"]
        begun.set()
    assert order == ["a", "f", "d", "e", "c"]


async def test_who_gives_up_takes_no_place_along() -> None:
    turns = Turns(1)

    async def wait() -> None:
        async with turns.turn(0):
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery, turns.turn(0):
        nursery.start_soon(wait)
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    with trio.fail_after(5):
        async with turns.turn(0):
            pass
    # Called and given up in the same moment.
    async with trio.open_nursery() as nursery:
        async with turns.turn(0):
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    with trio.fail_after(5):
        async with turns.turn(0):
            pass
