"""The client's side of the stage-out queue, over a real socket and a real queue."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import pytest
import trio

from stagefs.control.api import Area
from stagefs.control.client import Client, Refused
from stagefs.control.server import serve
from stagefs.errors import AccessDenied
from stagefs.staging import queue_values
from stagefs.staging.values import Progress
from tests.unit.staging.out_rig import OutRig

_T = TypeVar("_T")


class QueueArea:
    """The part of the area that is tried here."""

    def __init__(self, rig: OutRig) -> None:
        operations = rig.operations
        self.queue_list = operations.list_uploads
        self.queue_retry = operations.retry
        self.queue_cancel = operations.cancel
        self.queue_flush = operations.flush

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def missing(*_arguments: object) -> object:
            raise AssertionError(f"{name} was not to be called")

        return missing


async def in_thread(call: Callable[[], _T]) -> _T:
    return await trio.to_thread.run_sync(call, abandon_on_cancel=True)


async def test_queue_by_its_client(tmp_path: Path) -> None:
    rig = OutRig(tmp_path / "outputs")
    socket = tmp_path / "control.sock"
    rig.remote("one").failures = [AccessDenied("The key is not known there.")]
    async with rig.running(), trio.open_nursery() as nursery:

        async def answer(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            area = cast("Area", QueueArea(rig))
            await serve(area, socket, users=[], task_status=task_status)

        await nursery.start(answer)
        client = Client(socket)
        await rig.add("c1", "a")
        await rig.idle()
        (failed,) = await in_thread(lambda: list(client.queue_list(["failed"])))
        assert (failed.url, failed.reason) == ("memory://one/a", "The key is not known there.")
        assert await in_thread(lambda: list(client.queue_list(["queued"]))) == []
        changed = await in_thread(lambda: client.queue_retry([failed.id]))
        assert changed == queue_values.UploadsChanged(1)
        told: list[Progress] = []
        flushed = await in_thread(lambda: client.flush(10.0, progress=told.append))
        assert (flushed.left.waiting, flushed.left.failed) == (0, 0)
        assert rig.remote("one").content("/a") == b"c1/a"
        with pytest.raises(Refused, match="is done"):
            await in_thread(lambda: client.queue_cancel([failed.id]))
        everything = await in_thread(client.queue_cancel)
        assert everything == queue_values.UploadsChanged(0)
        nursery.cancel_scope.cancel()
