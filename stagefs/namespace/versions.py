"""Changes of what names lead to: registering objects, and newer versions of them.

A node is one version of one object for ever.  A newer version is another node; names move
over to it: at once when somebody replaces a name or writes for all, or inside ``staging/`` when
the remote changed; elsewhere when the name is next looked up (``successor``, ``rebind``), so that a
change costs nothing for links that nobody uses.
"""

from collections.abc import Sequence

from stagefs.errors import InvalidName, IsADirectory
from stagefs.model import Inode
from stagefs.namespace import outgoing
from stagefs.namespace.edit import Edit
from stagefs.namespace.node import (
    STAGING_INODE,
    ContentKind,
    Node,
    NodeKind,
    StagedObject,
    encoded_name,
)
from stagefs.namespace.overlay import Entry
from stagefs.namespace.rows import FOUND, KEPT, Rows, fingerprint

_VERSIONS_MAX = 10_000
FOLLOWING_AT_ONCE_MAX = 10_000


def register(edit: Edit, parent: Inode, name: str, staged: StagedObject) -> Inode:
    inode = _register(edit, parent, name, staged)
    edit.log(inode, parent=parent, name=name, **logged(staged))
    return inode


def register_many(edit: Edit, wanted: Sequence[tuple[Inode, str, StagedObject]]) -> list[Inode]:
    inodes = [_register(edit, parent, name, staged) for parent, name, staged in wanted]
    entries = [
        {"inode": inode, "parent": parent, "name": name, **logged(staged)}
        for inode, (parent, name, staged) in zip(inodes, wanted, strict=True)
    ]
    edit.log(Inode(0), entries=entries)
    return inodes


def _register(edit: Edit, parent: Inode, name: str, staged: StagedObject) -> Inode:
    directory = edit.directory(parent)
    encoded = edit.free_name(directory, name)
    inode = edit.new_file(staged, nlink=1)
    edit.attach_new(directory, encoded, inode, NodeKind.FILE)
    return inode


def logged(staged: StagedObject) -> dict[str, str | int | bool | None]:
    return {
        "url": staged.url,
        "version": staged.version,
        "size_bytes": staged.size_bytes,
        "mtime_ns": staged.mtime_ns,
        "mode": staged.mode,
        "validator": staged.validator,
        "checksum": None if staged.checksum is None else str(staged.checksum),
        "ranges": staged.ranges,
    }


def replace(edit: Edit, parent: Inode, name: str, staged: StagedObject) -> Inode:
    """The name leads to a new version; other links of the old one keep it."""
    directory = edit.directory(parent)
    encoded = encoded_name(name)
    entry = edit.existing(directory, encoded)
    if entry.node.kind is NodeKind.DIRECTORY:
        raise IsADirectory(f"{name!r} in {edit.rows.path(parent)} is a directory.")
    inode = edit.new_file(staged)
    entry = outgoing.left(edit, directory, encoded, entry, removed=False)
    flags = FOUND | KEPT if entry.flags & FOUND else 0
    edit.keep(parent)
    edit.repoint(directory, encoded, entry, edit.node(inode), flags, touch=True)
    edit.log(inode, parent=parent, name=name, **logged(staged))
    return inode


def supersede(edit: Edit, inode: Inode, staged: StagedObject) -> Inode:
    """The remote has another version now."""
    old = newest(edit.rows, edit.node(inode))
    if old.kind is not NodeKind.FILE or old.content is not ContentKind.OBJECT:
        raise InvalidName(f"{edit.rows.path(inode)} is no remote object: it has no versions.")
    if old.inode != inode and old.object_id == staged.object_id:
        edit.log(old.inode, old=inode, again=True)
        return old.inode
    new = edit.node(edit.new_file(staged))
    _follow(edit, old, new, [n for n in edit.rows.names_of(old.inode) if _is_staged(edit, n[0])])
    edit.log(new.inode, old=old.inode, **logged(staged))
    return new.inode


def supersede_for_all(edit: Edit, old: Node, new: Node) -> None:
    """What some task wrote is the newer version, under all names: it stays when that task's own
    name goes.  Beyond FOLLOWING_AT_ONCE_MAX those outside ``staging/`` follow when they are next
    looked up, as to a version of the remote's."""
    names = edit.rows.names_of(old.inode)
    if len(names) > FOLLOWING_AT_ONCE_MAX:
        names = [(parent, name) for parent, name in names if _is_staged(edit, parent)]
    _follow(edit, old, new, names)


def _is_staged(edit: Edit, directory: Inode) -> bool:
    return STAGING_INODE in edit.rows.ancestors(directory)


