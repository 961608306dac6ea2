"""Imports a catalog: ``python -m stagefs.namespace.importer STATE_DB CATALOG PREFIX [--replace]``
(and ``--file-mode 755``, octal).

A process of its own, because a busy thread in the daemon would slow every read.  It prints
JSON lines: progress ``{"phase": "check" | "import", "done": n, "total": n}`` (of bytes, then of
entries), at last ``{"result": {...}}`` or ``{"error": sentence, "kind": class, "exit_code": n}``.
PREFIX is a directory, as a path from the mount's root; it is made when it is absent.

First everything is read and checked, into a temporary file beside the database; nothing is
imported when a line is wrong, a name comes twice, or exists and is something else
(``--replace`` gives it a new version).  Then the names are inserted in the order of their
directories, in transactions so short that the daemon's own changes hardly wait.  Ended at any
point, by SIGTERM too, it can be run again: what is there already is left as it is.

Memory grows with the number of directories, not of entries.
"""

import argparse
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import FrameType

import msgspec

from stagefs.errors import InvalidCatalog, StageFSError, UnsuitableState
from stagefs.namespace.catalog import read_catalog
from stagefs.namespace.database import translated
from stagefs.namespace.giving_way import GivingWay
from stagefs.namespace.inserting import Inserter, Result, Stopped
from stagefs.namespace.scratch import Scratch

PROGRESS_EVERY_S = 0.3
_PROGRESS_ENTRIES = 2000

Report = Callable[[str, int, int], None]


def import_catalog(
    database: Path,
    catalog: Path,
    prefix: str,
    *,
    replace: bool = False,
    file_mode: int = 0o755,
    report: Report = lambda _phase, _done, _total: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Result:
    """Import all of a catalog, or raise and import nothing or (Stopped, StateFailed) a part."""
    way = GivingWay()

    def read_more(phase: str, done: int, total: int) -> None:
        way.pause()
        report(phase, done, total)

    try:
        with closing(Scratch(database.parent)) as scratch:
            _read(catalog, scratch, read_more, stopped)
            inserting = Inserter(database, scratch, prefix, replace=replace, file_mode=file_mode)
            with closing(inserting) as inserter:
                inserter.check()
                for done in inserter.insert():
                    way.pause()
                    report("import", done, scratch.entries)
                    if stopped():
                        raise Stopped(_STOPPED)
                return inserter.result
    except sqlite3.Error as exc:
        raise translated(exc, database) from exc


_STOPPED = "The import was stopped: run it again, what it imported is left as it is."


def _read(catalog: Path, scratch: Scratch, report: Report, stopped: Callable[[], bool]) -> None:
    try:
        with catalog.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            for entry in read_catalog(file, catalog.name):
                scratch.add(entry)
                if scratch.entries % _PROGRESS_ENTRIES == 0:
                    report("check", file.tell(), total)
                    if stopped():
                        raise Stopped(_STOPPED)
    except OSError as exc:
        raise InvalidCatalog(
            f"The catalog {catalog} cannot be read ({exc.strerror or exc})."
        ) from exc
    scratch.finish()
    report("check", total, total)


class _Output:
    """JSON lines on standard output, progress not more often than somebody can look."""

    def __init__(self) -> None:
        self._last_s = 0.0

    def progress(self, phase: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if now_s - self._last_s >= PROGRESS_EVERY_S or done == total:
            self._last_s = now_s
            self.line({"phase": phase, "done": done, "total": total})

    @staticmethod
    def line(value: object) -> None:
        os.write(1, msgspec.json.encode(value) + b"\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="stagefs.namespace.importer")
    parser.add_argument("database", type=Path)
    parser.add_argument("catalog", type=Path)
    parser.add_argument("prefix")
    parser.add_argument("--replace", action="store_true")
    parser.add_argument("--file-mode", type=lambda text: int(text, 8), default=0o755)
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    signalled: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        signalled.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    # Tasks that read come first.
    os.nice(10)
    output = _Output()
    try:
        if not arguments.database.exists():
            raise UnsuitableState(f"There is no namespace {arguments.database}.")
        result = import_catalog(
            arguments.database,
            arguments.catalog,
            arguments.prefix,
            replace=arguments.replace,
            file_mode=arguments.file_mode,
            report=output.progress,
            stopped=lambda: bool(signalled),
        )
    except StageFSError as exc:
        text = str(exc).encode("utf-8", "backslashreplace").decode()
        output.line({"error": text, "kind": type(exc).__name__, "exit_code": exc.exit_code})
        return exc.exit_code
    except BrokenPipeError:
        # Whoever asked for the import is gone; what is imported stays.
        return 1
    output.line({"result": result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
