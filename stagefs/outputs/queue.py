"""The durable stage-out queue: which files are still to be uploaded, and what became of the rest.

Life of an upload: ``prepare`` writes the rows of a commit, which ``activate`` puts into the queue
or ``discard`` takes back; ``settle`` says how attempts ended; ``retry`` and ``cancel`` are what
somebody decides.  Every method is one transaction and durable when it returns.  Who prepared rows
and died is found in ``unsettled`` by the next daemon on the same state directory; the rows of
*another* state directory stay prepared until somebody retries or cancels them, because only
the namespace there knows whether their commit was made.

Order: outputs of one URL are uploaded one after another, in the order of their activation, and an
output that may overwrite makes earlier ones of its URL needless (``replaced``).

A file goes only after it is durable that nobody needs it.  What is left over when a daemon dies
in between, ``sweep`` removes.

Blocking (fsync).  Not thread-safe: ``staging.stageout`` uses it in one worker thread at a time.
"""

import json
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from stagefs.errors import NotFound, NotPermitted, StageFSError, StateFailed
from stagefs.outputs.queue_database import open_database, transaction, translated
from stagefs.outputs.queue_directory import DATABASE_NAME, OutputsDirectory, refused
from stagefs.outputs.queue_rows import INSERT, inserted, upload_of
from stagefs.outputs.queued import (
    WITH_FILE,
    Done,
    NotDone,
    Outcome,
    QueueItem,
    Total,
    Totals,
    Upload,
    UploadState,
)

log = logging.getLogger(__name__)

PAGE_UPLOADS_MAX = 1000
_TRIM_ROWS = 500

_NEXT = """SELECT * FROM listed AS one WHERE state = 'queued'
    AND id NOT IN (SELECT value FROM json_each(?1))
    AND CAST(host AS TEXT) NOT IN (SELECT value FROM json_each(?2))
    AND NOT EXISTS (SELECT 1 FROM uploads AS earlier WHERE earlier.url = one.url
        AND earlier.state = 'queued' AND (earlier.turn, earlier.id) < (one.turn, one.id))
    ORDER BY turn, id LIMIT ?3"""
_REPLACE = """UPDATE uploads SET state = 'replaced', changed_ns = ?1,
    reason = 'a later output for the same URL took its place'
    WHERE state IN ('queued', 'failed', 'cancelled') AND turn < ?2
    AND url IN (SELECT url FROM uploads WHERE commit_id = ?3 AND (overwrite OR removes))
    RETURNING commit_id, file"""
_DONE = """UPDATE uploads SET state = 'done', validator = ?1, reason = NULL, next_try_ns = 0,
    changed_ns = ?2 WHERE id = ?3 AND state IN ('queued', 'cancelled') RETURNING commit_id, file"""
_NOT_DONE = """UPDATE uploads SET state = ?1, attempts = attempts + 1, reason = ?2,
    next_try_ns = ?3, changed_ns = ?4 WHERE id = ?5 AND state = 'queued'"""
_RETRY = """UPDATE uploads SET state = 'queued', attempts = 0, next_try_ns = 0, changed_ns = ?1
    WHERE id = ?2 AND state IN ('failed', 'cancelled', 'queued')"""
_CANCEL = """UPDATE uploads SET state = 'cancelled', next_try_ns = 0, changed_ns = ?1
    WHERE id = ?2 AND state IN ('queued', 'failed')"""

_OVER_COUNT = """SELECT coalesce(sum(uploads), 0) FROM totals
    WHERE state IN ('done', 'replaced', 'cancelled')"""
_TRIM = """DELETE FROM uploads WHERE id IN (SELECT id FROM uploads
    WHERE state IN ('done', 'replaced', 'cancelled') AND changed_ns < ?
    ORDER BY changed_ns LIMIT ?) RETURNING commit_id, file"""
_FOR_EVER_NS = (1 << 63) - 1


