"""A staging area without FUSE and without a socket: all layers real, the remote in memory."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from stagefs.cache.store import Cache
from stagefs.config import Settings
from stagefs.errors import NotFound
from stagefs.measures import Measures
from stagefs.model import MIB, ROOT_INODE, Handle, Inode, OnWrite
from stagefs.namespace.node import ContentKind, Node
from stagefs.namespace.store import Namespace
from stagefs.objects.objects import Objects
from stagefs.outputs.local import LocalFiles
from stagefs.outputs.queue import Queue
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.memory import MemoryRemote
from stagefs.remote.registry import Remotes
from stagefs.remote.settings import RemoteSettings
from stagefs.staging import values
from stagefs.staging.area import StagingArea
from stagefs.staging.manifest import Manifest, Output
from stagefs.staging.stageout import StageOut
from stagefs.staging.values import Progress
from stagefs.vfs.attributes import Attributes
from stagefs.vfs.bindings import Bindings
from stagefs.vfs.changes import Changes, Owner
from stagefs.vfs.copying import Copying
from stagefs.vfs.learning import Learning
from stagefs.vfs.sandbox_roots import SandboxRoots
from stagefs.vfs.workspace import Workspace


class Told:
    """What the kernel would have been told."""

    def __init__(self) -> None:
        self.names: list[tuple[Inode, str]] = []
        self.inodes: list[Inode] = []

    def entry(self, parent: Inode, name: str) -> None:
        self.names.append((parent, name))

    def inode(self, inode: Inode) -> None:
        self.inodes.append(inode)

    async def settled(self) -> None:
        """Nobody has to be waited for."""


class NoWriters:
    """Counts what a test says is open."""

    def __init__(self) -> None:
        self.open: set[Inode] = set()

    def add(self, handle: Handle, thread: int) -> None:
        raise AssertionError("nobody opens files here")

    def close(self, handle: Handle) -> None:
        raise AssertionError("nobody opens files here")

    def closed(self) -> list[Handle]:
        return []

    def remove(self, handle: Handle) -> None:
        raise AssertionError("nobody opens files here")

    def count(self, inode: Inode) -> int:
        return int(inode in self.open)

    def __contains__(self, handle: Handle) -> bool:
        return False


class NoPending:
    """Nobody writes through the kernel here."""

    def __bool__(self) -> bool:
        return False

    def put_copy_up(self, thread: int, inode: Inode) -> bool:
        raise AssertionError((thread, inode))

    def sent_back(self, thread: int) -> Inode | None:
        raise AssertionError(thread)

    def wants_copy_up(self, thread: int, inode: Inode) -> bool:
        raise AssertionError((thread, inode))

    def drop(self, thread: int) -> None:
        raise AssertionError(thread)

    def put_record(self, thread: int, inode: Inode) -> bool:
        raise AssertionError((thread, inode))

    def wants_record(self, thread: int, inode: Inode) -> bool:
        raise AssertionError((thread, inode))

    def asked_name(self, thread: int) -> bool:
        raise AssertionError(thread)

    def grant(self, thread: int, inode: Inode, sandbox: Inode) -> None:
        raise AssertionError((thread, inode, sandbox))

    def granted(self, thread: int, inode: Inode) -> Inode | None:
        raise AssertionError((thread, inode))


class Staging:
    """An area, and what a test looks at behind it."""

    def __init__(self, directory: Path, cache: Cache | None) -> None:
        settings = Settings()
        self.directory = directory
        self.namespace = Namespace.open(directory / "namespace.sqlite")
        self.cache = cache
        self.remote = MemoryRemote()
        self.told = Told()
        self.progress: list[Progress] = []
        self.remotes = Remotes(
            RemoteSettings(attempts=1),
            CredentialStore(None),
            drivers={"memory": lambda *_arguments: self.remote},
        )
        self.objects = Objects(
            namespace=self.namespace,
            cache=cache,
            inline_flags=None,
            remote_for=self.remotes.for_url,
            settings=settings.read,
        )
        self.bindings = Bindings(
            namespace=self.namespace,
            objects=self.objects,
            remote_for=self.remotes.for_url,
            read=settings.read,
            settings=settings.namespace,
            names_changed=lambda _names: None,
        )
        self.queue = Queue.open(directory / "outputs", owner="test", origin="here:/state")
        self.stage_out = StageOut(
            self.queue, remote_for=self.remotes.for_url, settings=settings.stage_out
        )
        self.local = LocalFiles(
            directory / "scratch",
            read_base=self._read_base,
            base_shrunk=self._shrunk,
        )
        self.writers = NoWriters()
        self.workspace = Workspace(
            namespace=self.namespace,
            objects=self.objects,
            local=self.local,
            writers=self.writers,
            kept_up_to=0,
        )
        self.learning = Learning(
            namespace=self.namespace,
            objects=self.objects,
            ahead_bytes_max=settings.read.learned_ahead_bytes_max,
            directory=directory,
        )
        self.changes = changes = Changes(
            namespace=self.namespace,
            objects=self.objects,
            attributes=Attributes(self.objects, lambda _node: [], self.namespace.uploads_of),
            workspace=self.workspace,
            copying=Copying(
                namespace=self.namespace,
                pending=NoPending(),
                default=OnWrite.COPY_UP,
                live=self.local.live,
                links_changed=self.told.inode,
                name_changed=self.told.entry,
            ),
            roots=SandboxRoots(self.namespace, settings.workspace),
            learning=self.learning,
            settings=settings.namespace,
            owner=Owner(0, 0),
            public=self.remotes.public,
        )
        self.reached: list[str] = []
        self.on_step: Callable[[str], None] = self.reached.append
        self.area = StagingArea(
            measures=Measures(),
            namespace=self.namespace,
            objects=self.objects,
            bindings=self.bindings,
            cache=cache,
            cache_directory=directory / "cache",
            remotes=self.remotes,
            invalidations=self.told,
            changes=changes,
            workspace=self.workspace,
            learning=self.learning,
            stage_out=self.stage_out,
            settings=settings,
            mountpoint="/mnt",
            state_directory=directory,
            log_path=directory / "stagefs.log",
            commit_reached=self._reach,
        )

    def _reach(self, step: str) -> None:
        self.on_step(step)

    async def _read_base(self, node: Node, offset: int, size: int) -> memoryview | bytes:
        return await self.workspace.read_base(node, offset, size)

    def _shrunk(self, inode: Inode, base_bytes: int) -> None:
        self.namespace.set_attributes(inode, base_bytes=base_bytes)

    async def write(self, path: str, data: bytes) -> Node:
        """A file as a task makes it, with the directories above it."""
        *above, name = path.split("/")
        directory = self.namespace.node(ROOT_INODE)
        for part in above:
            try:
                directory = self.namespace.lookup(directory.inode, part)
            except NotFound:
                directory = self.namespace.make_directory(directory.inode, part)
        node = self.namespace.create_file(directory.inode, name, 0o644)
        await self.local.write(node, 0, data)
        return node

    async def create(self, name: str, manifest: Manifest | None = None) -> values.Sandbox:
        request = values.CreateSandbox(name, manifest or Manifest())
        return await self.area.sandbox_create(request, self.progress.append)

    async def commit(self, name: str, *outputs: Output) -> values.CommitRecord:
        request = values.CommitSandbox(name, list(outputs))
        return await self.area.sandbox_commit(request, self.progress.append)

    async def show(self, name: str) -> values.SandboxDetails:
        return await self.area.sandbox_show(values.ShowSandbox(name), self.progress.append)

    async def flush(self) -> None:
        """Until the queue has nothing to do."""
        while self.stage_out.busy:
            await self.stage_out.moved()

    async def stage_in(self, *urls: str, target: str, replace: bool = False) -> values.NameStat:
        request = values.StageIn(urls=list(urls), target=target, replace=replace)
        staged = await self.area.stage_in(request, self.progress.append)
        return staged.entries[0]

    async def stat(self, path: str) -> values.NameStat:
        return await self.area.stat(values.OnePath(path))

    async def names(self, path: str) -> list[str]:
        page = await self.area.list_names(values.ListNames(path))
        return [entry.name for entry in page.entries]

    async def read(self, path: str) -> bytes:
        node = self.namespace.resolve(path)
        if node.content is not ContentKind.OBJECT:
            live = self.local.live(node)
            return bytes(await self.local.read(node, 0, max(live.size_bytes, 1)))
        opened = self.objects.open(node)
        data = bytes(await self.objects.read(opened, 0, max(node.size_bytes, 1)))
        self.objects.release(opened)
        return data

    def node(self, path: str) -> Node:
        return self.namespace.resolve(path)

    def asked(self, kind: str) -> int:
        return sum(request.kind == kind for request in self.remote.requests)


@asynccontextmanager
async def open_staging(directory: Path, *, capacity_bytes: int | None) -> AsyncIterator[Staging]:
    cache = None
    if capacity_bytes is not None:
        cache = Cache.open(directory / "cache", capacity_bytes=capacity_bytes, free_floor_bytes=0)
    staging = Staging(directory, cache)
    try:
        async with (
            staging.objects.running(),
            staging.bindings.running(),
            staging.workspace.running(),
            staging.stage_out.running(),
            staging.area.running(),
        ):
            yield staging
    finally:
        await staging.remotes.aclose()
        staging.queue.close()
        staging.local.close()
        if cache is not None:
            cache.close()
        staging.namespace.close()


@pytest.fixture
async def staging(tmp_path: Path) -> AsyncIterator[Staging]:
    async with open_staging(tmp_path, capacity_bytes=64 * MIB) as made:
        yield made


@pytest.fixture
async def cacheless(tmp_path: Path) -> AsyncIterator[Staging]:
    async with open_staging(tmp_path, capacity_bytes=None) as made:
        yield made
