"""Reading the tables: one SQL statement a method, rows to values.

Knows nothing of overlays and keeps nothing in memory.  Used from the trio thread, inside and
outside of transactions; every cursor is emptied at once, so that no read transaction stays
open and checkpoints can complete.
"""

import sqlite3
from collections.abc import Iterator
from typing import Any
from zlib import crc32

import msgspec

from stagefs.model import ROOT_INODE, Checksum, ChecksumKind, Inode, ObjectId
from stagefs.namespace.node import (
    SPECIAL_KINDS,
    CommitRow,
    ContentKind,
    Node,
    NodeKind,
    Opened,
    SandboxRow,
    Statistics,
    decoded_name,
)

# nodes.flags
WHOLE_ONLY, COUNTED, FROZEN, XATTRS, WRITABLE, OVERWRITES, DELETES = 1, 2, 4, 8, 16, 32, 64
BINDING_FLAGS = WRITABLE | OVERWRITES | DELETES
# names.flags
SHOWN, FOUND, KEPT, OURS = 1, 2, 4, 8

ANCESTORS_MAX = 4096

COLUMNS = (
    "n.inode, n.kind, n.mode, n.size_bytes, n.mtime_ns, n.ctime_ns, n.nlink, n.flags, n.successor,"
    " n.checked_ns, n.lower, n.listed_ns, n.ttl_s, n.url, n.version, n.validator, n.checksum,"
    " n.target, n.uid, n.gid, n.atime_ns, n.rdev, n.content, n.base_bytes"
)
_NODE = f"SELECT {COLUMNS} FROM nodes n WHERE n.inode = ?"  # noqa: S608 - our own constants
_NAMED = (
    f"SELECT a.inode, a.place, a.flags, {COLUMNS} FROM names a "  # noqa: S608
    "LEFT JOIN nodes n ON n.inode = a.inode WHERE a.parent = ? AND a.name = ?"
)
_PAGE = (
    f"SELECT a.place, a.name, {COLUMNS} FROM names a "  # noqa: S608
    "CROSS JOIN nodes n ON n.inode = a.inode "
    "WHERE a.parent = ? AND a.place > ? ORDER BY a.place LIMIT ?"
)
_PAGE_FLAGS = (
    f"SELECT a.place, a.name, a.flags, {COLUMNS} FROM names a "  # noqa: S608
    "CROSS JOIN nodes n ON n.inode = a.inode "
    "WHERE a.parent = ? AND a.place > ? ORDER BY a.place LIMIT ?"
)
_OVERLAYS = (
    "WITH RECURSIVE over(inode) AS (SELECT inode FROM nodes WHERE lower = ? AND lower > 0 "
    "UNION SELECT n.inode FROM over JOIN nodes n ON n.lower = over.inode AND n.lower > 0) "
    "SELECT inode FROM over"
)
_SANDBOXES = (
    "SELECT inode, state, on_write, record, persistent, lifetime, manifest, created_ns, changed_ns"
    " FROM sandboxes"
)
_COMMITS = "SELECT id, sandbox, time_ns, record FROM commits"
_KINDS = {kind.value: kind for kind in NodeKind}
_CONTENTS = tuple(ContentKind)
_CHECKSUM_KINDS = {kind.value: kind for kind in ChecksumKind}


SqlValue = int | float | str | bytes | None


class OwnName(msgspec.Struct, frozen=True, gc=False):
    """A row of a directory's own names.  ``node`` is None when the row hides a name."""

    place: int
    flags: int
    node: Node | None


