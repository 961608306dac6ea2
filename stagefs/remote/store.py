"""``s3://bucket/key``: objects in S3 and the stores that speak its protocol, through obstore.

One instance serves one bucket.  obstore is called from worker threads, which it does not let
anybody wake: a stalled one ends by obstore's own read timeout.  It must not be used before
the process has forked for the last time, or every call hangs; nothing here touches it
before the first request.

obstore's own retries are off: RetryingRemote does that, and resumes.  Versions are entity tags,
sent along as If-Match; an answer of another length or version than asked for is never
taken, because not every endpoint honours ranges and conditions.
"""

import datetime
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import obstore
import trio
from obstore.exceptions import BaseError, InvalidPathError
from obstore.store import S3Store

from stagefs.errors import (
    AccessDenied,
    ObjectMissing,
    RangesRefused,
    RemoteError,
    RemoteUnavailable,
)
from stagefs.model import MIB, EntryKind, ListedEntry, ObjectInfo, Span, WholeObject
from stagefs.remote import aws
from stagefs.remote.base import WHOLE_OBJECT_BYTES_MAX, BatchItem, Results, Sink
from stagefs.remote.batch import fetch_each, not_the_version, shorter, too_large
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.store_errors import NO_RANGE, translated
from stagefs.remote.threads import Call, SinkCall
from stagefs.remote.url import HIDDEN, is_file_name, join, parse

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult, ObjectMeta
    from obstore.store import S3Credential

T = TypeVar("T")
Page: TypeAlias = list[ListedEntry]

LIST_PAGE_NAMES = 1000
# Measured with 8 ranges in flight: 1.4 GB/s, against 1.1 with 256 KiB and 0.8 with 16 KiB.
PIECE_BYTES = MIB
# obstore yields pieces of a megabyte, so a slow link shows no progress here for long;
# its own read timeout is the exact one.
PROGRESS_SLACK = 4.0
# How long keys of a file are used before the file is read again: pilots renew them in place.
KEYS_LIFETIME = datetime.timedelta(minutes=5)


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
        self._made: S3Store | None = None
        self._making = threading.Lock()

    async def stat(self, url: str) -> ObjectInfo:
        def work(call: Call[ObjectInfo]) -> ObjectInfo:
            del call
            return self._head(url)

        return await self._call(work, url).run(self._lookup_threads)

    async def list(self, url: str) -> AsyncIterator[Sequence[ListedEntry]]:
        pages: Iterator[Page] | None = None

        def work(call: Call[Page | None]) -> Page | None:
            nonlocal pages
            del call
            with translated(url):
                if pages is None:
                    pages = _pages(self._store(), url)
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

    async def aclose(self) -> None:
        """Obstore closes idle connections itself."""
        self._made = None

    def _call(self, work: Callable[[Call[T]], T], url: str) -> Call[T]:
        return Call(
            work,
            url=url,
            answer_timeout_s=self._answer_timeout_s,
            progress_timeout_s=self._settings.progress_timeout_s,
        )

    # In worker threads.

    def _store(self) -> S3Store:
        with self._making:
            if self._made is None:
                self._made = _new_store(self._host_url, self._settings, self._credentials)
            return self._made

    def _head(self, url: str) -> ObjectInfo:
        with translated(url):
            return _described(url, obstore.head(self._store(), _key(url)))

    def _fetch(
        self, call: SinkCall[ObjectInfo], url: str, span: Span, validator: str | None
    ) -> ObjectInfo:
        if not span.length:
            info = self._head(url)
            _check_version(info, validator)
            return info
        with translated(url, span):
            result = self._get(url, validator, span)
            info = _described(url, result.meta)
            _check_version(info, validator)
            if span.stop > info.size_bytes:
                raise shorter(url, span.stop, info.size_bytes)
            if tuple(result.range) != (span.start, span.stop):
                raise RangesRefused(f"The server of {url} sends whole objects only.")
            call.found(info)
            for piece in result.stream(min_chunk_size=PIECE_BYTES):
                call.write(memoryview(piece))
        if call.missing_bytes:
            raise RemoteUnavailable(f"The transfer of {url} ended before the last byte: try again.")
        return info

    def _get(self, url: str, validator: str | None, span: Span) -> "GetResult":
        options = _condition(validator)
        try:
            with_range: GetOptions = {**options, "range": (span.start, span.stop)}
            return obstore.get(self._store(), _key(url), options=with_range)
        except BaseError as exc:
            if NO_RANGE not in str(exc) or span.start:
                raise
        # The server ignores ranges; what it sends may still be what is wanted.
        return obstore.get(self._store(), _key(url), options=options)

    def _fetch_whole(self, call: Call[WholeObject], item: BatchItem) -> WholeObject:
        url = item.url
        with translated(url):
            result = obstore.get(self._store(), _key(url), options=_condition(item.validator))
            info = _described(url, result.meta)
            if info.size_bytes > WHOLE_OBJECT_BYTES_MAX:
                raise too_large(url, info.size_bytes)
            _check_version(info, item.validator)
            call.answered()
            data = bytes(result.bytes())
        if len(data) != info.size_bytes:
            raise RemoteUnavailable(f"The transfer of {url} ended before the last byte: try again.")
        return WholeObject(info=info, data=data)


