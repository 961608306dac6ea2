"""Leases of sandboxes: their inputs stay in the cache until the sandbox, or the mount, has ended.

Owners tell which it is: ``sandbox:INODE:NAME`` ends with that sandbox (or with the last one of
a template), ``pilot:INODE:NAME`` when the mount is made anew; a sandbox whose lifetime is
``forever`` pins as ``stagefs-cache pin`` does, which ``stagefs-cache unpin`` takes back.  An
inode, because sandboxes can be renamed; a name, because people read it.

Concurrency: trio thread; the cache's leases are written in worker threads.
"""

import functools
import logging
from collections.abc import Collection, Sequence

import trio

from stagefs.cache.store import Cache
from stagefs.errors import CacheFailed
from stagefs.model import Inode
from stagefs.namespace.node import Node
from stagefs.staging.manifest import LeaseLifetime

log = logging.getLogger(__name__)

TASK, PILOT = "sandbox", "pilot"
# As ``stagefs-cache pin``.
ADMIN = "admin"


class SandboxLeases:
    def __init__(self, cache: Cache | None) -> None:
        """Without a cache there is nothing to keep."""
        self._cache = cache
        self._held: dict[Inode, str] = {}
        if cache is not None:
            for owner in cache.lease_owners():
                inode = _inode_of(owner, TASK)
                if inode is not None:
                    self._held[inode] = owner

    async def hold(
        self, sandbox: Inode, name: str, lifetime: LeaseLifetime, files: Sequence[Node]
    ) -> None:
        """Keep what is or will be cached of ``files``.  A cache that cannot note it is no reason
        for a sandbox to fail."""
        items = [(node.object_id.key, node.object_id.url) for node in files if node.object_id]
        if self._cache is None or not items:
            return
        owner = {
            # One that was renamed keeps its owner's name.
            LeaseLifetime.TASK: self._held.get(sandbox) or f"{TASK}:{sandbox}:{name}",
            LeaseLifetime.PILOT: f"{PILOT}:{sandbox}:{name}",
            LeaseLifetime.FOREVER: ADMIN,
        }[lifetime]
        if lifetime is LeaseLifetime.TASK:
            self._held[sandbox] = owner
        try:
            await trio.to_thread.run_sync(functools.partial(self._cache.pin, items, owner=owner))
        except CacheFailed as error:
            log.warning("inputs of the sandbox %s are not kept: %s", name, error)

    async def end(self, sandbox: Inode) -> None:
        """Of a sandbox that is over."""
        owner = self._held.pop(sandbox, None)
        if owner is not None:
            await self._unpin([owner])

    async def begin_mount(self) -> None:
        """An earlier mount has ended: so have its pilot's leases."""
        if self._cache is None:
            return
        owners = self._cache.lease_owners()
        await self._unpin([owner for owner in owners if _inode_of(owner, PILOT) is not None])

    @property
    def possible(self) -> bool:
        """Whether there is a cache."""
        return self._cache is not None

    def holds(self, sandbox: Inode, file: Node) -> bool:
        """Whether an object is kept for a sandbox, or for everybody."""
        if self._cache is None or file.object_id is None:
            return True
        owners = (lease.owner for lease in self._cache.leases_of(file.object_id.key))
        return any(
            owner == ADMIN or sandbox in (_inode_of(owner, TASK), _inode_of(owner, PILOT))
            for owner in owners
        )

    @property
    def held(self) -> Collection[Inode]:
        """The sandboxes and templates that have leases which end with them."""
        return self._held.keys()

    def count(self, sandbox: Inode) -> int:
        """How many objects are kept for one."""
        if self._cache is None:
            return 0
        return sum(
            self._cache.leases_held_by(owner)
            for owner in self._cache.lease_owners()
            if sandbox in (_inode_of(owner, TASK), _inode_of(owner, PILOT))
        )

    async def _unpin(self, owners: Collection[str]) -> None:
        assert self._cache is not None
        for owner in owners:
            try:
                await trio.to_thread.run_sync(
                    functools.partial(self._cache.unpin, None, owner=owner)
                )
            except CacheFailed as error:
                log.warning("the leases of %s stay: %s", owner, error)


def _inode_of(owner: str, kind: str) -> Inode | None:
    words = owner.split(":", 2)
    if len(words) == 3 and words[0] == kind and words[1].isdecimal():
        return Inode(int(words[1]))
    return None
