"""Whether a namespace file is consistent: for ``doctor``, after crashes, and in tests.

Reads everything, which takes seconds for millions of names.  Changes nothing.
"""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

from stagefs.model import ROOT_INODE
from stagefs.namespace.database import connect, translated
from stagefs.namespace.node import FIXED_INODES, TEMPLATES_INODE
from stagefs.namespace.removal import FILES_SHOWN
from stagefs.namespace.rows import Rows

# Each gives two numbers that tell where.  Kinds and flags as in schema.sql.
_FINDINGS = {
    "a name leads to no node": (
        "SELECT a.parent, a.inode FROM names a LEFT JOIN nodes n ON n.inode = a.inode"
        " WHERE a.inode > 0 AND n.inode IS NULL"
    ),
    "a name lies in no directory": (
        "SELECT a.parent, a.inode FROM names a LEFT JOIN nodes n ON n.inode = a.parent"
        " WHERE n.inode IS NULL OR n.kind <> 1"
    ),
    "a directory has several names, or none": (
        "SELECT n.inode, (SELECT count(*) FROM names a WHERE a.inode = n.inode AND a.inode > 0)"
        " AS k FROM nodes n WHERE n.kind = 1 AND n.nlink > 0"
        " AND n.inode NOT IN (1, 4) AND k <> 1"
    ),
    "a directory counts its subdirectories wrong": (
        "SELECT n.inode, n.nlink FROM nodes n"
        " WHERE n.kind = 1 AND n.nlink > 0 AND n.nlink <> CASE WHEN n.lower > 0 THEN 1"
        " ELSE 2 + (SELECT count(*) FROM names a JOIN nodes d ON d.inode = a.inode"
        " WHERE a.parent = n.inode AND d.kind = 1) END"
    ),
    "two names have one place": (
        "SELECT parent, place FROM names GROUP BY parent, place HAVING count(*) > 1"
    ),
    "only files have content of their own": (
        "SELECT inode, content FROM nodes WHERE content > 0 AND kind <> 2"
    ),
    "a private copy is of a file that is gone": (
        "SELECT n.inode, n.lower FROM nodes n LEFT JOIN nodes b ON b.inode = n.lower"
        " WHERE n.kind = 2 AND n.lower > 0 AND coalesce(b.content, 0) = 0"
    ),
    "a private copy shows more than there is": (
        "SELECT inode, base_bytes FROM nodes WHERE base_bytes > size_bytes"
    ),
    "extended attributes are of no node": (
        "SELECT x.inode, count(*) FROM xattrs x LEFT JOIN nodes n ON n.inode = x.inode"
        " WHERE coalesce(n.flags, 0) & 8 = 0 GROUP BY x.inode"
    ),
    "a node lost its extended attributes": (
        "SELECT inode, flags FROM nodes WHERE flags & 8"
        " AND NOT EXISTS (SELECT 1 FROM xattrs x WHERE x.inode = nodes.inode)"
    ),
    "replicas are of no object": (
        "SELECT r.fingerprint, r.added FROM replicas r"
        " WHERE NOT EXISTS (SELECT 1 FROM nodes n WHERE n.fingerprint = r.fingerprint)"
    ),
    "a sandbox is no directory": (
        "SELECT s.inode, s.inode FROM sandboxes s LEFT JOIN nodes n ON n.inode = s.inode"
        " WHERE n.inode IS NULL OR n.kind <> 1 OR n.nlink = 0"
    ),
    "the counters are wrong": (
        "SELECT c.kind, c.nodes FROM counters c WHERE c.nodes <>"
        " (SELECT count(*) FROM nodes n WHERE n.kind = c.kind AND n.nlink > 0) OR c.size_bytes <>"
        " (SELECT total(n.size_bytes) FROM nodes n WHERE n.kind = c.kind AND n.nlink > 0)"
    ),
    "the change log has a gap": (
        "SELECT max(sequence), count(*) FROM changes HAVING max(sequence) <> count(*)"
    ),
    "an operation belongs to no change": (
        "SELECT operation, sequence FROM operations"
        " WHERE sequence NOT IN (SELECT sequence FROM changes)"
    ),
}
_SHOWN_MAX = 20


def problems(path: Path) -> list[str]:
    """What is wrong, a sentence each; empty when all is well."""
    try:
        connection = connect(path)
        try:
            return list(_problems(connection))
        finally:
            connection.close()
    except sqlite3.Error as exc:
        raise translated(exc, path) from exc


def _problems(connection: sqlite3.Connection) -> Iterator[str]:
    for (text,) in connection.execute("PRAGMA integrity_check(20)").fetchall():
        if text != "ok":
            yield f"the database is damaged: {text}"
    for what, sql in _FINDINGS.items():
        for one, other in connection.execute(sql).fetchmany(_SHOWN_MAX):
            yield f"{what}: {one}, {other}"
    if not connection.execute("SELECT 1 FROM doomed LIMIT 1").fetchone():
        yield from _wrong_links(connection)
    yield from _unreachable(Rows(connection), connection)


def _wrong_links(connection: sqlite3.Connection) -> Iterator[str]:
    """Links of files: their names, and what sandboxes show from templates."""
    shown: dict[int, int] = {}
    counted = connection.execute(
        "SELECT inode, lower FROM nodes WHERE flags & 2 AND nlink > 0 AND lower > 0"
    ).fetchall()
    for overlay, template in counted:
        for inode, count in connection.execute(
            FILES_SHOWN, {"template": template, "overlay": overlay}
        ).fetchall():
            shown[inode] = shown.get(inode, 0) + count
    for inode, nlink, names in connection.execute(
        "SELECT n.inode, n.nlink, (SELECT count(*) FROM names a WHERE a.inode = n.inode"
        " AND a.inode > 0) FROM nodes n WHERE n.kind <> 1"
    ):
        if nlink != names + shown.get(inode, 0):
            yield f"a file has {nlink} links, not {names} + {shown.get(inode, 0)}: inode {inode}"


def _unreachable(rows: Rows, connection: sqlite3.Connection) -> Iterator[str]:
    parents = dict(
        connection.execute(
            "SELECT n.inode, a.parent FROM nodes n JOIN names a ON a.inode = n.inode"
            " WHERE n.kind = 1 AND a.inode > 0"
        )
    )
    fine: set[int] = {ROOT_INODE, TEMPLATES_INODE}
    for inode in parents:
        walked: list[int] = []
        at = inode
        while at not in fine and at in parents and len(walked) <= len(parents):
            walked.append(at)
            at = parents[at]
        node = rows.node(at)
        if at in fine or (node is not None and node.nlink == 0):
            fine.update(walked)
        elif inode not in FIXED_INODES:
            yield f"no path leads to a directory: inode {inode}"
