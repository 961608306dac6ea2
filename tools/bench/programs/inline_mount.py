"""The least a pyfuse3 file system can be: one directory of files, answered by inline pread.

The peer that shows what the binding and the kernel leave to StageFS.  Arguments: the directory
to show, the mountpoint.  Runs until it is unmounted.
"""

import os
import sys

import pyfuse3
import trio

TIMEOUT_S = 300.0


class InlineMount(pyfuse3.Operations):
    def __init__(self, directory: str) -> None:
        super().__init__()
        self._directory = directory.encode()
        self._paths: dict[int, bytes] = {pyfuse3.ROOT_INODE: self._directory}

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        status = os.stat(self._paths[inode])
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode)
        entry.st_mode = pyfuse3.ModeT(status.st_mode)
        entry.st_nlink = status.st_nlink
        entry.st_uid, entry.st_gid = status.st_uid, status.st_gid
        entry.st_size = status.st_size
        entry.st_mtime_ns = status.st_mtime_ns
        entry.entry_timeout = entry.attr_timeout = TIMEOUT_S
        return entry

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        path = os.path.join(self._paths[parent_inode], name)
        try:
            inode = os.stat(path).st_ino
        except OSError as exc:
            raise pyfuse3.FUSEError(exc.errno or 5) from exc
        self._paths[inode] = path
        return self._attributes(inode)

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._attributes(inode)

    async def open(
        self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.FileInfo:
        fd = os.open(self._paths[inode], os.O_RDONLY)
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(fd), keep_cache=True)

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        return os.pread(fh, size, off)

    async def release(self, fh: pyfuse3.FileHandleT) -> None:
        os.close(fh)


def main(directory: str, mountpoint: str) -> None:
    pyfuse3.init(InlineMount(directory), mountpoint, {*pyfuse3.default_options, "fsname=inline"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close(unmount=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
