"""Writing an object of ``s3://``: one request, or parts that are put together at the end.

Either makes the object appear whole or not at all.  Each body has its MD5 with it, which the
server compares; the digest of the whole is taken from the same reading.  Without ``overwrite``
the request that makes the object carries If-None-Match.  Servers that do not know it, for parts
most did not before 2024, are asked right before whether the object exists: between the two,
somebody else's object could still be replaced there.

Parts that failed for a passing reason are sent again, each for itself.  An upload that is
given up is aborted, as are those of the same key that an earlier process left.  Lives in the
trio thread; requests run in worker threads.
"""

import base64
import datetime
import hashlib
import math
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar
from xml.sax.saxutils import escape

import msgspec
import trio

from stagefs.errors import RemoteUnavailable, StageFSError
from stagefs.model import MIB, Checksum
from stagefs.remote.retry import repeated
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.source import Proof, Source, exists
from stagefs.remote.store_client import Answered, StoreClient, fields, refused
from stagefs.remote.threads import Call, SourceCall

T = TypeVar("T")

# Up to here one request does it.
SINGLE_BYTES_MAX = 32 * MIB
PART_BYTES_MIN = 16 * MIB
PARTS_MAX = 10_000
PARTS_AT_ONCE = 4
# What is sent between two signs of progress, and read between two for a digest.
SENT_BLOCK_BYTES = 128 << 10
READ_BLOCK_BYTES = MIB
# How long a put that ends early may try to leave nothing behind.
ABORT_TIMEOUT_S = 2.0
# The server puts the parts together before it answers.
COMPLETE_PATIENCE = 10.0


class Part(msgspec.Struct, frozen=True):
    number: int
    offset: int
    length: int
    md5: bytes


class Uploads:
    """The unfinished uploads of one bucket that this process knows of."""

    def __init__(self) -> None:
        self.begun_at = datetime.datetime.now(datetime.UTC)
        self.active: set[str] = set()
        self.left: dict[str, str] = {}
        """Upload id to key, of those that could not be aborted."""


