"""The copy itself: which item goes where, and moving the bytes.

Nothing is written before all sources and the target were looked at.  Several files are on their
way at a time; each appears whole or not at all, and the first failure ends the copy: what came
before it stays, as with scp.  Trio thread.
"""

import functools
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence

import msgspec
import trio

from stagefs.copying.local_files import (
    Attributes,
    Landing,
    opened_source,
    sync_directory,
    telling,
    write_all,
)
from stagefs.copying.request import CopyRequest
from stagefs.copying.sources import WITH_DIRECTORIES, Item, Sources
from stagefs.copying.through_mount import ThroughMount
from stagefs.errors import InvalidName, NotADirectory, NotFound, ObjectMissing, StageFSError
from stagefs.model import MIB, ObjectInfo, Span
from stagefs.remote.registry import Remotes
from stagefs.remote.url import check_writable, join, name_to_write, parse

FILES_AT_ONCE = 4
PIECE_BYTES = MIB


class Job(msgspec.Struct, frozen=True):
    """An item, and where it goes: a path of this machine, or a URL."""

    item: Item
    path: str = ""
    url: str = ""


class _FileSink:
    """A fetch writes into the file at the object's own offsets."""

    shift = 0

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def landed(self, span: Span) -> None:
        """The fetch itself says when all of it is there."""


