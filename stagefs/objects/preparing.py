"""Getting an object ready: an entry that may be read or filled, and a known validator.

Small objects are fetched whole on the way, and with them the names that follow in a
directory that a task walks through.  Trio thread.
"""

import os
import time
from collections.abc import Callable, Sequence

from stagefs.cache.entry import Entry
from stagefs.errors import CacheFailed, ObjectChanged, StageFSError
from stagefs.model import Inode, ObjectInfo, WholeObject
from stagefs.namespace.node import Node
from stagefs.namespace.store import Namespace
from stagefs.objects.content import Content
from stagefs.objects.contents import Contents
from stagefs.objects.fetching import Fetcher
from stagefs.objects.replicas import UNASKED, Replicas
from stagefs.objects.sharing import Sharing
from stagefs.objects.small import SHARED_NAME, Arrival, SmallFetcher
from stagefs.objects.walking import Place, Walks
from stagefs.remote.base import Remote


class Preparing:
    def __init__(
        self,
        *,
        namespace: Namespace,
        contents: Contents,
        fetcher: Fetcher,
        sharing: Sharing,
        replicas: Replicas,
        remote_for: Callable[[str], Remote],
    ) -> None:
        self._namespace = namespace
        self._contents = contents
        self._fetcher = fetcher
        self._sharing = sharing
        self._replicas = replicas
        self._remote_for = remote_for
        self._small: SmallFetcher | None = None
        self._walks: Walks | None = None

    def fetch_small_with(self, small: SmallFetcher, *, ahead_max: int) -> None:
        self._small = small
        self._walks = Walks(self._namespace, ahead_max=ahead_max, fetch_ahead=self._fetch_ahead)

    async def entry(self, content: Content, *, ahead: bool = False) -> None:
        """Return when ``content`` has an entry, or is here whole.  ``ahead``: nobody waits for it,
        and when too many small objects are wanted already, return without."""
        while content.entry is None and content.whole is None:
            if content.changed is not None:
                raise content.changed
            if self._small is not None and self._small.takes_size(content.size_bytes):
                assert self._walks is not None
                self._fetcher.raise_failure(content, 0)
                was_queued = SHARED_NAME in content.shared
                shared = self._small.want(content, urgent=not ahead)
                if shared is None:
                    assert ahead
                    return
                if not was_queued and not ahead:
                    self._walks.missed(content.inode)
                await shared.wait()
            elif content.validator is None and self._replicas.of(content) is not None:
                content.validator = UNASKED + content.object_id.version
            elif content.validator is None:
                self._fetcher.raise_failure(content, 0)
                await self._sharing.run(content, "contact", self._first_contact)
            else:
                self._contents.create(content)

    async def _first_contact(self, content: Content) -> None:
        """Learn the validator of an object that a catalog only named."""
        self._fetcher.raise_failure(content, 0)
        try:
            answer = await self._remote_for(content.url).stat(content.url)
            if answer.size_bytes != content.size_bytes:
                raise ObjectChanged(
                    f"{content.url} has {answer.size_bytes} bytes, {content.size_bytes} were "
                    "registered; stage it in again with --replace"
                )
        except StageFSError as error:
            self._fetcher.failed(content, [0], error)
            raise
        self._contacted(content, answer)

    def _contacted(self, content: Content, answer: ObjectInfo) -> None:
        content.validator = answer.validator
        content.ranges = content.ranges and answer.ranges
        self._namespace.set_validator(
            content.inode, answer.validator, checked_ns=time.time_ns(), ranges=content.ranges
        )

    def small_arrived(self, arrivals: Sequence[Arrival]) -> None:
        told = []
        for content, whole in arrivals:
            content.checksum_proved = True
            if content.validator is None:
                content.validator = whole.info.validator
                told.append((content.inode, content.validator))
        if told:
            self._namespace.set_validators(told, checked_ns=time.time_ns())

    def small_stored(
        self, content: Content, whole: WholeObject, entry: Entry | CacheFailed
    ) -> None:
        if content.entry is not None:
            return
        if isinstance(entry, CacheFailed):
            memory = self._contents.serve_from_memory(content, entry)
            os.pwrite(memory.fd, whole.data, 0)
            memory.commit(0)
        else:
            self._contents.adopt(content, entry)

    def reached(self, content: Content) -> None:
        """The first read of a handle came for ``content``."""
        if content.place is not None and self._walks is not None:
            place, content.place = content.place, None
            self._walks.reached(place)

    def listed(self, directory: Inode) -> None:
        """The names of a directory became known."""
        if self._walks is not None:
            self._walks.listed(directory)

    def _fetch_ahead(self, neighbours: Sequence[tuple[Node, Place]]) -> int:
        """Queue those that are small objects and not here yet; how many."""
        small = self._small
        assert small is not None
        fit = [
            (node, place)
            for node, place in neighbours
            if node.object_id is not None and node.size_bytes and small.takes_size(node.size_bytes)
        ]
        queued = 0
        for content, place in self._contents.newly_opened(fit):
            if content.entry is None and small.want(content, urgent=False) is not None:
                content.place = place
                queued += 1
        return queued
