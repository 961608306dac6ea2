"""Read-ahead that learns: what the next input of a task will be, from earlier tasks of its kind.

While sandboxes live, the first use (open) of each of their inputs is noted.  The order of a
task is that of its kind (``kinds``), and when another task of the kind opens an input, those that
follow in the order are fetched ahead of it: until they are ``ahead_bytes_max`` together, a few
at a time for the whole mount, so that reads which wait keep most of the remote's places.

A sandbox is watched from the moment it has its inputs.  An input says whose task it is that
opens it, unless several sandboxes have it: then it counts for those whose tasks are at work
already.  Sandboxes of one template are watched as one, because they have their inputs in common.
What happens here answers no request: a daemon that dies loses the notes of tasks at work.

Concurrency: trio thread; ``used`` never waits.  Fetches are tasks in the nursery of ``running``
and are cancelled when their sandbox ends.
"""

import contextlib
import functools
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path

import trio

from stagefs.errors import NotFound, StageFSError
from stagefs.model import Inode
from stagefs.namespace.node import ContentKind, Node, NodeKind
from stagefs.namespace.store import Namespace
from stagefs.objects.objects import Objects
from stagefs.vfs import kinds
from stagefs.vfs.kinds import ORDER_MAX, Orders

log = logging.getLogger(__name__)

NAME = "kinds.json"
# Fetches ahead of tasks at a time: a quarter of the places that each remote has by default.
AHEAD_AT_ONCE = 4
# Inputs of all sandboxes that are watched; the oldest sandboxes are watched no more.
WATCHED_INPUTS_MAX = 100_000
# Of a sandbox whose links are found by looking: more inputs than that are no pattern.
LOOKED_AT_MAX = 4 * ORDER_MAX


class Watched:
    """One sandbox, or one template.  ``links``: name -> inode, None until they are looked at.

    ``places`` is by inode; ``order`` are the places used until now.  ``position`` is how far in
    the order of its kind the task is.  ``is_whole``: it was watched from its beginning, so others
    may learn of it.
    """

    __slots__ = (
        "brought", "directory", "inodes", "is_whole", "kind", "known_inputs", "links", "order",
        "places", "position", "under_way",
    )  # fmt: skip

    def __init__(
        self, directory: Inode, links: Mapping[str, Inode] | None, *, is_whole: bool
    ) -> None:
        self.directory = directory
        self.links = links
        self.is_whole = is_whole
        self.known_inputs = set(links.values()) if links is not None else set()
        self.kind = ""
        self.inodes: list[Inode] = []
        self.places: dict[Inode, int] = {}
        self.order: dict[int, None] = {}
        self.position = 0
        self.brought: set[int] = set()
        self.under_way: dict[int, trio.CancelScope] = {}


