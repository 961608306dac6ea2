"""The ``user.stagefs.*`` extended attributes: what an administrator asks a file.

Listing them contacts no remote and loads at most the map of the file's cache entry.
"""

from collections.abc import Callable, Sequence

from stagefs.errors import NoAttribute
from stagefs.model import Inode
from stagefs.namespace.node import (
    ContentKind,
    Node,
    NodeKind,
    OutgoingState,
    OutgoingUpload,
)
from stagefs.objects.objects import Objects

PREFIX = "user.stagefs."


class Attributes:
    """``pins`` says who pinned or leased an object: one ``owner`` a line, empty when nobody.
    ``uploads``: of a published file, to where writable bindings send it."""

    def __init__(
        self,
        objects: Objects,
        pins: Callable[[Node], list[str]],
        uploads: Callable[[Inode], Sequence[OutgoingUpload]],
    ) -> None:
        self._objects = objects
        self._pins = pins
        self._uploads = uploads

    def names(self, node: Node) -> list[str]:
        return [PREFIX + name for name in self._values(node)]

    def get(self, node: Node, name: str) -> bytes:
        if not name.startswith(PREFIX):
            raise NoAttribute(f"Staged files have {PREFIX}* attributes only, not {name}.")
        value = self._values(node).get(name.removeprefix(PREFIX))
        if value is None:
            raise NoAttribute(f"There is no attribute {name} here.")
        return value.encode("utf-8", "surrogateescape")

    def _values(self, node: Node) -> dict[str, str]:
        if node.kind is NodeKind.DIRECTORY:
            return _of_directory(node)
        if node.content is not ContentKind.OBJECT:
            return self._of_local(node)
        if node.object_id is None:
            return {}
        cached = self._objects.cached_bytes(node)
        values = {
            "source": node.object_id.url,
            "version": node.validator or node.object_id.version,
            "cached": str(cached),
            "state": cached_state(node, cached),
        }
        if node.checksum is not None:
            values["checksum"] = str(node.checksum)
        replicas = self._objects.replicas.lines(node.object_id)
        if replicas:
            values["replicas"] = "\n".join(replicas)
        pins = self._pins(node)
        if pins:
            values["pins"] = "\n".join(pins)
        error = self._objects.last_error(node)
        if error is not None:
            values["error"] = error.sentence
        return values

    def _of_local(self, node: Node) -> dict[str, str]:
        values = {"state": node.content.name.lower()}
        if node.object_id is not None:
            values["source"] = node.object_id.url
            values["version"] = node.validator or node.object_id.version
        if node.content is ContentKind.PUBLISHED:
            said = upload_state(self._uploads(node.inode))
            if said is not None:
                values["upload"] = said
        return values


def _of_directory(node: Node) -> dict[str, str]:
    if node.bind_url is None:
        return {}
    if not node.writable:
        return {"source": node.bind_url}
    allowed = [(node.overwrites, "overwrite"), (node.deletes, "propagate-delete")]
    words = [word for is_so, word in allowed if is_so]
    return {"source": node.bind_url, "writable": ", ".join(["yes", *words])}


def upload_state(uploads: Sequence[OutgoingUpload]) -> str | None:
    """``queued``, ``done``, ``cancelled`` or ``failed: reason``; a line for each place, with its
    URL, when there are several.  None for what is not uploaded."""
    if len(uploads) < 2:
        return _said(uploads[0]) if uploads else None
    return "\n".join(f"{upload.url} {_said(upload)}" for upload in uploads)


def _said(upload: OutgoingUpload) -> str:
    if upload.state in {OutgoingState.DONE, OutgoingState.CANCELLED}:
        return upload.state.name.lower()
    word = "failed" if upload.state is OutgoingState.FAILED else "queued"
    return word if upload.reason is None else f"{word}: {upload.reason}"


def cached_state(node: Node, cached: int) -> str:
    """``cached``, ``partial`` or ``remote``, after how many bytes are cached."""
    if cached >= node.size_bytes:
        return "cached"
    return "partial" if cached else "remote"
