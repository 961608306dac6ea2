"""What the sources of a copy are: every file and directory, with its place below the target.

Files of this machine are looked at in worker threads, as scp does it: symbolic links are
followed.  Remote directories are listed by their remotes; remote files get a path in the mount
where one is used.  Trio thread.
"""

import contextlib
import fnmatch
import os
import re
import stat
from collections.abc import AsyncIterator, Sequence

import msgspec
import trio

from stagefs.copying.local_files import Attributes, attributes_of, telling
from stagefs.copying.request import CopyRequest, Place
from stagefs.copying.through_mount import ThroughMount
from stagefs.errors import (
    AccessDenied,
    DeadlineExceeded,
    InvalidName,
    InvalidUrl,
    NoDaemon,
    NotFound,
    NotSupported,
    ObjectMissing,
    RemoteError,
    RemoteUnavailable,
    StageFSError,
)
from stagefs.model import EntryKind, ListedEntry, ObjectInfo
from stagefs.remote.registry import Remotes
from stagefs.remote.url import BUCKET_SCHEMES, join, last_name, parse

DEPTH_MAX = 100
# Where a directory is something of its own, so that one may ask for it.
WITH_DIRECTORIES = frozenset({"ssh", "sftp"})
_WILDCARDS = re.compile(r"[*?\[]")
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)


class Item(msgspec.Struct, frozen=True, kw_only=True):
    """One file or directory.  ``below`` are the names that follow the target's; ``name`` is what
    it is called in a target that is a directory.  A file has a ``path`` of this machine (in the
    mount, maybe) or an ``info``; a directory has neither.  ``shown`` is for messages."""

    below: tuple[str, ...] = ()
    name: str
    shown: str
    path: str | None = None
    info: ObjectInfo | None = None
    attributes: Attributes = Attributes()

    @property
    def is_directory(self) -> bool:
        return self.path is None and self.info is None


class Sources:
    def __init__(self, remotes: Remotes, mount: ThroughMount | None, request: CopyRequest) -> None:
        self._remotes = remotes
        self._mount = mount
        self._request = request
        # One that was found here may have other credentials, or be meant for something else.
        self._ignored = NoDaemon if request.mount_is_meant else StageFSError

    async def find(self) -> list[Item]:
        """All of them, each source's directories before what is in them."""
        found: list[Item] = []
        for place in self._request.sources:
            async for one in self._matches(place):
                found += await (self._remote(one) if one.is_remote else self._local(one))
        return found

    # On this machine

    async def _local(self, place: Place) -> list[Item]:
        return await trio.to_thread.run_sync(_walked, place.path, self._request.recursive)

    # At remotes

    async def _remote(self, place: Place) -> list[Item]:
        url = self._remotes.public(place.url)
        name = last_name(url)
        if not url.endswith("/"):
            try:
                return [await self._file(url, name)]
            except (AccessDenied, DeadlineExceeded, RemoteUnavailable, InvalidUrl):
                raise
            except StageFSError:
                # Maybe it is a directory.
                if not await self.is_directory(url):
                    raise
        if not self._request.recursive:
            raise InvalidName(f"{url} is a directory: copy it with -r.")
        items = [Item(name=name, shown=url)]
        async for below, entry in self._listed(url, ()):
            attributes = Attributes()
            if entry.info is not None:
                attributes = Attributes(entry.info.mode, entry.info.mtime_ns)
            info = entry.info
            if entry.kind is EntryKind.FILE and info is None:
                info = await self._remotes.for_url(entry.url).stat(entry.url)
            items.append(
                Item(below=below, name=name, shown=entry.url, info=info, attributes=attributes)
            )
        return await self._through_mount(items)

    async def _file(self, url: str, name: str) -> Item:
        if self._mount is not None:
            with contextlib.suppress(self._ignored):
                (path,) = await trio.to_thread.run_sync(self._mount.linked, [url])
                return await trio.to_thread.run_sync(_in_mount, Item(name=name, shown=url), path)
        info = await self._remotes.for_url(url).stat(url)
        attributes = Attributes(info.mode, info.mtime_ns)
        return Item(name=name, shown=url, info=info, attributes=attributes)

    async def _through_mount(self, items: Sequence[Item]) -> list[Item]:
        files = [item for item in items if item.info is not None]
        if self._mount is None or not files:
            return [*items]
        try:
            paths = await trio.to_thread.run_sync(
                self._mount.linked, [item.info.url for item in files if item.info is not None]
            )
        except self._ignored:
            return [*items]
        placed = dict(zip(map(id, files), paths, strict=True))

        def look() -> list[Item]:
            return [
                _in_mount(item, placed[id(item)]) if id(item) in placed else item for item in items
            ]

        return await trio.to_thread.run_sync(look)

    async def is_directory(self, url: str) -> bool:
        """Whether a remote has a directory of that name.  Raises what keeps it from telling."""
        if url.endswith("/"):
            return True
        if parse(url).scheme not in WITH_DIRECTORIES and not self._request.recursive:
            return False
        try:
            async for _page in self._remotes.for_url(url).list(url):
                return True
        except (ObjectMissing, NotSupported):
            return False
        except (AccessDenied, DeadlineExceeded, RemoteUnavailable):
            raise
        except RemoteError:
            return False
        # Buckets have no directories: one is there when something is in it.
        return parse(url).scheme not in BUCKET_SCHEMES

    async def _listed(
        self, url: str, below: tuple[str, ...]
    ) -> AsyncIterator[tuple[tuple[str, ...], ListedEntry]]:
        if len(below) > DEPTH_MAX:
            raise InvalidName(f"{url} is more than {DEPTH_MAX} directories deep: is it a loop?")
        async for page in self._remotes.for_url(url).list(url):
            for entry in page:
                here = (*below, entry.name)
                yield here, entry
                if entry.kind is EntryKind.DIRECTORY:
                    async for inside in self._listed(entry.url, here):
                        yield inside

    # Wildcards

    async def _matches(self, place: Place) -> AsyncIterator[Place]:
        """What the wildcards of a ``host:path`` match; itself when nothing does, as scp."""
        if not place.is_pattern:
            yield place
            return
        plain = _ESCAPED.sub(r"\1", place.path) if not place.is_remote else _unescaped(place.url)
        found: list[Place] = []
        if place.is_remote and _WILDCARDS.search(_ESCAPED.sub("", parse(place.url).path)):
            found = [Place(url=url) async for url in self._glob(place.url)]
        elif not place.is_remote:
            names = await trio.to_thread.run_sync(_glob_local, place.path)
            found = [Place(path=name) for name in names]
        for one in found:
            yield one
        if not found:
            yield Place(url=plain) if place.is_remote else Place(path=plain)

    async def _glob(self, url: str) -> AsyncIterator[str]:
        parts = parse(url)
        components = parts.path.split("/")
        first = next(
            number
            for number, component in enumerate(components)
            if _WILDCARDS.search(_ESCAPED.sub("", component))
        )
        above = _ESCAPED.sub(r"\1", "/".join(components[:first])) or "/"
        pattern, rest = components[first], components[first + 1 :]
        directory = str(msgspec.structs.replace(parts, path=above))
        names: list[str] = []
        async for page in self._remotes.for_url(directory).list(directory):
            names += [entry.name for entry in page if _matches(entry.name, pattern)]
        for name in sorted(names):
            matched = directory
            for component in (name, *(_ESCAPED.sub(r"\1", one) for one in rest)):
                matched = join(matched, component)
            yield matched


