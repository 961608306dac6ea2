"""Small files: fetched whole, many in one pipelined batch.

A miss on a small object queues it; what is asked for ahead of a task (``walking``) queues behind
what somebody waits for, and is dropped when the queue is full.  Concurrency: trio thread;
batches are tasks in the nursery of Objects, at most ``small_batches_in_flight`` per remote.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence

import msgspec
import trio

from stagefs.cache.entry import Entry
from stagefs.cache.packed import SmallObject
from stagefs.cache.store import Cache
from stagefs.config import ReadSettings
from stagefs.errors import CacheFailed, ObjectChanged, RemoteError, StageFSError
from stagefs.model import WholeObject
from stagefs.objects.content import Content, Counters, Shared
from stagefs.objects.proving import digest_of_bytes, mismatch
from stagefs.objects.replica_choice import Source
from stagefs.objects.replicas import UNASKED, Replicas
from stagefs.remote.base import WHOLE_OBJECT_BYTES_MAX, Remote

log = logging.getLogger(__name__)

QUEUE_MAX = 4096
SHARED_NAME = "small"

# Batches that have arrived and are still being stored, and what is in one: this bounds what they
# take in memory.
STORES_MAX = 4
BATCH_BYTES_MAX = 8 << 20

Arrival = tuple[Content, WholeObject]


class Wanted(msgspec.Struct, frozen=True, eq=False):
    """One object of a batch (see ``remote.base.BatchItem``).  ``source``: where it has replicas,
    the one that is asked; ``failed``: what those said that were asked before."""

    content: Content
    url: str
    validator: str | None
    source: Source | None = None
    failed: dict[str, StageFSError] = {}


def _small_object(content: Content, whole: WholeObject) -> SmallObject:
    return SmallObject(
        object_id=content.object_id,
        data=whole.data,
        validator=whole.info.validator,
        mtime_ns=whole.info.mtime_ns,
        checksum=content.checksum,
    )


def _as_of(item: Wanted, whole: WholeObject) -> WholeObject:
    """What another replica brought, under the validator that the object has."""
    content = item.content
    if item.source is None or item.source.is_first:
        return whole
    if content.validator is None:
        content.validator = UNASKED + content.object_id.version
    known = msgspec.structs.replace(whole.info, validator=content.validator)
    return msgspec.structs.replace(whole, info=known)


class SmallFetcher:
    def __init__(
        self,
        *,
        nursery: trio.Nursery,
        replicas: Replicas,
        remote_for: Callable[[str], Remote],
        cache: Cache,
        failed: Callable[[Content, list[int], StageFSError], None],
        counters: Counters,
        settings: ReadSettings,
        arrived: Callable[[Sequence[Arrival]], None],
        stored: Callable[[Content, WholeObject, Entry | CacheFailed], None],
    ) -> None:
        self._nursery = nursery
        self._replicas = replicas
        self._remote_for = remote_for
        self._cache = cache
        self._failed = failed
        self._counters = counters
        self._settings = settings
        self._arrived = arrived
        self._stored = stored
        self._store_slots = trio.Semaphore(STORES_MAX)
        self._queues: dict[int, deque[Wanted]] = {}
        self._running: dict[int, int] = {}

    def takes_size(self, size_bytes: int) -> bool:
        return size_bytes <= WHOLE_OBJECT_BYTES_MAX

    def want(self, content: Content, *, urgent: bool) -> Shared | None:
        """Queue ``content``; the answer is set when it has arrived or failed."""
        shared = content.shared.get(SHARED_NAME)
        if shared is not None:
            return shared
        source = self._replicas.best(content, ())
        if source is None:
            wanted = Wanted(content, content.url, content.validator)
        else:
            wanted = Wanted(content, source.url, source.validator, source)
        if not self._queue(wanted, urgent=urgent):
            return None
        shared = content.shared[SHARED_NAME] = Shared()
        return shared

    def _queue(self, wanted: Wanted, *, urgent: bool) -> bool:
        remote = self._remote_for(wanted.url)
        queue = self._queues.setdefault(id(remote), deque())
        if not urgent and len(queue) >= QUEUE_MAX:
            return False
        if urgent:
            queue.appendleft(wanted)
        else:
            queue.append(wanted)
        running = self._running.get(id(remote), 0)
        # Beside a batch under way another begins only when it is worth one: few large batches
        # cost less than many small ones.
        full = self._settings.small_batch_items_max // 2
        if not running or (running < self._settings.small_batches_in_flight and len(queue) >= full):
            self._running[id(remote)] = running + 1
            self._nursery.start_soon(self._drain, remote, queue)
        return True

    async def _drain(self, remote: Remote, queue: deque[Wanted]) -> None:
        try:
            while queue:
                await self._batch(remote, self._next_batch(queue))
        finally:
            self._running[id(remote)] -= 1

    def _next_batch(self, queue: deque[Wanted]) -> list[Wanted]:
        items: list[Wanted] = []
        size_bytes = 0
        while queue and len(items) < self._settings.small_batch_items_max:
            size_bytes += queue[0].content.size_bytes
            if items and size_bytes > BATCH_BYTES_MAX:
                break
            items.append(queue.popleft())
        return items

    async def _batch(self, remote: Remote, items: Sequence[Wanted]) -> None:
        self._counters.batches += 1
        results: Sequence[WholeObject | StageFSError]
        try:
            results = await remote.fetch_batch(items)
        except StageFSError as error:
            results = [error] * len(items)
        except Exception as error:
            self._counters.unexpected += 1
            log.exception("batch of %d small objects failed unexpectedly", len(items))
            results = [RemoteError(f"fetching failed unexpectedly ({error!r})")] * len(items)
        good = []
        for item, result in zip(items, results, strict=True):
            checked = self._check(item, result)
            if isinstance(checked, StageFSError):
                self._fail(item, checked)
            else:
                good.append((item.content, _as_of(item, checked)))
        if not good:
            return
        self._counters.small_objects += len(good)
        for content, whole in good:
            self._counters.fetched_bytes += len(whole.data)
            content.whole = whole.data
        self._arrived(good)
        # Readers are answered from what has arrived; storing it is nobody's wait.
        for content, _whole in good:
            content.shared.pop(SHARED_NAME).event.set()
        await self._store_slots.acquire()
        self._nursery.start_soon(self._store, good)

    async def _store(self, good: Sequence[Arrival]) -> None:
        try:
            entries: Sequence[Entry | CacheFailed] = await trio.to_thread.run_sync(
                self._cache.store_small, [_small_object(content, whole) for content, whole in good]
            )
        except CacheFailed as error:
            log.warning("small objects are read without the cache: %s", error)
            entries = [error] * len(good)
        except Exception as error:
            self._counters.unexpected += 1
            log.exception("storing %d small objects failed unexpectedly", len(good))
            entries = [CacheFailed(f"storing failed unexpectedly ({error!r})")] * len(good)
        finally:
            self._store_slots.release()
        for (content, whole), entry in zip(good, entries, strict=True):
            self._stored(content, whole, entry)
            content.whole = None
            content.wake((0,))

    def _check(
        self, item: Wanted, result: WholeObject | StageFSError
    ) -> WholeObject | StageFSError:
        if isinstance(result, StageFSError):
            return result
        content = item.content
        if len(result.data) != content.size_bytes:
            return ObjectChanged(
                f"{item.url} has {len(result.data)} bytes, {content.size_bytes} were "
                "registered; stage it in again with --replace"
            )
        if content.checksum is not None:
            found = digest_of_bytes(result.data, content.checksum.kind)
            if found != content.checksum.digest:
                self._counters.checksum_mismatches += 1
                return mismatch(item.url, content.checksum, found)
        return result

    def _fail(self, item: Wanted, error: StageFSError) -> None:
        """Ask the next replica, or give up."""
        content = item.content
        if item.source is not None:
            failed = {**item.failed, item.url: error}
            ended = self._replicas.whole_failed(content, item.source, error)
            following = None if ended else self._replicas.best(content, failed)
            if following is not None:
                again = Wanted(content, following.url, following.validator, following, failed)
                self._queue(again, urgent=True)
                return
            error = ended or self._replicas.none_left(content, failed)
        self._failed(content, [0], error)
        shared = content.shared.pop(SHARED_NAME)
        shared.error = error
        shared.event.set()
