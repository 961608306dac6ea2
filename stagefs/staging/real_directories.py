"""Sandboxes as real directories, where FUSE is forbidden: their content written out of the cache,
and what a task made there taken back.

``materialize`` writes whole files into a directory of this machine; ``absorb`` takes what the
declared outputs match there into the sandbox, whose commit then is the same as anybody's.
Files that are as they were written stay links.

Concurrency: trio thread; files are written and looked at in worker threads, several at a time.
"""

import contextlib
import errno
import functools
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

from stagefs.errors import InvalidName, NoSpace, NotFound, StageFSError, StateFailed
from stagefs.model import MIB, Inode
from stagefs.namespace.node import ContentKind, Node, NodeKind
from stagefs.namespace.store import Namespace
from stagefs.objects.objects import Objects
from stagefs.staging import values
from stagefs.staging.manifest import Output
from stagefs.staging.names import NameOperations, first_error
from stagefs.staging.sandboxes import Found
from stagefs.staging.tree import Tree
from stagefs.staging.values import PAGE_ENTRIES_MAX, Progress, ProgressCallback
from stagefs.vfs.workspace import Workspace

FILES_AT_ONCE = 8
PIECE_BYTES = MIB

_T = TypeVar("_T")
_Read = Callable[[int, int], Awaitable[bytes | memoryview]]


class _Made(msgspec.Struct, frozen=True):
    """Something that a task left in a real directory."""

    parts: tuple[str, ...]
    status: os.stat_result
    target: str | None = None


