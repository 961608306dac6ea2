-- The stage-out queue, format 1.  See queue_database.py; the rules are queue.py's.
PRAGMA application_id = 0x53544651;  -- "STFQ"
PRAGMA user_version = 1;

CREATE TABLE uploads (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    commit_id TEXT NOT NULL,
    state TEXT NOT NULL,
    turn INTEGER NOT NULL DEFAULT 0,      -- the order of activation; 0 while it is prepared
    owner TEXT NOT NULL,                  -- the state directory that prepared it: its random name
    origin TEXT NOT NULL,                 -- and its place, for people
    host BLOB NOT NULL,                   -- scheme and host of the URL: what fails together
    url BLOB NOT NULL,
    removes INTEGER NOT NULL,             -- the object is to be removed: there is no file
    file TEXT NOT NULL,
    label BLOB NOT NULL,
    size_bytes INTEGER NOT NULL,
    checksums TEXT NOT NULL,              -- "sha256:... xxh3:..."
    mode INTEGER,
    mtime_ns INTEGER NOT NULL,
    overwrite INTEGER NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    reason TEXT,
    next_try_ns INTEGER NOT NULL DEFAULT 0,
    added_ns INTEGER NOT NULL,
    changed_ns INTEGER NOT NULL,
    validator BLOB,
    UNIQUE (commit_id, file)
);
CREATE VIEW listed AS SELECT
    id, commit_id, state, origin, owner, url, file, label, size_bytes, checksums, mode, mtime_ns,
    overwrite, attempts, reason, next_try_ns, added_ns, changed_ns, validator, turn, host,
    removes FROM uploads;
CREATE INDEX uploads_queued ON uploads (turn, id) WHERE state = 'queued';
CREATE INDEX uploads_by_url ON uploads (url, turn);
CREATE INDEX uploads_over ON uploads (changed_ns)
    WHERE state IN ('done', 'replaced', 'cancelled');

-- Counted as they change, because `status` asks all the time.
CREATE TABLE totals (
    state TEXT PRIMARY KEY,
    uploads INTEGER NOT NULL,
    size_bytes INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TRIGGER uploads_insert AFTER INSERT ON uploads BEGIN
    INSERT INTO totals VALUES (NEW.state, 1, NEW.size_bytes) ON CONFLICT (state) DO UPDATE
        SET uploads = uploads + 1, size_bytes = size_bytes + NEW.size_bytes;
END;
CREATE TRIGGER uploads_delete AFTER DELETE ON uploads BEGIN
    UPDATE totals SET uploads = uploads - 1, size_bytes = size_bytes - OLD.size_bytes
        WHERE state = OLD.state;
END;
CREATE TRIGGER uploads_update AFTER UPDATE OF state ON uploads BEGIN
    UPDATE totals SET uploads = uploads - 1, size_bytes = size_bytes - OLD.size_bytes
        WHERE state = OLD.state;
    INSERT INTO totals VALUES (NEW.state, 1, NEW.size_bytes) ON CONFLICT (state) DO UPDATE
        SET uploads = uploads + 1, size_bytes = size_bytes + NEW.size_bytes;
END;
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO counters VALUES ('turn', 0);