class Copy:
    def __init__(
        self,
        request: CopyRequest,
        remotes: Remotes,
        mount: ThroughMount | None,
        *,
        umask: int,
        say: Callable[[str], None],
    ) -> None:
        self._request = request
        self._remotes = remotes
        self._mount = mount
        self._umask = umask
        self._say = say
        self._sources = Sources(remotes, mount, request)

    async def run(self) -> None:
        """Raises StageFSError: one sentence."""
        target = self._request.target
        if target.is_remote:
            check_writable(target.url)
        items = await self._sources.find()
        if target.is_remote:
            jobs = await self._to_remote(items, self._remotes.public(target.url))
        else:
            jobs = await self._to_here(items, target.path)
        # Of two sources with one name the later one stays, as with scp.
        last = {job.path or job.url: job for job in jobs}
        await self._all([job for job in last.values() if not job.item.is_directory])
        if not target.is_remote:
            await trio.to_thread.run_sync(self._finish_directories, jobs)
        if self._mount is not None and not target.is_remote:
            written = [job.path for job in last.values() if not job.item.is_directory]
            await trio.to_thread.run_sync(self._mount.await_uploads, written)

    # Where

    async def _to_remote(self, items: Sequence[Item], url: str) -> list[Job]:
        into = await self._sources.is_directory(url)
        tops = self._tops(items, into=into, shown=url)
        if into:
            url = url.rstrip("/")
        jobs = []
        for item, below in tops:
            here = url
            for name in below:
                here = join(here, name)
            if not item.is_directory:
                name_to_write(here)
                jobs.append(Job(item, url=here))
        return jobs

    async def _to_here(self, items: Sequence[Item], path: str) -> list[Job]:
        def look() -> bool:
            with telling(path, "written"):
                try:
                    return stat.S_ISDIR(os.stat(path).st_mode)
                except FileNotFoundError:
                    return False

        into = await trio.to_thread.run_sync(look)
        tops = self._tops(items, into=into, shown=path)
        if not into and path.endswith("/") and not items[0].is_directory:
            raise NotFound(f"There is no directory {path}.")
        jobs = [Job(item, path=os.path.join(path, *below)) for item, below in tops]
        await trio.to_thread.run_sync(self._make_directories, jobs)
        return jobs

    def _tops(
        self, items: Sequence[Item], *, into: bool, shown: str
    ) -> list[tuple[Item, tuple[str, ...]]]:
        """Each item with its names below the target."""
        if not into and sum(not item.below for item in items) > 1:
            raise NotADirectory(f"{shown} is no directory: several sources need one.")
        return [
            (item, (item.name, *item.below) if into and item.name else item.below) for item in items
        ]

    def _make_directories(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if not job.item.is_directory:
                if job.item.path is not None:
                    _refuse_same(job.item.path, job.path)
                continue
            with telling(job.path, "made"):
                if not os.path.isdir(job.path):
                    mode = job.item.attributes.mode
                    os.mkdir(job.path, (0o777 if mode is None else mode & 0o777) | 0o700)

    def _finish_directories(self, jobs: Sequence[Job]) -> None:
        """What is in a directory changes its times, so that it comes last."""
        for job in reversed(jobs):
            if not job.item.is_directory:
                continue
            with telling(job.path, "written"):
                attributes = job.item.attributes
                if self._request.preserve and attributes.mtime_ns is not None:
                    os.chmod(job.path, (attributes.mode or 0o755) & 0o777)
                    times = (attributes.atime_ns or attributes.mtime_ns, attributes.mtime_ns)
                    os.utime(job.path, ns=times)
                sync_directory(job.path)

    # Bytes

    async def _all(self, jobs: Sequence[Job]) -> None:
        failures: list[StageFSError] = []
        left = iter(jobs)
        async with trio.open_nursery() as nursery:
            for _ in range(min(FILES_AT_ONCE, len(jobs))):
                nursery.start_soon(self._work, left, failures, nursery.cancel_scope)
        if failures:
            raise failures[0]

    async def _work(
        self, left: Iterator[Job], failures: list[StageFSError], scope: trio.CancelScope
    ) -> None:
        for job in left:
            try:
                await self._one(job)
            except StageFSError as error:
                failures.append(error)
                scope.cancel()
                return
            if self._request.verbose:
                self._say(f"{job.item.shown} -> {job.path or job.url}")

    async def _one(self, job: Job) -> None:
        if job.url and job.item.path is not None:
            await self._sent(job, job.item.path)
        elif job.url:
            await self._passed_on(job)
        else:
            await self._landed(job)

    async def _landed(self, job: Job) -> None:
        item = job.item
        landing = await trio.to_thread.run_sync(self._landing, job)
        try:
            if item.path is not None:
                attributes = await self._read(item, item.path, landing.fd)
            else:
                assert item.info is not None
                attributes = await self._fetched(item.info, landing.fd)
            preserve = self._request.preserve
            finish = functools.partial(landing.finish, attributes, preserve=preserve)
            await trio.to_thread.run_sync(finish)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(landing.abandon)

    def _landing(self, job: Job) -> Landing:
        return Landing(job.path, job.item.shown, umask=self._umask)

    async def _read(self, item: Item, path: str, target: int) -> Attributes:
        source = await trio.to_thread.run_sync(opened_source, path)
        try:
            while True:
                with telling(path, "read"):
                    # A file of the mount may wait for its remote: the copy can be ended then.
                    piece = await trio.to_thread.run_sync(
                        os.read, source, PIECE_BYTES, abandon_on_cancel=True
                    )
                if not piece:
                    return item.attributes
                await trio.to_thread.run_sync(_put_piece, target, piece, item.shown)
        finally:
            os.close(source)

    async def _fetched(self, info: ObjectInfo, target: int) -> Attributes:
        whole = Span(0, info.size_bytes)
        if whole.length:
            remote = self._remotes.for_url(info.url)
            sink = _FileSink(target)
            await remote.fetch(info.url, whole, sink=sink, validator=info.validator)
        return Attributes(info.mode, info.mtime_ns)

    async def _sent(self, job: Job, path: str) -> None:
        source = await trio.to_thread.run_sync(opened_source, path)
        try:
            await self._put(job, source, job.item.attributes)
        finally:
            os.close(source)

    async def _passed_on(self, job: Job) -> None:
        """From remote to remote through a file of this machine that has no name."""
        info = job.item.info
        assert info is not None
        with telling(tempfile.gettempdir(), "written"):
            passing = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
        with passing:
            attributes = await self._fetched(info, passing.fileno())
            await self._put(job, passing.fileno(), attributes)

    async def _put(self, job: Job, source: int, attributes: Attributes) -> None:
        mode = None if attributes.mode is None else attributes.mode & 0o777
        if mode is not None and not self._request.preserve:
            before = await self._mode_there(job.url)
            mode = mode & ~self._umask if before is None else before
        await self._remotes.for_url(job.url).put(
            job.url,
            source=source,
            size_bytes=os.fstat(source).st_size,
            overwrite=True,
            checksum=None,
            mode=mode,
            progress=lambda _sent_bytes: None,
        )
        if self._request.preserve and attributes.mtime_ns is not None:
            await self._remotes.set_mtime(job.url, attributes.mtime_ns)

    async def _mode_there(self, url: str) -> int | None:
        """A file that is replaced keeps its mode, as with scp, which writes into it."""
        if parse(url).scheme not in WITH_DIRECTORIES:
            return None
        try:
            mode = (await self._remotes.for_url(url).stat(url)).mode
        except ObjectMissing:
            return None
        return None if mode is None else mode & 0o777


def _put_piece(target: int, piece: bytes, shown: str) -> None:
    with telling(shown, "copied"):
        write_all(target, piece)


def _refuse_same(source: str, target: str) -> None:
    with telling(source, "read"):
        same = os.path.exists(target) and os.path.samefile(source, target)
    if same:
        raise InvalidName(f"{source} and {target} are the same file.")
