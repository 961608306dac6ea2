"""Why a file is cached, absent, kept, evicted or failing: what is known, put into sentences.

Trio thread; the history is read and the remote asked without holding anything up.
"""

import time

import trio

from stagefs.cache.history import Event, read_events
from stagefs.cache.store import Cache
from stagefs.errors import StageFSError
from stagefs.model import ObjectInfo
from stagefs.namespace.node import ContentKind, Node, NodeKind
from stagefs.objects.objects import Objects
from stagefs.objects.replica_choice import Source
from stagefs.staging.values import Why
from stagefs.vfs.attributes import cached_state

REMOTE_DEADLINE_S = 30.0


class Explaining:
    def __init__(self, *, objects: Objects, cache: Cache | None) -> None:
        self._objects = objects
        self._cache = cache

    async def why(self, path: str, node: Node, *, ask: bool) -> Why:
        """``ask``: the remote, too, when not everything is cached or something failed."""
        if node.kind is NodeKind.DIRECTORY:
            return Why(path, "directory", _of_directory(node))
        if node.content is not ContentKind.OBJECT or node.object_id is None:
            said = (
                "Its bytes are a file of this mount: nothing of it is fetched, cached or evicted."
            )
            return Why(path, "local", [said])
        cached = self._objects.cached_bytes(node)
        failed = self._objects.last_error(node)
        because = [f"It is {node.object_id.url}, {cached} of {node.size_bytes} bytes cached."]
        because += self._of_replicas(node)
        because += await self._of_cache(node, cached)
        because += self._of_leases(node.object_id.key)
        because += self._of_transfers(node)
        if failed is not None:
            because.append(f"Last failure, {_when(failed.at)}: {failed.sentence}")
        if ask and (cached < node.size_bytes or failed is not None):
            because.append(await self._of_remote(node))
        state = cached_state(node, cached)
        return Why(path, "failing" if failed and state != "cached" else state, because)

    async def _of_cache(self, node: Node, cached: int) -> list[str]:
        assert node.object_id is not None
        cache = self._cache
        if cache is None:
            return ["This mount has no cache, because its disk cannot be used (see the log)."]
        said = []
        if node.size_bytes > cache.capacity_bytes:
            said.append(
                f"It is larger than the cache ({cache.capacity_bytes} bytes): reading it evicts"
                " parts of it."
            )
        if cached < node.size_bytes:
            event = await trio.to_thread.run_sync(_last_event, cache, node.object_id.key)
            if event is not None:
                asked = f", asked for by {event.by}" if event.by else " to make room"
                said.append(f"It was {event.what} {_when(event.at)}{asked}.")
            elif not cached:
                said.append("Nothing was evicted of it: no program has read it yet.")
            if cached:
                said.append("The rest was not read yet, or was evicted in parts.")
        return said

    def _of_replicas(self, node: Node) -> list[str]:
        sources = self._objects.replicas.ordered(node)
        if len(sources) < 2:
            return []
        own = self._objects.replicas.affinity
        where = f"This node is at {own}. " if own else ""
        said = [_of_source(source, trio.current_time()) for source in sources]
        return [f"{where}It has {len(said)} replicas, asked in this order: {'; '.join(said)}."]

    def _of_leases(self, key: str) -> list[str]:
        if self._cache is None:
            return []
        said = []
        for lease in self._cache.leases_of(key):
            until = "until it is unpinned" if lease.expires is None else _when(lease.expires)
            said.append(f"{lease.owner} keeps it in the cache, {until}: it is not evicted.")
        return said or ["Nobody keeps it: it may be evicted, the least recently used goes first."]

    def _of_transfers(self, node: Node) -> list[str]:
        assert node.object_id is not None
        return [
            f"It is being fetched: {one.landed} of {one.length} bytes from {one.start} have come in"
            f" {one.age_s:.1f} s."
            for one in self._objects.transfers()
            if one.url == node.object_id.url
        ]

    async def _of_remote(self, node: Node) -> str:
        assert node.object_id is not None
        try:
            with trio.fail_after(REMOTE_DEADLINE_S):
                now = await self._objects.stat(node.object_id.url)
        except StageFSError as error:
            return f"The remote says now: {error}"
        except trio.TooSlowError:
            return f"The remote does not answer within {REMOTE_DEADLINE_S:g} s."
        return _of_version(node, now)


def _of_source(source: Source, now_s: float) -> str:
    facts = [f"at {source.affinity}"] if source.affinity else []
    rate = source.standing.rate_bytes_per_s
    if rate is not None:
        facts.append(f"{rate / 1e6:.0f} MB/s")
    if source.excluded is not None:
        facts.append(f"left out: {source.excluded}")
    elif source.is_demoted(now_s):
        facts.append(f"failing, tried again in {source.demoted_for_s(now_s):.0f} s")
    return f"{source.url} ({', '.join(facts)})" if facts else source.url


def _of_directory(node: Node) -> list[str]:
    if node.bind_url is not None:
        return [f"It shows {node.bind_url}; `stagefs ls` lists it, name a file for more."]
    return ["A directory takes no place in the cache: name a file."]


def _of_version(node: Node, now: ObjectInfo) -> str:
    if node.validator is not None and now.validator != node.validator:
        return "The remote answers now, and has another version: the next open shows that one."
    return "The remote answers now, and has this object: a read fetches what is missing."


def _last_event(cache: Cache, key: str) -> Event | None:
    last = None
    for event in read_events(cache.directory):
        if event.key == key:
            last = event
    return last


def _when(at_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_s))
