"""What is to run just after an answer was written.

pyfuse3 writes an answer before it gives the event loop back, so what is scheduled while a
request is handled runs just after.  trio's own ``run_sync_soon`` is for other threads: it
wakes the loop through a socket, at the price of three system calls a time.
"""

from collections.abc import Callable

import trio


class Soon:
    """Call it with a function.  Trio thread; ``run`` is the task that carries out."""

    def __init__(self) -> None:
        self._wanted: list[Callable[[], None]] = []
        self._bell = trio.Event()

    def __call__(self, function: Callable[[], None]) -> None:
        self._wanted.append(function)
        self._bell.set()

    async def run(self) -> None:
        """Until it is cancelled; leaves nothing undone."""
        try:
            while True:
                await self._bell.wait()
                self._bell = trio.Event()
                self._carry_out()
        finally:
            self._carry_out()

    def _carry_out(self) -> None:
        wanted, self._wanted = self._wanted, []
        for function in wanted:
            function()
