"""A reading stack without FUSE: real namespace, real cache, the memory remote."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trio.testing

from stagefs.cache.store import Cache
from stagefs.config import ReadSettings
from stagefs.model import MIB, Checksum
from stagefs.namespace.node import STAGING_INODE, Node, StagedObject
from stagefs.namespace.store import Namespace
from stagefs.objects.objects import Objects
from stagefs.remote.memory import MemoryRemote

SETTINGS = ReadSettings(read_deadline_s=30.0, failure_hold_s=5.0)


class Reading:
    """One daemon's worth of reading.  ``cache`` is None when there is no cache disk."""

    def __init__(self, namespace: Namespace, cache: Cache | None, settings: ReadSettings) -> None:
        self.namespace = namespace
        self.cache = cache
        self.remote = MemoryRemote()
        self.objects = Objects(
            namespace=namespace,
            cache=cache,
            inline_flags=0,
            remote_for=lambda _url: self.remote,
            settings=settings,
        )

    def stage(
        self,
        name: str,
        data: bytes,
        *,
        checksum: Checksum | None = None,
        validator: str | None = None,
    ) -> Node:
        """Put an object at the remote and register it as a catalog does, with its size only."""
        url = self.remote.store(f"/{name}", data)
        version = validator or (str(checksum) if checksum else f"declared:{len(data)}:0")
        staged = StagedObject(
            url=url,
            version=version,
            size_bytes=len(data),
            mtime_ns=0,
            checksum=checksum,
            validator=validator,
        )
        return self.namespace.register(STAGING_INODE, name, staged)

    async def read(self, node: Node, offset: int = 0, size: int | None = None) -> bytes:
        """Read through one handle in requests of a mebibyte, as the kernel does."""
        opened = self.objects.open(node)
        stop = node.size_bytes if size is None else min(offset + size, node.size_bytes)
        pieces = []
        while offset < stop:
            length = min(MIB, stop - offset)
            now = opened.read_now(offset, length)
            piece = bytes(
                now if now is not None else await self.objects.read(opened, offset, length)
            )
            pieces.append(piece)
            offset += length
        self.objects.release(opened)
        return b"".join(pieces)


MakeReading = Callable[..., AbstractAsyncContextManager[Reading]]


@pytest.fixture
def patient_clock() -> trio.testing.MockClock:
    """Jumps to the next deadline when nothing has happened for a while, so that a worker thread
    has time to end before it is taken for nothing."""
    return trio.testing.MockClock(autojump_threshold=0.3)


@pytest.fixture
def make_reading(tmp_path: Path) -> MakeReading:
    """Start reading over the state in ``tmp_path``: called twice, it is the next daemon."""

    @asynccontextmanager
    async def make(
        *,
        capacity_bytes: int = 256 * MIB,
        with_cache: bool = True,
        settings: ReadSettings = SETTINGS,
        remote: MemoryRemote | None = None,
    ) -> AsyncIterator[Reading]:
        namespace = Namespace.open(tmp_path / "namespace.sqlite")
        directory = tmp_path / "cache"
        cache = None
        if with_cache:
            cache = Cache.open(directory, capacity_bytes=capacity_bytes, free_floor_bytes=0)
        reading = Reading(namespace, cache, settings)
        if remote is not None:
            reading.remote = remote
        try:
            async with reading.objects.running():
                yield reading
        finally:
            if cache is not None:
                cache.close()
            namespace.close()

    return make