def _pages(store: S3Store, url: str) -> Iterator[Page]:
    """The entries below a prefix.  obstore lists either in a stream, but with everything below,
    or one level, but in one piece.  A directory without subdirectories, as the very large
    ones are, is streamed; at the first subdirectory the rest is listed in one piece."""
    prefix = _key(url).strip("/")
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


def _one_level(store: S3Store, url: str, base: str, *, after: str) -> Iterator[Page]:
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


def _key(url: str) -> str:
    return parse(url).path


def _described(url: str, meta: "ObjectMeta") -> ObjectInfo:
    """Times are cut to seconds, tags freed of quotes: listing and stat spell both differently."""
    modified_s = math.floor(meta["last_modified"].timestamp())
    tag = (meta["e_tag"] or "").removeprefix("W/").strip('"')
    return ObjectInfo(
        url=url,
        size_bytes=meta["size"],
        validator=f'etag:"{tag}"' if tag else f"modified:{modified_s}:{meta['size']}",
        mtime_ns=modified_s * 1_000_000_000,
    )


def _check_version(info: ObjectInfo, validator: str | None) -> None:
    if validator is not None and info.validator != validator:
        raise not_the_version(info.url, validator, info.validator)


def _condition(validator: str | None) -> "GetOptions":
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
    return ListedEntry(name, EntryKind.FILE, child, _described(child, meta))


def _new_store(host_url: str, settings: RemoteSettings, credentials: CredentialStore) -> S3Store:
    parts = parse(host_url)
    profile = aws.read_profile(settings)
    endpoint = aws.endpoint(settings, profile)
    stall_s = max(settings.answer_timeout_s, settings.progress_timeout_s)
    client: dict[str, Any] = {
        "connect_timeout": datetime.timedelta(seconds=settings.connect_timeout_s),
        "read_timeout": datetime.timedelta(seconds=stall_s),
        # For a whole request, which may be a large range on a slow link.
        "timeout": datetime.timedelta(days=1),
        "allow_http": endpoint is not None and endpoint.startswith("http://"),
    }
    if settings.s3.ca_file is not None:
        client["root_certificate"] = _certificates(settings.s3.ca_file)
    options: dict[str, Any] = {
        "region": aws.region(settings, profile),
        "virtual_hosted_style_request": not settings.s3.path_style,
        "client_options": client,
        "retry_config": {"max_retries": 0},
    }
    if endpoint is not None:
        options["endpoint"] = endpoint
    keys = _keys_of_url(host_url, credentials) or aws.keys_of_environment(settings)
    if settings.s3.anonymous:
        options["skip_signature"] = True
    elif keys is not None:
        options["access_key_id"] = keys.access_key_id
        options["secret_access_key"] = keys.secret_access_key
        if keys.session_token is not None:
            options["session_token"] = keys.session_token
    elif profile.keys is not None:
        options["credential_provider"] = _FileKeys(settings)
    return S3Store(parts.host, **options)


def _keys_of_url(host_url: str, credentials: CredentialStore) -> aws.Keys | None:
    """``s3://KEY:SECRET@bucket/...`` brings its own keys."""
    parts = parse(host_url)
    if parts.user is None:
        return None
    public = f"s3://{parts.user}:{HIDDEN}@{parts.authority}/"
    return aws.Keys(parts.user, parse(credentials.reveal(public)).password or "")


class _FileKeys:
    """Asked by obstore for the keys of ~/.aws, and again when they have become old."""

    def __init__(self, settings: RemoteSettings) -> None:
        self._settings = settings

    def __call__(self) -> "S3Credential":
        keys = aws.read_profile(self._settings).keys
        if keys is None:
            raise AccessDenied("The AWS profile holds no keys any more: mend ~/.aws/credentials.")
        return {
            "access_key_id": keys.access_key_id,
            "secret_access_key": keys.secret_access_key,
            "token": keys.session_token,
            "expires_at": datetime.datetime.now(datetime.UTC) + KEYS_LIFETIME,
        }


def _certificates(ca_file: str) -> bytes:
    try:
        return Path(ca_file).read_bytes()
    except OSError as exc:
        raise RemoteError(
            f"The certificates in {ca_file} ([remote.s3] ca_file) cannot be read ({exc.strerror}): "
            "name a file of PEM certificates."
        ) from exc
