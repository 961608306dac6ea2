"""Further URLs of an object: kept with its version, and gone with it."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from stagefs.model import ObjectId
from stagefs.namespace.node import STAGING_INODE, Replica
from stagefs.namespace.store import Namespace
from tests.unit.namespace.trees import staged

NEAR = Replica(url="ssh://near/f", affinity="here/m1", validator="mtime:1:3")
FAR = Replica(url="s3://far/f", affinity="there", validator="etag:x")


def rows(database: Path) -> int:
    with closing(sqlite3.connect(database)) as connection:
        return int(connection.execute("SELECT count(*) FROM replicas").fetchone()[0])


def test_they_are_kept_in_their_order_and_survive(database: Path) -> None:
    namespace = Namespace.open(database)
    node = namespace.register(STAGING_INODE, "f", staged("f"))
    of = node.object_id
    assert of is not None
    assert namespace.replicas(of) == []
    namespace.put_replica(of, NEAR)
    assert namespace.put_replica(of, FAR) == [NEAR, FAR]
    moved = Replica(url=NEAR.url, affinity="elsewhere", validator="mtime:2:3")
    assert namespace.put_replica(of, moved) == [moved, FAR]
    assert namespace.replicas(ObjectId(of.url, "another version")) == []
    namespace.close()

    namespace = Namespace.open(database)
    assert namespace.replicas(of) == [moved, FAR]
    assert namespace.remove_replica(of, FAR.url) == [moved]
    namespace.close()
    with closing(sqlite3.connect(database)) as connection:
        last = connection.execute(
            "SELECT kind, arguments FROM changes ORDER BY sequence DESC"
        ).fetchone()
    assert last[0] == "remove_replica"
    assert json.loads(last[1])["replica"] == FAR.url


def test_they_go_with_the_last_node_of_the_version(database: Path) -> None:
    namespace = Namespace.open(database)
    node = namespace.register(STAGING_INODE, "f", staged("f"))
    twin = namespace.register(STAGING_INODE, "g", staged("f"))
    other = namespace.register(STAGING_INODE, "h", staged("h"))
    for one in (node, other):
        assert one.object_id is not None
        namespace.put_replica(one.object_id, NEAR)
    for name, inode, left in (("f", node.inode, 2), ("g", twin.inode, 1)):
        namespace.remove(STAGING_INODE, name)
        assert namespace.drop_unlinked() == [inode]
        assert rows(database) == left, f"after {name} was removed"
    namespace.close()


def test_a_newer_version_has_none(database: Path) -> None:
    namespace = Namespace.open(database)
    node = namespace.register(STAGING_INODE, "f", staged("f"))
    assert node.object_id is not None
    namespace.put_replica(node.object_id, NEAR)
    newer = namespace.replace(STAGING_INODE, "f", staged("f", version="2"))
    assert newer.object_id is not None
    assert namespace.replicas(newer.object_id) == []
    assert namespace.replicas(node.object_id) == [NEAR]
    namespace.close()
