"""The local files that are known now, a bounded number of them with open descriptors.

Concurrency: trio thread, but for ``forget`` and ``swept``.  A file that is forgotten or closed
to make room is closed when nobody refers to it any more.
"""

import os
from collections.abc import Collection

from stagefs.errors import StageFSError, StateFailed
from stagefs.model import Inode
from stagefs.namespace.node import Node
from stagefs.outputs.local_directory import LocalDirectory
from stagefs.outputs.local_file import LocalFile
from stagefs.outputs.local_map import ChunkMap


class LocalTable:
    """``files`` is for the hot path to look into; ``made`` counts real files."""

    def __init__(self, directory: LocalDirectory, *, open_files_max: int, chunk_bytes: int) -> None:
        self._directory = directory
        self._open_files_max = open_files_max
        self._shift = chunk_bytes.bit_length() - 1
        self._made_unswept: set[Inode] | None = set()
        self.files: dict[Inode, LocalFile] = {}
        self.made = 0

    def held(self, node: Node) -> LocalFile:
        """The file, which stays in the table until ``holds`` is lowered again."""
        file = self.file(node)
        file.holds += 1
        return file

    def file(self, node: Node) -> LocalFile:
        file = self.files.get(node.inode)
        if file is None:
            return self.load(node)
        file.used = True
        return file

    def expect_new(self, inode: Inode) -> None:
        """There is no real file, as nothing had this inode before."""
        self._make_room()
        self.files.setdefault(inode, LocalFile(inode, 0))

    def _make_room(self) -> None:
        if len(self.files) >= self._open_files_max:
            self._close_some()

    def load(self, node: Node) -> LocalFile:
        """A file that is not in the table.  Raises StateFailed."""
        self._make_room()
        inode = node.inode
        file = LocalFile(inode, node.base_bytes)
        try:
            fd = self._directory.open(inode)
        except FileNotFoundError:
            pass
        except OSError as exc:
            raise self.failed(exc, inode, "opened") from exc
        else:
            try:
                chunks = self._load_map(node) if node.base_bytes else None
                size_bytes = os.fstat(fd).st_size
            except StageFSError:
                os.close(fd)
                raise
            file.opened(fd, chunks, size_bytes=size_bytes)
        self.files[inode] = file
        return file

    def _load_map(self, node: Node) -> ChunkMap:
        try:
            path = self._directory.map_path(node.inode)
            return ChunkMap.load(path, base_bytes=node.base_bytes)
        except FileNotFoundError as exc:
            raise StateFailed(
                f"The file {self._directory.path(node.inode)} has lost its chunk map: what was "
                "written to it cannot be told from what it was copied from; restore the map."
            ) from exc
        except OSError as exc:
            raise self.failed(exc, node.inode, "opened") from exc

    def make(self, file: LocalFile, node: Node) -> None:
        """A real file, with the size and times of the node: its content is about to change.

        Raises NoSpace, StateFailed.
        """
        atime_ns = node.atime_ns or node.mtime_ns
        chunks = None
        if self._made_unswept is not None:
            self._made_unswept.add(node.inode)
        try:
            if file.base_bytes:
                fd, chunks = self._directory.make_with_base(
                    node.inode,
                    size_bytes=file.base_bytes,
                    atime_ns=atime_ns,
                    mtime_ns=node.mtime_ns,
                    shift=self._shift,
                )
            else:
                fd = self._directory.make(node.inode, atime_ns=atime_ns, mtime_ns=node.mtime_ns)
        except OSError as exc:
            raise self.failed(exc, node.inode, "made") from exc
        file.opened(fd, chunks, size_bytes=file.base_bytes)
        self.made += 1

    def _close_some(self) -> None:
        """An eighth, those first that were not used since they were looked at here."""
        wanted = max(1, self._open_files_max // 8)
        for _round in range(2):
            for inode, file in list(self.files.items()):
                if wanted <= 0:
                    return
                if file.used:
                    file.used = False
                elif not file.holds:
                    self.files.pop(inode, None)
                    wanted -= 1

    def forget(self, inode: Inode) -> None:
        """Any thread; for files that nobody uses."""
        self.files.pop(inode, None)

    def sweep(self, wanted: Collection[Inode]) -> int:
        """See ``LocalFiles.sweep``.  Blocking, any thread."""
        made = self._made_unswept
        assert made is not None, "sweep is for the start"
        removed = self._directory.sweep(wanted=wanted, made=made)
        self._made_unswept = None
        return removed

    def failed(self, exc: OSError, inode: Inode, participle: str) -> StageFSError:
        """The error to raise for one of the system's."""
        return self._directory.failed(exc, f"The file with inode {inode} cannot be {participle}")
