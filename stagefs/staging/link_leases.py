"""Leases of what tasks link into their sandboxes by themselves, with ``link(2)`` for one.

The link is acknowledged first; its lease follows within moments, many in one transaction.  What a
daemon that died had not noted, the next one finds in the sandboxes that are active.  As with
declared inputs, a lease ends with its sandbox and not with the link.

Concurrency: trio thread, one task; the cache's leases are written in worker threads.
"""

import logging
from collections.abc import Iterable, Iterator

import trio

from stagefs.errors import NotFound
from stagefs.model import Inode
from stagefs.namespace.node import ContentKind, Node, NodeKind, SandboxRow
from stagefs.namespace.store import Namespace
from stagefs.staging.manifest import LeaseLifetime
from stagefs.staging.sandbox_building import LEASED_FILES_MAX, Building
from stagefs.staging.sandbox_leases import SandboxLeases
from stagefs.staging.values import SandboxState
from stagefs.vfs.new_links import NewLinks

log = logging.getLogger(__name__)

BATCH_MAX = 1000
_LOOKED_AT_ONCE = 20


class LinkLeases:
    def __init__(
        self,
        *,
        namespace: Namespace,
        new_links: NewLinks,
        building: Building,
        leases: SandboxLeases,
    ) -> None:
        self._namespace = namespace
        self._new_links = new_links
        self._building = building
        self._leases = leases

    async def keep(self) -> None:
        """Never returns."""
        await self._look_at_all()
        while True:
            batch = [await self._new_links.news.receive()]
            batch += self._more()
            if self._new_links.missed:
                self._new_links.missed = False
                await self._look_at_all()
            of_sandbox: dict[Inode, tuple[SandboxRow, list[Node]]] = {}
            for row, node in batch:
                of_sandbox.setdefault(row.inode, (row, []))[1].append(node)
            for row, nodes in of_sandbox.values():
                await self._hold(row, nodes)

    def _more(self) -> Iterator[tuple[SandboxRow, Node]]:
        for _ in range(BATCH_MAX):
            try:
                yield self._new_links.news.receive_nowait()
            except trio.WouldBlock:
                return

    async def _hold(self, row: SandboxRow, nodes: Iterable[Node]) -> None:
        files: dict[Inode, Node] = {}
        try:
            for node in nodes:
                if node.kind is NodeKind.DIRECTORY:
                    files |= await self._below(node, LEASED_FILES_MAX - len(files))
                else:
                    files[node.inode] = node
            name = self._namespace.path(row.inode).rpartition("/")[2]
        except NotFound:
            return  # removed meanwhile
        lifetime = LeaseLifetime(row.lifetime)
        await self._leases.hold(row.inode, name, lifetime, list(files.values()))
        now = self._namespace.sandbox(row.inode)
        if now is None or now.state != SandboxState.ACTIVE:
            await self._leases.end(row.inode)

    async def _below(self, directory: Node, limit: int) -> dict[Inode, Node]:
        if directory.lower:
            return await self._building.files_below(directory.inode, limit)
        found = {}
        for inode in [*self._namespace.own_links(directory.inode)][:limit]:
            node = self._namespace.node(inode)
            if node.content is ContentKind.OBJECT:
                found[inode] = node
        return found

    async def _look_at_all(self) -> None:
        """Hold what is linked in active sandboxes and not held."""
        if not self._leases.possible:
            return
        for count, row in enumerate([*self._namespace.sandboxes()]):
            if count % _LOOKED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
            # Leases of other lifetimes may have been ended on purpose.
            if row.state != SandboxState.ACTIVE or row.lifetime != LeaseLifetime.TASK:
                continue
            missing = []
            for inode in self._namespace.own_links(row.inode):
                node = self._namespace.node(inode)
                if node.content is ContentKind.OBJECT and not self._leases.holds(row.inode, node):
                    missing.append(node)
            if missing:
                await self._hold(row, missing)
