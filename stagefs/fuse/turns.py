"""The event loop's part of pyfuse3's session loop, made cheaper.

pyfuse3's readers take turns: one waits for the device, takes a request, answers it, and waits
for its turn again, while another waits in its place.  With trio's own Lock and wait_readable each
request costs two trips through the scheduler and four system calls for epoll, about as
much as all the rest of an open (measured, docs/BENCHMARKS.md).  pyfuse3 looks its trio up
when it needs it, so that its asyncio mode can replace it; here it finds ``Turns``, in
which a reader keeps its turn for as long as requests are waiting, ``RUN_MAX`` at most, so
that the other tasks of the event loop get theirs.
"""

import collections
import select
from typing import Any

import trio

# Requests that are answered in a row before the rest of the event loop gets its turn.
RUN_MAX = 16
# How often to look for the next request before going to sleep: a program that got its answer
# usually asks again within the time that this takes (some 10 us).
LOOKS_MAX = 12


class Turn:
    """As trio.Lock, except that taking a free one does not go through the scheduler, and that
    whoever gives it back may take it again before a waiter has run."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting: collections.deque[trio.lowlevel.Task] = collections.deque()

    async def __aenter__(self) -> None:
        while self._taken:
            task = trio.lowlevel.current_task()
            self._waiting.append(task)

            def abort(
                _raise_cancel: object, task: trio.lowlevel.Task = task
            ) -> trio.lowlevel.Abort:
                self._waiting.remove(task)
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)
        self._taken = True

    async def __aexit__(self, *_details: object) -> None:
        self._taken = False
        if self._waiting:
            trio.lowlevel.reschedule(self._waiting.popleft())


class LowLevel:
    """trio.lowlevel with another wait_readable."""

    def __init__(self) -> None:
        self._run = 0
        self._polls: dict[int, select.poll] = {}

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - it is a module's stand-in
        return getattr(trio.lowlevel, name)

    async def wait_readable(self, fd: int) -> None:
        poll = self._polls.get(fd)
        if poll is None:
            poll = self._polls[fd] = select.poll()
            poll.register(fd, select.POLLIN)
        if self._run < RUN_MAX:
            for _ in range(LOOKS_MAX):
                if poll.poll(0):
                    self._run += 1
                    return
        self._run = 0
        await trio.lowlevel.wait_readable(fd)


class Turns:
    """What pyfuse3 finds where it expects trio."""

    Lock = Turn

    def __init__(self) -> None:
        self.lowlevel = LowLevel()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - it is a module's stand-in
        return getattr(trio, name)
