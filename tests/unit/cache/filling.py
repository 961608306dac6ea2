"""Objects with known content, and a cache whose clock stands still unless it is told to go on."""

import contextlib
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from stagefs.cache.entry import Entry, ObjectFile
from stagefs.cache.packed import SmallObject
from stagefs.cache.store import Cache
from stagefs.model import GIB, KIB, MIB, ObjectId

CHUNK = 64 * KIB


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float = 1.0) -> None:
        self.now += seconds


def object_id(name: str, version: str = "etag:1") -> ObjectId:
    return ObjectId(url=f"http://host/{name}", version=version)


def content(name: str, size_bytes: int) -> bytes:
    return random.Random(name).randbytes(size_bytes)


@contextlib.contextmanager
def opened(
    directory: Path,
    *,
    capacity_bytes: int = GIB,
    chunk_bytes: int = CHUNK,
    clock: Clock | None = None,
) -> Iterator[Cache]:
    cache = Cache.open(
        directory,
        capacity_bytes=capacity_bytes,
        chunk_bytes=chunk_bytes,
        free_floor_bytes=MIB,
        clock=clock or Clock(),
    )
    try:
        yield cache
    finally:
        cache.close()


def begin(cache: Cache, name: str, size_bytes: int) -> ObjectFile:
    return cache.create(
        object_id(name), size_bytes=size_bytes, validator="etag:1", mtime_ns=7, checksum=None
    )


def fetch(entry: Entry, name: str, chunks: range | None = None) -> None:
    """What a remote does: write into the file, then commit."""
    data = content(name, entry.size_bytes)
    for chunk in range(entry.chunk_count) if chunks is None else chunks:
        start = chunk * entry.chunk_bytes
        os.pwrite(entry.fd, data[start : start + entry.chunk_length(chunk)], entry.base + start)
        entry.commit(chunk)


def store(cache: Cache, name: str, size_bytes: int, chunks: range | None = None) -> ObjectFile:
    """An object with a file of its own, committed and held by nobody."""
    entry = begin(cache, name, size_bytes)
    cache.hold(entry)
    fetch(entry, name, chunks)
    cache.drop(entry)
    return entry


def small(name: str, size_bytes: int = 100) -> SmallObject:
    return SmallObject(
        object_id=object_id(name), data=content(name, size_bytes), validator="etag:1", mtime_ns=7
    )


def find(cache: Cache, name: str, size_bytes: int) -> Entry | None:
    return cache.entry(object_id(name), size_bytes=size_bytes)


def found(cache: Cache, name: str, size_bytes: int) -> Entry:
    entry = find(cache, name, size_bytes)
    assert entry is not None, f"{name} is not cached"
    return entry


def read(entry: Entry) -> bytes:
    return os.pread(entry.fd, entry.size_bytes, entry.base)


def object_file(directory: Path, name: str) -> Path:
    key = object_id(name).key
    return directory / "objects" / key[:2] / key


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def disk_bytes(directory: Path) -> int:
    """What du says."""
    total = directory.lstat().st_blocks * 512
    for top, directories, files in os.walk(directory):
        for name in (*directories, *files):
            with contextlib.suppress(FileNotFoundError):
                total += os.lstat(os.path.join(top, name)).st_blocks * 512
    return total


def killed_after(directory: Path, steps: str) -> None:
    """Run ``steps`` on an open ``cache`` in a process that then kills itself with SIGKILL."""
    program = f"""
import os, signal
from pathlib import Path
from tests.unit.cache.filling import *
with opened(Path({str(directory)!r})) as cache:
{textwrap.indent(textwrap.dedent(steps), "    ")}
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == -9, done.stderr