def node_from_row(  # noqa: PLR0917 - see the docstring
    inode: Inode,
    kind: int,
    mode: int,
    size_bytes: int,
    mtime_ns: int,
    ctime_ns: int,
    nlink: int,
    flags: int,
    successor: Inode,
    checked_ns: int,
    lower: Inode,
    listed_ns: int,
    ttl_s: float,
    url: str | None,
    version: str | None,
    validator: str | None,
    checksum: str | None,
    target: bytes | None,
    uid: int,
    gid: int,
    atime_ns: int,
    rdev: int,
    content: int,
    base_bytes: int,
) -> Node:
    """Positional, in the order of COLUMNS: this runs once for each name that is listed."""
    if kind == NodeKind.FILE:
        return Node(
            inode, NodeKind.FILE, mode, size_bytes, mtime_ns, ctime_ns, nlink,
            None,
            None if url is None or version is None else ObjectId(url, version),
            validator,
            None if checksum is None else checksum_from(checksum),
            not flags & WHOLE_ONLY,
            successor,
            checked_ns,
            None, 0.0, 0, lower, False, False,
            uid, gid, atime_ns, 0, _CONTENTS[content], base_bytes, flags & XATTRS != 0,
        )  # fmt: skip
    return Node(
        inode=inode,
        kind=_KINDS[kind],
        mode=mode,
        size_bytes=size_bytes,
        mtime_ns=mtime_ns,
        ctime_ns=ctime_ns,
        nlink=nlink,
        target=None if target is None else decoded_name(target),
        checked_ns=checked_ns,
        bind_url=url,
        bind_ttl_s=ttl_s,
        listed_ns=listed_ns,
        lower=lower,
        counted=bool(flags & COUNTED),
        frozen=bool(flags & FROZEN),
        uid=uid,
        gid=gid,
        atime_ns=atime_ns,
        rdev=rdev,
        has_xattrs=bool(flags & XATTRS),
        writable=bool(flags & WRITABLE),
        overwrites=bool(flags & OVERWRITES),
        deletes=bool(flags & DELETES),
    )


def _sandbox_row(
    inode: Inode,
    state: str,
    on_write: str,
    record: int,
    persistent: int,
    lifetime: str,
    manifest: str,
    created_ns: int,
    changed_ns: int,
) -> SandboxRow:
    return SandboxRow(
        inode=inode,
        state=state,
        on_write=on_write,
        record=bool(record),
        persistent=bool(persistent),
        lifetime=lifetime,
        manifest=manifest,
        created_ns=created_ns,
        changed_ns=changed_ns,
    )


def _commit_row(commit_id: str, path: str, time_ns: int, record: str) -> CommitRow:
    return CommitRow(id=commit_id, sandbox=path, time_ns=time_ns, record=record)


def checksum_from(text: str) -> Checksum:
    kind, _, digest = text.partition(":")
    return Checksum(_CHECKSUM_KINDS[kind], digest)


def fingerprint(url: str, version: str) -> int:
    """A short hash of an object id, for an index that stays small.

    Neighbours by URL are neighbours here: a hash without that would write another page of the
    index for each name of an import.
    """
    directory = crc32(url.rpartition("/")[0].encode()) & 0x7FFFFFFF
    return directory << 32 | crc32(f"{url}\0{version}".encode())


