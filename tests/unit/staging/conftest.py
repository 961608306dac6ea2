"""A staging area without FUSE and without a socket: all layers real, the remote in memory."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from stagefs.cache.store import Cache
from stagefs.config import Settings
from stagefs.model import MIB, Inode
from stagefs.namespace.node import Node
from stagefs.namespace.store import Namespace
from stagefs.objects.objects import Objects
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.memory import MemoryRemote
from stagefs.remote.registry import Remotes
from stagefs.remote.settings import RemoteSettings
from stagefs.staging import values
from stagefs.staging.area import StagingArea
from stagefs.staging.values import Progress
from stagefs.vfs.bindings import Bindings


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
        self.area = StagingArea(
            namespace=self.namespace,
            objects=self.objects,
            bindings=self.bindings,
            cache=cache,
            cache_directory=directory / "cache",
            remotes=self.remotes,
            invalidations=self.told,
            settings=settings,
            mountpoint="/mnt",
            state_directory=directory,
            log_path=directory / "stagefs.log",
        )

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
        opened = self.objects.open(node)
        data = bytes(await self.objects.read(opened, 0, max(node.size_bytes, 1)))
        self.objects.release(opened)
        return data

    def node(self, path: str) -> Node:
        return self.namespace.resolve(path)

    def asked(self, kind: str) -> int:
        return sum(request.kind == kind for request in self.remote.requests)


@asynccontextmanager
async def _staging(directory: Path, *, capacity_bytes: int | None) -> AsyncIterator[Staging]:
    cache = None
    if capacity_bytes is not None:
        cache = Cache.open(directory / "cache", capacity_bytes=capacity_bytes, free_floor_bytes=0)
    staging = Staging(directory, cache)
    try:
        async with staging.objects.running(), staging.bindings.running():
            yield staging
    finally:
        await staging.remotes.aclose()
        if cache is not None:
            cache.close()
        staging.namespace.close()


@pytest.fixture
async def staging(tmp_path: Path) -> AsyncIterator[Staging]:
    async with _staging(tmp_path, capacity_bytes=64 * MIB) as made:
        yield made


@pytest.fixture
async def cacheless(tmp_path: Path) -> AsyncIterator[Staging]:
    async with _staging(tmp_path, capacity_bytes=None) as made:
        yield made
