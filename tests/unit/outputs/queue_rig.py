"""A queue in a directory of its own, and the few steps that tests make with it."""

import os
from collections.abc import Sequence
from pathlib import Path

from stagefs.outputs.queue import Queue
from stagefs.outputs.queued import QueueItem, Upload, UploadState

OWNER = "state-a"


class Clock:
    """A wall clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now_ns = 1_800_000_000_000_000_000

    def __call__(self) -> int:
        return self.now_ns

    def move_s(self, seconds: float) -> None:
        self.now_ns += int(seconds * 1e9)


class QueueRig:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clock = Clock()
        self.queue = self.open()

    def open(self, owner: str = OWNER) -> Queue:
        return Queue.open(self.directory, owner=owner, origin=f"here:/{owner}", clock=self.clock)

    def daemon(self, owner: str = OWNER) -> Queue:
        """The next daemon."""
        self.queue.close()
        self.queue = self.open(owner)
        return self.queue

    def files(
        self, commit: str, names: Sequence[str], *, overwrite: bool = False, prefix: str = ""
    ) -> list[QueueItem]:
        """Their content is ``COMMIT/NAME``."""
        return put_files(self.queue, commit, names, overwrite=overwrite, prefix=prefix)

    def prepare(self, commit: str, *names: str, overwrite: bool = False) -> None:
        self.queue.prepare(commit, self.files(commit, names, overwrite=overwrite))

    def add(self, commit: str, *names: str, overwrite: bool = False) -> list[int]:
        """Their numbers in the queue."""
        self.queue.add(commit, self.files(commit, names, overwrite=overwrite))
        return [upload.id for upload in self.all() if upload.commit == commit]

    def all(self, *states: UploadState) -> list[Upload]:
        return self.queue.uploads(states=states or None)

    def states(self) -> dict[str, str]:
        """``COMMIT/NAME`` -> state."""
        return {f"{one.commit}/{one.item.file}": one.state.value for one in self.all()}

    def kept(self) -> set[str]:
        """``COMMIT/NAME`` of every file there is."""
        top = self.directory / "files"
        return {str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()}

    def next(self, limit: int = 100) -> list[str]:
        return [f"{one.commit}/{one.item.file}" for one in self.queue.next_uploads(limit)]


def put_files(
    queue: Queue, commit: str, names: Sequence[str], *, overwrite: bool = False, prefix: str = ""
) -> list[QueueItem]:
    directory = queue.make_directory_of(commit)
    items = []
    for name in names:
        data = os.fsencode(f"{commit}/{name}")
        (directory / name).write_bytes(data)
        url = f"{prefix or 'memory://store/'}{name}"
        items.append(QueueItem(url=url, file=name, size_bytes=len(data), overwrite=overwrite))
    return items
