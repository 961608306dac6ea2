"""From the close in a writable binding to the queue, and what the queue tells afterwards."""

import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
import trio

from stagefs.errors import (
    InvalidName,
    NoSpace,
    NotSupported,
    RemoteUnavailable,
    StageFSError,
)
from stagefs.model import Inode
from stagefs.namespace.node import STAGING_INODE, Node, OutgoingState
from stagefs.namespace.store import Namespace
from stagefs.outputs.local import LocalFiles
from stagefs.outputs.queued import UploadState
from stagefs.staging import values
from stagefs.staging.bound_uploads import BoundUploads
from stagefs.staging.stageout import StageOut
from tests.unit.namespace.trees import staged
from tests.unit.staging.conftest import Staging
from tests.unit.staging.out_rig import OutRig

URL = "memory://one/out"
BASE = bytes(range(256)) * 8192


class Rig:
    """The parts of a daemon that a writable binding needs; ``staging/out`` is one."""

    def __init__(self, directory: Path, *, overwrites: bool, deletes: bool) -> None:
        self.path = directory / "namespace.db"
        self.directory = directory
        self.namespace = Namespace.open(self.path)
        bound = self.namespace.bind(
            *(STAGING_INODE, "out", URL, 60.0),
            writable=True,
            overwrites=overwrites,
            deletes=deletes,
        )
        self.namespace.close()
        self.top = bound.inode
        self.outputs = OutRig(directory / "outputs")
        self.remote = self.outputs.remote("one")
        self.base_error: StageFSError | None = None
        self.local: LocalFiles
        self.bound: BoundUploads

    @asynccontextmanager
    async def daemon(self, *, settle_s: float = 0.0) -> AsyncIterator[StageOut]:
        """Nothing is handed over by itself."""
        self.namespace = Namespace.open(self.path)
        self.local = LocalFiles(
            self.directory / "scratch",
            read_base=self._read_base,
            base_shrunk=self._shrunk,
        )
        try:
            async with self.outputs.running() as out:
                self.bound = BoundUploads(
                    namespace=self.namespace, local=self.local, stage_out=out, settle_s=settle_s
                )
                await self.bound.begin()
                yield out
        finally:
            self.local.close()
            self.namespace.close()

    async def _read_base(self, node: Node, offset: int, size: int) -> bytes:
        if self.base_error is not None:
            raise self.base_error
        return BASE[offset : offset + size]

    def _shrunk(self, inode: Inode, base_bytes: int) -> None:
        self.namespace.set_attributes(inode, base_bytes=base_bytes)

    async def close(self, name: str, data: bytes) -> Node:
        """A file that was written and closed."""
        made = self.namespace.create_file(self.top, name, 0o640)
        await self.local.write(made, 0, data)
        self.namespace.publish([made.inode])
        return self.namespace.node(made.inode)

    def trouble(self) -> str | None:
        return self.bound.trouble

    def states(self, node: Node) -> list[OutgoingState]:
        return [one.state for one in self.namespace.uploads_of(node.inode)]

    def take_back(self, state: OutgoingState) -> None:
        """As if the daemon had died before it noted more.  Only while none runs."""
        with closing(sqlite3.connect(self.path)) as connection:
            connection.execute("UPDATE outgoing SET state = ?", (int(state),))
            connection.commit()

    async def uploaded(self) -> None:
        async with trio.open_nursery() as nursery:

            async def keep_account() -> None:
                async with self.bound.running():
                    await trio.sleep_forever()

            nursery.start_soon(keep_account)
            await self.outputs.idle()
            await self.outputs.until(lambda: not self.namespace.open_uploads(10))
            nursery.cancel_scope.cancel()


@pytest.fixture
def new_rig(tmp_path: Path) -> Callable[..., Rig]:
    def new(*, overwrites: bool = False, deletes: bool = False) -> Rig:
        return Rig(tmp_path, overwrites=overwrites, deletes=deletes)

    return new