class StorePut:
    """One put, from the first request to the last.  ``exists_now`` asks whether the object
    exists."""

    def __init__(
        self,
        client: StoreClient,
        uploads: Uploads,
        *,
        url: str,
        key: str,
        source: int,
        size_bytes: int,
        overwrite: bool,
        checksum: Checksum | None,
        progress: Callable[[int], None],
        exists_now: Callable[[], Awaitable[bool]],
        settings: RemoteSettings,
        threads: trio.CapacityLimiter,
    ) -> None:
        self._client = client
        self._uploads = uploads
        self._url = url
        self._key = key
        self._fd = source
        self._size_bytes = size_bytes
        self._progress = progress
        self._exists_now = exists_now
        self._settings = settings
        self._threads = threads
        self._answer_timeout_s = settings.connect_timeout_s + settings.answer_timeout_s
        self._proof = Proof(checksum, url=url)
        self._may_replace = overwrite
        # Parts are read for their digests in order, one at a time; what follows is changed
        # under this lock only.
        self._reading = trio.Lock()
        self._read = 0
        self._number = 0
        self._sent: dict[int, int] = {}
        self._etags: dict[int, str] = {}

    async def run(self) -> None:
        """Raises NameExists when the object exists and may not be replaced, and StageFSError."""
        if self._size_bytes <= SINGLE_BYTES_MAX:
            part = await self._read_part(self._size_bytes)
            self._proof.check()
            await self._make_object(lambda condition: self._send(part, {}, condition))
        else:
            await self._in_parts()

    async def _in_parts(self) -> None:
        await self._abort_older()
        upload = await self._begin()
        self._uploads.active.add(upload)
        try:
            await self._send_parts(upload)
            self._proof.check()
            await self._check_free()
            await self._make_object(lambda condition: self._complete(upload, condition))
        except BaseException:
            await self._abort(upload, self._key)
            raise
        finally:
            self._uploads.active.discard(upload)

    async def _make_object(self, ask: Callable[[dict[str, str]], Awaitable[Answered]]) -> None:
        """The request that makes the object appear."""
        answer = await ask({} if self._may_replace else {"If-None-Match": "*"})
        if answer.status == 501 and not self._may_replace:
            # A server that says it does not know the condition.
            await self._check_free()
            answer = await ask({})
        if answer.status == 412:
            raise exists(self._url)
        self._check(answer)

    async def _check_free(self) -> None:
        if not self._may_replace and await self._exists_now():
            raise exists(self._url)

    def _check(self, answer: Answered) -> None:
        if answer.status not in (200, 204) or answer.code is not None:
            raise refused(self._url, answer)

    # Parts

    async def _send_parts(self, upload: str) -> None:
        failures: list[StageFSError] = []
        async with trio.open_nursery() as nursery:

            async def work() -> None:
                try:
                    await self._send_one_by_one(upload)
                except StageFSError as exc:
                    failures.append(exc)
                    nursery.cancel_scope.cancel()

            for _ in range(PARTS_AT_ONCE):
                nursery.start_soon(work)
        if failures:
            raise failures[0]

    async def _send_one_by_one(self, upload: str) -> None:
        size = part_bytes(self._size_bytes)
        while True:
            async with self._reading:
                if self._read >= self._size_bytes:
                    return
                part = await self._read_part(size)
            await self._send_part(upload, part)

    async def _send_part(self, upload: str, part: Part) -> None:
        query = {"partNumber": str(part.number), "uploadId": upload}

        async def attempt() -> None:
            answer = await self._send(part, query, {})
            self._check(answer)
            # Encrypted parts have tags of another kind.
            encrypted = "x-amz-server-side-encryption" in answer.headers
            if len(answer.etag) == 32 and answer.etag != part.md5.hex() and not encrypted:
                raise RemoteUnavailable(f"A part of {self._url} arrived damaged: try again.")
            self._etags[part.number] = answer.etag

        await repeated(attempt, self._settings)

    async def _read_part(self, size: int) -> Part:
        """The next part and its digest."""
        offset = self._read
        length = min(size, self._size_bytes - offset)

        def work(call: SourceCall[bytes]) -> bytes:
            source = Source(call.source, url=self._url, size_bytes=self._size_bytes)
            digest = hashlib.md5(usedforsecurity=False)
            for block in _blocks(source, offset, length, READ_BLOCK_BYTES):
                digest.update(block)
                self._proof.update(block)
                call.moved()
            return digest.digest()

        md5 = await self._source_call(work, _nothing).run(self._threads)
        self._read = offset + length
        self._number += 1
        return Part(self._number, offset, length, md5)

    async def _send(self, part: Part, query: dict[str, str], headers: dict[str, str]) -> Answered:
        digest = {"Content-MD5": base64.b64encode(part.md5).decode()}

        def work(call: SourceCall[Answered]) -> Answered:
            source = Source(call.source, url=self._url, size_bytes=self._size_bytes)

            def body() -> Iterator[bytes]:
                for block in _blocks(source, part.offset, part.length, SENT_BLOCK_BYTES):
                    yield block
                    call.moved(len(block))

            return self._client.ask(
                call,
                "PUT",
                self._url,
                key=self._key,
                query=query,
                headers=digest | headers,
                body=body() if part.length else None,
                length=part.length,
            )

        def progress(sent_bytes: int) -> None:
            self._sent[part.number] = sent_bytes
            self._progress(sum(self._sent.values()))

        return await self._source_call(work, progress).run(self._threads)

    # Uploads

    async def _begin(self) -> str:
        answer = await self._ask("POST", {"uploads": ""})
        self._check(answer)
        for found in fields(answer.body, "InitiateMultipartUploadResult"):
            if found.get("UploadId"):
                return found["UploadId"]
        raise refused(self._url, answer)

    async def _complete(self, upload: str, condition: dict[str, str]) -> Answered:
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>&quot;{escape(etag)}&quot;</ETag></Part>"
            for number, etag in sorted(self._etags.items())
        )
        space = "http://s3.amazonaws.com/doc/2006-03-01/"
        document = f'<CompleteMultipartUpload xmlns="{space}">{parts}</CompleteMultipartUpload>'
        return await self._ask(
            "POST",
            {"uploadId": upload},
            headers=condition | {"Content-Type": "application/xml"},
            body=document.encode(),
            patience=COMPLETE_PATIENCE,
        )

    async def _abort(self, upload: str, key: str) -> None:
        """Shielded and bounded; what does not succeed is left for the next put."""
        self._uploads.left[upload] = key
        with trio.move_on_after(ABORT_TIMEOUT_S, shield=True):
            try:
                answer = await self._ask("DELETE", {"uploadId": upload}, key=key)
            except StageFSError:
                return
            if answer.status in (200, 204, 404):
                del self._uploads.left[upload]

    async def _abort_older(self) -> None:
        """Remove what this process could not, and what an earlier one left of this key."""
        for upload, key in list(self._uploads.left.items()):
            await self._abort(upload, key)
        try:
            answer = await self._ask("GET", {"uploads": "", "prefix": self._key}, key="")
        except StageFSError:
            # Those who may write need not be allowed to list uploads.
            return
        for found in fields(answer.body, "Upload"):
            name = found.get("UploadId", "")
            ours = found.get("Key") == self._key and name not in self._uploads.active
            if ours and name and self._is_older(found):
                await self._abort(name, self._key)

    def _is_older(self, upload: dict[str, str]) -> bool:
        """Whether it began before this process: whoever began it has ended, or will begin anew."""
        try:
            begun = datetime.datetime.fromisoformat(upload["Initiated"])
        except (KeyError, ValueError):
            return False
        return begun.tzinfo is not None and begun < self._uploads.begun_at

    # Calls

    async def _ask(
        self,
        method: str,
        query: dict[str, str],
        *,
        key: str | None = None,
        headers: dict[str, str] | None = None,
        body: bytes = b"",
        patience: float = 1.0,
    ) -> Answered:
        def work(call: Call[Answered]) -> Answered:
            return self._client.ask(
                call,
                method,
                self._url,
                key=self._key if key is None else key,
                query=query,
                headers=headers,
                body=[body] if body else None,
                length=len(body),
                at_each_step=call.answered,
            )

        call = Call(
            work,
            url=self._url,
            answer_timeout_s=self._answer_timeout_s * patience,
            progress_timeout_s=self._settings.progress_timeout_s,
        )
        return await call.run(self._threads)

    def _source_call(
        self, work: Callable[[SourceCall[T]], T], progress: Callable[[int], None]
    ) -> SourceCall[T]:
        return SourceCall(
            work,
            url=self._url,
            source=self._fd,
            progress=progress,
            answer_timeout_s=self._answer_timeout_s,
            progress_timeout_s=self._settings.progress_timeout_s,
        )


