"""Changes of what is in nodes: local files, private copies, publishing, attributes.

The bytes of local files are elsewhere, in real files named by inode.  Here is which inode a
name leads to, what a private copy was made of, and whether a file may still change.
"""

import msgspec

from stagefs.errors import IsADirectory, NoAttribute, NotFound, NotPermitted, ReadOnly
from stagefs.model import Inode
from stagefs.namespace import outgoing, versions
from stagefs.namespace.edit import Edit
from stagefs.namespace.node import (
    SPECIAL_KINDS,
    ContentKind,
    Node,
    NodeKind,
    encoded_name,
)
from stagefs.namespace.rows import FOUND, KEPT, XATTRS, Rows, SqlValue

_FILE, _PRIVATE, _PUBLISHED = (
    int(NodeKind.FILE),
    int(ContentKind.PRIVATE),
    int(ContentKind.PUBLISHED),
)

_PRIVATE_BELOW = f"""
WITH RECURSIVE below(inode) AS (
    VALUES (?)
    UNION
    SELECT a.inode FROM below JOIN names a ON a.parent = below.inode WHERE a.inode > 0
)
SELECT n.inode FROM below JOIN nodes n ON n.inode = below.inode
WHERE n.kind = {_FILE} AND n.content = {_PRIVATE}
"""  # noqa: S608 - our own constants
_UNLINKED = f"""
SELECT inode FROM nodes n WHERE content > 0 AND nlink = 0 AND kind = {_FILE}
AND NOT EXISTS (SELECT 1 FROM nodes o WHERE o.lower = n.inode AND o.lower > 0)
AND NOT EXISTS (
    SELECT 1 FROM outgoing o WHERE o.inode = n.inode AND o.inode > 0 AND o.state < 2)
LIMIT ?
"""  # noqa: S608


def create_file(edit: Edit, parent: Inode, name: str, mode: int, *, uid: int, gid: int) -> Inode:
    """An empty private file."""
    directory = edit.directory(parent)
    encoded = edit.free_name(directory, name)
    if directory.bind_url is not None and not directory.writable:
        raise ReadOnly(
            f"{name!r} cannot be created in {edit.rows.path(parent)}: it shows a remote directory "
            "that was bound without --writable."
        )
    if directory.writable:
        outgoing.url_of(directory, encoded)  # raises for a name that no upload could have
    now_ns = edit.now_ns
    inode = edit.insert(
        Node(
            Inode(0), NodeKind.FILE, mode & 0o7777, 0, now_ns, now_ns, 1,
            uid=uid, gid=gid, content=ContentKind.PRIVATE,
        )
    )  # fmt: skip
    edit.attach_new(directory, encoded, inode, NodeKind.FILE)
    edit.log(inode, parent=parent, name=name, mode=mode, uid=uid, gid=gid)
    return inode


def make_special(
    edit: Edit,
    parent: Inode,
    name: str,
    kind: NodeKind,
    mode: int,
    *,
    rdev: int,
    uid: int,
    gid: int,
) -> Inode:
    assert kind in SPECIAL_KINDS, f"{kind!r} is made in another way"
    directory = edit.directory(parent)
    encoded = edit.free_name(directory, name)
    inode = edit.insert(
        Node(
            Inode(0), kind, mode & 0o7777, 0, edit.now_ns, edit.now_ns, 1,
            rdev=rdev, uid=uid, gid=gid,
        )
    )  # fmt: skip
    edit.attach_new(directory, encoded, inode, kind)
    edit.log(
        inode, parent=parent, name=name, node_kind=int(kind), mode=mode, rdev=rdev, uid=uid, gid=gid
    )
    return inode


def copy_up(
    edit: Edit,
    parent: Inode,
    name: str,
    inode: Inode,
    *,
    keep_content: bool,
    live: Node | None,
    for_all: bool,
) -> Inode:
    """One name of a shared file leads to a private copy from now on; ``for_all``: all names do."""
    directory = edit.directory(parent)
    encoded = encoded_name(name)
    entry = edit.existing(directory, encoded)
    if entry.node.inode != inode:
        raise NotFound(f"{name!r} in {edit.rows.path(parent)} is another file now.")
    if entry.node.kind is NodeKind.DIRECTORY:
        raise IsADirectory(f"{name!r} in {edit.rows.path(parent)} is a directory.")
    if entry.node.kind is not NodeKind.FILE or entry.node.content is ContentKind.PRIVATE:
        raise NotPermitted(f"{name!r} in {edit.rows.path(parent)} is no shared file.")
    copied = edit.insert(_copy_of(entry.node, live, keep_content=keep_content))
    if entry.node.has_xattrs:
        edit.copy_xattrs(inode, copied)
    # A name that the remote has too stays known as such: removing it must hide it there.
    entry = outgoing.left(edit, directory, encoded, entry, removed=False)
    flags = FOUND | KEPT if entry.flags & FOUND else 0
    edit.keep(parent)
    edit.repoint_new(directory, encoded, entry, copied, flags)
    if for_all:
        versions.supersede_for_all(edit, edit.node(inode), edit.node(copied))
    edit.log(
        copied,
        parent=parent,
        name=name,
        shared=inode,
        keep_content=keep_content,
        for_all=for_all,
    )
    return copied


