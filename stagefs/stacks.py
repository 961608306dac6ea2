"""SIGUSR1: what every task and every thread is doing, into the log.

The threads are written by a handler that runs even when the event loop does not, to standard
error (STATE/supervisor.log), and with them what a fatal signal interrupts.  The tasks are written
to the daemon's log by the loop itself.  Nothing stops for it.
"""

import collections
import faulthandler
import logging
import signal
import traceback

import trio

log = logging.getLogger(__name__)

TASKS_SHOWN_MAX = 200


def prepare() -> None:
    """From now on SIGUSR1 does not end this process, and a crash leaves its stacks."""
    faulthandler.enable()
    signal.signal(signal.SIGUSR1, _go_on)
    faulthandler.register(signal.SIGUSR1, all_threads=True)


async def dump_tasks_on_signal() -> None:
    """Never returns.  ``prepare`` must have been called."""
    faulthandler.unregister(signal.SIGUSR1)
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        # On top of the receiver: both hear of it.
        faulthandler.register(signal.SIGUSR1, all_threads=True, chain=True)
        async for _ in signals:
            log.warning("SIGUSR1: %s", _all_tasks())


def _go_on(_number: int, _frame: object) -> None:
    """What SIGUSR1 does while nobody else listens: not the default, which ends the process."""


def _all_tasks() -> str:
    """Each stack once, with the number of tasks that are in it: thousands may wait alike."""
    root = trio.lowlevel.current_root_task()
    waiting = [root] if root is not None else []
    stacks: collections.Counter[str] = collections.Counter()
    while waiting:
        task = waiting.pop()
        frames = traceback.StackSummary.extract(task.iter_await_frames())
        stacks[f"{task.name}\n{''.join(frames.format())}"] += 1
        for nursery in task.child_nurseries:
            waiting.extend(nursery.child_tasks)
    shown = [f"{count} x {stack}" for stack, count in stacks.most_common(TASKS_SHOWN_MAX)]
    hidden = len(stacks) - len(shown)
    more = f"and {hidden} more stacks\n" if hidden else ""
    return f"{stacks.total()} tasks\n{''.join(shown)}{more}"
