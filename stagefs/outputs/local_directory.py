"""Where the real files lie: ``<scratch>/<inode % 256 in hex>/<inode>``, a chunk map beside each
that was copied from something (``.map``), and ``.new`` while such a file is being made.

Plain blocking functions; every method may be called from any thread.  Files are 0600: modes
and owners are the namespace's.
"""

import contextlib
import errno
import os
import re
from collections.abc import Collection
from pathlib import Path

from stagefs.errors import NoSpace, StageFSError, StateFailed, TooLarge
from stagefs.model import Inode
from stagefs.outputs.local_map import ChunkMap

_SHARDS = 256
_OUR_NAME = re.compile(r"([1-9][0-9]*)(\.map|\.new)?")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class LocalDirectory:
    def __init__(self, directory: Path) -> None:
        """Makes what is missing.  Raises NoSpace, StateFailed."""
        self.directory = directory
        self._prefix = os.fspath(directory)
        self._flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOATIME
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            present = set(os.listdir(directory))
            for shard in range(_SHARDS):
                if f"{shard:02x}" not in present:
                    os.mkdir(directory / f"{shard:02x}", 0o700)
        except OSError as exc:
            raise self.failed(exc, "The directory of local files cannot be used") from exc

    def path(self, inode: Inode) -> str:
        return f"{self._prefix}/{inode & (_SHARDS - 1):02x}/{inode}"

    def map_path(self, inode: Inode) -> str:
        return f"{self.path(inode)}.map"

    def open(self, inode: Inode) -> int:
        """Raises OSError."""
        return self._open(self.path(inode), 0)

    def _open(self, path: str, extra_flags: int) -> int:
        try:
            return os.open(path, self._flags | extra_flags, 0o600)
        except PermissionError:
            # Some file systems refuse O_NOATIME even to the owner.
            self._flags &= ~os.O_NOATIME
            return os.open(path, self._flags | extra_flags, 0o600)

    def make(self, inode: Inode, *, atime_ns: int, mtime_ns: int) -> int:
        """An empty file.  Raises OSError."""
        fd = self._open(self.path(inode), os.O_CREAT)
        try:
            os.utime(fd, ns=(atime_ns, mtime_ns))
        except OSError:
            os.close(fd)
            raise
        return fd

    def make_with_base(
        self, inode: Inode, *, size_bytes: int, atime_ns: int, mtime_ns: int, shift: int
    ) -> tuple[int, ChunkMap]:
        """A file of holes and its map; the file has its name only when it is whole, because its
        size is what says how much of the base can be seen.  Raises OSError."""
        chunks = ChunkMap.make(self.map_path(inode), shift=shift, base_bytes=size_bytes)
        new = f"{self.path(inode)}.new"
        try:
            fd = self._open(new, os.O_CREAT | os.O_TRUNC)
        except OSError:
            os.close(chunks.fd)
            raise
        try:
            os.ftruncate(fd, size_bytes)
            os.utime(fd, ns=(atime_ns, mtime_ns))
            os.rename(new, self.path(inode))
        except OSError:
            os.close(fd)
            os.close(chunks.fd)
            raise
        return fd, chunks

    def sync_name(self, inode: Inode) -> None:
        """Raises OSError."""
        fd = os.open(os.path.dirname(self.path(inode)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def remove(self, inode: Inode) -> None:
        """Raises OSError."""
        path = self.path(inode)
        for each in (path, f"{path}.map", f"{path}.new"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(each)

    def sweep(self, *, wanted: Collection[Inode], made: Collection[Inode]) -> int:
        """Remove the files of inodes that are not wanted, and what earlier daemons left half made;
        returns how many files.  ``made`` is spared, and so are names that are none of ours.
        Raises StateFailed."""
        removed = 0
        try:
            for shard in range(_SHARDS):
                with os.scandir(f"{self._prefix}/{shard:02x}") as entries:
                    for entry in entries:
                        found = _OUR_NAME.fullmatch(entry.name)
                        if found is None or (inode := Inode(int(found[1]))) in made:
                            continue
                        if inode in wanted and found[2] != ".new":
                            continue
                        with contextlib.suppress(FileNotFoundError):
                            os.unlink(entry.path)
                        removed += not found[2]
        except OSError as exc:
            raise self.failed(exc, "Files that nobody needs cannot be removed") from exc
        return removed

    def failed(self, exc: OSError, what: str) -> StageFSError:
        """The error to raise for one of the system's."""
        if exc.errno in _FULL:
            return NoSpace(
                f"{what}: the disk of {self.directory} is full; remove files there or in the mount."
            )
        if exc.errno == errno.EFBIG:
            return TooLarge(f"{what}: the file system of {self.directory} has no files that large.")
        return StateFailed(
            f"{what} ({exc.strerror or exc}): check the disk of {self.directory}, then try again."
        )
