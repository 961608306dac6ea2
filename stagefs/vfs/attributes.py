"""The ``user.stagefs.*`` extended attributes: what an administrator asks a file.

Listing them contacts no remote and loads at most the map of the file's cache entry.
"""

from collections.abc import Callable

from stagefs.errors import NoAttribute
from stagefs.namespace.node import Node, NodeKind
from stagefs.objects.objects import Objects

PREFIX = "user.stagefs."


class Attributes:
    """``pins`` says who pinned or leased an object: one ``owner`` a line, empty when nobody."""

    def __init__(self, objects: Objects, pins: Callable[[Node], list[str]]) -> None:
        self._objects = objects
        self._pins = pins

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
            return {"source": node.bind_url} if node.bind_url is not None else {}
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
        pins = self._pins(node)
        if pins:
            values["pins"] = "\n".join(pins)
        error = self._objects.last_error(node)
        if error is not None:
            values["error"] = error.sentence
        return values


def cached_state(node: Node, cached: int) -> str:
    """``cached``, ``partial`` or ``remote``, after how many bytes are cached."""
    if cached >= node.size_bytes:
        return "cached"
    return "partial" if cached else "remote"
