"""Requests that change a bucket, which obstore cannot make as they are needed here.

They carry If-None-Match and Content-MD5, say how far a body was sent, and end when nobody
waits for them any more.  Blocking: each runs in a worker thread of its own call.
"""

import contextlib
import datetime
import html
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import urllib3

from stagefs.errors import (
    AccessDenied,
    NoSpace,
    ObjectMissing,
    RemoteError,
    RemoteUnavailable,
    StageFSError,
)
from stagefs.remote import aws
from stagefs.remote.aws_machine import MachineKeys
from stagefs.remote.aws_signature import encoded_key, encoded_query, signed
from stagefs.remote.http_access import proxy_of, trusting
from stagefs.remote.http_answers import BUSY_STATUSES, TRANSIENT_STATUSES, retry_after_s
from stagefs.remote.http_client import new_client, serve, translated
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.store_errors import EXPIRED_CODES
from stagefs.remote.threads import Call
from stagefs.remote.url import RemoteUrl, parse

ANSWER_BYTES_MAX = 4 << 20
_CODE = re.compile(rb"<Code>([A-Za-z0-9]{1,60})</Code>")
_FIELD = re.compile(r"<(\w+)>([^<]*)</\1>")
_FULL = frozenset(
    {"QuotaExceeded", "InsufficientCapacity", "InsufficientStorage", "XMinioStorageFull"}
)
# The request, or its body, arrived other than it was sent, or somebody else was at it too.
_AGAIN = frozenset(
    {
        "BadDigest",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "NoSuchUpload",
        "OperationAborted",
        "RequestTimeout",
        "XAmzContentSHA256Mismatch",
    }
)


class Answered(msgspec.Struct, frozen=True):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def code(self) -> str | None:
        """S3's own word for an error.  It may come with status 200."""
        match = _CODE.search(self.body)
        return match[1].decode() if match else None

    @property
    def etag(self) -> str:
        return self.headers.get("ETag", "").strip('"')


class StoreClient:
    """One bucket.  ``keys_of_url`` come before all others."""

    def __init__(self, bucket: str, settings: RemoteSettings, keys_of_url: aws.Keys | None) -> None:
        self._settings = settings
        self._keys_of_url = keys_of_url
        profile = aws.read_profile(settings)
        self._region = aws.region(settings, profile)
        self._base = _base(bucket, settings, aws.endpoint(settings, profile), self._region)
        self._machine = MachineKeys(settings.environment.get(aws.MACHINE_ENDPOINT_NAME))
        self._making = threading.Lock()
        self._made: urllib3.PoolManager | None = None

    def ask(
        self,
        call: Call[Any],
        method: str,
        url: str,
        *,
        key: str,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: Iterable[bytes] | None = None,
        length: int = 0,
        at_each_step: Callable[[], None] | None = None,
    ) -> Answered:
        """The answer, whatever its status.  ``url`` is for messages.  Raises StageFSError,
        CallStopped."""
        path = self._base.path.rstrip("/") + ("/" + encoded_key(key) if key else "")
        text = encoded_query(query or {})
        sent = dict(headers or {})
        sent["Content-Length"] = str(length)
        keys = self.keys()
        if keys is not None:
            sent = signed(
                method,
                host=self._base.authority,
                path=path or "/",
                query=text,
                headers=sent,
                keys=keys,
                region=self._region,
                now=datetime.datetime.now(datetime.UTC),
            )
        serve(call)
        target = f"{self._base.host_url}{path or '/'}" + (f"?{text}" if text else "")
        with translated(url, ca_setting="[remote.s3] ca_file"):
            response = self._client().urlopen(
                method,
                target,
                headers={"User-Agent": "stagefs", **sent},
                body=body,
                redirect=False,
                retries=False,
                preload_content=False,
            )
            with contextlib.closing(response):
                data = bytearray()
                while piece := response.read1(64 << 10):
                    data += piece
                    if len(data) > ANSWER_BYTES_MAX:
                        raise RemoteError(f"The server's answer for {url} is not valid.")
                    if at_each_step is not None:
                        at_each_step()
        return Answered(response.status, response.headers, bytes(data))

    def close(self) -> None:
        with self._making:
            made, self._made = self._made, None
        if made is not None:
            made.clear()

    def keys(self) -> aws.Keys | None:
        """None for anonymous requests.  Read anew each time: pilots renew them in place."""
        if self._settings.s3.anonymous:
            return None
        keys = (
            self._keys_of_url
            or aws.keys_of_environment(self._settings)
            or aws.read_profile(self._settings).keys
            or self._machine.keys()
        )
        if keys is None:
            raise AccessDenied(
                f"There are no keys to write to {self._base.host_url}: set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or name a profile of ~/.aws in [remote.s3] profile."
            )
        return keys

    def _client(self) -> urllib3.PoolManager:
        with self._making:
            if self._made is None:
                ca_file = self._settings.s3.ca_file
                self._made = new_client(
                    self._settings,
                    proxy_of(self._settings, self._base),
                    trust=None if ca_file is None else trusting(ca_file, "[remote.s3] ca_file"),
                )
            return self._made


def refused(url: str, answer: Answered) -> StageFSError:
    """What an answer means that is not what was hoped for."""
    code = answer.code
    said = f" ({code})" if code else f" (HTTP {answer.status})"
    if code in _FULL or answer.status == 507:
        return NoSpace(f"{url} cannot be written: the store or its quota is full{said}.")
    if code in _AGAIN or answer.status in TRANSIENT_STATUSES or answer.status == 409:
        return RemoteUnavailable(
            f"{url} cannot be written now{said}: try again later.",
            retry_after_s=retry_after_s(answer.headers),
            busy=answer.status in BUSY_STATUSES or code == "SlowDown",
        )
    if answer.status in (401, 403) or code in EXPIRED_CODES:
        return AccessDenied(
            f"{url} may not be written{said}: check the keys (AWS_* variables, ~/.aws, or "
            "[remote.s3] profile) and the bucket's policy."
        )
    match answer.status:
        case 404:
            return ObjectMissing(f"The server has no bucket for {url}: make it, or mend the name.")
        case 301 | 302 | 307 | 308:
            return RemoteError(
                f"The server redirects {url} elsewhere: set the bucket's region in [remote.s3] "
                "region."
            )
        case _:
            return RemoteError(f"{url} cannot be written: the server refuses it{said}.")


def fields(document: bytes, element: str) -> list[dict[str, str]]:
    """The texts within each such element of an answer, by name.  No parser of XML: those
    believe what a server says of entities."""
    text = document.decode("utf-8", "replace")
    found = re.findall(rf"<{element}(?: [^>]*)?>(.*?)</{element}>", text, re.DOTALL)
    return [{name: html.unescape(value) for name, value in _FIELD.findall(one)} for one in found]


def _base(bucket: str, settings: RemoteSettings, endpoint: str | None, region: str) -> RemoteUrl:
    """What comes before the key, as obstore has it: with virtual hosting, an endpoint that was
    configured already holds the bucket."""
    if settings.s3.path_style:
        host = endpoint or f"https://s3.{region}.amazonaws.com"
        return parse(f"{host.rstrip('/')}/{bucket}")
    return parse(endpoint or f"https://{bucket}.s3.{region}.amazonaws.com")
