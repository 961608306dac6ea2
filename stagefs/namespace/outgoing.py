"""What writable bindings owe their remotes: kept with the names, so that both change together.

A file that is published under a name in a writable bound directory gets a row in ``outgoing`` in
the transaction that publishes it (or gives it that name), and so does an object that is to be
removed at the remote.  Whoever uploads takes the rows from there; nothing that was closed can
be forgotten in between.  While a row is only DUE, nobody outside knows of it: a name that
goes, or gets other content, takes it back.

Directories in a writable binding are bound themselves, those made here too, so that each knows
its URL.  One that only has what was made here can be renamed, and then is bound to the URL of
its new place.
"""

from collections.abc import Iterator

import msgspec

from stagefs.errors import CrossesMounts, NoOverwrite
from stagefs.model import Inode
from stagefs.namespace.edit import Edit
from stagefs.namespace.node import (
    ContentKind,
    Node,
    NodeKind,
    OutgoingState,
    OutgoingUpload,
    decoded_name,
)
from stagefs.namespace.node_edit import storable
from stagefs.namespace.overlay import Entry
from stagefs.namespace.rows import (
    BINDING_FLAGS,
    DELETES,
    FOUND,
    KEPT,
    OURS,
    OVERWRITES,
    WRITABLE,
    OwnName,
    Rows,
)
from stagefs.remote.url import join

_DUE, _LEAVING, _DONE = (
    int(OutgoingState.DUE),
    int(OutgoingState.LEAVING),
    int(OutgoingState.DONE),
)
_COLUMNS = "id, inode, url, overwrite, state, since_ns, commit_id, reason"
# "inode > 0" lets SQLite take the index.
_OF_FILE = "inode = ? AND inode > 0 AND url = ?"
_AT_REMOTE = f"SELECT 1 FROM outgoing WHERE {_OF_FILE} AND state BETWEEN {_LEAVING} AND {_DONE}"  # noqa: S608 - our own constants


def url_of(directory: Node, name: bytes) -> str:
    """Where a name of a bound directory is at the remote.  Raises InvalidUrl for names that its
    URLs cannot spell."""
    assert directory.bind_url is not None
    return storable(join(directory.bind_url, decoded_name(name)))


# Names that come and go


def gained(edit: Edit, directory: Node, name: bytes, node: Node) -> None:
    """A file got a name."""
    if not directory.writable or node.kind is not NodeKind.FILE:
        return
    url = url_of(directory, name)
    if node.content is not ContentKind.PUBLISHED:
        return
    known = edit.rows.one(
        f"SELECT 1 FROM outgoing WHERE {_OF_FILE} AND state <= {_DONE}",  # noqa: S608
        node.inode,
        url,
    )
    if known is None:
        _add(edit, node.inode, url, overwrite=directory.overwrites)


def published(edit: Edit, inodes: list[Inode]) -> None:
    """Private files became published ones."""
    for inode in inodes:
        for parent, name in edit.rows.names_of(inode):
            directory = edit.node(parent)
            if directory.writable:
                gained(edit, directory, name, edit.node(inode))


def left(edit: Edit, directory: Node, name: bytes, entry: Entry, *, removed: bool) -> Entry:
    """A name is about to lead elsewhere, or nowhere (``removed``).  The entry, which says that the
    remote has the name, too, if it has or is about to."""
    if not directory.writable or entry.node.kind is NodeKind.DIRECTORY:
        return entry
    url = url_of(directory, name)
    inode = entry.node.inode
    edit.run(
        f"DELETE FROM outgoing WHERE {_OF_FILE} AND state = {_DUE}",  # noqa: S608
        (inode, url),
    )
    sent = edit.rows.one(_AT_REMOTE, inode, url) is not None
    if not sent and not entry.flags & FOUND:
        return entry
    if removed and directory.deletes:
        edit.run(f"DELETE FROM outgoing WHERE {_OF_FILE} AND state >= {_DONE}", (inode, url))  # noqa: S608
        _add(edit, Inode(0), url, overwrite=True)
    return msgspec.structs.replace(entry, flags=entry.flags | FOUND | KEPT)


def is_at_remote(rows: Rows, directory: Node, name: bytes, own: OwnName | Entry | None) -> bool:
    """Whether the remote has, or is about to get, an object under a name of a bound directory."""
    if own is None:
        return False
    if own.flags & FOUND and not own.flags & OURS:
        return True
    node = own.node
    return (
        node is not None and rows.one(_AT_REMOTE, node.inode, url_of(directory, name)) is not None
    )


def refuse_replacing(edit: Edit, directory: Node, name: bytes, entry: Entry) -> None:
    """Raises NoOverwrite for an object of a binding that replaces none."""
    if not directory.writable or directory.overwrites:
        return
    if entry.node.kind is NodeKind.FILE and is_at_remote(edit.rows, directory, name, entry):
        raise NoOverwrite(
            f"{decoded_name(name)!r} in {edit.rows.path(directory.inode)} exists at"
            f" {directory.bind_url}, which was bound without --overwrite: take another name."
        )


