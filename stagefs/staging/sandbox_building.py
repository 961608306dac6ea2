"""Building sandboxes: a directory that nobody sees gets its inputs, then its name, in one step.

A directory under construction lies in TEMPLATES_INODE, where no path leads; a daemon that dies
meanwhile leaves it there, and ``sweep`` removes it at the next start of a mount.  Remotes are
asked before anything is made.  Trio thread; trees of this machine are looked at in a worker
thread.
"""

import functools
import secrets
from collections.abc import Sequence

import msgspec
import trio

from stagefs.config import NamespaceSettings
from stagefs.errors import InvalidManifest, NameExists, NotFound
from stagefs.model import Inode
from stagefs.namespace.node import TEMPLATES_INODE, Node, NodeKind, StagedObject
from stagefs.namespace.store import Namespace
from stagefs.objects.staged import staged_from
from stagefs.staging.manifest import Manifest, Mirrored
from stagefs.staging.mirroring import MirroredEntry, look
from stagefs.staging.names import NameOperations
from stagefs.staging.tree import Tree, parse_place
from stagefs.staging.values import PAGE_ENTRIES_MAX, Progress, ProgressCallback

# Below a linked directory, files beyond this many are not leased: it may hold a million.
LEASED_FILES_MAX = 1000
_UNDER_CONSTRUCTION = "new-"
_LINKED_AT_ONCE = 50


class NewDirectory(msgspec.Struct, frozen=True):
    mode: int = 0o755


class NewSymlink(msgspec.Struct, frozen=True):
    target: str


Thing = StagedObject | Node | NewDirectory | NewSymlink
"""What a name in a sandbox shall be: an object, a node to link, or something new."""


class Parts(msgspec.Struct, frozen=True):
    """What a manifest asks for, found: path in the sandbox -> thing, parents before children."""

    things: dict[tuple[str, ...], Thing]
    inputs: dict[tuple[str, ...], str]


class Built(msgspec.Struct, frozen=True):
    """A directory with its links.  ``linked``: the inode each declared input leads to."""

    directory: Inode
    name: str
    linked: dict[str, int]
    files: list[Node]


class Building:
    def __init__(
        self,
        *,
        namespace: Namespace,
        names: NameOperations,
        tree: Tree,
        settings: NamespaceSettings,
        mountpoint: str,
    ) -> None:
        self._namespace = namespace
        self._names = names
        self._tree = tree
        self._settings = settings
        self._mountpoint = mountpoint

    def public(self, manifest: Manifest) -> Manifest:
        """The manifest as it may be kept: what is secret in its URLs is remembered elsewhere."""
        return msgspec.structs.replace(
            manifest,
            inputs={name: self._public(url) for name, url in manifest.inputs.items()},
            outputs=[
                msgspec.structs.replace(output, to=self._public(output.to))
                for output in manifest.outputs
            ],
        )

    def _public(self, url: str) -> str:
        return url if url.startswith("staging:") else self._names.public(url)

    async def find(
        self, manifest: Manifest, mirrored: Sequence[Mirrored], progress: ProgressCallback
    ) -> Parts:
        """What the sandbox shall show.  Changes nothing; raises what the remotes say, and
        InvalidManifest when two things would have one name."""
        things: dict[tuple[str, ...], Thing] = {}
        for place in mirrored:
            for parts, thing in await self._mirrored(place):
                if not isinstance(things.get(parts), NewDirectory) or not isinstance(
                    thing, NewDirectory
                ):
                    _put(things, parts, thing)
        sources = await self._names.sources(list(manifest.inputs.values()), progress)
        inputs = {tuple(name.split("/")): name for name in manifest.inputs}
        for parts, source in zip(inputs, sources, strict=True):
            _put(things, parts, source)
        return Parts(things, inputs)

    async def _mirrored(self, mirrored: Mirrored) -> list[tuple[tuple[str, ...], Thing]]:
        look_at = functools.partial(look, mirrored.path, mountpoint=self._mountpoint)
        tree = await trio.to_thread.run_sync(look_at)
        top = tuple(part for part in mirrored.name.split("/") if part)
        if tree.inside is not None:
            return [(top, await self._tree.node(parse_place(tree.inside)))]
        return [((*top, *entry.parts), self._thing(entry)) for entry in tree.entries]

    def _thing(self, entry: MirroredEntry) -> Thing:
        if entry.info is not None:
            return staged_from(entry.info, default_mode=self._settings.default_file_mode)
        if entry.target is not None:
            return NewSymlink(entry.target)
        return NewDirectory(entry.mode & 0o777)

    async def build(self, parts: Parts, progress: ProgressCallback) -> Built:
        """A new directory under construction, with everything in it."""
        name = f"{_UNDER_CONSTRUCTION}{secrets.token_hex(8)}"
        directory = self._namespace.make_directory(TEMPLATES_INODE, name)
        try:
            return await self.fill(directory.inode, name, parts, progress, replace=False)
        except BaseException:
            self.drop(name)
            raise

    def drop(self, name: str) -> None:
        self._namespace.remove_tree(TEMPLATES_INODE, name)

    async def fill(
        self,
        directory: Inode,
        name: str,
        parts: Parts,
        progress: ProgressCallback,
        *,
        replace: bool,
    ) -> Built:
        """``replace``: what has the name of an input, and is not that input, gives way to it."""
        filling = _Filling(self._namespace, self._names, directory, replace=replace)
        files: dict[Inode, Node] = {}
        linked: dict[str, int] = {}
        for count, (path, thing) in enumerate(parts.things.items()):
            if count % _LINKED_AT_ONCE == 0:
                progress(Progress("linking", count, len(parts.things), unit="names"))
                await trio.lowlevel.checkpoint()
            node = filling.put(path, thing)
            if node.kind is NodeKind.FILE:
                files[node.inode] = node
            elif node.lower:
                files |= await self.files_below(node.inode, LEASED_FILES_MAX - len(files))
            if path in parts.inputs:
                linked[parts.inputs[path]] = node.lower or node.inode
        return Built(directory, name, linked, list(files.values()))

    async def files_below(self, directory: Inode, limit: int) -> dict[Inode, Node]:
        """Some staged files below a linked directory, as far as the namespace knows them."""
        found: dict[Inode, Node] = {}
        left = [self._namespace.node(directory).lower]
        while left and len(found) < limit:
            page = self._namespace.page(left.pop(), 0, min(limit, PAGE_ENTRIES_MAX))
            for _cookie, _name, node in page:
                if node.kind is NodeKind.DIRECTORY:
                    left.append(node.inode)
                elif node.object_id is not None:
                    found[node.inode] = node
            await trio.lowlevel.checkpoint()
        return found

    def sweep(self) -> None:
        """Remove what daemons that died were building, and templates without sandboxes."""
        after = 0
        while page := self._namespace.page(TEMPLATES_INODE, after, PAGE_ENTRIES_MAX):
            after = page[-1][0]
            for _cookie, name, node in page:
                if name.startswith(_UNDER_CONSTRUCTION) and not self._namespace.overlays(
                    node.inode
                ):
                    self.drop(name)


