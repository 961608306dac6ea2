"""``s3://bucket/key``: objects in S3 and the stores that speak its protocol, through obstore.

One instance serves one bucket.  obstore is called from worker threads, which it does not let
anybody wake: a stalled one ends by obstore's own read timeout.  Spans are fetched by our own
client where obstore can sign a URL for it.  It must not be used before
the process has forked for the last time, or every call hangs; nothing here touches it
before the first request.

Writing is in ``store_put``, with requests of its own.

obstore's own retries are off: RetryingRemote does that, and resumes.  Versions are entity tags,
sent along as If-Match; an answer of another length or version than asked for is never
taken, because not every endpoint honours ranges and conditions.
"""

import contextlib
import datetime
import functools
import math
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import obstore
import trio
import urllib3
import urllib3.exceptions
from obstore.exceptions import BaseError, InvalidPathError
from obstore.store import AzureStore, GCSStore, S3Store

from stagefs.errors import (
    AccessDenied,
    CredentialsExpired,
    NameExists,
    ObjectMissing,
    RangesRefused,
    RemoteError,
    RemoteUnavailable,
)
from stagefs.model import (
    MIB,
    Checksum,
    EntryKind,
    ListedEntry,
    ObjectInfo,
    Span,
    WholeObject,
)
from stagefs.remote import aws
from stagefs.remote.base import (
    WHOLE_OBJECT_BYTES_MAX,
    WHOLE_OBJECT_PIECE_BYTES,
    BatchItem,
    Results,
    Sink,
)
from stagefs.remote.batch import fetch_each, not_the_version, shorter, too_large
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.http_answers import TRANSIENT_STATUSES, answer_to_range, refusal
from stagefs.remote.http_client import HttpClient, receive
from stagefs.remote.http_client import translated as translated_http
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.source import Source, exists
from stagefs.remote.store_client import StoreClient
from stagefs.remote.store_errors import NO_RANGE, translated
from stagefs.remote.store_opening import keys_of_url, open_store, trusting
from stagefs.remote.store_put import PARTS_AT_ONCE, StorePut, Uploads, expected_etag
from stagefs.remote.threads import Call, SinkCall, SourceCall
from stagefs.remote.url import is_file_name, join, name_to_write, parse

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult, ObjectMeta

T = TypeVar("T")
Page: TypeAlias = list[ListedEntry]
Store: TypeAlias = S3Store | AzureStore | GCSStore

LIST_PAGE_NAMES = 1000
# Measured with 8 ranges in flight: 1.4 GB/s, against 1.1 with 256 KiB and 0.8 with 16 KiB.
PIECE_BYTES = MIB
# obstore yields pieces of a megabyte, so a slow link shows no progress here for long;
# its own read timeout is the exact one.
PROGRESS_SLACK = 4.0
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# A request is signed just before it is sent; clocks may differ.
SIGNED_LIFETIME = datetime.timedelta(minutes=15)


