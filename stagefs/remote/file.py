"""``file://``: objects in directories of this machine, local disks and network file systems alike.

The validator is modification time, size and inode number, compared before and after each
fetch.  A file that is rewritten in place within the clock's granularity and keeps its size
cannot be told apart; nothing on this side could.  Symbolic links are followed, as any
program would.  Writing is in ``file_put``.

Every call runs in a worker thread, because a network file system may stall; such a thread
cannot be woken and ends when the kernel lets it.
"""

import contextlib
import errno
import os
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import trio

from stagefs.errors import (
    AccessDenied,
    ObjectMissing,
    RemoteError,
    RemoteUnavailable,
    StageFSError,
)
from stagefs.model import (
    MIB,
    Checksum,
    EntryKind,
    ListedEntry,
    ObjectInfo,
    Span,
    WholeObject,
)
from stagefs.page_buffer import page_buffer
from stagefs.remote.base import WHOLE_OBJECT_BYTES_MAX, BatchItem, Results, Sink
from stagefs.remote.batch import not_the_version, shorter, too_large
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.file_put import FilePut, remove_file
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.temporaries import Leftovers
from stagefs.remote.threads import PIECE_BYTES, Call, SinkCall, SourceCall
from stagefs.remote.url import is_file_name, join, name_to_write, parse

T = TypeVar("T")

LIST_PAGE_NAMES = 1000
# O_NONBLOCK: opening a FIFO without a writer must not block.  It means nothing for files.
_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK


class FileRemote:
    """The driver of ``file://``."""

    def __init__(
        self, host_url: str, settings: RemoteSettings, credentials: CredentialStore
    ) -> None:
        del host_url, credentials
        self._answer_timeout_s = settings.answer_timeout_s
        self._progress_timeout_s = settings.progress_timeout_s
        self._threads = trio.CapacityLimiter(settings.concurrency * 2)
        self._put_threads = trio.CapacityLimiter(settings.concurrency * 2)
        self._lookup_threads = trio.CapacityLimiter(settings.lookups * 2)
        self._leftovers = Leftovers()

    async def stat(self, url: str) -> ObjectInfo:
        def work(call: Call[ObjectInfo]) -> ObjectInfo:
            del call
            try:
                return described(url, os.stat(_path(url)))
            except OSError as exc:
                raise _translated(exc, url) from exc

        return await self._call(work, url).run(self._lookup_threads)

    async def list(self, url: str) -> AsyncIterator[Sequence[ListedEntry]]:
        def open_directory(call: Call[_Directory]) -> _Directory:
            del call
            return _Directory(url)

        directory = await self._call(open_directory, url).run(self._lookup_threads)
        try:
            while True:
                page = await self._call(directory.page, url).run(self._lookup_threads)
                if page is None:
                    return
                yield page
        finally:
            directory.close()

    async def fetch(self, url: str, span: Span, *, sink: Sink, validator: str | None) -> ObjectInfo:
        def work(call: SinkCall[ObjectInfo]) -> ObjectInfo:
            try:
                return _copy(call, url, span, validator)
            except OSError as exc:
                raise _translated(exc, url) from exc

        call = SinkCall(
            work,
            url=url,
            span=span,
            sink=sink,
            answer_timeout_s=self._answer_timeout_s,
            progress_timeout_s=self._progress_timeout_s,
        )
        return await call.run(self._threads)

    async def fetch_batch(self, items: Sequence[BatchItem]) -> Results:
        if not items:
            return []

        # One thread for the batch: a hop costs more than reading a small file.
        def work(call: Call[Results]) -> Results:
            results: Results = []
            for item in items:
                call.checkpoint()
                call.answered()
                try:
                    results.append(_whole(item.url, item.validator))
                except StageFSError as exc:
                    results.append(exc)
            return results

        call = Call(
            work,
            url=items[0].url,
            answer_timeout_s=self._answer_timeout_s,
            progress_timeout_s=self._progress_timeout_s,
        )
        return await call.run(self._threads)

    async def put(
        self,
        url: str,
        *,
        source: int,
        size_bytes: int,
        overwrite: bool,
        checksum: Checksum | None,
        mode: int | None,
        progress: Callable[[int], None],
    ) -> ObjectInfo:
        name_to_write(url)
        path = _path(url)

        def work(call: SourceCall[os.stat_result]) -> os.stat_result:
            # It is not woken, but ends after a step; whoever cancels waits a moment for that.
            call.interruptible(lambda: True)
            return FilePut(
                call,
                url=url,
                path=path,
                size_bytes=size_bytes,
                overwrite=overwrite,
                checksum=checksum,
                mode=mode,
            ).run(self._leftovers)

        call = SourceCall(
            work,
            url=url,
            source=source,
            progress=progress,
            answer_timeout_s=self._answer_timeout_s,
            progress_timeout_s=self._progress_timeout_s,
        )
        return described(url, await call.run(self._put_threads))

    async def delete(self, url: str) -> None:
        name_to_write(url)

        def work(call: Call[None]) -> None:
            del call
            remove_file(_path(url), url)

        await self._call(work, url).run(self._lookup_threads)

    async def aclose(self) -> None:
        """Nothing is kept open."""

    def _call(self, work: Callable[[Call[T]], T], url: str) -> Call[T]:
        return Call(work, url=url, answer_timeout_s=self._answer_timeout_s)


