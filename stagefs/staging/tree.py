"""From the paths of the API to nodes, and from nodes to what the API tells of them.

A path is ``staging:///a/b`` (the namespace) or ``/tasks/t1/x`` (relative to the mountpoint).
Nothing here changes a name, but for ``make_directories``.  Trio thread; only bound directories
may wait for a remote, with the deadline that ``Bindings`` keeps.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from stagefs.errors import InvalidName, NotADirectory, NotFound
from stagefs.model import ROOT_INODE, Inode
from stagefs.namespace.node import ContentKind, Node, NodeKind, encoded_name
from stagefs.namespace.store import Namespace
from stagefs.objects.objects import Objects
from stagefs.staging.values import NameStat
from stagefs.vfs.attributes import cached_state, upload_state
from stagefs.vfs.bindings import Bindings

STAGING = "staging"
SCHEME = "staging:"
_KINDS = {NodeKind.FILE: "file", NodeKind.DIRECTORY: "directory", NodeKind.SYMLINK: "symlink"}


class Invalidations(Protocol):
    """News for the kernel: what it must ask for again."""

    def entry(self, parent: Inode, name: str) -> None: ...

    def inode(self, inode: Inode) -> None: ...

    async def settled(self) -> None:
        """Return when the kernel knows all of it, or does not answer."""
        ...


class Place(msgspec.Struct, frozen=True):
    """A path taken apart.  ``is_directory``: it ended with a slash."""

    parts: tuple[str, ...]
    is_directory: bool

    @property
    def name(self) -> str:
        return self.parts[-1]

    @property
    def above(self) -> "Place":
        return Place(self.parts[:-1], is_directory=True)

    def below(self, name: str) -> "Place":
        return Place((*self.parts, name), is_directory=False)

    def __str__(self) -> str:
        if self.parts[:1] == (STAGING,):
            return f"staging:///{'/'.join(self.parts[1:])}"
        return f"/{'/'.join(self.parts)}"


def parse_place(path: str) -> Place:
    """Raises InvalidName for what can never be a path here."""
    if path.startswith(SCHEME):
        rest = path.removeprefix(SCHEME)
        if not rest.startswith("///"):
            raise InvalidName(f"{path!r} is no staging name: write staging:///name.")
        path = f"/{STAGING}/{rest[3:]}"
    elif not path.startswith("/"):
        raise InvalidName(f"{path!r} is no path in the mount: write staging:///name, or /path.")
    parts = tuple(part for part in path.split("/") if part)
    for part in parts:
        encoded_name(part)
    return Place(parts, is_directory=path.endswith("/") or not parts)


class Tree:
    def __init__(
        self,
        namespace: Namespace,
        objects: Objects,
        bindings: Bindings,
        hidden_links: Mapping[Inode, int],
        *,
        live: Callable[[Node], Node],
    ) -> None:
        """``hidden_links``: how many of a file's links nobody can see.  ``live``: a local file with
        the size and the times that it has."""
        self._live = live
        self._hidden_links = hidden_links
        self._namespace = namespace
        self._objects = objects
        self._bindings = bindings

    async def node(self, place: Place) -> Node:
        """Raises NotFound, NotADirectory; what a remote says of a bound directory."""
        node = self._namespace.node(ROOT_INODE)
        for depth, part in enumerate(place.parts):
            node = await self._below(node, part, Place(place.parts[: depth + 1], False))
        if place.is_directory and node.kind is not NodeKind.DIRECTORY:
            raise NotADirectory(f"{place} is not a directory.")
        return node

    async def find(self, place: Place) -> Node | None:
        try:
            return await self.node(place)
        except NotFound:
            return None

    async def _below(self, directory: Node, name: str, place: Place) -> Node:
        if directory.kind is not NodeKind.DIRECTORY:
            raise NotADirectory(f"{place.above} is not a directory, so there is no {place}.")
        await self.shown(directory, name)
        try:
            node = self._namespace.lookup(directory.inode, name)
        except NotFound as exc:
            raise NotFound(f"There is no {place}.") from exc
        return self._namespace.newest(node.inode) if node.successor else node

    async def shown(self, directory: Node, name: str | None = None) -> None:
        """Return when the names of a directory are those that its remote has, if it is bound."""
        bound = self._bindings.shown_by(directory)
        if bound is not None:
            await self._bindings.listed(bound)
            if name is not None:
                await self._bindings.found(directory, bound, name)

    async def directory(self, place: Place) -> Node:
        """As ``node``, and a directory."""
        return await self.node(Place(place.parts, is_directory=True))

    async def make_directories(self, place: Place) -> Node:
        """The directory at ``place``, made with its parents where they are missing."""
        node = self._namespace.node(ROOT_INODE)
        for depth, part in enumerate(place.parts):
            here = Place(place.parts[: depth + 1], is_directory=False)
            try:
                node = await self._below(node, part, here)
            except NotFound:
                if depth == 0:
                    refuse_root(here)
                node = self._namespace.make_directory(node.inode, part)
        if node.kind is not NodeKind.DIRECTORY:
            raise NotADirectory(f"{place} is not a directory.")
        return node

    def _upload(self, node: Node) -> str | None:
        if node.content is not ContentKind.PUBLISHED:
            return None
        return upload_state(self._namespace.uploads_of(node.inode))

    def describe(self, place: Place, node: Node, *, cached: bool = True) -> NameStat:
        """What is known of a node, asking nobody; without ``cached`` not even the cache."""
        if node.content is not ContentKind.OBJECT:
            node = self._live(node)
        of = node.object_id
        held = self._objects.cached_bytes(node) if cached and of is not None else 0
        error = self._objects.last_error(node) if of is not None else None
        return NameStat(
            path=str(place),
            name=place.name if place.parts else "",
            kind=_KINDS[node.kind],
            inode=node.inode,
            size_bytes=node.size_bytes,
            mtime_ns=node.mtime_ns,
            mode=node.mode,
            links=node.nlink - self._hidden_links.get(node.inode, 0),
            url=of.url if of is not None else node.bind_url,
            version=(node.validator or of.version) if of is not None else None,
            checksum=str(node.checksum) if node.checksum is not None else None,
            state=cached_state(node, held) if cached and of is not None else None,
            cached_bytes=held,
            bound=node.bind_url is not None,
            writable=node.writable,
            upload=self._upload(node),
            last_error=error.sentence if error is not None else None,
            replicas=self._objects.replicas.lines(of) if cached and of is not None else [],
        )


def refuse_root(place: Place) -> None:
    """New names directly in the mount's root are made by hand only; a typing error is likelier."""
    raise NotFound(f"There is no {place}: write staging:///name for a name in the namespace.")
