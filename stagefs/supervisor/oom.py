"""Who dies first when the machine runs out of memory: a task, not the file system under all.

Only root may make a program less likely to be killed; the mount of an ordinary user stays as
likely as his tasks, and a killed daemon is brought back.
"""

import contextlib
from pathlib import Path

SUPERVISOR_SCORE = -900
DAEMON_SCORE = -500


def adjust(pid: int, score: int) -> None:
    """Lower the score of ``pid`` as far as that is permitted; never raise it."""
    path = Path(f"/proc/{pid}/oom_score_adj")
    with contextlib.suppress(OSError, ValueError):
        if int(path.read_text(encoding="ascii")) > score:
            path.write_text(str(score), encoding="ascii")
