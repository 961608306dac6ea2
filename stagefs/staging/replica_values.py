"""What the control API is asked of replicas, and what it answers: values, as ``values``."""

import msgspec


class AddReplica(msgspec.Struct, frozen=True):
    """``url`` has the content of the file at ``path``.  ``affinity``: where that is,
    ``datacenter/machine``.  The object's own URL may be named, to say where it is.  ``trust``: do
    not compare contents."""

    path: str
    url: str
    affinity: str = ""
    trust: bool = False


class RemoveReplica(msgspec.Struct, frozen=True):
    path: str
    url: str


class ReplicaStatus(msgspec.Struct, frozen=True):
    """``first``: the object's own URL.  ``state``: well, failing (asked last until
    ``again_in_s``), or left-out for a ``reason``.  ``shared_parts``: leading parts of its affinity
    that are this node's."""

    url: str
    affinity: str = ""
    first: bool = False
    state: str = "well"
    shared_parts: int = 0
    rate_bytes_per_s: float | None = None
    again_in_s: float = 0.0
    reason: str | None = None


class ReplicaList(msgspec.Struct, frozen=True):
    """In the order in which they would be asked now.  ``affinity``: this node's."""

    path: str
    affinity: str
    replicas: list[ReplicaStatus]
