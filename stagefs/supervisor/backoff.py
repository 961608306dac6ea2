"""How long to wait before the next daemon is started.

Not at all after the first death.  Then the pause doubles from death to death; it stays short for
daemons that got some work done.  It starts anew after one that lived for a while, and for one that
got work done a short while is enough: what dies of the requests that it is sent again dies at once,
so all that has to be held down is how often daemons are started.
"""

FIRST_S, WORKING_MAX_S, MAX_S = 0.1, 1.0, 10.0
GOOD_LIFE_S, WORKING_LIFE_S = 10.0, 2.0


class Backoff:
    def __init__(self) -> None:
        self._pause_s = 0.0

    def note_life(self, lived_s: float, *, worked: bool) -> None:
        """``worked``: the daemon answered something."""
        if lived_s >= (WORKING_LIFE_S if worked else GOOD_LIFE_S):
            self._pause_s = 0.0

    def next_pause_s(self, *, worked: bool) -> float:
        """``worked``: the last daemon answered something."""
        pause_s = self._pause_s
        longest = WORKING_MAX_S if worked else MAX_S
        self._pause_s = min(max(pause_s * 2, FIRST_S), longest)
        return pause_s
