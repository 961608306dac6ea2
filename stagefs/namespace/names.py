"""Changes of names: make, link, rename, remove.  Each function edits one open transaction.

What every POSIX program expects of a directory, in plain, bound and overlay directories alike.
Directories that are linked or moved never come to lie below themselves.
"""

import msgspec

from stagefs.errors import (
    Busy,
    CrossesMounts,
    InvalidName,
    IsADirectory,
    NameExists,
    NotADirectory,
    NotEmpty,
    NotFound,
    NotPermitted,
)
from stagefs.model import Inode
from stagefs.namespace import contents, outgoing, overlay, sandbox_rows
from stagefs.namespace.edit import Edit
from stagefs.namespace.node import (
    FIXED_INODES,
    ContentKind,
    Node,
    NodeKind,
    RenameFlags,
    SandboxRow,
    encoded_name,
)
from stagefs.namespace.overlay import Entry
from stagefs.namespace.removal import end_directory
from stagefs.namespace.rows import FOUND, KEPT


def make_directory(
    edit: Edit, parent: Inode, name: str, mode: int, *, uid: int, gid: int, row: SandboxRow | None
) -> Inode:
    directory = edit.directory(parent)
    encoded = edit.free_name(directory, name)
    inode = _new_directory(edit, directory, encoded, mode & 0o7777, uid=uid, gid=gid)
    edit.attach_new(directory, encoded, inode, NodeKind.DIRECTORY)
    if row is None:
        edit.log(inode, parent=parent, name=name, mode=mode, uid=uid, gid=gid)
        return inode
    sandbox_rows.put_new(edit, [inode], row)
    kept = msgspec.structs.asdict(row)
    edit.log(inode, parent=parent, name=name, mode=mode, uid=uid, gid=gid, sandbox=kept)
    return inode


def _new_directory(
    edit: Edit, directory: Node, name: bytes, mode: int, *, uid: int, gid: int
) -> Inode:
    """In a writable binding it is bound, too; nobody need wait for what the remote has of it."""
    if not directory.writable:
        return edit.new_directory(mode, uid=uid, gid=gid)
    inode = edit.new_directory(
        mode,
        uid=uid,
        gid=gid,
        url=outgoing.url_of(directory, name),
        ttl_s=directory.bind_ttl_s,
        writable=True,
        overwrites=directory.overwrites,
        deletes=directory.deletes,
    )
    edit.run("UPDATE nodes SET listed_ns = ? WHERE inode = ?", (edit.now_ns, inode))
    edit.changed(inode)
    return inode


def make_symlink(edit: Edit, parent: Inode, name: str, target: str, *, uid: int, gid: int) -> Inode:
    directory = edit.directory(parent)
    encoded = edit.free_name(directory, name)
    encoded_target = target.encode("utf-8", "surrogateescape")
    if not encoded_target or len(encoded_target) > 4095 or b"\0" in encoded_target:
        raise InvalidName(f"The symbolic link {name!r} needs a target of 1 to 4095 bytes.")
    inode = edit.insert(
        Node(
            Inode(0), NodeKind.SYMLINK, 0o777, len(encoded_target), edit.now_ns, edit.now_ns, 1,
            target=target, uid=uid, gid=gid,
        )
    )  # fmt: skip
    edit.attach_new(directory, encoded, inode, NodeKind.SYMLINK)
    edit.log(inode, parent=parent, name=name, target=target, uid=uid, gid=gid)
    return inode


def link(edit: Edit, inode: Inode, parent: Inode, name: str, *, publish: bool) -> Inode:
    node = edit.node(inode)
    if node.kind is NodeKind.DIRECTORY:
        raise NotPermitted(
            f"{edit.rows.path(inode)} is a directory: link it with a URL, "
            f"as in ln -s staging:///dir {name}."
        )
    if node.nlink == 0:
        raise NotFound(f"The file with inode {inode} was removed.")
    directory = edit.directory(parent)
    encoded = edit.free_name(directory, name)
    edit.attach(directory, encoded, node)
    outgoing.gained(edit, directory, encoded, node)
    published = contents.publish_below(edit, inode) if publish else []
    edit.log(inode, parent=parent, name=name, published=published)
    return inode


