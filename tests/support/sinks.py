"""Where a fetched span goes in a test, with the rules that a sink may count on checked."""

import os
from pathlib import Path
from types import TracebackType

import trio

from stagefs.model import Span


class FileSink:
    """A sink over a file of its own, which begins at byte ``shift`` of the object.

    The file is filled with a byte pattern first, so that what was not written shows.
    """

    def __init__(self, path: Path, size_bytes: int, *, shift: int = 0) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.pwrite(self.fd, b"\xa5" * size_bytes, 0)
        self.size_bytes = size_bytes
        self.shift = shift
        self.landed_spans: list[Span] = []
        self.first_landed = trio.Event()

    def landed(self, span: Span) -> None:
        trio.lowlevel.current_task()  # raises when it is not the trio thread
        if self.landed_spans:
            assert span.start == self.landed_spans[-1].stop, "landed spans must adjoin"
        assert span.length > 0, "an empty span landed"
        assert span.stop - self.shift <= os.fstat(self.fd).st_size, "landed before it was written"
        self.landed_spans.append(span)
        self.first_landed.set()

    @property
    def landed_bytes(self) -> int:
        return sum(span.length for span in self.landed_spans)

    def content(self) -> bytes:
        return os.pread(self.fd, os.fstat(self.fd).st_size, 0)

    def __enter__(self) -> "FileSink":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self.fd)
