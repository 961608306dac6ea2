"""Waiting for something in another program, which sends no event: polls, with a bound."""

import threading
import time
from collections.abc import Callable


def wait_until(
    holds: Callable[[], bool],
    what: str,
    *,
    deadline_s: float = 20.0,
    told: Callable[[], object] = lambda: "",
    pause_s: float = 0.01,
) -> None:
    """``told``: how things stand, for whoever reads why it failed.  ``pause_s``: between two looks,
    longer where one starts a program."""
    pause, end = threading.Event(), time.monotonic() + deadline_s
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {deadline_s:.0f} s {told()}"
        pause.wait(pause_s)
