"""The operations on names: stage in, bind, list, stat, remove, move.

Each asks the remotes first and changes the namespace when all have answered, so that a failure
leaves nothing half made.  Trio thread.  Every change of a name that the kernel may know is told
to it.
"""

import functools
from collections.abc import Awaitable, Callable, Sequence

import msgspec
import trio

from stagefs.config import NamespaceSettings
from stagefs.errors import InvalidName, IsADirectory, NameExists, NotEmpty, StageFSError
from stagefs.model import Checksum, Inode
from stagefs.namespace.node import (
    IMMUTABLE_CHECKED_NS,
    Node,
    NodeKind,
    RenameFlags,
    StagedObject,
)
from stagefs.namespace.store import Namespace
from stagefs.objects.objects import Objects
from stagefs.objects.staged import staged_from
from stagefs.remote.registry import Remotes
from stagefs.remote.url import check_writable, last_name, parse
from stagefs.staging import values
from stagefs.staging.tree import SCHEME, Invalidations, Place, Tree, parse_place, refuse_root
from stagefs.staging.values import Progress, ProgressCallback
from stagefs.vfs.changes import Changes
from stagefs.vfs.workspace import Workspace

ASKED_AT_ONCE = 16
# Attributes of so many files are told to the kernel when a tree goes; others time out.
FORGOTTEN_MAX = 1000

Source = StagedObject | Node
"""What a new name leads to: an object that a remote has, or a node that is there already."""


