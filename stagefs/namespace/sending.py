"""What writable bindings owe their remotes, for whoever uploads it: see ``outgoing`` for how it
gets there, and ``store`` for what is said of all methods.
"""

from collections.abc import Sequence

from stagefs.model import Inode
from stagefs.namespace import outgoing
from stagefs.namespace.looking import Looking
from stagefs.namespace.node import OutgoingState, OutgoingUpload, encoded_name

_DUE, _LEAVING = int(OutgoingState.DUE), int(OutgoingState.LEAVING)
_QUEUED = int(OutgoingState.QUEUED)


class Sending(Looking):
    def due_uploads(self, limit: int, *, after: int = 0) -> list[OutgoingUpload]:
        """What nobody outside knows of yet, or perhaps does not, the oldest first."""
        with self._reading():
            return outgoing.uploads(
                self._rows, "state < 2 AND id > ? ORDER BY id LIMIT ?", after, limit
            )

    def due_count(self) -> int:
        with self._reading():
            return self._rows.one("SELECT count(*) FROM outgoing WHERE state < 2") or 0

    def leaving_commits(self) -> list[str]:
        """Commits of which it is not known whether the queue has them."""
        with self._reading():
            rows = self._rows.all(
                f"SELECT DISTINCT commit_id FROM outgoing WHERE state < 2 AND state = {_LEAVING}"  # noqa: S608
            )
        return [commit for (commit,) in rows]

    def open_uploads(self, limit: int, *, after: int = 0) -> list[OutgoingUpload]:
        """What the queue has, and may tell more of."""
        with self._reading():
            return outgoing.uploads(
                self._rows, "state IN (2, 4) AND id > ? ORDER BY id LIMIT ?", after, limit
            )

    def uploads_of(self, inode: Inode) -> list[OutgoingUpload]:
        """Of a published file, the oldest first."""
        with self._reading():
            return outgoing.uploads(self._rows, "inode = ? AND inode > 0 ORDER BY id", inode)

    def is_at_remote(self, directory: Inode, name: str) -> bool:
        """Whether the remote has, or is about to get, an object under a name of a bound
        directory."""
        node, encoded = self.node(directory), encoded_name(name)
        if node.bind_url is None:
            return False
        with self._reading():
            own = self._rows.own(directory, encoded)
            return outgoing.is_at_remote(self._rows, node, encoded, own)

    # What the stage-out queue says; not in the change log, because the queue has its own.

    def begin_leaving(self, ids: Sequence[int], commit: str) -> list[int]:
        """These are handed to the queue now, as one commit; those that are still due."""
        with self._transaction() as edit:
            return [
                number
                for number in ids
                if edit.run(
                    f"UPDATE outgoing SET state = {_LEAVING}, commit_id = ? WHERE id = ?"  # noqa: S608
                    f" AND state = {_DUE}",
                    (commit, number),
                ).rowcount
            ]

    def still_due(self, commit: str) -> None:
        """The queue never heard of it."""
        with self._transaction() as edit:
            edit.run(
                f"UPDATE outgoing SET state = {_DUE}, commit_id = NULL WHERE commit_id = ?"  # noqa: S608
                f" AND state = {_LEAVING}",
                (commit,),
            )
            edit.outgoing = True

    def has_left(self, commit: str) -> None:
        """The queue has it for sure."""
        with self._transaction() as edit:
            edit.run(
                f"UPDATE outgoing SET state = {_QUEUED} WHERE commit_id = ? AND state = {_LEAVING}"  # noqa: S608
                " AND inode > 0",
                (commit,),
            )
            edit.run("DELETE FROM outgoing WHERE commit_id = ? AND inode = 0", (commit,))
            # Content whose name is gone is needed no more.
            edit.unlinked = True

    def settle_uploads(self, told: Sequence[tuple[int, OutgoingState, str | None]]) -> None:
        """(id, state, reason) as the queue says."""
        with self._transaction() as edit:
            edit.run_many(
                f"UPDATE outgoing SET state = ?, reason = ? WHERE id = ? AND state >= {_LEAVING}",  # noqa: S608
                [(int(state), reason, number) for number, state, reason in told],
            )