def _put(things: dict[tuple[str, ...], Thing], parts: tuple[str, ...], thing: Thing) -> None:
    if parts in things or not parts:
        raise InvalidManifest(
            f"Two inputs or mirrors would both be {'/'.join(parts) or '.'} in the sandbox: give one"
            " of them another name."
        )
    things[parts] = thing


class _Filling:
    """Names put into one directory.  Knows the subdirectories that it came through."""

    def __init__(
        self, namespace: Namespace, names: NameOperations, top: Inode, *, replace: bool
    ) -> None:
        self._namespace = namespace
        self._names = names
        self._replace = replace
        self._directories: dict[tuple[str, ...], Inode] = {(): top}

    def put(self, path: tuple[str, ...], thing: Thing) -> Node:
        above = self._directory(path[:-1])
        name = path[-1]
        old = self._there(above, name) if self._replace else None
        if old is not None:
            if self._is_so(old, thing):
                return old
            self._remove(above, name, old)
        match thing:
            case NewDirectory(mode):
                node = self._namespace.make_directory(above, name, mode)
                self._directories[path] = node.inode
            case NewSymlink(target):
                node = self._namespace.make_symlink(above, name, target)
            case Node():
                node = self._names.link(thing, above, name)
            case StagedObject():
                node = self._names.register(above, name, thing)
        if self._replace:
            self._names.changed(above, name)
        return node

    def _directory(self, path: tuple[str, ...]) -> Inode:
        known = self._directories.get(path)
        if known is None:
            above = self._directory(path[:-1])
            node = self._there(above, path[-1])
            if node is None:
                node = self._namespace.make_directory(above, path[-1])
            elif node.kind is not NodeKind.DIRECTORY:
                raise NameExists(
                    f"{'/'.join(path)} in the sandbox is a file, but inputs shall lie below it."
                )
            known = self._directories[path] = node.inode
        return known

    def _there(self, directory: Inode, name: str) -> Node | None:
        try:
            return self._namespace.lookup(directory, name)
        except NotFound:
            return None

    def _is_so(self, node: Node, thing: Thing) -> bool:
        match thing:
            case NewDirectory():
                return node.kind is NodeKind.DIRECTORY and not node.lower
            case NewSymlink(target):
                return node.target == target
            case Node():
                return thing.inode in (node.inode, node.lower or None)
            case StagedObject():
                return not node.content and node.object_id == thing.object_id

    def _remove(self, directory: Inode, name: str, node: Node) -> None:
        self._names.forget_removed(directory, name, node)
        if node.kind is NodeKind.DIRECTORY:
            self._namespace.remove_tree(directory, name)
        else:
            self._namespace.remove(directory, name)
