"""The operations on replicas: add, list, remove.

A replica belongs to the version of the object that a name leads to, so all names of that have it.
The remote is asked first, and the namespace changed when it has answered.  Trio thread.
"""

import trio

from stagefs.config import ReadSettings
from stagefs.errors import InvalidName, NotFound
from stagefs.model import ObjectId
from stagefs.namespace.node import ContentKind, Node, NodeKind, Replica
from stagefs.namespace.store import Namespace
from stagefs.objects.objects import Objects
from stagefs.objects.replica_choice import Source, parts
from stagefs.objects.replica_proof import prove
from stagefs.remote.registry import Remotes
from stagefs.staging.replica_values import AddReplica, RemoveReplica, ReplicaList, ReplicaStatus
from stagefs.staging.tree import Place, Tree, parse_place
from stagefs.staging.values import OnePath

REPLICAS_MAX = 64


class ReplicaOperations:
    def __init__(
        self,
        *,
        namespace: Namespace,
        objects: Objects,
        remotes: Remotes,
        tree: Tree,
        settings: ReadSettings,
    ) -> None:
        self._namespace = namespace
        self._objects = objects
        self._remotes = remotes
        self._tree = tree
        self._settings = settings

    async def add(self, request: AddReplica) -> ReplicaList:
        place, node, of = await self._object(request.path)
        url = self._remotes.public(request.url)
        affinity = "/".join(parts(request.affinity))
        validator = None
        if url != of.url:
            known = {replica.url for replica in self._namespace.replicas(of)}
            if url not in known and len(known) >= REPLICAS_MAX:
                raise InvalidName(
                    f"{place} has {len(known)} replicas, and more are not kept: remove one first."
                )
            said = await self._objects.stat(url)
            trusted = request.trust and said.size_bytes == node.size_bytes
            if not trusted:
                limit = self._settings.checksum_before_read_bytes_max
                await prove(
                    self._objects,
                    self._remotes.for_url(url),
                    node,
                    said,
                    proved_by_reads=node.size_bytes <= limit,
                )
            validator = said.validator
        self._namespace.put_replica(of, Replica(url=url, affinity=affinity, validator=validator))
        self._objects.replicas.changed(of)
        return self._listed(place, node)

    async def listed(self, request: OnePath) -> ReplicaList:
        place, node, _of = await self._object(request.path)
        return self._listed(place, node)

    async def remove(self, request: RemoveReplica) -> ReplicaList:
        place, node, of = await self._object(request.path)
        url = self._remotes.public(request.url)
        if url == of.url:
            raise InvalidName(
                f"{url} is what {place} was staged in from, and says which version it is: stage in"
                " another URL with --replace."
            )
        if url not in {replica.url for replica in self._namespace.replicas(of)}:
            raise NotFound(f"{url} is no replica of {place}: `stagefs replica list` shows them.")
        self._namespace.remove_replica(of, url)
        self._objects.replicas.changed(of)
        return self._listed(place, node)

    async def _object(self, path: str) -> tuple[Place, Node, ObjectId]:
        place = parse_place(path)
        node = await self._tree.node(place)
        if node.kind is NodeKind.DIRECTORY:
            raise InvalidName(f"{place} is a directory: replicas belong to files.")
        if node.content is not ContentKind.OBJECT or node.object_id is None:
            raise InvalidName(
                f"{place} is a file of this mount: replicas belong to remote objects."
            )
        return place, node, node.object_id

    def _listed(self, place: Place, node: Node) -> ReplicaList:
        now_s = trio.current_time()
        sources = self._objects.replicas.ordered(node)
        return ReplicaList(
            str(place), self._settings.affinity or "", [status(one, now_s) for one in sources]
        )


def status(source: Source, now_s: float) -> ReplicaStatus:
    again_in_s = source.demoted_for_s(now_s)
    state = "failing" if source.is_demoted(now_s) else "well"
    return ReplicaStatus(
        url=source.url,
        affinity=source.affinity,
        first=source.is_first,
        state="left-out" if source.excluded is not None else state,
        shared_parts=source.closeness,
        rate_bytes_per_s=source.standing.rate_bytes_per_s,
        again_in_s=again_in_s,
        reason=source.excluded,
    )
