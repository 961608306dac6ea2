"""Whether a URL has the content of an object: asked once, before it becomes a replica.

The size has to be the same.  An object without a declared checksum is compared at its beginning,
middle and end, and whole when it is small; one with a checksum is hashed when it is small, is
proved by every first read up to ``checksum_before_read_bytes_max``, and compared in parts beyond
that.  Trio thread; the bytes pass through memory.
"""

import os

from stagefs.errors import InvalidName, RangesRefused, StageFSError
from stagefs.model import MIB, ObjectInfo, Span
from stagefs.namespace.node import Node
from stagefs.objects.objects import Objects
from stagefs.objects.proving import digest_of_bytes, mismatch
from stagefs.remote.base import Remote

WHOLE_BYTES_MAX = 4 * MIB
PART_BYTES = MIB
# Of a server that sends whole objects only.
UNRANGED_BYTES_MAX = 64 * MIB


class _Memory:
    """A sink in memory."""

    def __init__(self, span: Span) -> None:
        self.shift = span.start
        self.fd = os.memfd_create("replica", os.MFD_CLOEXEC)

    def landed(self, span: Span) -> None:
        """Nobody waits for a part of it."""


def parts_to_compare(size_bytes: int) -> list[Span]:
    if size_bytes <= WHOLE_BYTES_MAX:
        return [
            Span(at, min(PART_BYTES, size_bytes - at)) for at in range(0, size_bytes, PART_BYTES)
        ]
    middle = size_bytes // 2 // PART_BYTES * PART_BYTES
    starts = (0, middle, size_bytes - PART_BYTES)
    return [Span(start, PART_BYTES) for start in starts]


async def prove(
    objects: Objects, remote: Remote, node: Node, said: ObjectInfo, *, proved_by_reads: bool
) -> None:
    """``said``: of the URL in question, by its ``remote``.  Raises InvalidName for another content,
    ChecksumMismatch, and what remotes say."""
    assert node.object_id is not None
    if said.size_bytes != node.size_bytes:
        raise InvalidName(
            f"{said.url} has {said.size_bytes} bytes, {node.object_id.url} has {node.size_bytes}: "
            "it is no replica of it."
        )
    checksum = node.checksum
    if checksum is not None and node.size_bytes <= WHOLE_BYTES_MAX:
        found = digest_of_bytes(
            await _fetched(remote, said, Span(0, node.size_bytes)), checksum.kind
        )
        if found != checksum.digest:
            raise mismatch(said.url, checksum, found)
        return
    if checksum is not None and proved_by_reads:
        return
    for part in parts_to_compare(node.size_bytes):
        theirs = await _fetched(remote, said, part)
        if theirs != await _ours(objects, node, said.url, part):
            raise InvalidName(
                f"{said.url} differs from {node.object_id.url} between the bytes {part.start} and"
                f" {part.stop}: it is no replica of it."
            )


async def _fetched(remote: Remote, said: ObjectInfo, span: Span) -> bytes:
    try:
        return await _fetched_span(remote, said, span)
    except RangesRefused:
        if said.size_bytes > UNRANGED_BYTES_MAX:
            raise
        whole = await _fetched_span(remote, said, Span(0, said.size_bytes))
        return whole[span.start : span.stop]


async def _fetched_span(remote: Remote, said: ObjectInfo, span: Span) -> bytes:
    memory = _Memory(span)
    try:
        await remote.fetch(said.url, span, sink=memory, validator=said.validator)
        return os.pread(memory.fd, span.length, 0)
    finally:
        os.close(memory.fd)


async def _ours(objects: Objects, node: Node, url: str, span: Span) -> bytes:
    opened = objects.open(node)
    try:
        return bytes(await objects.read(opened, span.start, span.length))
    except StageFSError as exc:
        raise type(exc)(
            f"{url} cannot be compared with what is there ({str(exc).rstrip('.')}): try again when"
            " that answers, or say --trust."
        ) from exc
    finally:
        objects.release(opened)
