"""Removing trees, in steps that never block for long.

``remove_tree`` takes the name away, which is one change however large the tree is.  The rows
below go in steps: the directory waits in ``doomed`` until ``purge`` has removed its names and
passed its subdirectories on.  Until then ``nlink`` of files that were linked from the tree is
still what it was.  A crash loses nothing: the next daemon goes on with what is doomed.

Here too: how sandboxes made from a template count in ``nlink``.  Their template cannot change
while they exist, so making them adds their number to each file below it once, and dropping
one subtracts what it still shows.
"""

from stagefs.errors import Busy
from stagefs.model import Inode
from stagefs.namespace import outgoing
from stagefs.namespace.edit import Edit
from stagefs.namespace.node import FIXED_INODES, Node, NodeKind, encoded_name
from stagefs.namespace.rows import COUNTED, FROZEN

# About ten milliseconds.
PURGE_ROWS = 2000

_DIRECTORY = int(NodeKind.DIRECTORY)
FILES_SHOWN = f"""
WITH RECURSIVE
top(inode, kind, flags) AS (
    SELECT n.inode, n.kind, n.flags FROM names a JOIN nodes n ON n.inode = a.inode
    WHERE a.parent = :template AND NOT EXISTS (
        SELECT 1 FROM names m WHERE m.parent = :overlay AND m.name = a.name)
),
dirs(inode) AS (
    SELECT inode FROM top WHERE kind = {_DIRECTORY} AND flags & {FROZEN}
    UNION ALL
    SELECT n.inode FROM dirs JOIN names a ON a.parent = dirs.inode
    JOIN nodes n ON n.inode = a.inode
    WHERE n.kind = {_DIRECTORY} AND n.flags & {FROZEN}
),
shown(inode) AS (
    SELECT inode FROM top WHERE kind <> {_DIRECTORY}
    UNION ALL
    SELECT n.inode FROM dirs JOIN names a ON a.parent = dirs.inode
    JOIN nodes n ON n.inode = a.inode WHERE n.kind <> {_DIRECTORY}
)
SELECT inode, count(*) FROM shown GROUP BY inode
"""  # noqa: S608 - our own constants


def count_shown(edit: Edit, *, template: Inode, overlay: Inode, times: int) -> None:
    """Add ``times`` links to each file that ``overlay`` (0: a fresh one) shows of a template."""
    shown = edit.run(FILES_SHOWN, {"template": template, "overlay": overlay}).fetchall()
    edit.run_many(
        "UPDATE nodes SET nlink = nlink + ? WHERE inode = ?",
        [(times * count, inode) for inode, count in shown],
    )
    for inode, _count in shown:
        edit.changed(inode)
    edit.unlinked |= times < 0


def remove_tree(edit: Edit, parent: Inode, name: str) -> Inode:
    directory = edit.directory(parent)
    encoded = encoded_name(name)
    entry = edit.existing(directory, encoded)
    node = entry.node
    if node.inode in FIXED_INODES:
        raise Busy(f"{edit.rows.path(node.inode)} is part of every mount and stays where it is.")
    if node.kind is NodeKind.DIRECTORY:
        _refuse_live_templates(edit, node)
    entry = outgoing.left(edit, directory, encoded, entry, removed=True)
    edit.detach(directory, encoded, entry)
    if node.kind is NodeKind.DIRECTORY:
        end_directory(edit, node)
    edit.log(node.inode, parent=parent, name=name)
    return node.inode


def end_directory(edit: Edit, node: Node) -> None:
    """A directory lost its name: remove what is in it, as much as one step allows."""
    edit.end_directory(node.inode)
    purge(edit)


def _refuse_live_templates(edit: Edit, node: Node) -> None:
    live = edit.rows.column(
        "SELECT inode FROM templates t WHERE EXISTS"
        " (SELECT 1 FROM nodes n WHERE n.lower = t.inode AND n.lower > 0 AND n.nlink > 0)"
    )
    for template in live:
        if node.inode in edit.rows.ancestors(template):
            raise Busy(
                f"{edit.rows.path(node.inode)} holds a template of sandboxes that still exist: "
                "remove those first."
            )


def purge(edit: Edit, rows_max: int = PURGE_ROWS) -> bool:
    """Remove at most about so many names of doomed directories.  True when some are left."""
    left = rows_max
    while left > 0:
        doomed = edit.rows.column("SELECT inode FROM doomed LIMIT 1")
        if not doomed:
            return False
        inode = doomed[0]
        _stop_showing(edit, inode)
        names = edit.run(
            "SELECT a.name, n.inode, n.kind FROM names a LEFT JOIN nodes n ON n.inode = a.inode"
            " WHERE a.parent = ? ORDER BY a.name LIMIT ?",
            (inode, left),
        ).fetchall()
        for _name, below, kind in names:
            if kind == _DIRECTORY:
                edit.end_directory(below)
            elif below is not None:
                edit.add_links(below, -1)
                edit.unlinked = True
        if names:
            edit.run("DELETE FROM names WHERE parent = ? AND name <= ?", (inode, names[-1][0]))
        if len(names) < left:
            edit.run("DELETE FROM doomed WHERE inode = ?", (inode,))
        edit.emptied.add(inode)
        left -= max(1, len(names))
    return edit.rows.one("SELECT 1 FROM doomed LIMIT 1") is not None


def _stop_showing(edit: Edit, inode: Inode) -> None:
    node = edit.rows.node(inode)
    if node is None or not node.lower:
        return
    if node.counted:
        count_shown(edit, template=node.lower, overlay=inode, times=-1)
    edit.run(f"UPDATE nodes SET lower = 0, flags = flags & ~{COUNTED} WHERE inode = ?", (inode,))  # noqa: S608
    edit.changed(inode)


def drop_unlinked(edit: Edit, inodes: list[Inode] | None, limit: int) -> list[Inode]:
    """Delete nodes that no name leads to.  Not those that a directory still shows or that a
    private copy was made of, nor those whose names are still being removed, nor what is yet to be
    handed to the stage-out queue."""
    chosen = (
        edit.rows.column("SELECT inode FROM nodes WHERE nlink = 0 LIMIT ?", limit)
        if inodes is None
        else inodes
    )
    dropped = []
    for inode in chosen:
        lower = edit.rows.lower(inode)
        done = edit.run(
            "DELETE FROM nodes WHERE inode = ? AND nlink = 0"
            " AND NOT EXISTS (SELECT 1 FROM doomed d WHERE d.inode = nodes.inode)"
            " AND NOT EXISTS (SELECT 1 FROM nodes o WHERE o.lower = nodes.inode AND o.lower > 0)"
            " AND NOT EXISTS (SELECT 1 FROM outgoing o WHERE o.inode = nodes.inode"
            " AND o.inode > 0 AND o.state < 2)",
            (inode,),
        )
        if done.rowcount:
            dropped.append(inode)
            edit.changed(inode)
            # What it was made of may be nobody's now.
            edit.unlinked |= lower > 0
    return dropped
