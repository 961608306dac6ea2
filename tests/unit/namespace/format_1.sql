-- The namespace, format 1.  One transaction: a file that has the version has everything.
--
-- kind: 1 directory, 2 file, 3 symlink.  nodes.flags: 1 the server sends whole objects only,
-- 2 its links count (a sandbox made from a template), 4 sandboxes were made from it.
-- names.inode 0 hides a name that the directory below, or the remote, has.
-- names.flags: 1 shown from the directory below, 2 found at the remote, 4 kept (something
-- below the name is this directory's own).  names.place orders a listing: unique in it,
-- never given again.
BEGIN EXCLUSIVE;

CREATE TABLE nodes (
    inode INTEGER PRIMARY KEY AUTOINCREMENT,
    kind INTEGER NOT NULL,
    mode INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL DEFAULT 0,
    mtime_ns INTEGER NOT NULL,
    ctime_ns INTEGER NOT NULL,
    nlink INTEGER NOT NULL,
    flags INTEGER NOT NULL DEFAULT 0,
    successor INTEGER NOT NULL DEFAULT 0,
    checked_ns INTEGER NOT NULL DEFAULT 0,
    lower INTEGER NOT NULL DEFAULT 0,
    listed_ns INTEGER NOT NULL DEFAULT 0,
    ttl_s REAL NOT NULL DEFAULT 0,
    url TEXT,
    version TEXT,
    validator TEXT,
    checksum TEXT,
    target BLOB,
    fingerprint INTEGER  -- of (url, version), to find an object again
);
CREATE INDEX nodes_by_lower ON nodes (lower) WHERE lower > 0;
CREATE INDEX nodes_by_fingerprint ON nodes (fingerprint) WHERE fingerprint IS NOT NULL;
CREATE INDEX nodes_unlinked ON nodes (inode) WHERE nlink = 0;

CREATE TABLE names (
    parent INTEGER NOT NULL,
    name BLOB NOT NULL,
    inode INTEGER NOT NULL,
    place INTEGER NOT NULL,
    flags INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (parent, name)
) WITHOUT ROWID;
CREATE INDEX names_by_place ON names (parent, place, inode, flags);
CREATE INDEX names_by_inode ON names (inode) WHERE inode > 0;

-- Directories whose names are still to be removed, and those that sandboxes were made from.
CREATE TABLE doomed (inode INTEGER PRIMARY KEY);
CREATE TABLE templates (inode INTEGER PRIMARY KEY);

-- What changed, in order; never changed itself.  arguments: JSON.
CREATE TABLE changes (
    sequence INTEGER PRIMARY KEY,
    kind TEXT NOT NULL,
    time_ns INTEGER NOT NULL,
    arguments TEXT NOT NULL
);
-- Requests that the kernel may send again, and what they made.
CREATE TABLE operations (
    operation INTEGER PRIMARY KEY,
    inode INTEGER NOT NULL,
    sequence INTEGER NOT NULL
);

-- What statfs and status tell, without counting.
CREATE TABLE counters (
    kind INTEGER PRIMARY KEY,
    nodes INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL
);
INSERT INTO counters VALUES (1, 0, 0), (2, 0, 0), (3, 0, 0);
CREATE TRIGGER node_made AFTER INSERT ON nodes WHEN new.nlink > 0 BEGIN
    UPDATE counters SET nodes = nodes + 1, size_bytes = size_bytes + new.size_bytes
    WHERE kind = new.kind;
END;
CREATE TRIGGER node_unlinked AFTER UPDATE OF nlink ON nodes
WHEN old.nlink > 0 AND new.nlink <= 0 BEGIN
    UPDATE counters SET nodes = nodes - 1, size_bytes = size_bytes - new.size_bytes
    WHERE kind = new.kind;
END;
CREATE TRIGGER node_linked_again AFTER UPDATE OF nlink ON nodes
WHEN old.nlink <= 0 AND new.nlink > 0 BEGIN
    UPDATE counters SET nodes = nodes + 1, size_bytes = size_bytes + new.size_bytes
    WHERE kind = new.kind;
END;

-- The root with staging/ and tasks/, and the place of templates, which has no name.
INSERT INTO nodes (inode, kind, mode, mtime_ns, ctime_ns, nlink) VALUES
    (1, 1, 493, 0, 0, 4), (2, 1, 493, 0, 0, 2), (3, 1, 493, 0, 0, 2), (4, 1, 448, 0, 0, 2);
INSERT INTO names (parent, name, inode, place) VALUES
    (1, CAST('staging' AS BLOB), 2, 16777216), (1, CAST('tasks' AS BLOB), 3, 16777217);
INSERT INTO changes VALUES (1, 'make_namespace', 0, '{}');

PRAGMA application_id = 1398031955;
PRAGMA user_version = 1;
COMMIT;
