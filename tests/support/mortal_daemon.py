"""The daemon, but it kills itself where a test says: at a method, before or after it.

Run in place of ``stagefs.daemon``, with its arguments (``Mounted.mount_otherwise``).  The test
puts the name of a point into the file ``die`` of the state directory; the daemon that comes
to that point takes the file away and ends by SIGKILL.  No file: it is the daemon.
"""

import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stagefs import daemon
from stagefs.fuse.operations_log import Notes
from stagefs.fuse.ops import StageFSOperations
from stagefs.namespace.store import Namespace
from stagefs.outputs.local import LocalFiles
from stagefs.vfs.changes import Changes
from stagefs.vfs.copying import Copying
from stagefs.vfs.vfs import Vfs

# Every method at which a daemon can be told to die.
METHODS: dict[str, tuple[type, str]] = {
    "begin": (Notes, "begin"),
    "finish": (Notes, "finish"),
    "ask": (Copying, "walk_again"),
    "copy": (Namespace, "copy_up"),
    "resolve": (Copying, "resolve"),
    "lookup": (Vfs, "lookup"),
    "open": (Vfs, "open"),
    "setattr": (Changes, "set_attributes"),
    "setxattr": (Changes, "set_xattr"),
    "create": (Namespace, "create_file"),
    "mkdir": (Namespace, "make_directory"),
    "mknod": (Namespace, "make_special"),
    "symlink": (Namespace, "make_symlink"),
    "link": (Namespace, "link"),
    "rename": (Namespace, "rename"),
    "unlink": (Namespace, "remove"),
    "rmdir": (Namespace, "remove_directory"),
    "publish": (Namespace, "publish"),
    "attributes": (Namespace, "set_attributes"),
    "write": (LocalFiles, "write"),
    "write_now": (LocalFiles, "write_now"),
    "truncate": (LocalFiles, "truncate"),
    "answer": (StageFSOperations, "count_served"),
}
PLAN_NAME = "die"


def _mortal(plan: Path, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def point(when: str) -> None:
        try:
            if plan.read_text() != f"{when} {name}":
                return
            plan.unlink()
        except FileNotFoundError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    @functools.wraps(method)
    def called(*arguments: Any, **options: Any) -> Any:
        point("before")
        answer = method(*arguments, **options)
        point("after")
        return answer

    @functools.wraps(method)
    async def awaited(*arguments: Any, **options: Any) -> Any:
        point("before")
        answer = await method(*arguments, **options)
        point("after")
        return answer

    return awaited if inspect.iscoroutinefunction(method) else called


def main() -> int:
    state = Path(sys.argv[sys.argv.index("--state") + 1])
    for name, (owner, method) in METHODS.items():
        setattr(owner, method, _mortal(state / PLAN_NAME, name, getattr(owner, method)))
    return daemon.main()


if __name__ == "__main__":
    sys.exit(main())
