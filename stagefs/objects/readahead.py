"""How far ahead of a reader to fetch: pure decisions, one object per open file handle.

The window starts with nothing beyond the bytes asked for, doubles while reads go forward,
and falls back to nothing on a jump.  A jump forward of at most ``seek_tolerance_bytes``
still counts as going forward, and so does one within the window, of whose reads the hot path
tells nothing; so does a step back within one chunk, because the kernel sends the requests of
its own read-ahead in any order.  (The shape is mountpoint-s3's prefetcher's.)
"""

from stagefs.model import MIB, Span

START_BYTES = MIB
STEP_BYTES_MAX = 16 * MIB
NEVER = 1 << 62


class ReadAhead:
    """State of one handle.  ``trigger`` is the offset from which on the window needs topping up:
    the hot path compares it and nothing else."""

    __slots__ = (
        "_covered", "_expected", "_seek_tolerance", "_size", "_window", "_window_max", "trigger"
    )  # fmt: skip

    def __init__(
        self, *, size_bytes: int, window_bytes_max: int, seek_tolerance_bytes: int
    ) -> None:
        self._window = 0
        self._window_max = window_bytes_max
        self._seek_tolerance = seek_tolerance_bytes
        self._expected = -1
        # Where the last answer ended.
        self._covered = 0
        self._size = size_bytes
        # Of what fits into the first fetch there is nothing ahead.
        self.trigger = NEVER if size_bytes <= START_BYTES else 0

    @property
    def window_bytes(self) -> int:
        return self._window

    def wanted(self, span: Span) -> Span:
        """Note a read of ``span`` and say what should be in the cache or on its way because of it.

        The answer starts at the span's start and covers at least the span, within the object.
        """
        if self._expected < 0:
            self._window = 0
        elif (
            self._expected - MIB
            <= span.start
            <= max(self._expected + self._seek_tolerance, self._covered if self._window else 0)
        ):
            if span.stop > self._expected:
                self._window = min(max(self._window * 2, START_BYTES), self._window_max)
        else:
            self._window = 0
        self._expected = max(span.stop, self._expected if self._window else 0)
        stop = span.stop + self._window
        if self._window:
            # In steps: a window that slides along byte by byte asks for a sliver each time.
            step = min(self._window, STEP_BYTES_MAX)
            stop = -(-stop // step) * step
        stop = min(stop, self._size)
        if stop >= self._size or not self._window:
            self.trigger = NEVER
        else:
            self.trigger = span.stop + self._window // 2
        self._covered = stop
        return Span(span.start, max(stop - span.start, 0))
