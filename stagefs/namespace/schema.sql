-- The namespace, format 3 (formats.py brings older ones along).  One transaction: a file that has the version has everything.
--
-- kind: 1 directory, 2 file, 3 symlink, 4 FIFO, 5 socket, 6 character device, 7 block device.
-- nodes.flags: 1 the server sends whole objects only, 2 its links count (a sandbox made from a
-- template), 4 sandboxes were made from it, 8 it has rows in xattrs, 16 a writable binding,
-- 32 which replaces objects, 64 which removes them.
-- nodes.content, of files: 0 a remote object, 1 a private local file, 2 a published one.
-- nodes.lower: the directory that a directory shows, or the local file that a copy was made of.
-- names.inode 0 hides a name that the directory below, or the remote, has.
-- names.flags: 1 shown from the directory below, 2 found at the remote, 4 kept (something
-- below the name is this directory's own), 8 made here in place of a hidden one.  names.place orders a listing: unique in it,
-- never given again.
--
-- A change of a name edits a little in each of ten pages, all of which go to the log: half as
-- large pages make it a fifth faster, and a large import no slower.
PRAGMA page_size = 2048;
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
    fingerprint INTEGER,  -- of (url, version), to find an object again
    uid INTEGER NOT NULL DEFAULT -1,
    gid INTEGER NOT NULL DEFAULT -1,
    atime_ns INTEGER NOT NULL DEFAULT 0,
    rdev INTEGER NOT NULL DEFAULT 0,
    content INTEGER NOT NULL DEFAULT 0,
    base_bytes INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX nodes_by_lower ON nodes (lower) WHERE lower > 0;
CREATE INDEX nodes_by_fingerprint ON nodes (fingerprint) WHERE fingerprint IS NOT NULL;
CREATE INDEX nodes_unlinked ON nodes (inode) WHERE nlink = 0;
CREATE INDEX nodes_by_content ON nodes (nlink) WHERE content > 0;

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

CREATE TABLE xattrs (
    inode INTEGER NOT NULL,
    name BLOB NOT NULL,
    value BLOB NOT NULL,
    PRIMARY KEY (inode, name)
) WITHOUT ROWID;
CREATE TRIGGER node_dropped AFTER DELETE ON nodes WHEN old.flags & 8 BEGIN
    DELETE FROM xattrs WHERE inode = old.inode;
END;

-- Directories that are sandboxes, and what commits of sandboxes made visible.
CREATE TABLE sandboxes (
    inode INTEGER PRIMARY KEY,
    state TEXT NOT NULL,
    on_write TEXT NOT NULL,
    record INTEGER NOT NULL,
    persistent INTEGER NOT NULL,
    lifetime TEXT NOT NULL,
    manifest TEXT NOT NULL,
    created_ns INTEGER NOT NULL,
    changed_ns INTEGER NOT NULL
);
CREATE TABLE commits (
    id TEXT PRIMARY KEY,
    sandbox TEXT NOT NULL,
    time_ns INTEGER NOT NULL,
    record TEXT NOT NULL
);
CREATE INDEX commits_by_sandbox ON commits (sandbox, time_ns);

CREATE INDEX sandboxes_recording ON sandboxes (inode) WHERE record > 0;
-- What recording sandboxes opened.
CREATE TABLE opened (
    sandbox INTEGER NOT NULL,
    inode INTEGER NOT NULL,
    name TEXT NOT NULL,
    url TEXT NOT NULL,
    version TEXT NOT NULL,
    size_bytes INTEGER NOT NULL,
    first_ns INTEGER NOT NULL,
    opens INTEGER NOT NULL,
    served_bytes INTEGER NOT NULL,
    fetched_bytes INTEGER NOT NULL,
    blocked_ns INTEGER NOT NULL,
    PRIMARY KEY (sandbox, inode)
) WITHOUT ROWID;
-- What writable bindings owe their remotes (outgoing.py).  inode 0: the object is to be removed.
-- state: 0 due, 1 leaving, 2 queued, 3 done, 4 failed, 5 cancelled.
CREATE TABLE outgoing (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    inode INTEGER NOT NULL,
    url TEXT NOT NULL,
    overwrite INTEGER NOT NULL,
    state INTEGER NOT NULL,
    since_ns INTEGER NOT NULL,
    commit_id TEXT,
    reason TEXT
);
CREATE INDEX outgoing_by_inode ON outgoing (inode, state) WHERE inode > 0;
CREATE INDEX outgoing_due ON outgoing (id) WHERE state < 2;
CREATE INDEX outgoing_open ON outgoing (id) WHERE state IN (2, 4);
CREATE TRIGGER outgoing_dropped AFTER DELETE ON nodes WHEN old.content = 2 BEGIN
    DELETE FROM outgoing WHERE inode = old.inode AND inode > 0;
END;
-- Further URLs of a version of an object (replicas.py).  object: its key in the cache.
CREATE TABLE replicas (
    fingerprint INTEGER NOT NULL,
    object TEXT NOT NULL,
    url TEXT NOT NULL,
    affinity TEXT NOT NULL,
    validator TEXT,
    added INTEGER NOT NULL,
    PRIMARY KEY (fingerprint, object, url)
) WITHOUT ROWID;
CREATE TRIGGER replicas_dropped AFTER DELETE ON nodes
WHEN old.fingerprint IN (SELECT fingerprint FROM replicas)
AND NOT EXISTS (SELECT 1 FROM nodes WHERE fingerprint = old.fingerprint) BEGIN
    DELETE FROM replicas WHERE fingerprint = old.fingerprint;
END;
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
INSERT INTO counters VALUES
    (1, 0, 0), (2, 0, 0), (3, 0, 0), (4, 0, 0), (5, 0, 0), (6, 0, 0), (7, 0, 0);
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
CREATE TRIGGER node_resized AFTER UPDATE OF size_bytes ON nodes WHEN new.nlink > 0 BEGIN
    UPDATE counters SET size_bytes = size_bytes + new.size_bytes - old.size_bytes
    WHERE kind = new.kind;
END;

-- The root with staging/ and tasks/, and the place of templates, which has no name.
INSERT INTO nodes (inode, kind, mode, mtime_ns, ctime_ns, nlink) VALUES
    (1, 1, 493, 0, 0, 4), (2, 1, 493, 0, 0, 2), (3, 1, 493, 0, 0, 2), (4, 1, 448, 0, 0, 2);
INSERT INTO names (parent, name, inode, place) VALUES
    (1, CAST('staging' AS BLOB), 2, 16777216), (1, CAST('tasks' AS BLOB), 3, 16777217);
INSERT INTO changes VALUES (1, 'make_namespace', 0, '{}');

PRAGMA application_id = 1398031955;
PRAGMA user_version = 3;
COMMIT;
