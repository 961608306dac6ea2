"""The content of local files: what tasks write, and copies that show through what they were
made of until they are written to.

Names, modes, owners and attributes are the namespace's; here an inode is a real file in the
scratch directory, made by the first change of its content (``local_directory``), and for a
copy a map of the chunks that are its own (``local_map``, ``local_file``).

Concurrency: trio thread, but for ``remove`` and ``sweep``, which block.  Reads and writes that
the page cache takes are done inline; ``read_now`` and ``write_now`` never wait.
"""

import errno
import os
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import msgspec

from stagefs.errors import StageFSError
from stagefs.model import CHUNK_BYTES, MIB, Inode
from stagefs.namespace.node import Node
from stagefs.objects.inline import inline_read_flags
from stagefs.outputs.local_directory import LocalDirectory
from stagefs.outputs.local_file import LocalFile, Piece
from stagefs.outputs.local_filling import Filling, LocalCopy, ReadBase
from stagefs.outputs.local_pace import SLOW_S, Pace
from stagefs.outputs.local_table import LocalTable
from stagefs.page_buffer import page_buffer

SECTOR_BYTES = 512
# Freeing more than this takes long enough to go to a thread.
_CUT_INLINE_BYTES_MAX = 64 * MIB

# What reads answer with: pyfuse3 copies it into the device before anything else runs.
_BUFFER = page_buffer(MIB)


