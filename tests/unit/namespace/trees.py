"""Short ways to make and to look at trees in these tests."""

from stagefs.model import Inode
from stagefs.namespace.node import Node, NodeKind, StagedObject
from stagefs.namespace.store import Namespace


def staged(
    label: str = "x", *, size_bytes: int = 3, version: str = "v1", validator: str | None = None
) -> StagedObject:
    return StagedObject(
        url=f"https://host/{label}",
        version=version,
        size_bytes=size_bytes,
        mtime_ns=1_000_000_007,
        validator=validator,
    )


def listing(namespace: Namespace, directory: Inode, limit: int = 100) -> dict[str, Node]:
    found: dict[str, Node] = {}
    after = 0
    while page := namespace.page(directory, after, limit):
        for cookie, name, node in page:
            assert name not in found, f"{name} was listed twice"
            found[name] = node
            after = cookie
    return found


def paths(namespace: Namespace, directory: Inode, prefix: str = "") -> list[str]:
    """Every path below a directory, directories with a slash."""
    found: list[str] = []
    for name, node in sorted(listing(namespace, directory).items()):
        if node.kind is NodeKind.DIRECTORY:
            found += [f"{prefix}{name}/", *paths(namespace, node.inode, f"{prefix}{name}/")]
        else:
            found.append(prefix + name)
    return found
