"""Bringing the bytes of an object from whichever of its replicas is best.

An object that has none besides its own URL costs one look at the namespace, and its fetches go
straight to its remote.  Else each fetch is made in pieces: the source of each piece is chosen
anew (``replica_choice``), and when one fails the next goes on behind the last byte that landed.
Bytes of different content are never mixed: a replica was compared with the object when it was
added, each fetch asks for the version that it had then, and one that has another version, another
size, or is found to be wrong by a declared checksum is left out from then on.

The object's own URL decides about its version: when that changed, the object has.  A catalog's
object that no remote was asked about yet has no validator; its cache entry gets one that says so
(UNASKED), for a replica may bring all of it.

Lives in the trio thread.  What was learnt here of an object is forgotten when its replicas
change, and with the daemon.
"""

import collections
import logging
import random
import time
from collections.abc import Callable, Collection

import trio

from stagefs.errors import (
    AccessDenied,
    CacheFailed,
    ChecksumMismatch,
    DeadlineExceeded,
    ObjectChanged,
    ObjectMissing,
    RangesRefused,
    RemoteDown,
    RemoteError,
    RemoteUnavailable,
    StageFSError,
)
from stagefs.model import ObjectId, Span
from stagefs.namespace.node import Node
from stagefs.namespace.store import Namespace
from stagefs.objects.content import Content
from stagefs.objects.replica_choice import STALLED_S, Choice, Source, Standing, choose
from stagefs.remote.base import Remote, Sink
from stagefs.remote.retry import ResumedSink

log = logging.getLogger(__name__)

KNOWN_MAX = 4096
# So often each source is asked in turn, as long as some fail for a reason that may pass.
ROUNDS = 3
ROUND_PAUSE_S = 0.3
UNASKED = "replicas:"


class Sources:
    """The replicas of one version of an object, its own URL first."""

    __slots__ = ("all", "alone", "brought", "pinned")

    def __init__(self, sources: list[Source]) -> None:
        self.all = sources
        # Which have brought bytes since the cache entry was empty.
        self.brought: set[str] = set()
        # After a wrong checksum: only ``pinned`` is asked until it fails, so that it can be blamed.
        self.alone = False
        self.pinned: Source | None = None

    def left(self, without: Collection[str]) -> list[Source]:
        return [one for one in self.all if one.excluded is None and one.url not in without]


class _Piece(ResumedSink):
    """The sink of one piece: tells the server's standing of what lands.  ``has_elsewhere``: see
    ``remote.guard.ChoosySink``."""

    def __init__(self, sink: Sink, span: Span, standing: Standing, *, has_elsewhere: bool) -> None:
        super().__init__(sink, span)
        self._standing = standing
        self.has_elsewhere = has_elsewhere

    def landed(self, span: Span) -> None:
        super().landed(span)
        self._standing.landed(span.length, trio.current_time())


class _Task:
    """One span that is being fetched: how far it is, and what sources said that failed."""

    __slots__ = ("_stop", "content", "failed", "position", "sink", "sources")

    def __init__(self, content: Content, sources: Sources, span: Span, sink: Sink) -> None:
        self.content = content
        self.sources = sources
        self.sink = sink
        self.position = span.start
        self._stop = span.stop
        self.failed: dict[str, StageFSError] = {}

    @property
    def is_done(self) -> bool:
        return self.position >= self._stop

    @property
    def left(self) -> Span:
        return Span(self.position, self._stop - self.position)


