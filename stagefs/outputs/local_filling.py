"""Bringing bytes of a base into a real file, a chunk at a time.

Concurrency: trio thread.  One task brings a chunk, whoever else wants it waits and looks
again; nobody holds the file's turn while a remote is waited for.  What stat says does not
change: filling never makes a file longer, and its times are put back.
"""

import os
from collections.abc import Awaitable, Callable

import msgspec
import trio

from stagefs.cache.file_system import write_fully
from stagefs.errors import StageFSError, StateFailed
from stagefs.model import Inode
from stagefs.namespace.node import Node
from stagefs.outputs.local_file import LocalFile
from stagefs.outputs.local_pace import Pace

ReadBase = Callable[[Node, int, int], Awaitable[bytes | memoryview]]
Failed = Callable[[OSError, str], StageFSError]


class LocalCopy(msgspec.Struct, frozen=True):
    """A file into which bytes of its base are being copied now."""

    inode: Inode
    copied_bytes: int
    size_bytes: int


class Filling:
    """``filled_bytes`` and ``filled_chunks`` count what was copied."""

    def __init__(self, read_base: ReadBase, *, pace: Pace, failed: Failed) -> None:
        self._read_base = read_base
        self._pace = pace
        self._failed = failed
        self._at_work: dict[LocalFile, int] = {}
        self.filled_bytes = 0
        self.filled_chunks = 0

    def copies(self) -> list[LocalCopy]:
        return [
            LocalCopy(file.inode, file.base_bytes - file.absent_bytes(), file.base_bytes)
            for file in self._at_work
        ]

    async def base(self, node: Node, start: int, length: int) -> bytes | memoryview:
        """All these bytes of the base; valid until the next await.  Raises what reading raises."""
        data = await self._read_base(node, start, length)
        if len(data) == length:
            return data
        whole = bytearray(data)
        while len(whole) < length:
            data = await self._read_base(node, start + len(whole), length - len(whole))
            if not data:
                raise StateFailed(
                    f"What the file with inode {node.inode} was copied from ends at "
                    f"{start + len(whole)}, before its {node.size_bytes} bytes."
                )
            whole += data
        return memoryview(whole)

    async def fill(self, file: LocalFile, node: Node, chunk: int) -> None:
        """See that a chunk is here, unless another task that did so gave up: look again.

        Raises NoSpace, and what reading the base raises.
        """
        event = file.filling.get(chunk)
        if event is not None:
            await event.wait()
            return
        event = file.filling[chunk] = trio.Event()
        self._at_work[file] = self._at_work.get(file, 0) + 1
        try:
            start, end = file.base_part(chunk)
            if start < end:
                data = bytes(await self.base(node, start, end - start))
                async with file.turn():
                    await self._keep(file, chunk, data)
        finally:
            self._at_work[file] -= 1
            if not self._at_work[file]:
                del self._at_work[file]
            del file.filling[chunk]
            event.set()

    async def _keep(self, file: LocalFile, chunk: int, data: bytes) -> None:
        """The file's turn is ours.  It may have been cut while the bytes were on their way."""
        chunks = file.chunks
        start, end = file.base_part(chunk)
        if chunks is None or start >= end or chunks.state[chunk]:
            return
        try:
            status = os.fstat(file.fd)
            file.held_times = status.st_atime_ns, status.st_mtime_ns
            try:
                await self._pace.write(write_fully, file.fd, data[: end - start], start)
            finally:
                times, file.held_times = file.held_times, None
                assert times is not None
                os.utime(file.fd, ns=times)
            chunks.mark(chunk, 1)
        except OSError as exc:
            raise self._failed(
                exc, f"A piece of the file with inode {file.inode} cannot be copied"
            ) from exc
        file.look()
        self.filled_chunks += 1
        self.filled_bytes += end - start
