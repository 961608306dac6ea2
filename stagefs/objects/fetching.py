"""Bringing chunks: what to fetch, in which spans, how many at once, and what failures mean.

Concurrency: all decisions are made in the trio thread without awaiting (plan); each flight is
a task in the nursery that Objects owns, so a reader that gives up never takes a fetch with
it that others wait for.
"""

import logging
import math
from collections.abc import Callable

import trio

from stagefs.config import ReadSettings
from stagefs.errors import (
    CacheFailed,
    ObjectChanged,
    RangesRefused,
    RemoteError,
    StageFSError,
)
from stagefs.model import MIB, Inode, Span
from stagefs.objects.content import (
    ABSENT,
    Content,
    Counters,
    Failure,
    Flight,
)
from stagefs.objects.contents import Contents
from stagefs.objects.recent import RecentErrors
from stagefs.objects.replicas import Replicas
from stagefs.objects.room import Room

log = logging.getLogger(__name__)

# A fetch that is decided brings at most this much: small enough that its tail is not far
# behind, large enough that the request's own cost vanishes.
SPAN_BYTES_MAX = 16 * MIB
# From this length on the time that reserving saves is worth a visit to a worker thread.
RESERVE_BYTES_MIN = 4 * MIB


class Fetcher:
    """Starts flights and deals with how they end."""

    def __init__(
        self,
        *,
        nursery: trio.Nursery,
        replicas: Replicas,
        room: Room,
        contents: Contents,
        errors: RecentErrors,
        counters: Counters,
        settings: ReadSettings,
        ranges_refused: Callable[[Inode], None],
        changed: Callable[[Content], None],
    ) -> None:
        self._nursery = nursery
        self._replicas = replicas
        self._room = room
        self._contents = contents
        self._errors = errors
        self._counters = counters
        self._settings = settings
        self._ranges_refused = ranges_refused
        self._changed = changed
        self.flights: set[Flight] = set()

    # Deciding

    def plan(self, content: Content, wanted: Span, *, urgent: Span) -> None:
        """Start fetches for what is neither here nor coming.  ``urgent`` (what a read waits for)
        is always fetched; the rest of ``wanted`` within the limits, and when other fetches of
        the content have ended."""
        entry = content.entry
        assert entry is not None
        content.postponed = None
        if content.changed is not None:
            return
        if not content.ranges:
            self._plan_whole(content)
            return
        chunks = content.chunks(wanted)
        urgent_stop = content.chunks(urgent).stop
        run_max = max(1, SPAN_BYTES_MAX >> entry.chunk_shift)
        state, flights, failures = entry.state, content.flights, content.failures
        # Most calls find the whole window here already: one scan in C settles that.
        first = state.find(ABSENT, chunks.start, chunks.stop)
        while 0 <= first < chunks.stop:
            if first in flights or (failures and first in failures):
                first = state.find(ABSENT, first + 1, chunks.stop)
                continue
            if first >= urgent_stop and not self._may_start(content):
                start = max(first << entry.chunk_shift, wanted.start)
                content.postponed = Span(start, wanted.stop - start)
                return
            stop = first + 1
            # What is urgent flies alone with its neighbours, so that it lands first.
            limit = min(chunks.stop, first + run_max)
            while stop < limit and state[stop] == ABSENT and stop not in flights:
                stop += 1
            self._start(content, range(first, stop))
            first = state.find(ABSENT, stop, chunks.stop)

    def _may_start(self, content: Content) -> bool:
        settings = self._settings
        return (
            content.flight_count < settings.parallel_spans_per_object
            and self._counters.in_flight_bytes
            < self._room.ahead_bytes_max(settings.in_flight_bytes_max)
        )

    def _plan_whole(self, content: Content) -> None:
        entry = content.entry
        assert entry is not None
        failure = content.failures.get(0)
        if failure is not None and trio.current_time() >= failure.until:
            content.failures.clear()
            failure = None
        if content.flight_count == 0 and failure is None and ABSENT in entry.state:
            self._start(content, range(len(entry.state)))

    def _start(self, content: Content, chunks: range) -> None:
        entry = content.entry
        assert entry is not None
        flight = Flight(
            content, entry, chunks, counters=self._counters, begin=self._nursery.start_soon
        )
        for chunk in chunks:
            if entry.state[chunk] == ABSENT:
                content.flights[chunk] = flight
        content.flight_count += 1
        self.flights.add(flight)
        self._counters.in_flight_bytes += flight.span.length
        self._nursery.start_soon(self._fly, content, flight)

    # Flying

    async def _fly(self, content: Content, flight: Flight) -> None:
        entry = content.entry
        error: StageFSError | None = None
        try:
            error = await self._bring(content, flight)
            if error is not None:
                await flight.give_back()
        finally:
            content.flight_count -= 1
            self.flights.discard(flight)
            self._counters.in_flight_bytes -= flight.span.length
            left = [chunk for chunk in flight.chunks if content.flights.get(chunk) is flight]
            for chunk in left:
                del content.flights[chunk]
            if error is not None and content.entry is entry:
                self.failed(content, left, error)
            content.wake(left)
        if error is None and content.postponed is not None and content.holds:
            # A reader that goes through what is here says nothing until it runs out of it.
            rest = content.postponed
            self.plan(content, rest, urgent=Span(rest.start, 0))
        if error is None and content.checksum is not None and not content.checksum_proved:
            content.wake_all()

    async def _bring(self, content: Content, flight: Flight) -> StageFSError | None:
        """Why it failed, if it did."""
        try:
            async with self._room.for_bytes(flight.span.length):
                self._counters.fetches += 1
                if flight.span.length >= RESERVE_BYTES_MIN and self._room.is_ample:
                    await flight.reserve()
                try:
                    await self._replicas.fetch(content, flight.span, flight)
                finally:
                    # What has landed stays, also of a fetch that failed.
                    await flight.settled()
        except StageFSError as failure:
            return failure
        except Exception as failure:
            self._counters.unexpected += 1
            log.exception("fetch of %s failed unexpectedly", content.url)
            return RemoteError(f"fetching {content.url} failed unexpectedly ({failure!r})")
        return None

    def failed(self, content: Content, chunks: list[int], error: StageFSError) -> None:
        if isinstance(error, RangesRefused):
            content.ranges = False
            self._ranges_refused(content.inode)
            return
        if isinstance(error, CacheFailed):
            self._errors.note(content.key, error)
            self._contents.serve_from_memory(content, error)
            return
        self._counters.failed_fetches += 1
        self._errors.count(content.url, error)
        self._errors.note(content.key, error)
        log.log(error.log_level, "fetch of %s: %s", content.url, error)
        if isinstance(error, ObjectChanged):
            content.changed = error
            self._changed(content)
            content.wake_all()
            return
        failure = self._failure(error)
        for chunk in chunks:
            content.failures[chunk] = failure

    def given_up(self, content: Content, span: Span, error: StageFSError) -> None:
        """A reader's deadline passed.  The kernel asks again for what its read-ahead did not get:
        without a word of it, that reader would wait a second deadline for the same bytes.
        """
        self._errors.note(content.key, error)
        log.log(error.log_level, "%s", error)
        waited_for = content.first_unreadable(span) if content.serving is not None else 0
        if waited_for is not None:
            content.failures[waited_for] = self._failure(error)

    def _failure(self, error: StageFSError) -> Failure:
        hold_s = self._settings.failure_hold_s
        return Failure(error, found=trio.current_time(), hold_s=hold_s)

    # Failures that readers meet

    def raise_failure(
        self, content: Content, chunk: int, *, waited_since: float = math.inf
    ) -> None:
        """Raise why ``chunk`` cannot be had, when that was found out a moment ago, or since the
        caller waits for it: however short failures are held, nobody who waited asks again."""
        if content.changed is not None:
            raise content.changed
        failure = content.failures.get(chunk)
        if failure is None:
            return
        if trio.current_time() < failure.until or failure.found >= waited_since:
            raise failure.error
        del content.failures[chunk]
