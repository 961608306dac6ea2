"""Directories that are sandboxes, and what their commits made visible.

The namespace keeps this because it must change together with names: a directory that is
removed is no sandbox any more, and a commit shows all of its outputs at once or none.
"""

import sqlite3
from collections.abc import Iterable, Sequence

import msgspec

from stagefs.errors import IsADirectory, NameExists, NotADirectory, NotFound, NotPermitted
from stagefs.model import Inode
from stagefs.namespace import contents, outgoing
from stagefs.namespace.edit import Edit
from stagefs.namespace.node import NodeKind, SandboxRow, encoded_name
from stagefs.namespace.rows import FOUND, KEPT

_PUT = "INSERT OR REPLACE INTO sandboxes VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"


def put(edit: Edit, row: SandboxRow) -> None:
    """``created_ns`` stays what it was when the directory is a sandbox already."""
    node = edit.node(row.inode)
    if node.kind is not NodeKind.DIRECTORY:
        raise NotADirectory(f"{edit.rows.path(row.inode)} is not a directory: it is no sandbox.")
    if node.nlink == 0:
        raise NotFound(f"The directory with inode {row.inode} was removed.")
    before = edit.rows.sandbox(row.inode)
    created_ns = edit.now_ns if before is None else before.created_ns
    put_new(edit, [row.inode], msgspec.structs.replace(row, created_ns=created_ns))
    values = msgspec.structs.asdict(row)
    edit.log(values.pop("inode"), **values)


def put_new(edit: Edit, inodes: Iterable[Inode], row: SandboxRow) -> None:
    """The same for each of these directories, which are known to exist."""
    edit.directories_moved = True
    edit.run_many(
        _PUT,
        [
            (
                inode, row.state, row.on_write, row.record, row.persistent, row.lifetime,
                row.manifest, row.created_ns or edit.now_ns, edit.now_ns,
            )
            for inode in inodes
        ],
    )  # fmt: skip


def commit(
    edit: Edit,
    inode: Inode,
    commit_id: str,
    record: str,
    *,
    state: str,
    publish: Sequence[Inode],
    links: Sequence[tuple[Inode, str, Inode]],
    replace: bool,
) -> None:
    """The outputs of a sandbox become visible, its state changes, and the record is kept."""
    row = edit.rows.sandbox(inode)
    if row is None:
        raise NotFound(f"{edit.rows.path(inode)} is no sandbox: there is nothing to commit.")
    contents.publish(edit, list(publish))
    for parent, name, output in links:
        _give_name(edit, parent, name, output, replace=replace)
    put_new(edit, [inode], msgspec.structs.replace(row, state=state))
    try:
        edit.run(
            "INSERT INTO commits VALUES (?, ?, ?, ?)",
            (commit_id, edit.rows.path(inode), edit.now_ns, record),
        )
    except sqlite3.IntegrityError as exc:
        raise NameExists(f"There was a commit {commit_id!r} already.") from exc
    edit.log(
        inode,
        commit=commit_id,
        record=record,
        state=state,
        publish=list(publish),
        links=[list(link) for link in links],
        replace=replace,
    )


def _give_name(edit: Edit, parent: Inode, name: str, output: Inode, *, replace: bool) -> None:
    node = edit.node(output)
    if node.kind is NodeKind.DIRECTORY:
        raise NotPermitted(f"{edit.rows.path(output)} is a directory: only files are linked.")
    if node.nlink == 0:
        raise NotFound(f"The output with inode {output} was removed.")
    directory = edit.directory(parent)
    encoded = encoded_name(name)
    entry = edit.entry(directory, encoded)
    if entry is None:
        edit.attach(directory, encoded, node)
        outgoing.gained(edit, directory, encoded, node)
        return
    if entry.node.kind is NodeKind.DIRECTORY:
        raise IsADirectory(f"{name!r} in {edit.rows.path(parent)} is a directory.")
    if not replace:
        raise NameExists(
            f"{name!r} exists already in {edit.rows.path(parent)}: "
            "commit to another name, or with --overwrite."
        )
    if entry.node.inode != output:
        outgoing.refuse_replacing(edit, directory, encoded, entry)
        entry = outgoing.left(edit, directory, encoded, entry, removed=False)
        flags = FOUND | KEPT if entry.flags & FOUND else 0
        edit.keep(parent)
        edit.repoint(directory, encoded, entry, node, flags, touch=True)
        outgoing.gained(edit, directory, encoded, node)