def _unescaped(url: str) -> str:
    parts = parse(url)
    return str(msgspec.structs.replace(parts, path=_ESCAPED.sub(r"\1", parts.path)))


def _matches(name: str, pattern: str) -> bool:
    if name.startswith(".") and not pattern.startswith("."):
        return False
    return fnmatch.fnmatchcase(name, re.sub(r"\\([*?\[])", r"[\1]", pattern).replace("\\", ""))


def _glob_local(pattern: str) -> list[str]:
    """Of the last component only, as batch systems use it."""
    directory, name = os.path.split(pattern)
    directory = _ESCAPED.sub(r"\1", directory)
    if not _WILDCARDS.search(_ESCAPED.sub("", name)):
        return []
    with contextlib.suppress(OSError), os.scandir(directory or ".") as entries:
        names = sorted(entry.name for entry in entries if _matches(entry.name, name))
        return [os.path.join(directory, each) for each in names]
    return []


def _in_mount(item: Item, path: str) -> Item:
    with telling(item.shown, "read"):
        attributes = attributes_of(os.stat(path))
    return msgspec.structs.replace(item, path=path, info=None, attributes=attributes)


def _walked(path: str, recursive: bool) -> list[Item]:
    name = os.path.basename(path.rstrip("/"))
    if name == "..":
        name = os.path.basename(os.path.realpath(path))
    items: list[Item] = []

    def walk(here: str, below: tuple[str, ...]) -> None:
        if len(below) > DEPTH_MAX:
            raise InvalidName(f"{here} is more than {DEPTH_MAX} directories deep: is it a loop?")
        with telling(here, "read"):
            status = os.stat(here)
            is_directory = stat.S_ISDIR(status.st_mode)
            if is_directory and not recursive:
                raise InvalidName(f"{here} is a directory: copy it with -r.")
            if not is_directory and not stat.S_ISREG(status.st_mode):
                raise InvalidName(f"{here} is not a regular file: it cannot be copied.")
            if not is_directory and path.endswith("/"):
                raise NotFound(f"{path} is no directory.")
            items.append(
                Item(
                    below=below,
                    name="" if name == "." else name,
                    shown=here,
                    path=None if is_directory else here,
                    attributes=attributes_of(status),
                )
            )
            names = sorted(os.listdir(here)) if is_directory else []
        for each in names:
            walk(os.path.join(here, each), (*below, each))

    walk(path, ())
    return items
