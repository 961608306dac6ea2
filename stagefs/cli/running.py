"""One command as the task of ``stagefs run``: its process group, signals and exit code.

The command has a process group of its own, and the signals that ``stagefs run`` gets are passed
on to all of it.  On a terminal it stays in the terminal's foreground group, which gets Ctrl-C
and Ctrl-Z by itself.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

PASSED_ON = (
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
NOT_FOUND, NOT_EXECUTABLE, BY_SIGNAL = 127, 126, 128


class Task:
    """Enter ``passing_signals`` before anything that must not be left half done."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []
        self._own_group = not sys.stdin.isatty()

    @contextlib.contextmanager
    def passing_signals(self) -> Iterator[None]:
        """What comes before the command has begun is passed on when it has."""

        def pass_on(number: int, _frame: FrameType | None) -> None:
            if not self._own_group and number in FROM_TERMINAL:
                return  # the terminal sent it to the command as well
            if self._child is None:
                self._early.append(number)
            else:
                self._send(number)

        before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _send(self, number: int) -> None:
        assert self._child is not None
        with contextlib.suppress(ProcessLookupError):
            if self._own_group:
                os.killpg(self._child.pid, number)
            else:
                self._child.send_signal(number)

    def run(self, command: Sequence[str], *, directory: str, variables: Mapping[str, str]) -> int:
        """The exit code as a shell tells it: 128 + n for a signal, 126 and 127 for what cannot be
        executed."""
        try:
            self._child = subprocess.Popen(
                command,
                cwd=directory,
                env=dict(variables),
                process_group=0 if self._own_group else None,
            )
        except FileNotFoundError:
            return NOT_FOUND
        except OSError:
            return NOT_EXECUTABLE
        for number in self._early:
            self._send(number)
        code = self._child.wait()
        return code if code >= 0 else BY_SIGNAL - code


def why(command: Sequence[str], code: int) -> str:
    """What became of a command that failed, as the end of a sentence."""
    if code == NOT_FOUND:
        return f"{command[0]} was not found"
    if code == NOT_EXECUTABLE:
        return f"{command[0]} could not be executed"
    if code > BY_SIGNAL and code - BY_SIGNAL in {int(number) for number in signal.Signals}:
        return f"{command[0]} was ended by {signal.Signals(code - BY_SIGNAL).name}"
    return f"{command[0]} ended with exit code {code}"