class NameOperations:
    def __init__(
        self,
        *,
        namespace: Namespace,
        objects: Objects,
        remotes: Remotes,
        tree: Tree,
        invalidations: Invalidations,
        changes: Changes,
        workspace: Workspace,
        settings: NamespaceSettings,
    ) -> None:
        self._namespace = namespace
        self._objects = objects
        self._remotes = remotes
        self._tree = tree
        self._invalidations = invalidations
        self._changes = changes
        self._workspace = workspace
        self._settings = settings

    # Staging in

    async def stage_in(
        self, request: values.StageIn, progress: ProgressCallback
    ) -> values.StagedIn:
        if request.checksum is not None and len(request.urls) != 1:
            raise InvalidName("A checksum belongs to one URL: stage the others in one by one.")
        places = await self._places(request)
        for place in places:
            await self._refuse_existing(place, replace=request.replace)
        sources = await self.sources(request.urls, progress, request.checksum)
        if request.immutable:
            sources = [_immutable(source) for source in sources]
        nodes = [
            await self._stage(place, source, request)
            for place, source in zip(places, sources, strict=True)
        ]
        return values.StagedIn(
            [self._tree.describe(place, node) for place, node in zip(places, nodes, strict=True)]
        )

    async def _places(self, request: values.StageIn) -> list[Place]:
        """Where each URL goes."""
        target = parse_place(request.target)
        existing = await self._tree.find(target)
        is_directory = existing is not None and existing.kind is NodeKind.DIRECTORY
        if len(request.urls) == 1 and not target.is_directory and not is_directory:
            return [target]
        if existing is not None and not is_directory:
            raise NameExists(f"{target} is a file: several URLs need a directory.")
        places = [target.below(self._last_name(url)) for url in request.urls]
        if len(set(places)) < len(places):
            raise InvalidName(
                f"Two of the URLs would get the same name in {target}: stage them in one by one."
            )
        return places

    def _last_name(self, url: str) -> str:
        name = last_name(url)
        if not name:
            raise InvalidName(f"{self.public(url)} tells no name: write staging:///name for it.")
        return name

    async def _refuse_existing(self, place: Place, *, replace: bool) -> None:
        if len(place.parts) < 2:
            refuse_root(place)
        existing = await self._tree.find(place)
        if existing is None:
            return
        if existing.kind is NodeKind.DIRECTORY:
            raise IsADirectory(f"{place} is a directory: name something in it, or remove it first.")
        if not replace:
            raise NameExists(
                f"{place} exists: use --replace for a new version of it, or take another name."
            )

    async def _stage(self, place: Place, source: Source, request: values.StageIn) -> Node:
        directory = await self._tree.make_directories(place.above)
        old = await self._tree.find(place)
        if isinstance(source, Node):
            if old is not None:
                self.forget_removed(directory.inode, place.name, old)
                self._namespace.remove(directory.inode, place.name)
            node = self.link(source, directory.inode, place.name)
        elif old is None:
            node = self.register(directory.inode, place.name, source)
        elif old.object_id == source.object_id and old.checksum == source.checksum:
            node = self._namespace.touch_checked(old.inode, source.checked_ns)
        else:
            node = self._namespace.replace(directory.inode, place.name, source)
            self.forget_removed(directory.inode, place.name, old)
        self.changed(directory.inode, place.name)
        return node

    def register(self, directory: Inode, name: str, source: StagedObject) -> Node:
        """The node of the same version when there is one, so that its readers share one page
        cache; else a new one."""
        known = None
        if source.checksum is None and source.checked_ns != IMMUTABLE_CHECKED_NS:
            known = self._namespace.find_object(source.url, source.version)
        if known is not None and known.checksum is None:
            self._invalidations.inode(known.inode)
            return self._namespace.link(known.inode, directory, name)
        return self._namespace.register(directory, name, source)

    def link(self, source: Node, directory: Inode, name: str) -> Node:
        if source.kind is NodeKind.DIRECTORY:
            return self._namespace.link_directory(source.inode, directory, name)
        self._invalidations.inode(source.inode)
        return self._changes.link(source.inode, directory, name, None)

    async def sources(
        self, urls: Sequence[str], progress: ProgressCallback, checksum: Checksum | None = None
    ) -> list[Source]:
        """What each URL leads to.  Asks the remotes, several at a time; raises the first error."""
        found: list[Source | None] = [None] * len(urls)
        asked = 0

        async def ask(position: int) -> None:
            nonlocal asked
            found[position] = await self._source(urls[position], checksum)
            asked += 1
            progress(Progress("asking the remotes", asked, len(urls), unit="objects"))

        await first_error(
            [functools.partial(ask, position) for position in range(len(urls))], ASKED_AT_ONCE
        )
        return [source for source in found if source is not None]

    async def _source(self, url: str, checksum: Checksum | None) -> Source:
        if url.startswith(SCHEME):
            return await self._tree.node(parse_place(url))
        said = await self._objects.stat(self.public(url))
        staged = staged_from(said, default_mode=self._settings.default_file_mode)
        if checksum is None:
            return staged
        # The checksum is what fixes the content: another declaration is another object.
        return msgspec.structs.replace(staged, checksum=checksum, version=str(checksum))

    def public(self, url: str) -> str:
        """First of all: from here on nobody sees a secret."""
        return self._remotes.public(url)

    async def bind(self, request: values.Bind) -> values.NameStat:
        if request.url.startswith(SCHEME):
            raise InvalidName(
                f"{request.url} is a name already: link it with `stagefs sandbox create --in`, or"
                " `ln -s` in the mount."
            )
        url = self.public(request.url)
        self._remotes.for_url(url)  # raises InvalidUrl where no remote serves it
        if request.writable:
            check_writable(url)
        elif request.overwrite or request.propagate_delete:
            raise InvalidName("--overwrite and --propagate-delete are for --writable bindings.")
        if parse(url).query is not None:
            raise InvalidName(f"{url} has a query, so names cannot be looked for below it.")
        place = parse_place(request.target)
        await self._refuse_existing(place, replace=False)
        directory = await self._tree.make_directories(place.above)
        ttl_s = self._settings.listing_ttl_s if request.ttl_s is None else request.ttl_s
        node = self._namespace.bind(
            *(directory.inode, place.name, url, ttl_s),
            writable=request.writable,
            overwrites=request.overwrite,
            deletes=request.propagate_delete,
        )
        self.changed(directory.inode, place.name)
        self._remotes.connect_soon(url)
        return self._tree.describe(place, node)

    # Looking

    async def list_names(self, request: values.ListNames) -> values.NamePage:
        place = parse_place(request.path)
        directory = await self._tree.directory(place)
        await self._tree.shown(directory)
        limit = max(1, min(request.limit, values.PAGE_ENTRIES_MAX))
        try:
            after = int(request.after or 0)
        except ValueError as exc:
            raise InvalidName(f"{request.after!r} continues no listing.") from exc
        page = self._namespace.page(directory.inode, after, limit)
        entries = []
        for _cookie, name, node in page:
            entries.append(self._tree.describe(place.below(name), node, cached=request.cached))
            if request.cached:
                await trio.lowlevel.checkpoint()
        more = str(page[-1][0]) if len(page) == limit else None
        return values.NamePage(entries, after=more)

    async def stat(self, request: values.OnePath) -> values.NameStat:
        place = parse_place(request.path)
        return self._tree.describe(place, await self._tree.node(place))

    # Changing names

    async def remove(self, request: values.RemoveName) -> values.Removed:
        place = parse_place(request.path)
        if not place.parts:
            raise InvalidName("The root of the mount cannot be removed: unmount it.")
        node = await self._tree.node(place)
        directory = await self._tree.directory(place.above)
        self.forget_removed(directory.inode, place.name, node)
        if node.kind is not NodeKind.DIRECTORY:
            self._changes.unlink(directory.inode, place.name, None)
        elif request.recursive:
            if directory.deletes:
                await self._remove_below(node)
            self._namespace.remove_tree(directory.inode, place.name)
            await self.purge()
            self._workspace.names_went()
        else:
            self._remove_directory(directory.inode, place)
        self.changed(directory.inode, place.name)
        return values.Removed(1)

    async def _remove_below(self, directory: Node) -> None:
        """One by one, so that each object is removed at the remote.  (To remove the binding itself
        removes nothing there.)"""
        await self._tree.shown(directory)
        while page := self._namespace.page(directory.inode, 0, values.PAGE_ENTRIES_MAX):
            for _cookie, name, node in page:
                if node.kind is NodeKind.DIRECTORY:
                    await self._remove_below(node)
                    self._namespace.remove_tree(directory.inode, name)
                else:
                    self._changes.unlink(directory.inode, name, None)

    def _remove_directory(self, above: Inode, place: Place) -> None:
        try:
            self._namespace.remove_directory(above, place.name)
        except NotEmpty as exc:
            raise NotEmpty(
                f"{place} is not empty: use --recursive; nothing at a remote is touched."
            ) from exc

    async def purge(self) -> None:
        while self._namespace.purge():
            await trio.lowlevel.checkpoint()

    async def move(self, request: values.MoveName) -> values.NameStat:
        source, target = parse_place(request.source), parse_place(request.target)
        if not source.parts:
            raise InvalidName("The root of the mount cannot be moved.")
        existing = await self._tree.find(target)
        if existing is not None and existing.kind is NodeKind.DIRECTORY:
            target = target.below(source.name)
            existing = await self._tree.find(target)
        if existing is not None:
            raise NameExists(f"{target} exists: remove it first, or take another name.")
        await self._tree.node(source)
        old = await self._tree.directory(source.above)
        new = await self._tree.directory(target.above)
        self._changes.rename(
            *(old.inode, source.name, new.inode, target.name), RenameFlags.NOREPLACE, None
        )
        node = self._namespace.lookup(new.inode, target.name)
        self.changed(old.inode, source.name)
        self.changed(new.inode, target.name)
        return self._tree.describe(target, node)

    # What the kernel must hear

    def changed(self, directory: Inode, name: str) -> None:
        """A name leads elsewhere: here, and in the directories that show this one."""
        self._invalidations.entry(directory, name)
        self._invalidations.inode(directory)
        for overlay in self._namespace.overlays(directory):
            self._invalidations.entry(overlay, name)
            self._invalidations.inode(overlay)

    def many_changed(self, directory: Inode, names: Sequence[str]) -> None:
        """As ``changed`` for new names: somebody may have looked for them in vain."""
        for shown in (directory, *self._namespace.overlays(directory)):
            for name in names:
                self._invalidations.entry(shown, name)
            self._invalidations.inode(shown)

    def attributes_changed(self, inode: Inode) -> None:
        self._invalidations.inode(inode)

    def forget_removed(self, directory: Inode, name: str, node: Node) -> None:
        """Files lose a link: their other names shall show it."""
        if node.kind is not NodeKind.DIRECTORY:
            self._invalidations.inode(node.inode)
            return
        for _cookie, _name, below in self._namespace.page(node.inode, 0, FORGOTTEN_MAX):
            if below.kind is NodeKind.FILE:
                self._invalidations.inode(below.inode)


def _immutable(source: Source) -> Source:
    if isinstance(source, Node):
        return source
    return msgspec.structs.replace(source, checked_ns=IMMUTABLE_CHECKED_NS)


async def first_error(works: Sequence[Callable[[], Awaitable[None]]], at_once: int) -> None:
    """Run all, ``at_once`` at a time; the first error ends the others and is raised."""
    errors: list[StageFSError] = []
    limit = trio.CapacityLimiter(at_once)

    async with trio.open_nursery() as nursery:

        async def run(work: Callable[[], Awaitable[None]]) -> None:
            async with limit:
                try:
                    await work()
                except StageFSError as error:
                    errors.append(error)
                    nursery.cancel_scope.cancel()

        for work in works:
            nursery.start_soon(run, work)
    if errors:
        raise errors[0]
