"""What recording sandboxes opened: rows that are added to, and go with the sandbox.

Not in the change log: it is what this node saw.
"""

from collections.abc import Sequence

from stagefs.model import Inode
from stagefs.namespace.edit import Edit
from stagefs.namespace.node import Opened
from stagefs.namespace.rows import Rows

_ADD = """
INSERT INTO opened VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (sandbox, inode) DO UPDATE SET opens = opens + excluded.opens,
    served_bytes = served_bytes + excluded.served_bytes,
    fetched_bytes = fetched_bytes + excluded.fetched_bytes,
    blocked_ns = blocked_ns + excluded.blocked_ns
"""


def add(edit: Edit, seen: Sequence[tuple[Inode, Opened]]) -> None:
    """(sandbox, what happened since the last time) each."""
    edit.run_many(
        _ADD,
        [
            (
                sandbox, row.inode, row.name, row.url, row.version, row.size_bytes, edit.now_ns,
                row.opens, row.served_bytes, row.fetched_bytes, row.blocked_ns,
            )
            for sandbox, row in seen
        ],
    )  # fmt: skip


def of(rows: Rows, sandbox: Inode) -> list[Opened]:
    """In the order in which they were first opened."""
    return rows.opened(sandbox)


def any_recording(rows: Rows) -> bool:
    return rows.one("SELECT 1 FROM sandboxes WHERE record > 0 LIMIT 1") is not None