def _follow(edit: Edit, old: Node, new: Node, names: Sequence[tuple[Inode, bytes]]) -> None:
    """These names lead to the newer one from now on, the others when they are next looked up."""
    edit.run("UPDATE nodes SET successor = ? WHERE inode = ?", (new.inode, old.inode))
    edit.changed(old.inode)
    for parent, name in names:
        directory = edit.node(parent)
        own = edit.rows.own(parent, name)
        assert own is not None
        entry = Entry(old, own.place, own=True, counted=False, flags=own.flags)
        _move(edit, directory, name, entry, new)


def rebind(edit: Edit, parent: Inode, name: str, inode: Inode) -> Inode:
    """One name moves over to (the newest successor of) ``inode``."""
    directory = edit.node(parent)
    encoded = encoded_name(name)
    entry = edit.existing(directory, encoded)
    following = edit.rows.node(inode)
    new = entry.node if following is None else newest(edit.rows, following)
    if NodeKind.DIRECTORY in (entry.node.kind, new.kind):
        raise IsADirectory(f"{name!r} in {edit.rows.path(parent)}: directories have no versions.")
    if not _is_left(new):
        new = entry.node
    if entry.node.inode != new.inode:
        _move(edit, directory, encoded, entry, new)
    elif new.successor:
        # What followed it is gone: this is the newest there is.
        edit.run("UPDATE nodes SET successor = 0 WHERE inode = ?", (new.inode,))
        edit.changed(new.inode)
    edit.log(new.inode, parent=parent, name=name)
    return new.inode


def newest(rows: Rows, node: Node) -> Node:
    found = node
    for _ in range(_VERSIONS_MAX):
        following = rows.node(node.successor) if node.successor else None
        if following is None:
            break
        node = following
        if _is_left(node):
            found = node
    return found


def _is_left(node: Node) -> bool:
    """Whether a name may still be given: a local file that lost its last one goes any moment."""
    return node.content is ContentKind.OBJECT or node.nlink > 0


def _move(edit: Edit, directory: Node, name: bytes, entry: Entry, new: Node) -> None:
    edit.repoint(directory, name, entry, new, entry.flags if entry.own else 0, touch=False)
    if directory.frozen:
        shown = _sandboxes_showing(edit.rows, directory.inode, name)
        edit.add_links(entry.node.inode, -shown)
        edit.unlinked |= shown > 0
        edit.add_links(new.inode, shown)


def _sandboxes_showing(rows: Rows, template: Inode, name: bytes) -> int:
    """In how many sandboxes a name of a template directory is seen."""
    shown_in, not_yet = _sandboxes(rows, template)
    return not_yet + sum(rows.own(overlay, name) is None for overlay in shown_in)


def _sandboxes(rows: Rows, template: Inode) -> tuple[list[Inode], int]:
    """The directories that show a template directory, and how many will once they are seen."""
    shown_in = rows.column(
        "SELECT inode FROM nodes WHERE lower = ? AND lower > 0 AND nlink > 0", template
    )
    shown_in = [inode for inode in shown_in if (node := rows.node(inode)) and node.counted]
    above = rows.name_of(template)
    above_node = None if above is None else rows.node(above[0])
    if above is None or above_node is None or not above_node.frozen:
        return shown_in, 0
    parents, not_yet = _sandboxes(rows, above[0])
    return shown_in, not_yet + sum(rows.own(parent, above[1]) is None for parent in parents)


def set_validator(
    edit: Edit, inode: Inode, validator: str, *, checked_ns: int, ranges: bool | None
) -> None:
    """First contact: what the remote says of the version that was registered."""
    edit.node(inode)
    edit.run(
        "UPDATE nodes SET validator = ?, checked_ns = ?,"
        " flags = CASE ? WHEN 1 THEN flags & ~1 WHEN 0 THEN flags | 1 ELSE flags END"
        " WHERE inode = ?",
        (validator, checked_ns, None if ranges is None else int(ranges), inode),
    )
    edit.changed(inode)
    edit.log(inode, validator=validator, ranges=ranges)


def set_validators(edit: Edit, told: Sequence[tuple[Inode, str]], *, checked_ns: int) -> None:
    """First contact with many at once; those that were removed meanwhile are left out."""
    for inode, validator in told:
        edit.run(
            "UPDATE nodes SET validator = ?, checked_ns = ? WHERE inode = ?",
            (validator, checked_ns, inode),
        )
        edit.changed(inode)
    edit.log(Inode(0), told=[[inode, validator] for inode, validator in told])


def find_object(rows: Rows, url: str, version: str) -> Node | None:
    """The oldest node of an object that still has a name."""
    for inode in rows.column(
        "SELECT inode FROM nodes WHERE fingerprint = ? AND nlink > 0 ORDER BY inode",
        fingerprint(url, version),
    ):
        node = rows.node(inode)
        if node is not None and node.object_id is not None and not node.successor:
            found = node.object_id
            if found.url == url and found.version == version:
                return node
    return None
