"""A StageOut on a real queue, with remotes in memory: ``memory://one``, ``memory://two``, ..."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from stagefs.config import StageOutSettings
from stagefs.outputs.queue import Queue
from stagefs.outputs.queued import Upload
from stagefs.remote.base import Remote
from stagefs.remote.memory import MemoryRemote
from stagefs.remote.url import parse
from stagefs.staging.patience import Patience
from stagefs.staging.queue_operations import QueueOperations
from stagefs.staging.stageout import StageOut
from tests.unit.outputs.queue_rig import OWNER, put_files

QUICK = StageOutSettings(concurrency=3, attempts=3, backoff_s=0.002, backoff_s_max=0.004)
BOUND_S = 20.0


class NothingDue:
    due = 0
    trouble = None

    async def hand_over(self, *, hurry: bool = False) -> None:
        """There is nothing."""


class OutRig:
    def __init__(self, directory: Path, settings: StageOutSettings = QUICK) -> None:
        self.directory = directory
        self.settings = settings
        self.remotes: dict[str, MemoryRemote] = {}
        self.new_queue: Callable[[], Queue] = self.open_queue
        self.queue: Queue
        self.out: StageOut
        self.operations: QueueOperations

    def open_queue(self) -> Queue:
        return Queue.open(self.directory, owner=OWNER, origin=f"here:/{OWNER}")

    def remote(self, host: str) -> MemoryRemote:
        return self.remotes.setdefault(host, MemoryRemote(f"memory://{host}"))

    def remote_for(self, url: str) -> Remote:
        return self.remote(parse(url).host)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[StageOut]:
        """One daemon's life."""
        self.queue = self.new_queue()
        try:
            self.out = StageOut(
                self.queue,
                remote_for=self.remote_for,
                settings=self.settings,
                patience=Patience(self.settings, jitter=lambda: 1.0),
            )
            self.operations = QueueOperations(self.out, NothingDue())
            with trio.fail_after(BOUND_S):
                async with self.out.running():
                    yield self.out
        finally:
            self.queue.close()

    async def add(
        self, commit: str, *names: str, host: str = "one", overwrite: bool = False
    ) -> None:
        await self.out.add(
            commit,
            put_files(self.queue, commit, names, overwrite=overwrite, prefix=f"memory://{host}/"),
        )

    async def prepare(self, commit: str, *names: str) -> None:
        items = put_files(self.queue, commit, names, prefix="memory://one/")
        await self.out.prepare(commit, items)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Bounded by ``running``."""
        while not holds():  # noqa: ASYNC110 - a request that arrives at a remote is no event
            await trio.sleep(0.001)

    async def idle(self) -> None:
        await self.until(lambda: not self.out.busy)

    async def rows(self) -> Sequence[Upload]:
        return await self.out.uploads()

    async def states(self) -> dict[str, str]:
        return {f"{one.commit}/{one.item.file}": one.state.value for one in await self.rows()}

    async def upload(self, name: str) -> Upload:
        return next(one for one in await self.rows() if one.item.file == name)

    def puts(self, host: str = "one") -> list[str]:
        """The names that were put, an attempt each."""
        return [
            parse(request.url).path.lstrip("/")
            for request in self.remote(host).requests
            if request.kind == "put"
        ]