def link_directory(edit: Edit, target: Inode, parent: Inode, name: str) -> Inode:
    shown = edit.node(target)
    if shown.kind is not NodeKind.DIRECTORY:
        raise NotADirectory(f"{edit.rows.path(target)} is not a directory.")
    if shown.nlink == 0:
        raise NotFound(f"The directory with inode {target} was removed.")
    directory = edit.directory(parent)
    encoded = edit.free_name(directory, name)
    if overlay.loops(edit.rows, parent, target):
        raise InvalidName(
            f"{edit.rows.path(target)} cannot be linked into {edit.rows.path(parent)}: "
            "a directory is never shown below itself."
        )
    # A shown directory that others refer to must not go with the one it shows.
    edit.keep(target)
    inode = edit.new_overlay(shown, counted=False)
    edit.attach_new(directory, encoded, inode, NodeKind.DIRECTORY)
    edit.log(inode, parent=parent, name=name, lower=target)
    return inode


def remove(edit: Edit, parent: Inode, name: str) -> Inode:
    directory = edit.directory(parent)
    encoded = encoded_name(name)
    entry = edit.existing(directory, encoded)
    if entry.node.kind is NodeKind.DIRECTORY:
        raise IsADirectory(f"{name!r} in {edit.rows.path(parent)} is a directory.")
    entry = outgoing.left(edit, directory, encoded, entry, removed=True)
    edit.detach(directory, encoded, entry)
    edit.log(entry.node.inode, parent=parent, name=name)
    return entry.node.inode


def remove_directory(edit: Edit, parent: Inode, name: str) -> Inode:
    directory = edit.directory(parent)
    encoded = encoded_name(name)
    entry = edit.existing(directory, encoded)
    _refuse_fixed(edit, entry.node)
    _empty_directory(edit, entry.node)
    edit.detach(directory, encoded, entry)
    end_directory(edit, entry.node)
    edit.log(entry.node.inode, parent=parent, name=name)
    return entry.node.inode


def _empty_directory(edit: Edit, node: Node) -> None:
    if node.kind is not NodeKind.DIRECTORY:
        raise NotADirectory(f"{edit.rows.path(node.inode)} is not a directory.")
    if not overlay.is_empty(edit.rows, node):
        raise NotEmpty(f"The directory {edit.rows.path(node.inode)} is not empty.")


def _refuse_fixed(edit: Edit, node: Node) -> None:
    if node.inode in FIXED_INODES:
        raise Busy(f"{edit.rows.path(node.inode)} is part of every mount and stays where it is.")


def rename(
    edit: Edit,
    parent: Inode,
    name: str,
    new_parent: Inode,
    new_name: str,
    flags: int,
    *,
    publish: bool,
) -> Inode:
    if flags & ~3 or flags == 3:
        raise InvalidName(f"{name!r} cannot be renamed with flags {flags:#x}.")
    source_directory = edit.directory(parent)
    target_directory = edit.directory(new_parent)
    source_name, target_name = encoded_name(name), encoded_name(new_name)
    source = edit.existing(source_directory, source_name)
    target = edit.entry(target_directory, target_name)
    _refuse_fixed(edit, source.node)
    _refuse_below_itself(edit, source.node, parent, new_parent)
    if flags & RenameFlags.EXCHANGE:
        if target is None:
            raise NotFound(f"There is no {new_name!r} in {edit.rows.path(new_parent)}.")
        _refuse_fixed(edit, target.node)
        _refuse_below_itself(edit, target.node, new_parent, parent)
        if target.node.inode != source.node.inode:
            _exchange(edit, (source_directory, source_name, source), target_directory, target_name)
    elif target is not None and flags & RenameFlags.NOREPLACE:
        raise NameExists(f"{new_name!r} exists already in {edit.rows.path(new_parent)}.")
    elif target is None or target.node.inode != source.node.inode:
        _move(edit, (source_directory, source_name, source), target_directory, target_name, target)
    # Else they are two names of one file: rename(2) leaves both.
    published = contents.publish_below(edit, source.node.inode) if publish else []
    edit.log(
        source.node.inode,
        parent=parent,
        name=name,
        new_parent=new_parent,
        new_name=new_name,
        flags=int(flags),
        published=published,
    )
    return source.node.inode


