"""The rows of nodes that one change makes and edits.

What the change has read or written of a node it remembers, so that a row that is known need
not be read: before the change in ``Known``, from then on in ``nodes_now``.  Whoever edits a row
in another way calls ``changed`` afterwards.
"""

import sqlite3
from collections.abc import Sequence

from msgspec.structs import replace

from stagefs.errors import InvalidUrl, NotFound
from stagefs.model import Inode
from stagefs.namespace.known import Known
from stagefs.namespace.node import Node, NodeKind, StagedObject
from stagefs.namespace.rows import (
    COUNTED,
    DELETES,
    OVERWRITES,
    WHOLE_ONLY,
    WRITABLE,
    XATTRS,
    Rows,
    SqlValue,
    fingerprint,
)

INODES_MAX = 1 << 40

_NODE_COLUMNS = (
    "kind, mode, size_bytes, mtime_ns, ctime_ns, nlink, flags, checked_ns, lower, ttl_s,"
    " url, version, validator, checksum, target, fingerprint"
)
_INSERT_NODE = f"INSERT INTO nodes ({_NODE_COLUMNS}) VALUES ({', '.join('?' * 16)})"  # noqa: S608
_INSERT_NUMBERED = f"INSERT INTO nodes (inode, {_NODE_COLUMNS}) VALUES ({', '.join('?' * 17)})"  # noqa: S608
_INSERT_ANY = (
    "INSERT INTO nodes (kind, mode, size_bytes, mtime_ns, ctime_ns, nlink, flags, checked_ns,"
    " lower, ttl_s, url, version, validator, checksum, target, uid, gid, atime_ns, rdev, content,"
    " base_bytes) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)


class NodeEdit:
    """``nodes_changed``: what must be forgotten once the change is committed, but for what
    ``nodes_now`` says of it."""

    def __init__(self, connection: sqlite3.Connection, now_ns: int, known: Known) -> None:
        self.rows = Rows(connection)
        self.now_ns = now_ns
        self.run = connection.execute
        self.run_many = connection.executemany
        self.known = known
        self.nodes_changed: set[Inode] = set()
        self.nodes_now: dict[Inode, Node] = {}
        # Whether there is a directory more that shows another one.
        self.shown_anew = False
        self._touched: set[Inode] = set()

    def node(self, inode: Inode) -> Node:
        node = self._remembered(inode) or self.rows.node(inode)
        if node is None:
            raise NotFound(f"There is no inode {inode} in the namespace.")
        return node

    def _remembered(self, inode: Inode) -> Node | None:
        if inode in self.nodes_changed:
            return self.nodes_now.get(inode)
        return self.known.nodes.get(inode)

    def changed(self, inode: Inode) -> None:
        """A row was edited in a way that ``nodes_now`` does not know."""
        self.nodes_changed.add(inode)
        self.nodes_now.pop(inode, None)

    def _edited(self, inode: Inode, node: Node | None) -> None:
        """``node`` is how the row is now, None when that is not known."""
        self.nodes_changed.add(inode)
        if node is not None:
            self.nodes_now[inode] = node

    # Making

    def new_directory(
        self,
        mode: int,
        *,
        uid: int = -1,
        gid: int = -1,
        url: str | None = None,
        ttl_s: float = 0.0,
        writable: bool = False,
        overwrites: bool = False,
        deletes: bool = False,
    ) -> Inode:
        return self.insert(
            Node(
                Inode(0), NodeKind.DIRECTORY, mode, 0, self.now_ns, self.now_ns, 2,
                uid=uid, gid=gid, bind_url=None if url is None else storable(url),
                bind_ttl_s=ttl_s, writable=writable, overwrites=overwrites, deletes=deletes,
            )
        )  # fmt: skip

    def new_overlay(self, lower: Node, *, counted: bool) -> Inode:
        """A directory that shows another one."""
        self.shown_anew = True
        inode = self.insert(
            Node(
                Inode(0), NodeKind.DIRECTORY, lower.mode, 0, lower.mtime_ns, self.now_ns, 1,
                uid=lower.uid, gid=lower.gid, lower=lower.inode, counted=counted,
                has_xattrs=lower.has_xattrs,
            )
        )  # fmt: skip
        if lower.has_xattrs:
            self.copy_xattrs(lower.inode, inode)
        return inode

    def insert(self, node: Node) -> Inode:
        """A new row with all that ``node`` says but its inode; ``nlink`` counts the names that
        it is about to get."""
        found = node.object_id
        flags = (
            (0 if node.ranges else WHOLE_ONLY)
            | (COUNTED if node.counted else 0)
            | (XATTRS if node.has_xattrs else 0)
            | (WRITABLE if node.writable else 0)
            | (OVERWRITES if node.overwrites else 0)
            | (DELETES if node.deletes else 0)
        )
        inode = self._insert(
            _INSERT_ANY,
            (
                node.kind, node.mode, node.size_bytes, node.mtime_ns, node.ctime_ns, node.nlink,
                flags, node.checked_ns, node.lower, node.bind_ttl_s,
                node.bind_url if found is None else found.url,
                None if found is None else found.version, node.validator,
                None if node.checksum is None else str(node.checksum),
                None if node.target is None else node.target.encode("utf-8", "surrogateescape"),
                node.uid, node.gid, node.atime_ns, node.rdev, node.content, node.base_bytes,
            ),
        )  # fmt: skip
        self.nodes_changed.add(inode)
        self.nodes_now[inode] = replace(node, inode=inode)
        return inode

    def copy_xattrs(self, source: Inode, inode: Inode) -> None:
        self.run(
            "INSERT INTO xattrs SELECT ?, name, value FROM xattrs WHERE inode = ?", (inode, source)
        )

    def new_file(self, staged: StagedObject, *, nlink: int = 0) -> Inode:
        """``nlink`` 1 for ``attach_new``, 0 for what else gives it its name."""
        return self._insert(_INSERT_NODE, self._file_values(staged, nlink=nlink))

    def _file_values(self, staged: StagedObject, *, nlink: int) -> tuple[SqlValue, ...]:
        return (
            NodeKind.FILE, staged.mode & 0o7777, staged.size_bytes, staged.mtime_ns, self.now_ns,
            nlink, 0 if staged.ranges else WHOLE_ONLY, staged.checked_ns, 0, 0.0,
            storable(staged.url), storable(staged.version),
            None if staged.validator is None else storable(staged.validator),
            None if staged.checksum is None else str(staged.checksum), None,
            fingerprint(staged.url, staged.version),
        )  # fmt: skip

    def insert_files(self, files: Sequence[StagedObject]) -> range:
        """Many new files with one link each, three times as fast as one by one; their inodes."""
        first = 1 + (self.rows.one("SELECT seq FROM sqlite_sequence WHERE name = 'nodes'") or 0)
        inodes = range(first, first + len(files))
        assert inodes.stop < INODES_MAX, "inode numbers are used up"
        self.run_many(
            _INSERT_NUMBERED,
            [
                (inode, *self._file_values(staged, nlink=1))
                for inode, staged in zip(inodes, files, strict=True)
            ],
        )
        return inodes

    def _insert(self, statement: str, values: tuple[SqlValue, ...]) -> Inode:
        inode = self.run(statement, values).lastrowid
        assert inode is not None
        assert inode < INODES_MAX, "inode numbers are used up"
        return Inode(inode)

    # Editing

    def add_links(self, inode: Inode, count: int) -> None:
        self.run(
            "UPDATE nodes SET nlink = nlink + ?, ctime_ns = ? WHERE inode = ?",
            (count, self.now_ns, inode),
        )
        node = self._remembered(inode)
        if node is not None:
            node = replace(node, nlink=node.nlink + count, ctime_ns=self.now_ns)
        self._edited(inode, node)

    def set_nlink(self, inode: Inode, nlink: int) -> None:
        self.run("UPDATE nodes SET nlink = ? WHERE inode = ?", (nlink, inode))
        node = self._remembered(inode)
        self._edited(inode, None if node is None else replace(node, nlink=nlink))

    def touch_ctime(self, inode: Inode) -> None:
        self.run("UPDATE nodes SET ctime_ns = ? WHERE inode = ?", (self.now_ns, inode))
        node = self._remembered(inode)
        self._edited(inode, None if node is None else replace(node, ctime_ns=self.now_ns))

    def touch(self, directory: Inode) -> None:
        """Its names changed."""
        if directory in self._touched:
            return
        self._touched.add(directory)
        now_ns = self.now_ns
        self.run(
            "UPDATE nodes SET mtime_ns = ?, ctime_ns = ? WHERE inode = ?",
            (now_ns, now_ns, directory),
        )
        node = self._remembered(directory)
        if node is not None:
            node = replace(node, mtime_ns=now_ns, ctime_ns=now_ns)
        self._edited(directory, node)

    def add_subdirectories(self, directory: Node, count: int) -> None:
        # Directories that show another one do not count their subdirectories.
        if directory.lower:
            return
        inode = directory.inode
        self.run("UPDATE nodes SET nlink = nlink + ? WHERE inode = ? AND nlink > 0", (count, inode))
        node = self._remembered(inode)
        if node is not None and node.nlink > 0:
            node = replace(node, nlink=node.nlink + count)
        self._edited(inode, node)


def storable(text: str) -> str:
    """URLs and versions are text; bytes that are none would be refused by the database.
    Raises InvalidUrl."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise InvalidUrl(
                f"{text[:80]!r} holds bytes that are not text: percent-encode them."
            ) from exc
    return text