def _copy_of(shared: Node, live: Node | None, *, keep_content: bool) -> Node:
    if live is not None:
        shared = msgspec.structs.replace(
            shared,
            size_bytes=live.size_bytes,
            mtime_ns=live.mtime_ns,
            ctime_ns=live.ctime_ns,
            atime_ns=live.atime_ns,
        )
    copy = msgspec.structs.replace(
        shared, nlink=1, content=ContentKind.PRIVATE, successor=Inode(0), lower=Inode(0)
    )
    if keep_content and shared.content is ContentKind.OBJECT:
        return msgspec.structs.replace(copy, base_bytes=shared.size_bytes)
    copy = msgspec.structs.replace(
        copy, object_id=None, validator=None, checksum=None, ranges=True, checked_ns=0
    )
    if keep_content:
        return msgspec.structs.replace(copy, lower=shared.inode, base_bytes=shared.size_bytes)
    return msgspec.structs.replace(copy, size_bytes=0, base_bytes=0)


def publish(edit: Edit, inodes: list[Inode]) -> None:
    """Those that are private files never change any more."""
    edit.run_many(
        f"UPDATE nodes SET content = {_PUBLISHED} WHERE inode = ? AND content = {_PRIVATE}",  # noqa: S608
        [(inode,) for inode in inodes],
    )
    for inode in inodes:
        edit.changed(inode)
    outgoing.published(edit, inodes)


def publish_below(edit: Edit, inode: Inode) -> list[Inode]:
    found = private_files(edit.rows, inode)
    publish(edit, found)
    return found


def private_files(rows: Rows, inode: Inode) -> list[Inode]:
    """The inode itself or what is below it by own names."""
    return rows.column(_PRIVATE_BELOW, inode)


def private(rows: Rows) -> list[Inode]:
    return rows.column(
        f"SELECT inode FROM nodes WHERE content > 0 AND nlink > 0 AND content = {_PRIVATE}"  # noqa: S608
    )


def unlinked(rows: Rows, limit: int) -> list[Inode]:
    return rows.column(_UNLINKED, limit)


def set_attributes(
    edit: Edit,
    inode: Inode,
    *,
    base_bytes: int | None = None,
    size_bytes: int | None = None,
    **changed: int | None,
) -> None:
    """``changed``: columns that a user can set, which set the time of change as well."""
    given: dict[str, SqlValue] = {k: v for k, v in changed.items() if v is not None}
    if given:
        given["ctime_ns"] = edit.now_ns
    if size_bytes is not None:
        given["size_bytes"] = size_bytes
    assignments = [f"{column} = ?" for column in given]
    values = list(given.values())
    if base_bytes is not None:
        # What was cut off never shows again.
        assignments.append("base_bytes = min(base_bytes, ?)")
        values.append(base_bytes)
    update = f"UPDATE nodes SET {', '.join(assignments)} WHERE inode = ?"  # noqa: S608
    if not assignments or not edit.run(update, (*values, inode)).rowcount:
        # Says that there is no such node.
        edit.node(inode)
    edit.changed(inode)
    if base_bytes is not None:
        given["base_bytes"] = base_bytes
    edit.log(inode, **given)


def set_xattr(edit: Edit, inode: Inode, name: bytes, value: bytes) -> None:
    edit.node(inode)
    edit.run(
        "INSERT INTO xattrs VALUES (?, ?, ?)"
        " ON CONFLICT (inode, name) DO UPDATE SET value = excluded.value",
        (inode, name, value),
    )
    edit.run(f"UPDATE nodes SET flags = flags | {XATTRS} WHERE inode = ?", (inode,))  # noqa: S608
    edit.touch_ctime(inode)
    edit.changed(inode)
    edit.log(inode, name=_text(name), value=value.hex())


def remove_xattr(edit: Edit, inode: Inode, name: bytes) -> None:
    done = edit.run("DELETE FROM xattrs WHERE inode = ? AND name = ?", (inode, name))
    if not done.rowcount:
        raise _no_attribute(edit.rows, inode, name)
    if edit.rows.one("SELECT 1 FROM xattrs WHERE inode = ? LIMIT 1", inode) is None:
        edit.run(f"UPDATE nodes SET flags = flags & ~{XATTRS} WHERE inode = ?", (inode,))  # noqa: S608
    edit.touch_ctime(inode)
    edit.changed(inode)
    edit.log(inode, name=_text(name))


def xattr(rows: Rows, inode: Inode, name: bytes) -> bytes:
    value = rows.blobs("SELECT value FROM xattrs WHERE inode = ? AND name = ?", inode, name)
    if not value:
        raise _no_attribute(rows, inode, name)
    return value[0]


def xattrs(rows: Rows, inode: Inode) -> list[bytes]:
    return rows.blobs("SELECT name FROM xattrs WHERE inode = ? ORDER BY name", inode)


def _no_attribute(rows: Rows, inode: Inode, name: bytes) -> NoAttribute:
    return NoAttribute(f"{rows.path(inode)} has no attribute {_text(name)!r}.")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