def _move(
    edit: Edit,
    source_place: tuple[Node, bytes, Entry],
    target_directory: Node,
    target_name: bytes,
    target: Entry | None,
) -> None:
    source_directory, source_name, source = source_place
    outgoing.check_moving(edit, source_directory, source_name, source, target_directory)
    if target is not None:
        _refuse_fixed(edit, target.node)
        _replaceable(edit, source.node, target.node)
        outgoing.refuse_replacing(edit, target_directory, target_name, target)
    # Before the source goes: the target's directory may be shown only because of it.
    edit.keep(target_directory.inode)
    _take_away(edit, source_directory, source_name, source)
    if target is not None:
        target = outgoing.left(edit, target_directory, target_name, target, removed=False)
        edit.detach(target_directory, target_name, target)
        if target.node.kind is NodeKind.DIRECTORY:
            end_directory(edit, target.node)
    edit.attach(
        target_directory,
        target_name,
        source.node,
        place=None if target is None else target.place,
        is_counted=source.own or source.counted,
    )
    edit.touch_ctime(source.node.inode)
    if source.node.kind is NodeKind.DIRECTORY:
        edit.directories_moved = True
        outgoing.moved(edit, source_directory, source.node, target_directory, target_name)
    else:
        outgoing.gained(edit, target_directory, target_name, source.node)


def _take_away(edit: Edit, directory: Node, name: bytes, source: Entry) -> None:
    """From the place that it moves away from.  What only the remote has is not removed there."""
    is_local = source.node.content is not ContentKind.OBJECT
    source = outgoing.left(edit, directory, name, source, removed=is_local)
    edit.detach(directory, name, source, moves=True)


def _replaceable(edit: Edit, source: Node, target: Node) -> None:
    if target.kind is not NodeKind.DIRECTORY:
        if source.kind is NodeKind.DIRECTORY:
            raise NotADirectory(f"{edit.rows.path(target.inode)} is not a directory.")
    elif source.kind is not NodeKind.DIRECTORY:
        raise IsADirectory(f"{edit.rows.path(target.inode)} is a directory.")
    else:
        _empty_directory(edit, target)


def _refuse_below_itself(edit: Edit, node: Node, parent: Inode, new_parent: Inode) -> None:
    """Not into a directory that shows it either: it would be lost there."""
    if node.kind is not NodeKind.DIRECTORY or parent == new_parent:
        return
    if overlay.loops(edit.rows, new_parent, node.inode):
        raise InvalidName(f"The directory {edit.rows.path(node.inode)} cannot move into itself.")


def _exchange(
    edit: Edit, source_place: tuple[Node, bytes, Entry], directory: Node, name: bytes
) -> None:
    source_directory, source_name, source = source_place
    target = edit.existing(directory, name)
    _refuse_exchange(edit, source_place, directory, name, target)
    edit.keep(source_directory.inode)
    edit.keep(directory.inode)
    # A name that the remote has too stays known as such: removing it must hide it there.
    for parent, at, entry, node in (
        (source_directory, source_name, source, target.node),
        (directory, name, target, source.node),
    ):
        before = outgoing.left(edit, parent, at, entry, removed=False)
        flags = FOUND | KEPT if before.flags & FOUND else 0
        edit.repoint(parent, at, before, node, flags, touch=True)
        outgoing.gained(edit, parent, at, node)
    edit.touch_ctime(source.node.inode)
    edit.touch_ctime(target.node.inode)
    edit.directories_moved = True


def _refuse_exchange(
    edit: Edit, source_place: tuple[Node, bytes, Entry], directory: Node, name: bytes, target: Entry
) -> None:
    source_directory, source_name, source = source_place
    if not (source_directory.writable or directory.writable):
        return
    if NodeKind.DIRECTORY in (source.node.kind, target.node.kind):
        raise CrossesMounts("Directories of a writable binding cannot be exchanged: rename them.")
    outgoing.refuse_replacing(edit, source_directory, source_name, source)
    outgoing.refuse_replacing(edit, directory, name, target)
