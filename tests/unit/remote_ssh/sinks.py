"""What the tests fetch into, and ask for."""

import os
from pathlib import Path
from types import TracebackType

import msgspec
import trio

from stagefs.model import ObjectInfo, Span
from stagefs.remote.threads import VersionSink


class Item(msgspec.Struct, frozen=True):
    url: str
    validator: str | None = None


class FileSink(VersionSink):
    """A file, and what was said to have landed in it."""

    def __init__(self, path: Path, *, shift: int = 0) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.shift = shift
        self.spans: list[Span] = []
        self.found: ObjectInfo | None = None
        self.some_landed = trio.Event()

    def __enter__(self) -> "FileSink":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self.fd)

    def landed(self, span: Span) -> None:
        assert span.length > 0
        assert not self.spans or self.spans[-1].stop == span.start
        self.spans.append(span)
        self.some_landed.set()

    def bytes_of(self, span: Span) -> bytes:
        return os.pread(self.fd, span.length, span.start - self.shift)