async def test_closed_queued_uploaded(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig()
    async with rig.daemon() as out:
        nodes = [await rig.close(f"{n}", b"%d" % n) for n in range(130)]
        assert rig.bound.due == 130
        await rig.bound.hand_over()
        assert rig.bound.due == 0
        item = (await out.uploads())[0].item
        assert (item.mode, item.size_bytes, item.label) == (0o640, 1, "/staging/out/0")
        await rig.uploaded()
        assert all(rig.states(node) == [OutgoingState.DONE] for node in nodes)
        assert {rig.remote.content(f"/out/{n}") for n in range(130)} == {
            b"%d" % n for n in range(130)
        }
    assert not list((rig.directory / "outputs/files").iterdir())


async def test_what_was_closed_settles_first(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig()
    async with rig.daemon(settle_s=3600.0) as out:
        node = await rig.close("a", b"content")
        await rig.bound.hand_over()
        assert rig.states(node) == [OutgoingState.DUE]
        assert out.busy, "a flush would not wait for it"
        await rig.bound.hand_over(hurry=True)
        await rig.uploaded()
        assert rig.states(node) == [OutgoingState.DONE]
        assert not out.busy


@pytest.mark.parametrize("queue_knows", [False, True])
async def test_a_daemon_that_dies_while_it_hands_over(
    new_rig: Callable[..., Rig], queue_knows: bool
) -> None:
    rig = new_rig()
    rig.remote.gate = trio.Event()
    async with rig.daemon():
        node = await rig.close("a", b"content")
        if queue_knows:
            await rig.bound.hand_over()
        else:
            rig.namespace.begin_leaving([1], "bound-x-1")
    rig.take_back(OutgoingState.LEAVING)
    rig.remote.gate.set()
    async with rig.daemon() as out:
        expected = OutgoingState.QUEUED if queue_knows else OutgoingState.DUE
        assert rig.states(node) == [expected]
        await rig.bound.hand_over()
        await rig.uploaded()
        assert rig.remote.content("/out/a") == b"content"
        assert len(await out.uploads()) == 1, "it was queued twice"


async def test_news_that_nobody_took_is_asked_for(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig()
    async with rig.daemon():
        node = await rig.close("a", b"content")
        await rig.bound.hand_over()
        await rig.uploaded()
    rig.take_back(OutgoingState.QUEUED)
    async with rig.daemon():
        assert rig.states(node) == [OutgoingState.DONE]


async def test_a_failure_is_kept_with_its_reason(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig()
    rig.remote.store("/out/a", b"theirs")
    async with rig.daemon() as out:
        node = await rig.close("a", b"mine")
        await rig.bound.hand_over()
        async with trio.open_nursery() as nursery:

            async def keep_account() -> None:
                async with rig.bound.running():
                    await trio.sleep_forever()

            nursery.start_soon(keep_account)
            await rig.outputs.until(lambda: rig.states(node) == [OutgoingState.FAILED])
            (upload,) = rig.namespace.uploads_of(node.inode)
            assert upload.reason is not None
            assert upload.reason.startswith(f"{URL}/a exists")
            rig.remote.remove("/out/a")
            await out.retry(None)
            await rig.outputs.until(lambda: rig.states(node) == [OutgoingState.DONE])
            nursery.cancel_scope.cancel()
    assert rig.remote.content("/out/a") == b"mine"


async def test_a_copy_whose_base_cannot_be_read_waits(new_rig: Callable[..., Rig]) -> None:
    rig = new_rig(overwrites=True)
    async with rig.daemon() as out:
        found = rig.namespace.register(rig.top, "a", staged(size_bytes=len(BASE)))
        copied = rig.namespace.copy_up(rig.top, "a", found.inode)
        await rig.local.write(copied, 0, b"!" * (1 << 20))
        rig.namespace.publish([copied.inode])
        beside = await rig.close("b", b"beside")
        rig.base_error = RemoteUnavailable("The server of the base is away.")
        await rig.bound.hand_over()
        assert rig.states(copied) == [OutgoingState.DUE]
        assert rig.states(beside) == [OutgoingState.QUEUED]
        assert rig.trouble() == "The server of the base is away."
        assert out.busy
        rig.base_error = None
        await rig.bound.hand_over(hurry=True)
        assert rig.trouble() is None
        await rig.uploaded()
    assert rig.remote.content("/out/a") == b"!" * (1 << 20) + BASE[1 << 20 :]


async def test_content_outlives_its_name(new_rig: Callable[..., Rig]) -> None:
    """What the queue has is uploaded, although its name and its node are gone."""
    rig = new_rig()
    rig.remote.gate = trio.Event()
    async with rig.daemon():
        node = await rig.close("a", b"content")
        await rig.bound.hand_over()
        rig.namespace.remove(rig.top, "a")
        assert rig.namespace.unlinked_content(10) == [node.inode]
        rig.local.remove([node.inode])
        assert rig.namespace.drop_unlinked([node.inode]) == [node.inode]
        rig.remote.gate.set()
        await rig.uploaded()
    assert rig.remote.content("/out/a") == b"content"


async def test_removals_and_uploads_of_one_url_keep_their_order(
    new_rig: Callable[..., Rig],
) -> None:
    rig = new_rig(deletes=True)
    async with rig.daemon() as out:
        await rig.close("a", b"first")
        await rig.bound.hand_over()
        await rig.uploaded()
        rig.namespace.remove(rig.top, "a")
        await rig.close("a", b"second")
        rig.remote.requests.clear()
        await rig.bound.hand_over()
        await rig.uploaded()
        assert [one.kind for one in rig.remote.requests] == ["delete", "put"]
        uploads = await out.uploads()
        assert [(one.item.removes, one.state) for one in uploads] == [
            (False, UploadState.DONE),
            (True, UploadState.DONE),
            (False, UploadState.DONE),
        ]
    assert rig.remote.content("/out/a") == b"second"


async def test_bindings_that_cannot_be_made(staging: Staging) -> None:
    refused: list[tuple[values.Bind, type[StageFSError], str]] = [
        (values.Bind("http://h/x", "staging:///x", writable=True), NotSupported, "read only"),
        (values.Bind(URL, "staging:///x", overwrite=True), InvalidName, "--writable"),
        (values.Bind(URL, "staging:///x", propagate_delete=True), InvalidName, "--writable"),
    ]
    for request, kind, why in refused:
        with pytest.raises(kind, match=why):
            await staging.area.bind(request)
    assert await staging.names("staging:///") == []


async def test_a_full_disk_of_outputs_takes_nothing_and_loses_nothing(
    new_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = new_rig()
    async with rig.daemon() as out:
        node = await rig.close("a", b"content")

        def full(*_arguments: object) -> None:
            raise NoSpace("The disk is full.")

        with monkeypatch.context() as patched:
            patched.setattr(rig.outputs.queue, "add", full)
            with pytest.raises(NoSpace):
                await rig.bound.hand_over()
            assert rig.states(node) == [OutgoingState.DUE]
            assert out.busy
            assert not list((rig.directory / "outputs/files").iterdir()), "links that nobody needs"
        await rig.bound.hand_over()
        await rig.uploaded()
    assert rig.remote.content("/out/a") == b"content"