class LocalFiles:
    """A node that is passed is the one of the namespace now."""

    def __init__(
        self,
        directory: Path,
        *,
        read_base: ReadBase,
        base_shrunk: Callable[[Inode, int], None],
        open_files_max: int = 1024,
        chunk_bytes: int = CHUNK_BYTES,
        slow_write_s: float = SLOW_S,
    ) -> None:
        """``read_base(node, offset, size)`` reads what a copy was made of.  ``base_shrunk(inode,
        base_bytes)`` makes the namespace remember how much of that can be seen from now on.
        ``chunk_bytes``, a power of two, is for copies that are changed for the first time.

        Raises NoSpace, StateFailed.
        """
        self._directory = LocalDirectory(directory)
        self._base_shrunk = base_shrunk
        self._pace = Pace(slow_write_s)
        self._filling = Filling(read_base, pace=self._pace, failed=self._directory.failed)
        self._read_flags = inline_read_flags(directory)
        self._table = LocalTable(
            self._directory, open_files_max=open_files_max, chunk_bytes=chunk_bytes
        )
        self._files = self._table.files
        self._failed = self._table.failed

    def expect_new(self, inode: Inode) -> None:
        """A node was made just now, so there is no real file to look for."""
        self._table.expect_new(inode)

    # What stat says

    def live(self, node: Node) -> Node:
        """The node with the size and the times of its real file.  Raises StateFailed."""
        status = self._status(node)
        return node if status is None else self._with(node, status)

    def blocks(self, node: Node) -> int:
        """Units of 512 bytes: what is on the disk, and what shows through as if it were."""
        return self._blocks(node, self._status(node))

    def live_and_blocks(self, node: Node) -> tuple[Node, int]:
        """``live`` and ``blocks`` of the same moment."""
        status = self._status(node)
        live = node if status is None else self._with(node, status)
        return live, self._blocks(node, status)

    def _status(self, node: Node) -> os.stat_result | None:
        """None when there is no real file.  Opens none: listings ask for many."""
        file = self._files.get(node.inode)
        try:
            if file is None:
                return os.stat(self._directory.path(node.inode))
            return os.fstat(file.fd) if file.fd >= 0 else None
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise self._failed(exc, node.inode, "examined") from exc

    def _with(self, node: Node, status: os.stat_result) -> Node:
        file = self._files.get(node.inode)
        held = file.held_times if file is not None else None
        return msgspec.structs.replace(
            node,
            size_bytes=status.st_size,
            atime_ns=held[0] if held else status.st_atime_ns,
            mtime_ns=held[1] if held else status.st_mtime_ns,
            ctime_ns=max(node.ctime_ns, status.st_ctime_ns),
        )

    def _blocks(self, node: Node, status: os.stat_result | None) -> int:
        if not node.base_bytes:
            return status.st_blocks if status is not None else 0
        showing = -(-self._table.file(node).absent_bytes() // SECTOR_BYTES)
        return showing if status is None else status.st_blocks + showing

    def set_times(self, node: Node, *, atime_ns: int | None, mtime_ns: int | None) -> bool:
        """False: there is no real file, the times are the namespace's to keep."""
        file = self._table.file(node)
        if file.fd < 0:
            return False
        if atime_ns is None or mtime_ns is None:
            status = os.fstat(file.fd)
            old = file.held_times or (status.st_atime_ns, status.st_mtime_ns)
            atime_ns = old[0] if atime_ns is None else atime_ns
            mtime_ns = old[1] if mtime_ns is None else mtime_ns
        try:
            os.utime(file.fd, ns=(atime_ns, mtime_ns))
        except OSError as exc:
            raise self._failed(exc, node.inode, "given its times") from exc
        if file.held_times is not None:
            file.held_times = atime_ns, mtime_ns
        return True

    # Reading

    def read_now(self, node: Node, offset: int, size: int) -> memoryview | bytes | None:
        """The bytes, if that needs neither the base nor waiting for the disk; else None.

        A memoryview is valid until the next call, of any file.
        """
        file = self._files.get(node.inode)
        if file is None:
            file = self._table.load(node)
        file.used = True
        if not file.whole:
            if file.fd < 0:
                return None if file.base_bytes else b""
            if not file.is_own(offset, size):
                return None
        if self._read_flags is None or size > MIB:
            return None
        piece = _BUFFER[:size]
        try:
            done = os.preadv(file.fd, (piece,), offset, self._read_flags)
            if done == size:
                return piece
            # Less may be all that is in memory.
            return piece[:done] if offset + done >= os.fstat(file.fd).st_size else None
        except OSError:
            return None

    async def read(self, node: Node, offset: int, size: int) -> bytes | memoryview:
        """At most ``size`` bytes from ``offset``, short only at the end; holes are zeros.

        Raises StateFailed, and what reading the base raises.
        """
        data = self.read_now(node, offset, size)
        if data is not None:
            return data
        file = self._table.held(node)
        try:
            file_bytes = os.fstat(file.fd).st_size if file.fd >= 0 else file.base_bytes
            stop = min(offset + size, file_bytes)
            if offset >= stop:
                return b""
            piece = file.pieces(offset, stop)[0]
            if piece.stop == stop:
                return await self._piece(file, node, piece)
            whole = bytearray(stop - offset)
            while True:
                part = await self._piece(file, node, piece)
                at = piece.start - offset
                whole[at : at + len(part)] = part
                if piece.stop == stop:
                    break
                # Chunks may have come here meanwhile, and their base may be gone.
                piece = file.pieces(piece.stop, stop)[0]
            return memoryview(whole)
        finally:
            file.holds -= 1

    async def _piece(self, file: LocalFile, node: Node, piece: Piece) -> bytes | memoryview:
        length = piece.stop - piece.start
        if piece.of_base:
            return await self._filling.base(node, piece.start, length)
        try:
            return await self._pace.thread(os.pread, file.fd, length, piece.start)
        except OSError as exc:
            raise self._failed(exc, node.inode, "read") from exc

    # Writing

    def write_now(self, node: Node, offset: int, data: bytes | memoryview) -> int | None:
        """How many bytes were written, fewer only when the disk is full; None when that needs the
        base, or waiting.  Raises NoSpace, TooLarge, StateFailed."""
        file = self._files.get(node.inode)
        if file is None:
            file = self._table.load(node)
        file.used = True
        begun = time.monotonic()
        if file.busy or begun < self._pace.threads_until:
            return None
        if not file.whole:
            if not data:
                return 0
            stop = offset + len(data)
            if file.fd < 0:
                self._table.make(file, node)
            if file.to_fill(offset, stop) is not None:
                return None
            self._may_grow(file, stop)
        try:
            done = os.pwrite(file.fd, data, offset)
        except OSError as exc:
            raise self._failed(exc, node.inode, "written") from exc
        self._pace.took(begun)
        return done if file.whole else self._wrote(file, offset, done)

    async def write(self, node: Node, offset: int, data: bytes | memoryview) -> int:
        """As ``write_now``, waiting for what it takes.  ``data`` must stay as it is until then.

        Raises NoSpace, TooLarge, StateFailed, and what reading the base raises; what was written
        before stays as it is.
        """
        if not data:
            return 0
        file = self._table.held(node)
        stop = offset + len(data)
        try:
            while True:
                async with file.turn():
                    if file.fd < 0:
                        self._table.make(file, node)
                    chunk = file.to_fill(offset, stop)
                    if chunk is None:
                        return await self._write_in_turn(file, offset, data)
                await self._filling.fill(file, node, chunk)
        finally:
            file.holds -= 1

    async def _write_in_turn(self, file: LocalFile, offset: int, data: bytes | memoryview) -> int:
        self._may_grow(file, offset + len(data))
        try:
            done = await self._pace.write(os.pwrite, file.fd, data, offset)
        except OSError as exc:
            raise self._failed(exc, file.inode, "written") from exc
        return done if file.whole else self._wrote(file, offset, done)

    def _wrote(self, file: LocalFile, offset: int, done: int) -> int:
        """Raises NoSpace when nothing of it counts."""
        try:
            counted = file.wrote(offset, done)
        except OSError as exc:
            raise self._failed(exc, file.inode, "written") from exc
        if done and not counted:
            raise self._failed(OSError(errno.ENOSPC, ""), file.inode, "written")
        return counted

    async def truncate(self, node: Node, size_bytes: int) -> None:
        """Make the file shorter, or longer with zeros.  Needs nothing of the base.

        Raises NoSpace, TooLarge, StateFailed.
        """
        file = self._table.held(node)
        try:
            if file.fd < 0:
                self._table.make(file, node)
            if not file.busy:
                cut_bytes = os.fstat(file.fd).st_size - size_bytes
                if cut_bytes <= _CUT_INLINE_BYTES_MAX:
                    self._may_grow(file, size_bytes)
                    os.ftruncate(file.fd, size_bytes)
                    self._was_cut(file, size_bytes)
                    return
            async with file.turn():
                self._may_grow(file, size_bytes)
                await self._pace.thread(os.ftruncate, file.fd, size_bytes)
                self._was_cut(file, size_bytes)
        except OSError as exc:
            raise self._failed(exc, node.inode, "resized") from exc
        finally:
            file.holds -= 1

    def _was_cut(self, file: LocalFile, size_bytes: int) -> None:
        file.cut(size_bytes)
        if file.base_unsaved:
            try:
                self._remember(file)
            except StageFSError:
                # The cut is made, often to free a full disk; growing asks the namespace again.
                file.look()

    def _may_grow(self, file: LocalFile, stop: int) -> None:
        """Before bytes at ``stop`` or before are written: see local_file on kills."""
        if file.base_unsaved and stop > file.base_bytes:
            self._remember(file)

    def _remember(self, file: LocalFile) -> None:
        self._base_shrunk(file.inode, file.base_bytes)
        file.saved(file.base_bytes)

    # Durability

    async def sync(self, node: Node, *, data_only: bool) -> None:
        """Content, map and the real file's name are on the disk.  What the namespace has of the
        node (the size of what shows through included) is for the caller to sync, afterwards.

        Callers that come while one is at work share the next.  Raises NoSpace, StateFailed.
        """
        file = self._table.held(node)
        try:
            await self._sync(file, data_only=data_only)
        finally:
            file.holds -= 1

    async def _sync(self, file: LocalFile, *, data_only: bool) -> None:
        if file.fd < 0:
            return
        file.sync_asked += 1
        mine = file.sync_asked
        async with file.sync_lock:
            if mine <= (file.sync_done_data if data_only else file.sync_done):
                return
            upto = file.sync_asked
            try:
                await self._pace.sync(self._sync_blocking, file, data_only)
            except OSError as exc:
                raise self._failed(exc, file.inode, "synced") from exc
            file.sync_done_data = upto
            if not data_only:
                file.sync_done = upto

    def _sync_blocking(self, file: LocalFile, data_only: bool) -> None:
        if data_only:
            os.fdatasync(file.fd)
        else:
            os.fsync(file.fd)
        if file.chunks is not None:
            file.chunks.sync()
        if not file.name_synced:
            self._directory.sync_name(file.inode)
            file.name_synced = True

    # Copies as files of their own

    async def complete(self, node: Node, progress: Callable[[int], None]) -> None:
        """Copy all that still shows through.  Afterwards the file needs its base no more, also
        after a power failure.  ``progress`` is told how many bytes of the base are here.

        Raises NoSpace, StateFailed, and what reading the base raises.
        """
        file = self._table.held(node)
        try:
            if file.fd < 0:
                self._table.make(file, node)
            while (chunk := file.first_absent()) is not None:
                progress(file.base_bytes - file.absent_bytes())
                await self._filling.fill(file, node, chunk)
            progress(file.base_bytes)
            await self._sync(file, data_only=False)
            if file.base_known:
                file.base_bytes = 0
                self._remember(file)
        finally:
            file.holds -= 1

    def open_whole(self, node: Node) -> int:
        """A descriptor for reading, which the caller closes, of a file that is complete.

        Raises NoSpace, StateFailed.
        """
        file = self._table.file(node)
        if file.fd < 0:
            self._table.make(file, node)
        assert file.whole, "open_whole before complete"
        try:
            return os.open(f"/proc/self/fd/{file.fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise self._failed(exc, node.inode, "opened") from exc

    def copies(self) -> list[LocalCopy]:
        """Files into which bytes are being copied now."""
        return self._filling.copies()

    @property
    def copied_bytes(self) -> int:
        return self._filling.filled_bytes

    # Removing, in worker threads

    def remove(self, inodes: Sequence[Inode]) -> None:
        """Blocking.  Nobody uses these files any more.  Raises StateFailed, after trying all."""
        failure: StageFSError | None = None
        for inode in inodes:
            self._table.forget(inode)
            try:
                self._directory.remove(inode)
            except OSError as exc:
                failure = self._failed(exc, inode, "removed")
        if failure is not None:
            raise failure

    def sweep(self, wanted: Collection[Inode]) -> int:
        """Remove files that no node has; returns how many.  Once, soon after the start: files made
        since are kept, whether or not they are in ``wanted``.  Blocking.  Raises StateFailed."""
        return self._table.sweep(wanted)

    def close(self) -> None:
        """Let go of all files."""
        self._files.clear()
