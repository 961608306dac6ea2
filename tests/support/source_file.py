"""A local file that a test puts at a remote."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trio


class SourceFile:
    """A readable descriptor, and what the put told of its progress."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self.fd = fd
        self.size_bytes = size_bytes
        self.told: list[int] = []
        self.begun = trio.Event()

    def progress(self, sent_bytes: int) -> None:
        trio.lowlevel.current_task()  # raises when it is not the trio thread
        assert 0 < sent_bytes <= self.size_bytes, "more was sent than there is"
        self.told.append(sent_bytes)
        self.begun.set()


@contextmanager
def source_file(path: Path, data: bytes) -> Iterator[SourceFile]:
    path.write_bytes(data)
    with sparse_source(path, len(data)) as source:
        yield source


@contextmanager
def sparse_source(path: Path, size_bytes: int) -> Iterator[SourceFile]:
    """The file as it is, made longer with a hole where it is shorter."""
    with path.open("ab") as file:
        file.truncate(size_bytes)
    fd = os.open(path, os.O_RDONLY)
    try:
        yield SourceFile(fd, size_bytes)
    finally:
        os.close(fd)
