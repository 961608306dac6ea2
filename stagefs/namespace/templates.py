"""Thousands of sandboxes from one template: a directory whose content all of them show.

A sandbox is an overlay directory without rows of its own, a few hundred bytes, until somebody
changes something in it.
"""

from collections.abc import Sequence

import msgspec

from stagefs.errors import NotADirectory, NotPermitted
from stagefs.model import Inode
from stagefs.namespace import sandbox_rows
from stagefs.namespace.edit import Edit
from stagefs.namespace.node import FIXED_INODES, NodeKind, SandboxRow
from stagefs.namespace.removal import count_shown
from stagefs.namespace.rows import FROZEN, Rows

_FREEZE = f"""
WITH RECURSIVE dirs(inode) AS (
    VALUES (?)
    UNION ALL
    SELECT n.inode FROM dirs JOIN names a ON a.parent = dirs.inode
    JOIN nodes n ON n.inode = a.inode
    WHERE n.kind = {int(NodeKind.DIRECTORY)} AND n.lower = 0 AND n.url IS NULL
)
SELECT inode FROM dirs
"""  # noqa: S608 - our own constants


_FILES = f"""
WITH RECURSIVE dirs(inode) AS (
    VALUES (?)
    UNION ALL
    SELECT n.inode FROM dirs JOIN names a ON a.parent = dirs.inode
    JOIN nodes n ON n.inode = a.inode
    WHERE n.kind = {int(NodeKind.DIRECTORY)} AND n.lower = 0 AND n.url IS NULL
)
SELECT n.inode, count(*) FROM dirs JOIN names a ON a.parent = dirs.inode
JOIN nodes n ON n.inode = a.inode WHERE n.kind <> {int(NodeKind.DIRECTORY)} GROUP BY n.inode
"""  # noqa: S608 - our own constants


def own_links(rows: Rows, template: Inode) -> dict[Inode, int]:
    found: list[tuple[Inode, int]] = rows.all(_FILES, template)
    return dict(found)


def instantiate(
    edit: Edit, template: Inode, parent: Inode, names: Sequence[str], row: SandboxRow | None
) -> list[Inode]:
    """One sandbox a name.  From now on the template cannot change (see ``removal``)."""
    node = edit.node(template)
    if node.kind is not NodeKind.DIRECTORY:
        raise NotADirectory(f"{edit.rows.path(template)} is not a directory.")
    if template in FIXED_INODES or node.lower or node.bind_url is not None:
        raise NotPermitted(
            f"{edit.rows.path(template)} cannot be a template: "
            "take an ordinary directory made for that."
        )
    directory = edit.directory(parent)
    if template in edit.rows.ancestors(parent):
        raise NotPermitted(f"{edit.rows.path(parent)} lies in the template itself.")
    if edit.rows.one("SELECT 1 FROM templates WHERE inode = ?", template) is None:
        below = edit.rows.column(_FREEZE, template)
        edit.run_many(
            f"UPDATE nodes SET flags = flags | {FROZEN} WHERE inode = ?",  # noqa: S608
            [(inode,) for inode in below],
        )
        edit.run("INSERT OR IGNORE INTO templates VALUES (?)", (template,))
        for inode in below:
            edit.changed(inode)
    inodes = []
    for name in names:
        encoded = edit.free_name(directory, name)
        inode = edit.new_overlay(node, counted=True)
        edit.put_name(parent, encoded, inode, place=edit.next_place(), flags=0)
        inodes.append(inode)
    if inodes:
        count_shown(edit, template=template, overlay=Inode(0), times=len(inodes))
        edit.keep(parent)
        edit.add_subdirectories(directory, len(inodes))
        edit.touch(parent)
    if row is not None:
        sandbox_rows.put_new(edit, inodes, row)
    kept = None if row is None else msgspec.structs.asdict(row)
    edit.log(template, parent=parent, names=list(names), inodes=inodes, sandbox=kept)
    return inodes
