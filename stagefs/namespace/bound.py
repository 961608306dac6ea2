"""Bound directories: a remote directory's listing kept as names.

Names that came from a listing are marked FOUND.  A fresh listing adds, replaces and removes
only those.  What a user made or changed in the directory is the user's (no mark, or KEPT), and
a name that a user removed stays hidden: removal never reaches the remote, and the next
listing does not bring it back.
"""

from collections.abc import Sequence

import msgspec

from stagefs.errors import InvalidName, NotADirectory, NotFound, NotPermitted
from stagefs.model import EntryKind, Inode, ListedEntry
from stagefs.namespace.edit import Edit
from stagefs.namespace.node import Node, NodeKind, StagedObject, encoded_name
from stagefs.namespace.overlay import Entry
from stagefs.namespace.removal import end_directory
from stagefs.namespace.rows import FOUND, KEPT


class _Known(msgspec.Struct, gc=False):
    inode: int
    flags: int
    place: int
    kind: int
    validator: str | None


def bind(
    edit: Edit,
    parent: Inode,
    name: str,
    url: str,
    ttl_s: float,
    *,
    mode: int,
    writable: bool,
    overwrites: bool,
    deletes: bool,
) -> Inode:
    directory = edit.directory(parent)
    encoded = edit.free_name(directory, name)
    if directory.writable:
        raise NotPermitted(
            f"{name!r} in {edit.rows.path(parent)} cannot be bound: what is made there is uploaded"
            f" to {directory.bind_url}; name another place."
        )
    inode = edit.new_directory(
        mode & 0o7777,
        url=url,
        ttl_s=ttl_s,
        writable=writable,
        overwrites=overwrites,
        deletes=deletes,
    )
    edit.attach_new(directory, encoded, inode, NodeKind.DIRECTORY)
    edit.log(
        inode,
        parent=parent,
        name=name,
        url=url,
        ttl_s=ttl_s,
        mode=mode,
        writable=writable,
        overwrites=overwrites,
        deletes=deletes,
    )
    return inode


def merge_listing(
    edit: Edit, inode: Inode, entries: Sequence[ListedEntry], *, now_ns: int, default_mode: int
) -> list[str]:
    """Make the FOUND names those of ``entries``; the known names that lead elsewhere now.

    A file without ``info`` stays as it was known, or is left out.  So are names that cannot be
    file names.
    """
    directory = _bound(edit, inode)
    known = {
        name: _Known(below or 0, flags, place, kind or 0, validator)
        for name, below, flags, place, kind, validator in edit.run(
            "SELECT a.name, a.inode, a.flags, a.place, n.kind, n.validator FROM names a"
            " LEFT JOIN nodes n ON n.inode = a.inode WHERE a.parent = ?",
            (inode,),
        ).fetchall()
    }
    changed: list[str] = []
    seen: set[bytes] = set()
    new_files: list[tuple[bytes, StagedObject]] = []
    for entry in entries:
        try:
            name = encoded_name(entry.name)
        except InvalidName:
            continue
        if name in seen:
            continue
        seen.add(name)
        row = known.pop(name, None)
        found = _found(entry, edit.now_ns, default_mode)
        if found is None:
            continue
        if row is None and isinstance(found, StagedObject):
            new_files.append((name, found))
        elif _merge(edit, directory, name, row, found) and row is not None:
            changed.append(entry.name)
    edit.add_files(inode, new_files, FOUND)
    for name, row in known.items():
        if row.flags & (FOUND | KEPT) == FOUND:
            _vanish(edit, directory, name, row)
            changed.append(name.decode("utf-8", "surrogateescape"))
    edit.run("UPDATE nodes SET listed_ns = ? WHERE inode = ?", (now_ns, inode))
    if changed or new_files:
        edit.touch(inode)
    edit.changed(inode)
    edit.log(inode, listed_ns=now_ns, changed=len(changed))
    return changed