class Learning:
    def __init__(
        self, *, namespace: Namespace, objects: Objects, ahead_bytes_max: int, directory: Path
    ) -> None:
        """``directory`` keeps the orders.  ``ahead_bytes_max`` 0: nothing is watched."""
        self._namespace = namespace
        self._objects = objects
        self._ahead_bytes_max = ahead_bytes_max
        self._path = directory / NAME
        self._orders = Orders.read(self._path) if ahead_bytes_max else Orders()
        self._watched: OrderedDict[Inode, Watched] = OrderedDict()
        self._by_input: dict[Inode, list[Watched]] = {}
        self._input_count = 0
        self._places = trio.Semaphore(AHEAD_AT_ONCE)
        self._nursery: trio.Nursery | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Fetches ahead happen inside this only.  What was learned is written at its end."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                yield
            finally:
                self._nursery = None
                nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await self.write_down()

    @property
    def sandboxes(self) -> list[Inode]:
        """Those that are watched."""
        return [*self._watched]

    # Sandboxes

    def watch(self, directory: Inode, links: Mapping[str, Inode], *, is_whole: bool = True) -> None:
        """A sandbox or template has these inputs.  ``is_whole``: nobody has used one of them."""
        if not self._ahead_bytes_max or len(links) < 2:
            return
        self.ended(directory)
        self._add(Watched(directory, links, is_whole=is_whole))

    def link_made(self, parent: Inode, node: Node) -> None:
        """A file was linked into a directory: an input, if that is a sandbox without a manifest."""
        if not self._ahead_bytes_max or node.content is not ContentKind.OBJECT:
            return
        row = self._namespace.sandbox_of(parent)
        if row is None or row.inode != parent or row.manifest:
            return
        watched = self._watched.get(parent)
        if watched is None:
            self._add(watched := Watched(parent, None, is_whole=True))
        if not watched.kind and node.inode not in watched.known_inputs:
            watched.known_inputs.add(node.inode)
            self._add_inputs(watched, (node.inode,))

    def _add(self, watched: Watched) -> None:
        self._watched[watched.directory] = watched
        self._add_inputs(watched, watched.known_inputs)

    def _add_inputs(self, watched: Watched, inputs: Iterable[Inode]) -> None:
        for inode in inputs:
            self._by_input.setdefault(inode, []).append(watched)
            self._input_count += 1
        while self._input_count > WATCHED_INPUTS_MAX and len(self._watched) > 1:
            self._forget(next(iter(self._watched.values())))

    def ended(self, directory: Inode) -> None:
        """A sandbox has come to its end: what it used is learned, nothing more is fetched."""
        watched = self._watched.get(directory)
        if watched is not None:
            self._learn(watched, ended=True)
            self._forget(watched)

    def _forget(self, watched: Watched) -> None:
        del self._watched[watched.directory]
        for inode in watched.known_inputs:
            having = self._by_input[inode]
            having.remove(watched)
            self._input_count -= 1
            if not having:
                del self._by_input[inode]
        for scope in [*watched.under_way.values()]:
            scope.cancel()

    def _learn(self, watched: Watched, *, ended: bool = False) -> None:
        """A task that used more than is known says so at once, any other when it has ended;
        one that used less than half of that (it failed, most likely) says nothing."""
        if not watched.is_whole or not watched.kind:
            return
        known = self._orders.of(watched.kind)
        if len(watched.order) > len(known) or (ended and len(watched.order) * 2 >= len(known) > 0):
            self._orders.put(watched.kind, [*watched.order])

    # Uses

    def used(self, inode: Inode, sandbox: Inode | None = None) -> None:
        """An object is opened; ``sandbox``: by which, where that is known."""
        having = self._by_input.get(inode)
        if having is None:
            return
        if len(having) > 1:
            having = [
                one for one in having if one.directory == sandbox or (not sandbox and one.kind)
            ]
        for watched in having:
            self._used(watched, inode)

    def _used(self, watched: Watched, inode: Inode) -> None:
        if not watched.kind:
            self._begin(watched)
        place = watched.places.get(inode)
        if place is None:
            return
        if place not in watched.order and len(watched.order) < ORDER_MAX:
            watched.order[place] = None
            self._learn(watched)
        order = self._orders.of(watched.kind)
        position = order.index(place) + 1 if place in order else watched.position
        if position < watched.position:
            # Another task of the template: what it needs may be evicted since.
            watched.brought.clear()
        watched.position = position
        if self._nursery is not None and position < len(order):
            self._nursery.start_soon(self._fetch_ahead, watched)

    def _begin(self, watched: Watched) -> None:
        """The first of its inputs is used: now it has them all."""
        if watched.links is None:
            page = self._namespace.page(watched.directory, 0, LOOKED_AT_MAX)
            watched.links = {
                name: node.inode
                for _cookie, name, node in page
                if node.kind is NodeKind.FILE and node.content is ContentKind.OBJECT
            }
        names = kinds.in_order(watched.links)
        watched.inodes = [watched.links[name] for name in names]
        watched.places = {inode: place for place, inode in enumerate(watched.inodes)}
        watched.kind = kinds.kind_of(names)

    # Fetching

    async def _fetch_ahead(self, watched: Watched) -> None:
        """Begin to fetch what follows and is not too far ahead.  A task of its own, because an OPEN
        does not wait for the SQL of it."""
        if self._watched.get(watched.directory) is not watched:
            return
        left_bytes = self._objects.ahead_bytes_max(self._ahead_bytes_max)
        for place in self._orders.of(watched.kind)[watched.position :]:
            if left_bytes <= 0 or self._nursery is None:
                return
            try:
                node = self._namespace.newest(watched.inodes[place])
            except (NotFound, IndexError):
                continue
            if place not in watched.brought:
                watched.brought.add(place)
                bring = functools.partial(self._bring, watched, place, node, left_bytes)
                self._nursery.start_soon(bring)
            left_bytes -= node.size_bytes
            await trio.lowlevel.checkpoint()

    async def _bring(self, watched: Watched, place: int, node: Node, bytes_max: int) -> None:
        with trio.CancelScope() as scope:
            watched.under_way[place] = scope
            try:
                async with self._places:
                    if self._is_gone(watched):
                        return
                    await self._objects.fetch_ahead(node, bytes_max)
            except StageFSError as error:
                # Who reads it is told.
                log.debug("not fetched ahead of use: %s", error)
            except Exception:
                log.exception("fetching inode %d ahead of use failed unexpectedly", node.inode)
            finally:
                watched.under_way.pop(place, None)

    def _is_gone(self, watched: Watched) -> bool:
        if self._watched.get(watched.directory) is not watched:
            return True
        try:
            return self._namespace.node(watched.directory).nlink == 0
        except NotFound:
            return True

    # Keeping it

    async def write_down(self) -> None:
        """Without fsync: what a crash takes is learned again."""
        if not self._orders.changed:
            return
        text = self._orders.text()
        try:
            await trio.to_thread.run_sync(kinds.write, self._path, text)
        except OSError as error:
            log.warning("what tasks use is not kept in %s: %s", self._path, error.strerror)