class Rows:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._run = connection.execute

    def one(self, sql: str, *parameters: SqlValue) -> int | None:
        """The number in the first column of the first row, or None."""
        row = self._run(sql, parameters).fetchone()
        return None if row is None else row[0]

    def column(self, sql: str, *parameters: SqlValue) -> list[Inode]:
        return [row[0] for row in self._run(sql, parameters).fetchall()]

    def all(self, sql: str, *parameters: SqlValue) -> list[tuple[Any, ...]]:
        return self._run(sql, parameters).fetchall()

    def blobs(self, sql: str, *parameters: SqlValue) -> list[bytes]:
        return [row[0] for row in self._run(sql, parameters).fetchall()]

    def node(self, inode: int) -> Node | None:
        row = self._run(_NODE, (inode,)).fetchone()
        return None if row is None else node_from_row(*row)

    def own(self, parent: int, name: bytes) -> OwnName | None:
        row = self._run(_NAMED, (parent, name)).fetchone()
        if row is None:
            return None
        inode, place, flags, *columns = row
        if inode and columns[0] is None:
            return None
        return OwnName(place, flags, node_from_row(*columns) if inode else None)

    def page(self, parent: int, after: int, limit: int) -> list[tuple[int, str, Node]]:
        """The own names of a directory that shows no other."""
        rows = self._run(_PAGE, (parent, after, limit)).fetchall()
        make = node_from_row
        return [
            (place, name.decode("utf-8", "surrogateescape"), make(*columns))
            for place, name, *columns in rows
        ]

    def page_with_flags(
        self, parent: int, after: int, limit: int
    ) -> list[tuple[int, bytes, int, Node]]:
        rows = self._run(_PAGE_FLAGS, (parent, after, limit)).fetchall()
        return [(place, name, flags, node_from_row(*c)) for place, name, flags, *c in rows]

    def has_names(self, parent: int) -> bool:
        return self.one("SELECT 1 FROM names WHERE parent = ? LIMIT 1", parent) is not None

    def names_of(self, inode: int) -> list[tuple[Inode, bytes]]:
        """Every (directory, name) of an inode."""
        return self._run(
            "SELECT parent, name FROM names WHERE inode = ? AND inode > 0", (inode,)
        ).fetchall()

    def name_of(self, inode: int) -> tuple[Inode, bytes, int, int] | None:
        """(directory, name, place, flags) of one name of an inode."""
        row: tuple[Inode, bytes, int, int] | None = self._run(
            "SELECT parent, name, place, flags FROM names WHERE inode = ? AND inode > 0 LIMIT 1",
            (inode,),
        ).fetchone()
        return row

    def ancestors(self, inode: Inode) -> Iterator[Inode]:
        """The inode itself, then the directories above it."""
        for _ in range(ANCESTORS_MAX):
            yield inode
            if inode == ROOT_INODE:
                return
            above = self.name_of(inode)
            if above is None:
                return
            inode = above[0]

    def lower(self, inode: int) -> Inode:
        found = self.one("SELECT lower FROM nodes WHERE inode = ?", inode)
        return Inode(found or 0)

    def chain(self, inode: Inode) -> Iterator[Inode]:
        """The directory itself, then the one it shows, and so on."""
        while inode:
            yield inode
            inode = self.lower(inode)

    def overlays(self, inode: int) -> list[Inode]:
        """All directories that show this one, at first hand or through another."""
        if self.one("SELECT 1 FROM nodes WHERE lower = ? AND lower > 0 LIMIT 1", inode) is None:
            return []
        return self.column(_OVERLAYS, inode)

    def sandbox(self, inode: int) -> SandboxRow | None:
        columns = self._run(f"{_SANDBOXES} WHERE inode = ?", (inode,)).fetchone()
        return None if columns is None else _sandbox_row(*columns)

    def sandboxes(self) -> list[SandboxRow]:
        return [
            _sandbox_row(*columns)
            for columns in self._run(f"{_SANDBOXES} ORDER BY inode").fetchall()
        ]

    def commit(self, commit_id: str) -> CommitRow | None:
        columns = self._run(f"{_COMMITS} WHERE id = ?", (commit_id,)).fetchone()
        return None if columns is None else _commit_row(*columns)

    def commits(self, path: str | None) -> list[CommitRow]:
        """In the order of time; of the sandbox that had this path, or all."""
        found = (
            self._run(f"{_COMMITS} ORDER BY time_ns, rowid")
            if path is None
            else self._run(f"{_COMMITS} WHERE sandbox = ? ORDER BY time_ns, rowid", (path,))
        ).fetchall()
        return [_commit_row(*columns) for columns in found]

    def opened(self, sandbox: Inode) -> list[Opened]:
        rows = self._run(
            "SELECT inode, name, url, version, size_bytes, first_ns, opens, served_bytes,"
            " fetched_bytes, blocked_ns FROM opened WHERE sandbox = ? ORDER BY first_ns, name",
            (sandbox,),
        ).fetchall()
        return [
            Opened(
                inode=Inode(inode),
                name=name,
                url=url,
                version=version,
                size_bytes=size_bytes,
                first_ns=first_ns,
                opens=opens,
                served_bytes=served_bytes,
                fetched_bytes=fetched_bytes,
                blocked_ns=blocked_ns,
            )
            for (
                inode, name, url, version, size_bytes, first_ns, opens, served_bytes,
                fetched_bytes, blocked_ns,
            ) in rows
        ]  # fmt: skip

    def statistics(self) -> Statistics:
        nodes, sizes = {}, {}
        for kind, count, size_bytes in self._run(
            "SELECT kind, nodes, size_bytes FROM counters"
        ).fetchall():
            nodes[kind], sizes[kind] = count, size_bytes
        return Statistics(
            directories=nodes[NodeKind.DIRECTORY],
            files=nodes[NodeKind.FILE],
            symlinks=nodes[NodeKind.SYMLINK],
            specials=sum(nodes[kind] for kind in SPECIAL_KINDS),
            size_bytes=sizes[NodeKind.FILE],
            changes=self.one("SELECT max(sequence) FROM changes") or 0,
        )

    def path(self, inode: Inode) -> str:
        """For messages: one of the paths that lead to an inode, from the mount's root."""
        parts: list[str] = []
        for _ in range(ANCESTORS_MAX):
            if inode == ROOT_INODE:
                break
            above = self.name_of(inode)
            if above is None:
                parts.append(f"(inode {inode})")
                break
            parts.append(decoded_name(above[1]))
            inode = above[0]
        return "/" + "/".join(reversed(parts))