class Replicas:
    def __init__(
        self,
        *,
        nursery: trio.Nursery,
        namespace: Namespace,
        remote_for: Callable[[str], Remote],
        once_for: Callable[[str], Remote],
        affinity: str,
    ) -> None:
        """``once_for``: the remote of a URL that asks once, where another replica may do better.
        ``affinity``: this node's."""
        self._nursery = nursery
        self._namespace = namespace
        self._remote_for = remote_for
        self._once_for = once_for
        self.affinity = affinity
        self._known: collections.OrderedDict[str, Sources] = collections.OrderedDict()
        self._standings: collections.OrderedDict[str, Standing] = collections.OrderedDict()

    # Knowing them

    def changed(self, of: ObjectId) -> None:
        """One was added or removed."""
        self._known.pop(of.key, None)

    def of(self, content: Content) -> Sources | None:
        """None: nobody but the object's own remote is asked."""
        known = self._known.get(content.key)
        if known is not None:
            return known
        unasked = content.validator is not None and content.validator.startswith(UNASKED)
        if not unasked and not self._namespace.replicas(content.object_id):
            return None
        sources = self._sources(self._namespace.node(content.inode), content.object_id)
        if not unasked and len(sources.all) == 1:
            return None
        self._known[content.key] = sources
        if len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)
        return sources

    def lines(self, of: ObjectId) -> list[str]:
        """For who looks at a file: each URL, and behind a blank its affinity if it has one."""
        rows = self._namespace.replicas(of)
        return [f"{row.url} {row.affinity}".rstrip() for row in rows]

    def ordered(self, node: Node) -> list[Source]:
        """The replicas of a node's object in the order in which they would be asked now."""
        assert node.object_id is not None
        sources = self._known.get(node.object_id.key) or self._sources(node, node.object_id)
        left, order = sources.left(()), []
        while left:
            source = choose(left, trio.current_time()).source
            order.append(source)
            left.remove(source)
        return [*order, *(one for one in sources.all if one.excluded is not None)]

    def _sources(self, node: Node, of: ObjectId) -> Sources:
        rows = {row.url: row for row in self._namespace.replicas(of)}
        own = rows.pop(of.url, None)
        first = self._source(
            of.url, "" if own is None else own.affinity, node.validator, is_first=True
        )
        others = [self._source(row.url, row.affinity, row.validator) for row in rows.values()]
        return Sources([first, *others])

    def _source(
        self, url: str, affinity: str, validator: str | None, *, is_first: bool = False
    ) -> Source:
        site = url[: url.find("/", url.find("://") + 3)]
        standing = self._standings.pop(site, None) or Standing()
        self._standings[site] = standing
        if len(self._standings) > KNOWN_MAX:
            self._standings.popitem(last=False)
        return Source(
            url,
            standing,
            affinity=affinity,
            own=self.affinity,
            validator=validator,
            is_first=is_first,
        )

    # Fetching

    async def fetch(self, content: Content, span: Span, sink: Sink) -> None:
        """As ``Remote.fetch`` of the content's version.  Raises what the only remote says, or one
        error that names every replica."""
        sources = self.of(content)
        if sources is None:
            await self._remote_for(content.url).fetch(
                content.url, span, sink=sink, validator=content.validator
            )
            return
        task = _Task(content, sources, span, sink)
        for number in range(ROUNDS):
            if number:
                await trio.sleep(ROUND_PAUSE_S * 2**number * (0.5 + random.random() / 2))  # noqa: S311
            await self._round(task, patient=number > 0)
            if task.is_done:
                return
            if not any(_may_pass(error) for error in task.failed.values()):
                break
        raise _all_failed(content, sources, task.failed)

    async def _round(self, task: _Task, *, patient: bool) -> None:
        """Ask each source until it fails, those left out that cannot do better now."""
        tried = {url for url, error in task.failed.items() if not _may_pass(error)}
        while not task.is_done and (chosen := self._chosen(task.sources, tried)) is not None:
            source, span = chosen.source, task.left
            if chosen.bytes_max is not None and task.content.ranges:
                span = Span(span.start, min(chosen.bytes_max, span.length))
            leaves = not patient and len(task.sources.left(tried)) > 1
            piece = _Piece(task.sink, span, source.standing, has_elsewhere=leaves)
            try:
                await self._fetch_piece(
                    task.content, source, span, piece, is_sample=chosen.is_sample, leaves=leaves
                )
            except CacheFailed:
                raise
            except StageFSError as error:
                self._failed(task.content, task.sources, source, error)
                task.failed[source.url] = error
                tried.add(source.url)
            finally:
                if piece.position > task.position:
                    task.sources.brought.add(source.url)
                task.position = piece.position

    def _chosen(self, sources: Sources, tried: Collection[str]) -> Choice | None:
        left = sources.left(tried)
        if not left:
            return None
        for source in left:
            if source.standing.wants_probe(trio.current_time()):
                source.standing.is_probed = True
                self._nursery.start_soon(self._probe, source)
        if not sources.alone:
            return choose(left, trio.current_time())
        if sources.pinned not in left:
            sources.pinned = choose(left, trio.current_time()).source
        assert sources.pinned is not None
        return Choice(sources.pinned)

    async def _fetch_piece(
        self,
        content: Content,
        source: Source,
        span: Span,
        piece: _Piece,
        *,
        is_sample: bool,
        leaves: bool,
    ) -> None:
        """``leaves``: there is another source, so do not wait long for this one."""
        if source.whole_only and span.length < content.size_bytes:
            raise RangesRefused(f"The server of {source.url} sends whole objects only.")
        standing = source.standing
        begun_s, landed_before = trio.current_time(), standing.landed_bytes
        scope = trio.CancelScope()
        if leaves:
            scope.deadline = begun_s + STALLED_S
            standing.scopes.add(scope)
        standing.active += 1
        standing.sampling += is_sample
        try:
            with scope:
                remote = self._once_for(source.url)
                validator = await self._validator(content, source, remote)
                await remote.fetch(source.url, span, sink=piece, validator=validator)
        finally:
            standing.active -= 1
            standing.sampling -= is_sample
            standing.scopes.discard(scope)
        if piece.position < span.stop:
            raise DeadlineExceeded(
                f"{source.url} has sent nothing for {STALLED_S:g} s: another replica is asked."
            )
        now_s = trio.current_time()
        standing.transferred(standing.landed_bytes - landed_before, now_s - begun_s, now_s)

    async def _validator(self, content: Content, source: Source, remote: Remote) -> str:
        """What the source said when it was compared, or says now at first contact."""
        if source.validator is None:
            said = await remote.stat(source.url)
            if said.size_bytes != content.size_bytes:
                raise ObjectChanged(
                    f"{source.url} has {said.size_bytes} bytes, {content.size_bytes} were "
                    "registered; stage it in again with --replace"
                )
            source.validator = said.validator
            source.whole_only = not said.ranges
            if source.is_first:
                self._namespace.set_validator(
                    content.inode, said.validator, checked_ns=time.time_ns()
                )
        return source.validator

    async def _probe(self, source: Source) -> None:
        """See whether a server that failed is well again, at nobody's cost."""
        standing = source.standing
        try:
            await self._once_for(source.url).stat(source.url)
        except (RemoteUnavailable, DeadlineExceeded):
            standing.failed(trio.current_time())
        except StageFSError:
            standing.answered()
        except Exception:
            log.exception("asking %s whether it is well failed unexpectedly", source.url)
            standing.failed(trio.current_time())
        else:
            standing.answered()
        finally:
            standing.is_probed = False

    # Failing

    def _failed(
        self, content: Content, sources: Sources, source: Source, error: StageFSError
    ) -> None:
        """Raises ``error`` when it says that the object itself has changed."""
        log.info("a replica of %s failed: %s", content.url, error)
        sources.pinned = None
        if isinstance(error, RangesRefused):
            source.whole_only = True
            return
        if isinstance(error, ObjectChanged):
            # A declared checksum says what is right, whatever the first has now.
            if source.is_first and content.checksum is None:
                raise error
            source.excluded = "it has another version than was compared: remove it, or add it again"
            log.warning("%s is no replica of %s any more: %s", source.url, content.url, error)
            return
        if isinstance(error, ChecksumMismatch):
            source.excluded = "its content does not have the declared checksum"
            return
        source.failed(error, trio.current_time())

    def blame(self, content: Content) -> bool:
        """The whole does not have its checksum.  True: it may have when it is fetched again."""
        sources = self.of(content)
        if sources is None or len(sources.all) < 2:
            return False
        brought, sources.brought = sources.brought, set()
        sources.pinned = None
        # Some of it may have been brought by an earlier daemon: first fetch all of it from one.
        was_alone, sources.alone = sources.alone, True
        if not was_alone:
            return True
        if len(brought) != 1:
            return False
        for source in sources.all:
            if source.url in brought:
                source.excluded = "its content does not have the declared checksum"
                log.error("%s: %s; it is asked no more", source.url, source.excluded)
        return bool(sources.left(()))

    # For objects that are fetched whole, in batches

    def best(self, content: Content, tried: Collection[str]) -> Source | None:
        """None: the object's own remote is to be asked, or nobody is left."""
        sources = self.of(content)
        chosen = None if sources is None else self._chosen(sources, tried)
        return None if chosen is None else chosen.source

    def whole_failed(
        self, content: Content, source: Source, error: StageFSError
    ) -> StageFSError | None:
        """``source`` could not bring ``content``.  The error that ends it, or None: ask another."""
        sources = self.of(content)
        if sources is None:
            return error
        try:
            self._failed(content, sources, source, error)
        except ObjectChanged as changed:
            return changed
        return None

    def none_left(self, content: Content, failed: dict[str, StageFSError]) -> StageFSError:
        sources = self.of(content)
        return (
            next(iter(failed.values()))
            if sources is None
            else _all_failed(content, sources, failed)
        )


def _may_pass(error: StageFSError) -> bool:
    return error.transient and not isinstance(error, RemoteDown)


def _all_failed(
    content: Content, sources: Sources, failed: dict[str, StageFSError]
) -> StageFSError:
    """One error for all of them."""
    errors = list(failed.values())
    for error in errors:
        if len(sources.all) == 1 or (isinstance(error, RangesRefused) and content.ranges):
            return error
    said = []
    for source in sources.all:
        reason = str(source.excluded or failed.get(source.url) or "it was not asked")
        reason = reason.rstrip(".")
        said.append(reason if source.url in reason else f"{source.url}: {reason}")
    text = f"No replica of {content.url} can be read: {'; '.join(said)}."
    for kind in (
        ObjectMissing,
        AccessDenied,
        DeadlineExceeded,
        RemoteUnavailable,
        ChecksumMismatch,
    ):
        if errors and all(isinstance(error, kind) for error in errors):
            return kind(text)
    return RemoteError(text)