class StoreRemote:
    """The driver of ``s3://`` for one bucket."""

    def __init__(
        self, host_url: str, settings: RemoteSettings, credentials: CredentialStore
    ) -> None:
        self._host_url = host_url
        self._settings = settings
        self._credentials = credentials
        self._answer_timeout_s = settings.connect_timeout_s + settings.answer_timeout_s
        self._threads = trio.CapacityLimiter(settings.concurrency * 2)
        self._lookup_threads = trio.CapacityLimiter(settings.lookups * 2)
        # Each put sends several parts.
        self._put_threads = trio.CapacityLimiter(settings.concurrency * (PARTS_AT_ONCE + 1))
        self._uploads = Uploads()
        self._writer: StoreClient | None = None
        self._client = HttpClient(settings, trust=functools.partial(trusting, settings))
        # Without keys there is nothing to sign with.
        self._signs = not settings.s3.anonymous
        self._made: Store | None = None
        # Of the profile, when its keys were last looked at because of a refusal, and how often they
        # were other ones then.
        self._keys_seen: aws.Keys | None = None
        self._renewals = 0
        self._making = threading.Lock()

    async def stat(self, url: str) -> ObjectInfo:
        def work(call: Call[ObjectInfo]) -> ObjectInfo:
            del call
            return self._head(url)

        return await self._call(work, url).run(self._lookup_threads)

    async def list(self, url: str) -> AsyncIterator[Sequence[ListedEntry]]:
        pages: Iterator[Page] | None = None

        def work(call: Call[Page | None]) -> Page | None:
            del call
            return self._asked(first_page) if pages is None else next_page()

        def first_page() -> Page | None:
            nonlocal pages
            pages = _pages(self._store(), url)
            return next_page()

        def next_page() -> Page | None:
            assert pages is not None
            with translated(url):
                return next(pages, None)

        while (page := await self._call(work, url).run(self._lookup_threads)) is not None:
            yield page

    async def fetch(self, url: str, span: Span, *, sink: Sink, validator: str | None) -> ObjectInfo:
        def work(call: SinkCall[ObjectInfo]) -> ObjectInfo:
            return self._fetch(call, url, span, validator)

        call = SinkCall(
            work,
            url=url,
            span=span,
            sink=sink,
            answer_timeout_s=self._answer_timeout_s,
            progress_timeout_s=self._settings.progress_timeout_s * PROGRESS_SLACK,
        )
        return await call.run(self._threads)

    async def fetch_batch(self, items: Sequence[BatchItem]) -> Results:
        async def fetch_whole(item: BatchItem) -> WholeObject:
            def work(call: Call[WholeObject]) -> WholeObject:
                return self._fetch_whole(call, item)

            return await self._call(work, item.url).run(self._threads)

        return await fetch_each(fetch_whole, items)

    async def put(
        self,
        url: str,
        *,
        source: int,
        size_bytes: int,
        overwrite: bool,
        checksum: Checksum | None,
        mode: int | None,
        progress: Callable[[int], None],
    ) -> ObjectInfo:
        del mode  # objects have none
        name_to_write(url)
        check_key(url)
        try:
            return await self._write(
                url,
                source=source,
                size_bytes=size_bytes,
                overwrite=overwrite,
                checksum=checksum,
                progress=progress,
            )
        except AccessDenied as exc:
            # Servers do not always tell one that has expired from one that may not write.
            temporary = await trio.to_thread.run_sync(self._has_token, limiter=self._put_threads)
            if temporary:
                raise CredentialsExpired(str(exc)) from exc
            raise

    async def _write(
        self,
        url: str,
        *,
        source: int,
        size_bytes: int,
        overwrite: bool,
        checksum: Checksum | None,
        progress: Callable[[int], None],
    ) -> ObjectInfo:
        found = None if overwrite else await self._found(url)
        if found is None:
            try:
                await StorePut(
                    await trio.to_thread.run_sync(self._writing, limiter=self._put_threads),
                    self._uploads,
                    url=url,
                    key=key_of(url),
                    source=source,
                    size_bytes=size_bytes,
                    overwrite=overwrite,
                    checksum=checksum,
                    progress=progress,
                    exists_now=lambda: self._exists(url),
                    settings=self._settings,
                    threads=self._put_threads,
                ).run()
            except NameExists:
                # Somebody was faster, maybe this very put a moment ago.
                found = await self._found(url)
                if found is None:
                    raise
        if found is not None:
            if not await self._is_equal(found, source, size_bytes):
                raise exists(url)
            return found
        info = await self.stat(url)
        if info.size_bytes != size_bytes:
            raise RemoteUnavailable(
                f"{url} has {info.size_bytes} bytes after {size_bytes} were written: somebody "
                "else replaced it."
            )
        return info

    async def delete(self, url: str) -> None:
        name_to_write(url)

        def work(call: Call[None]) -> None:
            del call
            self._asked(remove)

        def remove() -> None:
            with contextlib.suppress(ObjectMissing), translated(url):
                obstore.delete(self._store(), key_of(url))

        await self._call(work, url).run(self._lookup_threads)

    async def aclose(self) -> None:
        """Obstore closes its idle connections itself."""
        self._made = None
        if self._writer is not None:
            self._writer.close()
        self._client.close()

    async def _found(self, url: str) -> ObjectInfo | None:
        try:
            return await self.stat(url)
        except ObjectMissing:
            return None

    async def _exists(self, url: str) -> bool:
        return await self._found(url) is not None

    async def _is_equal(self, found: ObjectInfo, source: int, size_bytes: int) -> bool:
        """Whether an object has the source's content: by its entity tag, else by reading it."""
        if found.size_bytes != size_bytes:
            return False

        def work(call: SourceCall[bool]) -> bool:
            local = Source(call.source, url=found.url, size_bytes=size_bytes)
            if found.validator == f'etag:"{expected_etag(call, local)}"':
                return True
            return self._asked(lambda: is_read_equal(call, local))

        def is_read_equal(call: SourceCall[bool], local: Source) -> bool:
            with translated(found.url):
                options = condition(found.validator)
                result = obstore.get(self._store(), key_of(found.url), options=options)
                offset = 0
                for piece in result.stream(min_chunk_size=PIECE_BYTES):
                    theirs = bytes(piece)
                    if theirs != local.read(offset, len(theirs)):
                        return False
                    offset += len(theirs)
                    call.moved()
            return offset == size_bytes

        call = SourceCall(
            work,
            url=found.url,
            source=source,
            progress=lambda _: None,
            answer_timeout_s=self._answer_timeout_s,
            progress_timeout_s=self._settings.progress_timeout_s * PROGRESS_SLACK,
        )
        return await call.run(self._put_threads)

    def _call(self, work: Callable[[Call[T]], T], url: str) -> Call[T]:
        return Call(
            work,
            url=url,
            answer_timeout_s=self._answer_timeout_s,
            progress_timeout_s=self._settings.progress_timeout_s,
        )

    # In worker threads.

    def _writing(self) -> StoreClient:
        with self._making:
            if self._writer is None:
                keys = keys_of_url(self._host_url, self._credentials)
                bucket = parse(self._host_url).host
                self._writer = StoreClient(bucket, self._settings, keys)
            return self._writer

    def _store(self) -> Store:
        with self._making:
            if self._made is None:
                self._made = self._new_store()
            return self._made

    def _new_store(self) -> Store:
        return open_store(self._host_url, self._settings, self._credentials)

    def _head(self, url: str) -> ObjectInfo:
        return self._asked(lambda: self._head_once(url))

    def _head_once(self, url: str) -> ObjectInfo:
        with translated(url):
            return described_meta(url, obstore.head(self._store(), key_of(url)))

    def _asked(self, ask: Callable[[], T]) -> T:
        """The answer; asked for once more when it was refused and there are other keys by now."""
        renewals = self._renewals
        try:
            return ask()
        except AccessDenied:
            if not self._renewed(renewals):
                raise
        return ask()

    def _renewed(self, before: int) -> bool:
        """After a refusal: whether other keys are used now than ``before``."""
        try:
            keys = aws.read_profile(self._settings).keys
        except AccessDenied:
            return False
        with self._making:
            if self._renewals != before:
                return True
            if keys is None or keys == self._keys_seen:
                return False
            self._keys_seen, self._made, self._writer = keys, None, None
            self._renewals += 1
            self._signs = True
        return True

    def _has_token(self) -> bool:
        """Whether the keys in use are temporary ones."""
        try:
            keys = self._writing().keys()
        except AccessDenied:
            return False
        return keys is not None and keys.session_token is not None

    def _fetch(
        self, call: SinkCall[ObjectInfo], url: str, span: Span, validator: str | None
    ) -> ObjectInfo:
        return self._asked(lambda: self._fetch_once(call, url, span, validator))

    def _fetch_once(
        self, call: SinkCall[ObjectInfo], url: str, span: Span, validator: str | None
    ) -> ObjectInfo:
        if not span.length:
            info = self._head_once(url)
            _check_version(info, validator)
            return info
        answered = self._fetch_signed(call, url, span, validator) if self._signs else None
        info = answered or self._fetch_by_store(call, url, span, validator)
        # What only obstore gets from this endpoint, only obstore will get next time.
        self._signs = answered is not None
        if call.missing_bytes:
            raise RemoteUnavailable(f"The transfer of {url} ended before the last byte: try again.")
        return info

    def _fetch_signed(
        self, call: SinkCall[ObjectInfo], url: str, span: Span, validator: str | None
    ) -> ObjectInfo | None:
        """By a request that obstore signs and our own client sends: half the CPU time.  None, and
        nothing written, when obstore's own request shall be tried: it follows redirects, trusts
        other certificates, and knows what S3's errors mean."""
        try:
            signed = obstore.sign(self._store(), "GET", key_of(url), SIGNED_LIFETIME)
        except (BaseError, ValueError):
            return None
        headers = {"Range": f"bytes={span.start}-{span.stop - 1}"}
        if version := condition(validator):
            headers["If-Match"] = str(version["if_match"])
        with translated_http(url):
            try:
                response = self._client.send(call, "GET", signed, headers)
            except urllib3.exceptions.SSLError:
                return None
            with contextlib.closing(response):
                if response.status in TRANSIENT_STATUSES:
                    raise refusal(url, response.status, response.headers)
                if response.status not in {200, 206}:
                    return None
                info = _answered(url, response, span)
                _check_version(info, validator)
                call.found(info)
                receive(call, response, url)
        return info

    def _fetch_by_store(
        self, call: SinkCall[ObjectInfo], url: str, span: Span, validator: str | None
    ) -> ObjectInfo:
        with translated(url, span):
            result = self._get(url, validator, span)
            info = described_meta(url, result.meta)
            _check_version(info, validator)
            if span.stop > info.size_bytes:
                raise shorter(url, span.stop, info.size_bytes)
            if tuple(result.range) != (span.start, span.stop):
                raise RangesRefused(f"The server of {url} sends whole objects only.")
            call.found(info)
            for piece in result.stream(min_chunk_size=PIECE_BYTES):
                call.write(memoryview(piece))
        return info

    def _get(self, url: str, validator: str | None, span: Span) -> "GetResult":
        options = condition(validator)
        try:
            with_range: GetOptions = {**options, "range": (span.start, span.stop)}
            return obstore.get(self._store(), key_of(url), options=with_range)
        except BaseError as exc:
            if NO_RANGE not in str(exc) or span.start:
                raise
        # The server ignores ranges; what it sends may still be what is wanted.
        return obstore.get(self._store(), key_of(url), options=options)

    def _fetch_whole(self, call: Call[WholeObject], item: BatchItem) -> WholeObject:
        return self._asked(lambda: self._fetch_whole_once(call, item))

    def _fetch_whole_once(self, call: Call[WholeObject], item: BatchItem) -> WholeObject:
        url = item.url
        with translated(url):
            result = obstore.get(self._store(), key_of(url), options=condition(item.validator))
            info = described_meta(url, result.meta)
            if info.size_bytes > WHOLE_OBJECT_BYTES_MAX:
                raise too_large(url, info.size_bytes)
            _check_version(info, item.validator)
            call.answered()
            data = b""
            for piece in result.stream(min_chunk_size=WHOLE_OBJECT_PIECE_BYTES):
                data += bytes(piece)
                call.answered()
        if len(data) != info.size_bytes:
            raise RemoteUnavailable(f"The transfer of {url} ended before the last byte: try again.")
        return WholeObject(info=info, data=data)


