"""Catalogs of many entries, as JSON lines."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

DIRECTORY_ENTRIES = 100_000
_MTIME_S = 1_700_000_000


def write_catalog(directory: Path, entries: int) -> Path:
    """``entries`` names in directories of DIRECTORY_ENTRIES.  Nobody serves their URLs."""
    path = directory / f"catalog-{entries}.jsonl"
    with path.open("w", encoding="ascii") as file:
        for number in range(entries):
            name = f"set-{number // DIRECTORY_ENTRIES:02d}/reads-{number:07d}.fastq.gz"
            file.write(
                f'{{"name": "{name}", "url": "http://127.0.0.1:9/{name}", '
                f'"size": {4096 + number}, "mtime": {_MTIME_S + number}}}\n'
            )
    path.chmod(0o644)
    return path


def write_entries(path: Path, entries: Iterable[tuple[str, str, os.stat_result]]) -> Path:
    """A catalog of (name, URL, what stat says of the object)."""
    with path.open("w", encoding="utf-8") as file:
        for name, url, status in entries:
            seconds = int(status.st_mtime)
            line = {"name": name, "url": url, "size": status.st_size, "mtime": seconds}
            file.write(json.dumps(line) + "\n")
    path.chmod(0o644)
    return path
