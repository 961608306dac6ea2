"""kill -9 in the middle of changes: consistent, and an operation is known if and only if it
took effect."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stagefs.errors import NotFound
from stagefs.namespace.check import problems
from stagefs.namespace.node import TASKS_INODE
from stagefs.namespace.store import Namespace

# Operation 4n+1 makes a file with a link, 4n+2 renames it, 4n+3 links a directory, 4n+4 removes
# the tree.  Each is announced before and after.
CHILD = """
import sys
from pathlib import Path
from stagefs.namespace.node import STAGING_INODE, TASKS_INODE, StagedObject
from stagefs.namespace.store import Namespace

namespace = Namespace.open(Path(sys.argv[1]))

def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
    sys.stdout.flush()

for n in range(100_000):
    made = f"made{n}"
    staged = StagedObject(url=f"memory://x/{n}", version="v", size_bytes=n, mtime_ns=0)
    steps = [
        lambda o: namespace.register(TASKS_INODE, made, staged, operation=o),
        lambda o: namespace.rename(TASKS_INODE, made, STAGING_INODE, f"moved{n}", operation=o),
        lambda o: namespace.link_directory(STAGING_INODE, TASKS_INODE, f"linked{n}", operation=o),
        lambda o: namespace.remove_tree(TASKS_INODE, f"linked{n}", operation=o),
    ]
    for k, step in enumerate(steps, start=4 * n + 1):
        say("begin", k)
        step(k)
        say("done", k)
"""


def took_effect(namespace: Namespace, operation: int) -> bool:
    """By what is there, without asking ``applied``."""
    n, step = divmod(operation - 1, 4)

    def exists(path: str) -> bool:
        try:
            namespace.resolve(path)
        except NotFound:
            return False
        return True

    if step == 0:
        return exists(f"tasks/made{n}") or exists(f"staging/moved{n}")
    if step == 1:
        return exists(f"staging/moved{n}") and not exists(f"tasks/made{n}")
    if step == 2:
        return exists(f"tasks/linked{n}") or namespace.applied(operation + 1) is not None
    return namespace.applied(operation - 1) is not None and not exists(f"tasks/linked{n}")


@pytest.mark.parametrize("kill_at", [1, 2, 3, 4, 57, 58, 59, 60, 333])
def test_killed_between_and_within_operations(database: Path, kill_at: int) -> None:
    Namespace.open(database).close()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(database)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    begun = done = 0
    for line in child.stdout:
        what, number = line.split()
        begun, done = (int(number), done) if what == "begin" else (begun, int(number))
        if begun == kill_at:
            child.kill()
            break
    # What it had said before it died.
    for line in child.stdout:
        if line.endswith("\n"):
            what, number = line.split()
            begun, done = (int(number), done) if what == "begin" else (begun, int(number))
    child.stdout.close()
    assert child.wait(timeout=60) == -signal.SIGKILL
    namespace = Namespace.open(database)
    assert begun >= kill_at
    for operation in range(max(1, begun - 40), begun + 2):
        applied = namespace.applied(operation) is not None
        assert applied == took_effect(namespace, operation), f"operation {operation}"
        if operation <= done:
            assert applied, f"operation {operation} was acknowledged and is lost"
    assert namespace.applied(begun + 1) is None
    namespace.make_directory(TASKS_INODE, "goes on", operation=begun + 1)
    namespace.close()
    assert problems(database) == []