def _pages(store: Store, url: str) -> Iterator[Page]:
    """The entries below a prefix.  obstore lists either in a stream, but with everything below,
    or one level, but in one piece.  A directory without subdirectories, as the very large
    ones are, is streamed; at the first subdirectory the rest is listed in one piece."""
    prefix = key_of(url).strip("/")
    base = prefix + "/" if prefix else ""
    last, empty = "", True
    try:
        for objects in obstore.list(store, prefix or None, chunk_size=LIST_PAGE_NAMES):
            empty = False
            below = [one for one in objects if one["path"].startswith(base)]
            if any("/" in one["path"].removeprefix(base) for one in below):
                break
            page = [entry for one in below if (entry := _listed(url, base, one)) is not None]
            last = max((one["path"] for one in below), default=last)
            if page:
                yield page
        else:
            if empty and prefix:
                raise ObjectMissing(f"{url} does not exist: no key begins with it.")
            return
    except InvalidPathError:
        # One key below cannot be expressed by obstore, which then lists nothing more.  When it
        # is deeper than one level, the level itself can still be listed.
        pass
    yield from _one_level(store, url, base, after=last)


def _one_level(store: Store, url: str, base: str, *, after: str) -> Iterator[Page]:
    found = obstore.list_with_delimiter(store, base.rstrip("/") or None)
    entries = [
        entry
        for one in found["objects"]
        if one["path"] > after and (entry := _listed(url, base, one)) is not None
    ]
    for directory in found["common_prefixes"]:
        name = directory.rstrip("/").removeprefix(base)
        if is_file_name(name):
            entries.append(ListedEntry(name, EntryKind.DIRECTORY, join(url, name)))
    for start in range(0, len(entries), LIST_PAGE_NAMES):
        yield entries[start : start + LIST_PAGE_NAMES]