def add_found(edit: Edit, inode: Inode, name: str, found: StagedObject | str) -> Inode:
    """One name that the remote has: a file, or a directory's URL.

    Raises NotFound when a user hid the name.
    """
    directory = _bound(edit, inode)
    encoded = encoded_name(name)
    own = edit.rows.own(inode, encoded)
    if own is not None and own.node is None:
        raise NotFound(f"{name!r} was removed from {edit.rows.path(inode)}.")
    result = own.node if own is not None else None
    if own is not None and result is not None and own.flags & (FOUND | KEPT) == FOUND:
        is_same = (
            result.kind is NodeKind.DIRECTORY
            if isinstance(found, str)
            else result.validator == found.validator and result.kind is NodeKind.FILE
        )
        if is_same:
            edit.run("UPDATE nodes SET checked_ns = ? WHERE inode = ?", (edit.now_ns, result.inode))
            edit.changed(result.inode)
        else:
            row = _Known(result.inode, own.flags, own.place, int(result.kind), None)
            result = _renew(edit, directory, encoded, row, found)
    elif result is None:
        result = _add(edit, directory, encoded, found)
    edit.log(result.inode, parent=inode, name=name)
    return result.inode


def _bound(edit: Edit, inode: Inode) -> Node:
    directory = edit.node(inode)
    if directory.kind is not NodeKind.DIRECTORY or directory.bind_url is None:
        raise NotADirectory(f"{edit.rows.path(inode)} is not bound to a remote directory.")
    if directory.nlink == 0:
        raise NotFound(f"The bound directory with inode {inode} was removed.")
    return directory


def _merge(
    edit: Edit, directory: Node, name: bytes, row: _Known | None, found: StagedObject | str
) -> bool:
    """Whether the name leads elsewhere now."""
    if row is None:
        _add(edit, directory, name, found)
        return True
    if row.flags & (FOUND | KEPT) != FOUND:
        return False
    if isinstance(found, str):
        is_same = row.kind == NodeKind.DIRECTORY
    else:
        is_same = row.kind == NodeKind.FILE and row.validator == found.validator
    if not is_same:
        _renew(edit, directory, name, row, found)
    return not is_same


def _found(entry: ListedEntry, now_ns: int, default_mode: int) -> StagedObject | str | None:
    if entry.kind is EntryKind.DIRECTORY:
        return entry.url
    told = entry.info
    if told is None:
        return None
    return StagedObject(
        url=entry.url,
        version=told.validator,
        size_bytes=told.size_bytes,
        mtime_ns=now_ns if told.mtime_ns is None else told.mtime_ns,
        mode=(default_mode if told.mode is None else told.mode) & 0o777,
        validator=told.validator,
        ranges=told.ranges,
        checked_ns=now_ns,
    )


def _new(edit: Edit, directory: Node, found: StagedObject | str) -> Node:
    if isinstance(found, str):
        inode = edit.new_directory(
            directory.mode,
            uid=directory.uid,
            gid=directory.gid,
            url=found,
            ttl_s=directory.bind_ttl_s,
            writable=directory.writable,
            overwrites=directory.overwrites,
            deletes=directory.deletes,
        )
    else:
        inode = edit.new_file(found)
    return edit.node(inode)


def _add(edit: Edit, directory: Node, name: bytes, found: StagedObject | str) -> Node:
    node = _new(edit, directory, found)
    edit.put_name(directory.inode, name, node.inode, place=edit.next_place(), flags=FOUND)
    if node.kind is NodeKind.FILE:
        edit.add_links(node.inode, 1)
    else:
        edit.add_subdirectories(directory, 1)
    return node


def _renew(
    edit: Edit, directory: Node, name: bytes, row: _Known, found: StagedObject | str
) -> Node:
    """The remote has something else under a name that was found before."""
    old = edit.node(Inode(row.inode))
    new = _new(edit, directory, found)
    entry = Entry(old, row.place, own=True, counted=False, flags=row.flags)
    edit.repoint(directory, name, entry, new, FOUND, touch=True)
    if old.kind is NodeKind.DIRECTORY:
        end_directory(edit, old)
    elif new.kind is NodeKind.FILE:
        edit.run("UPDATE nodes SET successor = ? WHERE inode = ?", (new.inode, old.inode))
        edit.changed(old.inode)
    return new


def _vanish(edit: Edit, directory: Node, name: bytes, row: _Known) -> None:
    old = edit.node(Inode(row.inode))
    edit.drop_name(directory.inode, name)
    if old.kind is NodeKind.DIRECTORY:
        edit.add_subdirectories(directory, -1)
        end_directory(edit, old)
    else:
        edit.add_links(old.inode, -1)
