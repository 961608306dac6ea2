"""Remote files through a running mount: its cache has them, or gets them once for all tasks.

Each call makes a sandbox of the mount whose entries are virtual links; they are read as any task
reads them.  The sandboxes end with the copy, or, when that was killed, with the next mount.
Blocking: used in worker threads.
"""

import contextlib
import os
import secrets
from collections.abc import Mapping, Sequence

from stagefs.control.client import Client
from stagefs.errors import RemoteError, StageFSError

_UPLOAD_ATTRIBUTE = "user.stagefs.upload"


class ThroughMount:
    def __init__(self, mountpoint: str) -> None:
        self.mountpoint = mountpoint
        self._client = Client.of(mountpoint)
        self._sandboxes: list[str] = []

    def linked(self, urls: Sequence[str]) -> list[str]:
        """A path for each.  Raises NoDaemon, and what the remotes say."""
        name = f"copy-{os.getpid()}-{secrets.token_hex(4)}"
        inputs = {str(number): url for number, url in enumerate(urls)}
        self._sandboxes.append(name)
        self._client.sandbox_create(name, inputs=inputs, worker_pid=os.getpid())
        return [os.path.join(self.mountpoint, "tasks", name, number) for number in inputs]

    def end(self) -> None:
        for name in self._sandboxes:
            with contextlib.suppress(StageFSError):
                self._client.sandbox_remove(name)
        self._sandboxes.clear()

    def await_uploads(self, paths: Sequence[str]) -> None:
        """Of files that were written into writable bindings.  Raises RemoteError naming one that
        is not where it shall be."""
        waiting = _uploads(paths)
        if not waiting:
            return
        self._client.flush()
        for path, states in _uploads(waiting).items():
            for state in states.splitlines():
                if not state.startswith("done"):
                    raise RemoteError(
                        f"{path} is in the mount, but not uploaded ({state.rstrip('.')}): it stays"
                        " in the queue; see `stagefs queue list`."
                    )


def _uploads(paths: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    found = {}
    for path in paths:
        with contextlib.suppress(OSError):
            found[path] = os.fsdecode(os.getxattr(path, _UPLOAD_ATTRIBUTE))
    return found