class RealDirectories:
    def __init__(
        self,
        *,
        namespace: Namespace,
        tree: Tree,
        names: NameOperations,
        objects: Objects,
        workspace: Workspace,
    ) -> None:
        self._namespace = namespace
        self._tree = tree
        self._names = names
        self._objects = objects
        self._workspace = workspace

    # Out

    async def materialize(
        self, found: Found, directory: Path, progress: ProgressCallback
    ) -> values.Copied:
        """Everything in the sandbox as real files in the empty ``directory``.  Raises what reading
        raises, NoSpace, StateFailed."""
        top = _checked(directory)
        files: list[tuple[Path, Node]] = []
        async for path, node in self._below(found.node, top):
            if node.kind is NodeKind.FILE:
                files.append((path, node))
            else:
                await _in_thread(_make, path, node)
        total = sum(node.size_bytes for _path, node in files)
        done = 0

        def wrote(count: int) -> None:
            nonlocal done
            done += count
            progress(Progress("writing the inputs", done, total))

        works = [functools.partial(self._write, path, node, wrote) for path, node in files]
        await first_error(works, FILES_AT_ONCE)
        return values.Copied(files=len(files), bytes_total=done)

    async def _below(self, directory: Node, path: Path) -> AsyncIterator[tuple[Path, Node]]:
        await self._tree.shown(directory)
        after = 0
        while page := self._namespace.page(directory.inode, after, PAGE_ENTRIES_MAX):
            after = page[-1][0]
            for _cookie, name, node in page:
                yield path / name, node
                if node.kind is NodeKind.DIRECTORY:
                    async for below in self._below(node, path / name):
                        yield below

    async def _write(self, path: Path, node: Node, wrote: Callable[[int], None]) -> None:
        fd = await _in_thread(os.open, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            async with self._reading(node) as read:
                offset = 0
                while piece := await read(offset, PIECE_BYTES):
                    # The buffer may be used again for the next read of anybody.
                    count = await _in_thread(_write_all, fd, bytes(piece), offset)
                    offset += count
                    wrote(count)
            await _in_thread(_finish, fd, node)
        finally:
            os.close(fd)

    @contextlib.asynccontextmanager
    async def _reading(self, node: Node) -> AsyncIterator[_Read]:
        if node.content is not ContentKind.OBJECT:
            yield functools.partial(self._workspace.read, node.inode)
            return
        opened = self._objects.open(node)
        try:
            yield functools.partial(self._objects.read, opened)
        finally:
            self._objects.release(opened)

    # In

    async def absorb(
        self,
        found: Found,
        outputs: Sequence[Output],
        directory: Path,
        progress: ProgressCallback,
    ) -> values.Copied:
        """What the outputs match in ``directory`` becomes the sandbox's."""
        made = await _in_thread(_look, _checked(directory), outputs)
        files = copied = 0
        for one in made:
            above = self._directory(found.node.inode, one.parts[:-1])
            old = self._there(above, one.parts[-1])
            if old is not None and self._is_so(old, one):
                continue
            if stat.S_ISDIR(one.status.st_mode):
                self._directory(found.node.inode, one.parts)
                continue
            if old is not None:
                self._remove(above, one.parts[-1], old)
            if one.target is not None:
                self._namespace.make_symlink(above, one.parts[-1], one.target)
                continue
            copied += await self._take(directory, above, one)
            files += 1
            progress(Progress("taking the outputs", copied, None))
        return values.Copied(files=files, bytes_total=copied)

    def _directory(self, top: Inode, parts: tuple[str, ...]) -> Inode:
        for part in parts:
            node = self._there(top, part)
            if node is not None and node.kind is not NodeKind.DIRECTORY:
                self._remove(top, part, node)
                node = None
            top = (node or self._namespace.make_directory(top, part)).inode
        return top

    def _remove(self, directory: Inode, name: str, node: Node) -> None:
        if node.kind is NodeKind.DIRECTORY:
            self._namespace.remove_tree(directory, name)
        else:
            self._namespace.remove(directory, name)
        self._names.forget_removed(directory, name, node)
        self._workspace.names_went()

    def _there(self, directory: Inode, name: str) -> Node | None:
        try:
            return self._namespace.lookup(directory, name)
        except NotFound:
            return None

    def _is_so(self, node: Node, made: _Made) -> bool:
        """Whether it is what ``materialize`` wrote."""
        if made.target is not None:
            return node.target == made.target
        if not stat.S_ISREG(made.status.st_mode) or node.kind is not NodeKind.FILE:
            return False
        if node.content is not ContentKind.OBJECT:
            node = self._workspace.local.live(node)
        now = (made.status.st_size, made.status.st_mtime_ns)
        return now == (node.size_bytes, node.mtime_ns)

    async def _take(self, directory: Path, above: Inode, made: _Made) -> int:
        path = directory.joinpath(*made.parts)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        source = await _in_thread(os.open, path, flags)
        try:
            node = self._namespace.create_file(
                above, made.parts[-1], stat.S_IMODE(made.status.st_mode) & 0o777
            )
            offset = 0
            while piece := await _in_thread(os.pread, source, PIECE_BYTES, offset):
                await self._workspace.write(node.inode, offset, piece, trusted=False)
                offset += len(piece)
        finally:
            os.close(source)
        local = self._workspace.local
        times = made.status.st_atime_ns, made.status.st_mtime_ns
        local.set_times(self._namespace.node(node.inode), atime_ns=times[0], mtime_ns=times[1])
        return offset


def _checked(directory: Path) -> Path:
    if not directory.is_absolute():
        raise InvalidName(f"{directory} is no absolute path of a directory.")
    return directory


def _make(path: Path, node: Node) -> None:
    if node.kind is NodeKind.DIRECTORY:
        path.mkdir(mode=node.mode | 0o700)
    elif node.kind is NodeKind.SYMLINK:
        path.symlink_to(node.target or "")


def _write_all(fd: int, piece: bytes, offset: int) -> int:
    view = memoryview(piece)
    while view:
        count = os.pwrite(fd, view, offset)
        offset += count
        view = view[count:]
    return len(piece)


def _finish(fd: int, node: Node) -> None:
    os.fchmod(fd, node.mode & 0o777)
    os.utime(fd, ns=(node.mtime_ns, node.mtime_ns))


def _look(top: Path, outputs: Sequence[Output]) -> list[_Made]:
    """What the outputs match, directories before what is in them."""
    globs = [output.glob for output in outputs]
    found: list[_Made] = []

    def walk(directory: Path, parts: tuple[str, ...], *, all_of_it: bool) -> None:
        with os.scandir(directory) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        for entry in listed:
            here = (*parts, entry.name)
            wanted = all_of_it or any(glob.matches(here) for glob in globs)
            status = entry.stat(follow_symlinks=False)
            is_directory = stat.S_ISDIR(status.st_mode)
            is_link = stat.S_ISLNK(status.st_mode)
            if wanted and (is_directory or is_link or stat.S_ISREG(status.st_mode)):
                target = os.readlink(entry.path) if is_link else None
                found.append(_Made(here, status, target))
            if is_directory and (wanted or any(glob.may_match_below(here) for glob in globs)):
                walk(Path(entry.path), here, all_of_it=wanted)

    walk(top, (), all_of_it=False)
    return found


async def _in_thread(work: Callable[..., _T], *arguments: object) -> _T:
    """Raises NoSpace, StateFailed for what the disk says."""
    try:
        return await trio.to_thread.run_sync(work, *arguments)
    except OSError as exc:
        raise _failed(exc) from exc


def _failed(exc: OSError) -> StageFSError:
    where = exc.filename or "the sandbox's directory"
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"The disk is full at {where}: free space there, or name another --state.")
    return StateFailed(f"{where} cannot be used: {exc.strerror}.")