def part_bytes(size_bytes: int) -> int:
    """How large the parts of an object are: always the same for the same size."""
    return max(PART_BYTES_MIN, math.ceil(size_bytes / PARTS_MAX / MIB) * MIB)


def expected_etag(call: SourceCall[bool], source: Source) -> str:
    """The entity tag that an object with the source's content gets when it is written here and
    the server does as S3 does.  Blocking."""
    single = source.size_bytes <= SINGLE_BYTES_MAX
    size = source.size_bytes if single else part_bytes(source.size_bytes)
    digests = []
    for offset in range(0, max(source.size_bytes, 1), max(size, 1)):
        digest = hashlib.md5(usedforsecurity=False)
        length = min(size, source.size_bytes - offset)
        for block in _blocks(source, offset, length, READ_BLOCK_BYTES):
            digest.update(block)
            call.moved()
        digests.append(digest)
    if single:
        return digests[0].hexdigest()
    whole = hashlib.md5(b"".join(one.digest() for one in digests), usedforsecurity=False)
    return f"{whole.hexdigest()}-{len(digests)}"


def _blocks(source: Source, offset: int, length: int, block_bytes: int) -> Iterator[bytes]:
    stop = offset + length
    while offset < stop:
        block = source.read(offset, min(block_bytes, stop - offset))
        yield block
        offset += len(block)


def _nothing(sent_bytes: int) -> None:
    """Progress of what sends nothing."""