class Queue:
    """See the module.  All methods raise NoSpace and StateFailed when the disk refuses; nothing
    of that call is done then."""

    def __init__(
        self,
        directory: OutputsDirectory,
        connection: sqlite3.Connection,
        *,
        owner: str,
        origin: str,
        clock: Callable[[], int],
    ) -> None:
        self._directory = directory
        self._connection = connection
        self._path = directory.path / DATABASE_NAME
        self._owner = owner
        self._origin = origin
        self._clock = clock

    @classmethod
    def open(
        cls, path: Path, *, owner: str, origin: str, clock: Callable[[], int] = time.time_ns
    ) -> "Queue":
        """The queue in ``path``, which is made (its parent is there).

        ``owner`` names the state directory for ever, ``origin`` is its place for people.  Raises
        StateInUse, UnsuitableState, NewerFormat, NoSpace, StateFailed.
        """
        directory = OutputsDirectory.take(path, state=origin)
        try:
            connection = open_database(path / DATABASE_NAME)
        except StageFSError:
            directory.close()
            raise
        return cls(directory, connection, owner=owner, origin=origin, clock=clock)

    def close(self) -> None:
        self._connection.close()
        self._directory.close()

    @property
    def directory(self) -> Path:
        return self._directory.path

    @property
    def owner(self) -> str:
        """The name of the state directory whose daemon this is."""
        return self._owner

    def directory_of(self, commit: str) -> Path:
        """Where the files of a commit lie."""
        return self._directory.directory_of(commit)

    def make_directory_of(self, commit: str) -> Path:
        """The same, made.  Files in it before ``prepare`` are gone after a crash."""
        return self._directory.make_directory_of(commit)

    # What comes in

    def prepare(self, commit: str, items: Sequence[QueueItem]) -> None:
        """Write down the outputs of a commit, whose files are in place; none is uploaded yet."""
        self._check_files(commit, items)
        with self._transaction():
            self._insert(commit, items, UploadState.PREPARED, turn=0)

    def activate(self, commit: str) -> int:
        """From now on its outputs are uploaded.  How many; 0 when that was done before."""
        needless: list[tuple[str, str]] = []
        with self._transaction():
            turn = self._next_turn()
            changed = self._connection.execute(
                "UPDATE uploads SET state = 'queued', turn = ?, changed_ns = ?"
                " WHERE commit_id = ? AND state = 'prepared'",
                (turn, self._clock(), commit),
            ).rowcount
            if changed:
                needless = self._replace(commit, turn)
        self._remove_files(needless)
        return changed

    def add(self, commit: str, items: Sequence[QueueItem]) -> None:
        """``prepare`` and ``activate`` in one step."""
        self._check_files(commit, items)
        with self._transaction():
            turn = self._next_turn()
            self._insert(commit, items, UploadState.QUEUED, turn=turn)
            needless = self._replace(commit, turn)
        self._remove_files(needless)

    def discard(self, commit: str) -> int:
        """Take back what was prepared, with its files."""
        with self._transaction():
            gone = self._connection.execute(
                "DELETE FROM uploads WHERE commit_id = ? AND state = 'prepared'"
                " RETURNING commit_id, file",
                (commit,),
            ).fetchall()
        self._remove_files(gone)
        return len(gone)

    def unsettled(self) -> list[str]:
        """Our own commits that are neither activated nor discarded."""
        rows = self._query(
            "SELECT DISTINCT commit_id FROM uploads WHERE state = 'prepared' AND owner = ?",
            (self._owner,),
        )
        return [commit for (commit,) in rows]

    # What goes out

    def next_uploads(
        self, limit: int, *, without: Collection[int] = (), hosts_held: Collection[str] = ()
    ) -> list[Upload]:
        """Up to ``limit`` uploads whose turn it is, the oldest first, one of each URL."""
        parameters = (json.dumps(list(without)), json.dumps(list(hosts_held)), limit)
        return self._uploads(_NEXT, parameters)

    def settle(self, outcomes: Sequence[Outcome]) -> None:
        """Write down how attempts ended; the files of what is done go."""
        needless: list[tuple[str, str]] = []
        with self._transaction():
            now = self._clock()
            for outcome in outcomes:
                if isinstance(outcome, Done):
                    done = (os.fsencode(outcome.validator), now, outcome.id)
                    needless += self._connection.execute(_DONE, done).fetchall()
                else:
                    self._connection.execute(_NOT_DONE, _failure(outcome, now))
        self._remove_files(needless)

    # What somebody decides

    def retry(self, ids: Sequence[int]) -> None:
        """Queue again, at once, what failed, waits or was cancelled; what is prepared by another
        state directory is activated with its whole commit.  Raises NotFound, StateFailed when a
        file is gone, NotPermitted where it makes no sense; then nothing is changed."""
        chosen = self._chosen(ids)
        for upload in chosen:
            if upload.state in (UploadState.FAILED, UploadState.CANCELLED):
                self._check_files(upload.commit, [upload.item])
        with self._transaction():
            now = self._clock()
            for upload in chosen:
                self._connection.execute(_RETRY, (now, upload.id))
        for commit in _strangers(chosen):
            self.activate(commit)

    def cancel(self, ids: Sequence[int], *, discard: bool = False) -> None:
        """Give up what is queued or failed; what another state directory prepared, with its whole
        commit.  The files stay until the rows are trimmed, or go at once with ``discard``.
        Raises NotFound, NotPermitted; then nothing is changed."""
        chosen = self._chosen(ids)
        with self._transaction():
            now = self._clock()
            for upload in chosen:
                self._connection.execute(_CANCEL, (now, upload.id))
            for commit in _strangers(chosen):
                self._connection.execute(
                    "UPDATE uploads SET state = 'cancelled', changed_ns = ?"
                    " WHERE commit_id = ? AND state = 'prepared'",
                    (now, commit),
                )
        if discard:
            now_cancelled = [self.upload(one) for one in ids]
            self._remove_files(
                (upload.commit, upload.item.file)
                for upload in now_cancelled
                if upload.state is UploadState.CANCELLED
            )

    # Looking

    def upload(self, number: int) -> Upload:
        """Raises NotFound."""
        found = self._uploads("SELECT * FROM listed WHERE id = ?", (number,))
        if not found:
            raise NotFound(f"There is no upload {number} in the queue {self.directory}.")
        return found[0]

    def some(self, ids: Collection[int]) -> list[Upload]:
        """Those of these numbers that there are."""
        query = "SELECT * FROM listed WHERE id IN (SELECT value FROM json_each(?))"
        return self._uploads(query, (json.dumps(list(ids)),))

    def of_commit(self, commit: str) -> list[Upload]:
        return self._uploads("SELECT * FROM listed WHERE commit_id = ?", (commit,))

    def uploads(
        self,
        *,
        states: Collection[UploadState] | None = None,
        after: int = 0,
        limit: int = PAGE_UPLOADS_MAX,
    ) -> list[Upload]:
        """In the order of their numbers, those behind ``after``."""
        wanted = json.dumps(
            [state.value for state in UploadState if states is None or state in states]
        )
        query = """SELECT * FROM listed WHERE id > ?
            AND state IN (SELECT value FROM json_each(?)) ORDER BY id LIMIT ?"""
        return self._uploads(query, (after, wanted, limit))

    def totals(self) -> Totals:
        """What is in each state; those with nothing are left out."""
        rows = self._query("SELECT state, uploads, size_bytes FROM totals WHERE uploads > 0", ())
        return {UploadState(state): Total(uploads, size) for state, uploads, size in rows}

    # Keeping house

    def trim(self, *, keep_s: float, keep_max: int) -> int:
        """Forget what is over for longer than ``keep_s``, and the oldest beyond ``keep_max``.

        Files of cancelled ones go with them.  Returns how many rows went, at most a few hundred:
        call it again until it says 0.
        """
        with self._transaction():
            (kept,) = self._connection.execute(_OVER_COUNT).fetchone()
            excess = max(kept - keep_max, 0)
            # The oldest of all when there are too many, else those that are old.
            before = _FOR_EVER_NS if excess else self._clock() - int(keep_s * 1e9)
            limit = min(excess or _TRIM_ROWS, _TRIM_ROWS)
            gone = self._connection.execute(_TRIM, (before, limit)).fetchall()
        self._remove_files(gone)
        return len(gone)

    def sweep(self) -> int:
        """Remove files that no row needs.  Only before commits are made."""
        states = json.dumps([state.value for state in WITH_FILE])

        def wanted(commit: str) -> set[str]:
            rows = self._query(
                "SELECT file FROM uploads WHERE commit_id = ?"
                " AND state IN (SELECT value FROM json_each(?))",
                (commit, states),
            )
            return {file for (file,) in rows}

        try:
            return self._directory.remove_all_but(wanted)
        except OSError as exc:
            raise refused(self.directory, exc) from exc

    # Steps of the above

    def _chosen(self, ids: Sequence[int]) -> list[Upload]:
        """Those that somebody may decide about.  Raises NotFound, NotPermitted."""
        chosen = [self.upload(one) for one in ids]
        for upload in chosen:
            if upload.state is UploadState.PREPARED and upload.own:
                raise NotPermitted(f"Upload {upload.id} belongs to a commit that is being made.")
            if upload.state not in WITH_FILE:
                raise NotPermitted(
                    f"Upload {upload.id} ({upload.item.url}) is {upload.state}: there is nothing"
                    " to decide about it."
                )
        return chosen

    def _transaction(self) -> AbstractContextManager[None]:
        return transaction(self._connection, self._path)

    def _query(self, query: str, parameters: Sequence[object]) -> list[Any]:
        try:
            return self._connection.execute(query, tuple(parameters)).fetchall()
        except sqlite3.Error as exc:
            raise translated(exc, self._path) from exc

    def _uploads(self, query: str, parameters: Sequence[object]) -> list[Upload]:
        return [upload_of(row, owner=self._owner) for row in self._query(query, parameters)]

    def _check_files(self, commit: str, items: Sequence[QueueItem]) -> None:
        """What is queued has its file, and that file's name is durable."""
        items = [item for item in items if not item.removes]
        for item in items:
            size = self._directory.size_of(commit, item.file)
            if size != item.size_bytes:
                was = "is not there" if size is None else f"has {size} bytes"
                raise StateFailed(
                    f"The file of the output {item.label or item.url}"
                    f" ({self.directory_of(commit) / item.file}) {was}, not"
                    f" {item.size_bytes} bytes: it cannot be uploaded to {item.url}."
                )
        if items:
            self._directory.sync_names(commit)

    def _insert(
        self, commit: str, items: Sequence[QueueItem], state: UploadState, *, turn: int
    ) -> None:
        now = self._clock()
        self._connection.executemany(
            INSERT,
            (
                inserted(
                    item,
                    commit=commit,
                    state=state,
                    turn=turn,
                    owner=self._owner,
                    origin=self._origin,
                    now=now,
                )
                for item in items
            ),
        )

    def _next_turn(self) -> int:
        row = self._connection.execute(
            "UPDATE counters SET value = value + 1 WHERE name = 'turn' RETURNING value"
        ).fetchall()
        return int(row[0][0])

    def _replace(self, commit: str, turn: int) -> list[tuple[str, str]]:
        """What the outputs of a commit that was just activated make needless."""
        return self._connection.execute(_REPLACE, (self._clock(), turn, commit)).fetchall()

    def _remove_files(self, names: Iterable[tuple[str, str]]) -> None:
        """Durably needless.  What cannot be removed now, the next sweep does."""
        for commit, file in names:
            try:
                self._directory.remove_file(commit, file)
            except OSError as exc:
                log.warning("cannot remove %s of commit %s: %s", file, commit, exc.strerror)


def _failure(outcome: NotDone, now: int) -> tuple[object, ...]:
    state = UploadState.FAILED if outcome.final else UploadState.QUEUED
    return state.value, outcome.reason, outcome.next_try_ns, now, outcome.id


def _strangers(uploads: Sequence[Upload]) -> set[str]:
    """The commits that another state directory left prepared."""
    return {
        upload.commit
        for upload in uploads
        if upload.state is UploadState.PREPARED and not upload.own
    }
