"""What a recording sandbox read: each object, at which version, and what that cost.

The counts are the namespace's (``vfs.recording`` writes them); hashes of chunks come from the
cache and are read on demand, in a worker thread.
"""

from collections.abc import Callable

import trio

from stagefs.cache.entry import Entry
from stagefs.cache.store import Cache
from stagefs.errors import NotFound
from stagefs.model import Inode
from stagefs.namespace.node import Opened
from stagefs.namespace.store import Namespace
from stagefs.staging.sandboxes import Found
from stagefs.staging.values import ReadObject, SandboxReads


class SandboxRecords:
    def __init__(
        self, namespace: Namespace, cache: Cache | None, *, write_down: Callable[[], None]
    ) -> None:
        """``write_down`` makes the namespace know what was counted up to now."""
        self._namespace = namespace
        self._cache = cache
        self._write_down = write_down

    async def of(self, found: Found, *, hashes: bool) -> SandboxReads | None:
        """None for a sandbox that does not record.  With ``hashes`` also those of the chunks that
        are cached."""
        if not found.row.record:
            return None
        self._write_down()
        opened = self._namespace.opened(found.node.inode)
        objects = [
            ReadObject(
                name=one.name,
                url=one.url,
                version=one.version,
                size_bytes=one.size_bytes,
                first_ns=one.first_ns,
                opens=one.opens,
                served_bytes=one.served_bytes,
                fetched_bytes=one.fetched_bytes,
                blocked_s=one.blocked_ns / 1e9,
                chunk_hashes=await self._hashes(one.inode) if hashes else {},
            )
            for one in opened
        ]
        return SandboxReads(
            objects=objects,
            served_bytes=sum(one.served_bytes for one in objects),
            fetched_bytes=sum(one.fetched_bytes for one in objects),
            blocked_s=sum(one.blocked_s for one in objects),
            never_opened=[
                name
                for name in found.kept.manifest.inputs
                if not any(_is_of(one, name, found.kept.linked.get(name)) for one in opened)
            ],
        )

    async def _hashes(self, inode: Inode) -> dict[str, str]:
        try:
            node = self._namespace.node(inode)
        except NotFound:
            return {}
        if self._cache is None or node.object_id is None:
            return {}
        entry = self._cache.entry(node.object_id, size_bytes=node.size_bytes)
        if entry is None or not self._cache.hold(entry):
            return {}
        try:
            return await trio.to_thread.run_sync(_read_hashes, entry)
        finally:
            self._cache.drop(entry)


def _read_hashes(entry: Entry) -> dict[str, str]:
    return {str(chunk): f"{number:016x}" for chunk, number in entry.hashes()}


def _is_of(opened: Opened, name: str, linked: int | None) -> bool:
    """Whether what was opened is an input, or below one."""
    return opened.inode == linked or f"{opened.name}/".startswith(f"{name}/")
