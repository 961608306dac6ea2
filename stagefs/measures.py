"""What a daemon counts while it answers requests: operations, how long they took, bytes, errors.

Values only: who shows them is ``staging.metrics``.  All calls are made on the event loop, many
per request, so nothing here allocates once an operation was seen.  What is answered at once
(``ready``) is counted and not timed: two readings of the clock would be the most of its cost.
"""

import collections
import time

# Upper bounds of the buckets: powers of four of a microsecond, up to 67 s; one more for the rest.
BUCKETS = 14
BUCKET_BOUNDS_S = tuple(4**power * 1e-6 for power in range(BUCKETS))


class Timing:
    """How long one kind of operation took: ``counts`` by bucket, not cumulative."""

    __slots__ = ("counts", "sum_ns")

    def __init__(self) -> None:
        self.counts = [0] * (BUCKETS + 1)
        self.sum_ns = 0

    def add(self, taken_ns: int) -> None:
        self.sum_ns += taken_ns
        # A bound belongs to its bucket, as ``le`` says; ceil(log4(microseconds)) without floats.
        bucket = (((taken_ns or 1) - 1) // 1000).bit_length() + 1 >> 1
        self.counts[min(BUCKETS, bucket)] += 1

    @property
    def count(self) -> int:
        return sum(self.counts)


class Measures:
    """One per daemon.  ``ready``: reads and writes that were answered at once; ``waited``: reads
    that needed the disk, a check or a fetch; ``unexpected``: failures that are defects of ours."""

    __slots__ = (
        "errors", "ready_bytes", "ready_reads", "ready_writes", "timings", "unexpected",
        "waited_bytes", "written_bytes",
    )  # fmt: skip

    def __init__(self) -> None:
        self.ready_reads = 0
        self.ready_bytes = 0
        self.ready_writes = 0
        self.waited_bytes = 0
        self.written_bytes = 0
        self.unexpected = 0
        self.timings: collections.defaultdict[str, Timing] = collections.defaultdict(Timing)
        self.errors: collections.Counter[tuple[str, int]] = collections.Counter()

    def answered(self, operation: str, begun_ns: int, error: int = 0) -> None:
        """``begun_ns`` is of ``time.perf_counter_ns``, ``error`` an errno, 0 for none."""
        self.timings[operation].add(time.perf_counter_ns() - begun_ns)
        if error:
            self.errors[operation, error] += 1