def key_of(url: str) -> str:
    return parse(url).path


def check_key(url: str) -> None:
    """Nothing is written that could not be read back here."""
    key = key_of(url)
    if "" in key.split("/") or _CONTROL.search(key):
        raise RemoteError(
            f"The key of {url} cannot be written: empty segments and control characters are not "
            "supported."
        )


def described_meta(url: str, meta: "ObjectMeta") -> ObjectInfo:
    """Times are cut to seconds, tags freed of quotes: listing and stat spell both differently."""
    modified_s = math.floor(meta["last_modified"].timestamp())
    return _version(url, meta["size"], meta["e_tag"] or "", modified_s)


def _answered(url: str, response: urllib3.BaseHTTPResponse, span: Span) -> ObjectInfo:
    """As ``_described``, of an answer that brings exactly ``span``, or an error is raised.  Objects
    may be stored with an encoding: that is how they are delivered here."""
    headers = response.headers.copy()
    headers.discard("Content-Encoding")
    found = answer_to_range(url, response.status, headers, span, None)
    modified_s = (found.mtime_ns or 0) // 1_000_000_000
    return _version(url, found.size_bytes, headers.get("ETag", ""), modified_s)


def _version(url: str, size_bytes: int, entity_tag: str, modified_s: int) -> ObjectInfo:
    tag = entity_tag.removeprefix("W/").strip('"')
    return ObjectInfo(
        url=url,
        size_bytes=size_bytes,
        validator=f'etag:"{tag}"' if tag else f"modified:{modified_s}:{size_bytes}",
        mtime_ns=modified_s * 1_000_000_000,
    )


def _check_version(info: ObjectInfo, validator: str | None) -> None:
    if validator is not None and info.validator != validator:
        raise not_the_version(info.url, validator, info.validator)


def condition(validator: str | None) -> "GetOptions":
    if validator is None or not validator.startswith("etag:"):
        return {}
    return {"if_match": validator.removeprefix("etag:")}


def _listed(url: str, base: str, meta: "ObjectMeta") -> ListedEntry | None:
    """None for keys that cannot be file names here, among them the empty objects that stand for
    directories."""
    name = meta["path"].removeprefix(base)
    if not meta["path"].startswith(base) or not is_file_name(name):
        return None
    child = join(url, name)
    return ListedEntry(name, EntryKind.FILE, child, described_meta(child, meta))