class _Directory:
    """An open directory, read in pages in worker threads."""

    def __init__(self, url: str) -> None:
        self._url = url
        try:
            self._entries = os.scandir(_path(url))
        except OSError as exc:
            raise _translated(exc, url) from exc

    def page(self, call: Call[list[ListedEntry] | None]) -> list[ListedEntry] | None:
        """The next entries; None at the end."""
        del call
        try:
            entries = list(islice(self._entries, LIST_PAGE_NAMES))
        except OSError as exc:
            raise _translated(exc, self._url) from exc
        if not entries:
            return None
        listed = (_listed(entry, self._url) for entry in entries)
        return [entry for entry in listed if entry is not None]

    def close(self) -> None:
        self._entries.close()


def _path(url: str) -> str:
    return parse(url).path


def _listed(entry: os.DirEntry[str], base: str) -> ListedEntry | None:
    """None for what is neither file nor directory, or went away meanwhile."""
    if not is_file_name(entry.name):
        return None
    url = join(base, entry.name)
    try:
        status = entry.stat()
    except OSError:
        return None
    if stat.S_ISDIR(status.st_mode):
        return ListedEntry(entry.name, EntryKind.DIRECTORY, url)
    if stat.S_ISREG(status.st_mode):
        return ListedEntry(entry.name, EntryKind.FILE, url, described(url, status))
    return None


def described(url: str, status: os.stat_result) -> ObjectInfo:
    if not stat.S_ISREG(status.st_mode):
        what = "a directory" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise RemoteError(f"{url} is {what}: name a file, or bind the directory.")
    return ObjectInfo(
        url=url,
        size_bytes=status.st_size,
        validator=f"mtime:{status.st_mtime_ns}:{status.st_size}:{status.st_ino}",
        mtime_ns=status.st_mtime_ns,
        mode=stat.S_IMODE(status.st_mode),
    )


@contextlib.contextmanager
def _opened(url: str, validator: str | None) -> Iterator[tuple[int, ObjectInfo]]:
    fd = os.open(_path(url), _OPEN_FLAGS)
    try:
        info = described(url, os.fstat(fd))
        if validator is not None and info.validator != validator:
            raise not_the_version(url, validator, info.validator)
        yield fd, info
    finally:
        os.close(fd)


def _unchanged(url: str, fd: int, info: ObjectInfo) -> None:
    now = described(url, os.fstat(fd)).validator
    if now != info.validator:
        raise not_the_version(url, info.validator, now)


def _copy(call: SinkCall[ObjectInfo], url: str, span: Span, validator: str | None) -> ObjectInfo:
    with _opened(url, validator) as (source, info):
        if span.stop > info.size_bytes:
            raise shorter(url, span.stop, info.size_bytes)
        call.found(info)
        _copy_in_kernel(call, source, span)
        buffer = page_buffer(PIECE_BYTES)
        while call.missing_bytes:
            position = span.stop - call.missing_bytes
            count = os.preadv(source, [buffer[: call.missing_bytes]], position)
            if not count:
                raise shorter(url, span.stop, position)
            call.write(buffer[:count])
        _unchanged(url, source, info)
    return info


def _copy_in_kernel(call: SinkCall[ObjectInfo], source: int, span: Span) -> None:
    """Copy what ``copy_file_range`` can: it shares extents where the file system can do that.

    Whatever stops it, an error of source or sink or a pair of file systems it does not serve,
    is met again, and told apart, by reading and writing.
    """

    def move(fd: int, offset: int) -> int:
        position = span.stop - call.missing_bytes
        try:
            return os.copy_file_range(
                source, fd, min(call.missing_bytes, 4 * MIB), position, offset
            )
        except OSError:
            return 0

    while call.missing_bytes and call.move(move):
        pass


def _whole(url: str, validator: str | None) -> WholeObject:
    try:
        with _opened(url, validator) as (source, info):
            if info.size_bytes > WHOLE_OBJECT_BYTES_MAX:
                raise too_large(url, info.size_bytes)
            data = os.read(source, WHOLE_OBJECT_BYTES_MAX + 1)
            _unchanged(url, source, info)
    except OSError as exc:
        raise _translated(exc, url) from exc
    if len(data) != info.size_bytes:
        raise shorter(url, info.size_bytes, len(data))
    return WholeObject(info=info, data=data)


def _translated(exc: OSError, url: str) -> StageFSError:
    match exc.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return ObjectMissing(f"{url} does not exist ({exc.strerror}).")
        case errno.EACCES | errno.EPERM:
            return AccessDenied(
                f"{url} may not be read ({exc.strerror}): mend its permissions or those of a "
                "directory above it."
            )
        case errno.EMFILE | errno.ENFILE | errno.ENOMEM | errno.EINTR | errno.ETIMEDOUT:
            return RemoteUnavailable(f"{url} cannot be read now ({exc.strerror}).")
        case errno.ESTALE:
            return RemoteUnavailable(f"{url} was replaced while it was read ({exc.strerror}).")
        case _:
            return RemoteError(f"{url} cannot be read ({exc.strerror}).")