def _add(edit: Edit, inode: Inode, url: str, *, overwrite: bool) -> None:
    edit.run(
        "INSERT INTO outgoing (inode, url, overwrite, state, since_ns) VALUES (?, ?, ?, ?, ?)",
        (inode, url, overwrite, _DUE, edit.now_ns),
    )
    edit.outgoing = True


# Directories


def check_moving(edit: Edit, source: Node, name: bytes, entry: Entry, target: Node) -> None:
    """Raises CrossesMounts for a directory that only copying can move."""
    if entry.node.kind is not NodeKind.DIRECTORY or not (source.writable or target.writable):
        return
    whole = not (source.writable and entry.flags & FOUND and not entry.flags & OURS)
    if not whole or not all(
        _is_ours(edit, below, bound=source.writable) for below in _below(edit, entry.node)
    ):
        raise CrossesMounts(
            f"{decoded_name(name)!r} in {edit.rows.path(source.inode)} holds what a remote has:"
            " only copying can move it into, within or out of a writable binding."
        )


def _below(edit: Edit, node: Node) -> Iterator[Node]:
    """The directory and those below it, by own names."""
    waiting = [node]
    while waiting:
        directory = waiting.pop()
        yield directory
        subdirectories = edit.rows.column(
            "SELECT n.inode FROM names a JOIN nodes n ON n.inode = a.inode"
            " WHERE a.parent = ? AND n.kind = ?",
            directory.inode,
            NodeKind.DIRECTORY,
        )
        waiting.extend(edit.node(inode) for inode in subdirectories)


def _is_ours(edit: Edit, directory: Node, *, bound: bool) -> bool:
    """Whether all that is in a directory was made here, and it is ``bound`` or it is not."""
    if directory.lower or directory.frozen or (directory.bind_url is not None) != bound:
        return False
    found = edit.rows.one(
        f"SELECT 1 FROM names a JOIN nodes n ON n.inode = a.inode WHERE a.parent = ?"  # noqa: S608
        f" AND a.flags & {FOUND} AND NOT a.flags & {OURS}"
        " AND (n.kind = ? OR n.kind = ? AND n.content = 0) LIMIT 1",
        directory.inode,
        NodeKind.DIRECTORY,
        NodeKind.FILE,
    )
    return found is None


def moved(edit: Edit, source: Node, node: Node, target: Node, name: bytes) -> None:
    """A directory has a new place: what is in it is to be uploaded there."""
    if not (source.writable or target.writable):
        return
    for directory in list(_below(edit, node)):
        for child, entry in _files(edit, directory):
            left(edit, directory, child, entry, removed=True)
    _bind_below(edit, node, url_of(target, name) if target.writable else None, target)


def _files(edit: Edit, directory: Node) -> list[tuple[bytes, Entry]]:
    return [
        (name, Entry(node, place, own=True, counted=False, flags=flags))
        for place, name, flags, node in edit.rows.page_with_flags(directory.inode, 0, -1)
        if node.kind is NodeKind.FILE
    ]


def _bind_below(edit: Edit, top: Node, top_url: str | None, binding: Node) -> None:
    flags = 0
    if top_url is not None:
        flags = WRITABLE | OVERWRITES * binding.overwrites | DELETES * binding.deletes
    urls = {top.inode: top_url}
    for directory in list(_below(edit, top)):
        url = urls[directory.inode]
        edit.run(
            f"UPDATE nodes SET url = ?, ttl_s = ?, listed_ns = ?,"  # noqa: S608
            f" flags = flags & ~{BINDING_FLAGS} | ? WHERE inode = ?",
            (
                url,
                0.0 if url is None else binding.bind_ttl_s,
                0 if url is None else edit.now_ns,
                flags,
                directory.inode,
            ),
        )
        edit.changed(directory.inode)
        rebound = edit.node(directory.inode)
        for _place, name, _flags, node in edit.rows.page_with_flags(directory.inode, 0, -1):
            if node.kind is NodeKind.DIRECTORY:
                urls[node.inode] = None if url is None else url_of(rebound, name)
            else:
                gained(edit, rebound, name, node)


# For who uploads


def uploads(rows: Rows, where: str, *parameters: int | str) -> list[OutgoingUpload]:
    return [
        OutgoingUpload(
            id=number,
            inode=inode,
            url=url,
            overwrite=bool(overwrite),
            state=OutgoingState(state),
            since_ns=since_ns,
            commit=commit,
            reason=reason,
        )
        for number, inode, url, overwrite, state, since_ns, commit, reason in rows.all(
            f"SELECT {_COLUMNS} FROM outgoing WHERE {where}",  # noqa: S608 - of ``sending`` only
            *parameters,
        )
    ]
