"""Bringing namespace files of older formats along.

One transaction, which takes milliseconds however many names there are: it adds columns that
have a default, and empty tables.  A file that is not wholly brought along is as it was before.
"""

import sqlite3

FORMAT_VERSION = 3

# The statements that make format N of format N - 1, by N.
_STEPS = {
    2: (
        "ALTER TABLE nodes ADD COLUMN uid INTEGER NOT NULL DEFAULT -1",
        "ALTER TABLE nodes ADD COLUMN gid INTEGER NOT NULL DEFAULT -1",
        "ALTER TABLE nodes ADD COLUMN atime_ns INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE nodes ADD COLUMN rdev INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE nodes ADD COLUMN content INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE nodes ADD COLUMN base_bytes INTEGER NOT NULL DEFAULT 0",
        "CREATE INDEX nodes_by_content ON nodes (nlink) WHERE content > 0",
        "CREATE TABLE xattrs (inode INTEGER NOT NULL, name BLOB NOT NULL, value BLOB NOT NULL,"
        " PRIMARY KEY (inode, name)) WITHOUT ROWID",
        "CREATE TRIGGER node_dropped AFTER DELETE ON nodes WHEN old.flags & 8 BEGIN"
        " DELETE FROM xattrs WHERE inode = old.inode; END",
        "CREATE TABLE sandboxes (inode INTEGER PRIMARY KEY, state TEXT NOT NULL,"
        " on_write TEXT NOT NULL, record INTEGER NOT NULL, persistent INTEGER NOT NULL,"
        " lifetime TEXT NOT NULL, manifest TEXT NOT NULL, created_ns INTEGER NOT NULL,"
        " changed_ns INTEGER NOT NULL)",
        "CREATE INDEX sandboxes_recording ON sandboxes (inode) WHERE record > 0",
        "CREATE TABLE opened (sandbox INTEGER NOT NULL, inode INTEGER NOT NULL, name TEXT NOT NULL,"
        " url TEXT NOT NULL, version TEXT NOT NULL, size_bytes INTEGER NOT NULL,"
        " first_ns INTEGER NOT NULL, opens INTEGER NOT NULL, served_bytes INTEGER NOT NULL,"
        " fetched_bytes INTEGER NOT NULL, blocked_ns INTEGER NOT NULL,"
        " PRIMARY KEY (sandbox, inode)) WITHOUT ROWID",
        "CREATE TABLE commits (id TEXT PRIMARY KEY, sandbox TEXT NOT NULL,"
        " time_ns INTEGER NOT NULL, record TEXT NOT NULL)",
        "CREATE INDEX commits_by_sandbox ON commits (sandbox, time_ns)",
        "CREATE TABLE outgoing (id INTEGER PRIMARY KEY AUTOINCREMENT, inode INTEGER NOT NULL,"
        " url TEXT NOT NULL, overwrite INTEGER NOT NULL, state INTEGER NOT NULL,"
        " since_ns INTEGER NOT NULL, commit_id TEXT, reason TEXT)",
        "CREATE INDEX outgoing_by_inode ON outgoing (inode, state) WHERE inode > 0",
        "CREATE INDEX outgoing_due ON outgoing (id) WHERE state < 2",
        "CREATE INDEX outgoing_open ON outgoing (id) WHERE state IN (2, 4)",
        "CREATE TRIGGER outgoing_dropped AFTER DELETE ON nodes WHEN old.content = 2 BEGIN"
        " DELETE FROM outgoing WHERE inode = old.inode AND inode > 0; END",
        "INSERT INTO counters VALUES (4, 0, 0), (5, 0, 0), (6, 0, 0), (7, 0, 0)",
        "CREATE TRIGGER node_resized AFTER UPDATE OF size_bytes ON nodes WHEN new.nlink > 0 BEGIN"
        " UPDATE counters SET size_bytes = size_bytes + new.size_bytes - old.size_bytes"
        " WHERE kind = new.kind; END",
    ),
    3: (
        "CREATE TABLE replicas (fingerprint INTEGER NOT NULL, object TEXT NOT NULL,"
        " url TEXT NOT NULL, affinity TEXT NOT NULL, validator TEXT, added INTEGER NOT NULL,"
        " PRIMARY KEY (fingerprint, object, url)) WITHOUT ROWID",
        "CREATE TRIGGER replicas_dropped AFTER DELETE ON nodes"
        " WHEN old.fingerprint IN (SELECT fingerprint FROM replicas)"
        " AND NOT EXISTS (SELECT 1 FROM nodes WHERE fingerprint = old.fingerprint) BEGIN"
        " DELETE FROM replicas WHERE fingerprint = old.fingerprint; END",
    ),
}


def format_of(connection: sqlite3.Connection) -> int:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    return version


def bring_along(connection: sqlite3.Connection) -> None:
    """To be called in a transaction that nobody else can be in."""
    for version in range(format_of(connection) + 1, FORMAT_VERSION + 1):
        for statement in _STEPS[version]:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {version}")
