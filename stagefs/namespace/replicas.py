"""Further URLs of objects: rows that belong to a version of an object, whatever names lead to it.

They go with the last node of that version.  A newer version begins without any: nobody has
compared them with it.  ``store`` has what is said of all methods.
"""

from stagefs.model import ObjectId
from stagefs.namespace.edit import Edit
from stagefs.namespace.node import Replica
from stagefs.namespace.node_edit import storable
from stagefs.namespace.rows import Rows, fingerprint
from stagefs.namespace.sending import Sending


class Replicated(Sending):
    # Whether some object has rows; None: not looked yet.  Readers of all others ask no more.
    _any_replicas: bool | None = None

    def replicas(self, of: ObjectId) -> list[Replica]:
        """In the order in which they were added.  One with the object's own URL only tells the
        affinity of that."""
        if self._any_replicas is False:
            return []
        with self._reading():
            if self._any_replicas is None:
                self._any_replicas = self._rows.one("SELECT 1 FROM replicas LIMIT 1") is not None
            return found(self._rows, of)

    def put_replica(
        self, of: ObjectId, replica: Replica, *, operation: int | None = None
    ) -> list[Replica]:
        """Add one, or replace the one that has its URL.  All of them now."""
        with self._change("put_replica", operation) as edit:
            put(edit, of, replica)
        self._any_replicas = True
        return self.replicas(of)

    def remove_replica(
        self, of: ObjectId, url: str, *, operation: int | None = None
    ) -> list[Replica]:
        """All that are left."""
        with self._change("remove_replica", operation) as edit:
            remove(edit, of, url)
        return self.replicas(of)


def found(rows: Rows, of: ObjectId) -> list[Replica]:
    return [
        Replica(url=url, affinity=affinity, validator=validator)
        for url, affinity, validator in rows.all(
            "SELECT url, affinity, validator FROM replicas WHERE fingerprint = ? AND object = ?"
            " ORDER BY added",
            fingerprint(of.url, of.version),
            of.key,
        )
    ]


def put(edit: Edit, of: ObjectId, replica: Replica) -> None:
    edit.run(
        "INSERT INTO replicas (fingerprint, object, url, affinity, validator, added)"
        " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (fingerprint, object, url) DO UPDATE SET"
        " affinity = excluded.affinity, validator = excluded.validator",
        (
            fingerprint(of.url, of.version),
            of.key,
            storable(replica.url),
            replica.affinity,
            replica.validator,
            edit.sequence,
        ),
    )
    edit.log(
        edit.result,
        url=of.url,
        version=of.version,
        replica=replica.url,
        affinity=replica.affinity,
        validator=replica.validator,
    )


def remove(edit: Edit, of: ObjectId, url: str) -> None:
    edit.run(
        "DELETE FROM replicas WHERE fingerprint = ? AND object = ? AND url = ?",
        (fingerprint(of.url, of.version), of.key, url),
    )
    edit.log(edit.result, url=of.url, version=of.version, replica=url)
