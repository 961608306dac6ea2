"""What the answers of an HTTP server mean: versions, spans and refusals.

Pure functions on status and headers; no I/O.  Validators are

* ``etag:"..."`` for a strong entity tag: the server itself is asked with If-Match;
* ``modified:<seconds>:<size>:<weak tag>`` otherwise, any part of it empty when the server
  does not tell: compared with Last-Modified and length of each answer.  A listing that tells
  time and size gives the same form without a tag, so it can be compared with both.
"""

import email.utils
import re
from collections.abc import Mapping
from datetime import UTC, datetime

from stagefs.errors import (
    AccessDenied,
    ObjectChanged,
    ObjectMissing,
    RangesRefused,
    RemoteError,
    RemoteUnavailable,
    StageFSError,
)
from stagefs.model import ObjectInfo, Span
from stagefs.remote.batch import not_the_version, shorter
from stagefs.remote.versions import is_version

TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
BUSY_STATUSES = frozenset({429, 503})
RETRY_AFTER_S_MAX = 3600.0
_CONTENT_RANGE = re.compile(r"bytes\s+(?:(\d+)-(\d+)|\*)/(\d+|\*)", re.IGNORECASE)
_STRONG_ETAG = re.compile(r'"[^"]*"')

Headers = Mapping[str, str]


def described(url: str, headers: Headers, size_bytes: int, *, ranges: bool = True) -> ObjectInfo:
    """The object that an answer is about."""
    etag = headers.get("ETag", "").strip()
    modified_s = http_date_s(headers.get("Last-Modified"))
    if _STRONG_ETAG.fullmatch(etag):
        validator = f"etag:{etag}"
    else:
        validator = modified_validator(modified_s, size_bytes, etag)
    return ObjectInfo(
        url=url,
        size_bytes=size_bytes,
        validator=validator,
        mtime_ns=None if modified_s is None else modified_s * 1_000_000_000,
        ranges=ranges,
    )


def modified_validator(modified_s: int | None, size_bytes: int, weak_etag: str = "") -> str:
    return f"modified:{'' if modified_s is None else modified_s}:{size_bytes}:{weak_etag}"


def strong_etag(validator: str | None) -> str | None:
    """What can be sent in If-Match."""
    if validator is None or not validator.startswith("etag:"):
        return None
    return validator.removeprefix("etag:")


def check_version(info: ObjectInfo, validator: str | None) -> None:
    """Raises ObjectChanged when an answer is not about the version that was asked for."""
    if validator is None or is_version(info, validator):
        return
    raise not_the_version(info.url, validator, info.validator)


def check_encoding(url: str, headers: Headers) -> None:
    """Encoded bodies are refused: their lengths and offsets are not the object's."""
    encoding = headers.get("Content-Encoding", "").strip().lower()
    if encoding not in {"", "identity"}:
        raise RemoteError(
            f"The server sends {url} with Content-Encoding {encoding[:40]!r} although it was asked "
            "not to encode: have it serve the file as it is."
        )


def content_length(headers: Headers) -> int | None:
    text = headers.get("Content-Length", "").strip()
    return int(text) if text.isascii() and text.isdigit() else None


def answer_to_range(
    url: str, status: int, headers: Headers, span: Span, validator: str | None
) -> ObjectInfo:
    """What a 200 or 206 that answers a GET of ``span`` is about to send: exactly the span, of
    the right version, or an error is raised."""
    check_encoding(url, headers)
    if status == 206:
        info = _partial(url, headers, span)
        check_version(info, validator)
        if span.stop > info.size_bytes:
            raise shorter(url, span.stop, info.size_bytes)
        return info
    size_bytes = content_length(headers)
    if size_bytes is None:
        raise RemoteError(
            f"The server tells no length of {url}: have it serve the file with a Content-Length."
        )
    info = described(url, headers, size_bytes, ranges=False)
    check_version(info, validator)
    if span.stop > size_bytes:
        raise shorter(url, span.stop, size_bytes)
    if span != Span(0, size_bytes):
        raise RangesRefused(f"The server of {url} sends whole objects only.")
    return info


def _partial(url: str, headers: Headers, span: Span) -> ObjectInfo:
    text = headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(text.strip())
    if match is None or match[1] is None or match[3] == "*":
        raise RemoteError(
            f"The server answered the request for a part of {url} with Content-Range "
            f"{text[:80]!r}, which does not say what it sends."
        )
    first, last, size_bytes = int(match[1]), int(match[2]), int(match[3])
    if first != span.start or last != min(span.stop, size_bytes) - 1:
        raise RemoteError(
            f"The server of {url} sends bytes {first} to {last} where {span.start} to "
            f"{span.stop - 1} were asked for."
        )
    length = content_length(headers)
    if length is not None and length != last - first + 1:
        raise RemoteUnavailable(
            f"The server of {url} contradicts itself: Content-Range {text[:80]!r}, "
            f"Content-Length {length}."
        )
    return described(url, headers, size_bytes)


def size_of_partial(headers: Headers) -> int | None:
    """The size of the whole object that a 206 or 416 tells."""
    match = _CONTENT_RANGE.fullmatch(headers.get("Content-Range", "").strip())
    return None if match is None or match[3] == "*" else int(match[3])


def refusal(url: str, status: int, headers: Headers, *, span: Span | None = None) -> StageFSError:
    """The error for a status that is no success."""
    match status:
        case 401 | 403 | 407:
            return AccessDenied(
                f"The server refuses {url} (HTTP {status}): check the user, token or signature "
                "that it wants (netrc, or in the URL when it is registered)."
            )
        case 404 | 410:
            return ObjectMissing(f"The server has no {url} (HTTP {status}).")
        case 412:
            return ObjectChanged(
                f"{url} is no longer the version that was asked for (HTTP 412): stage it in again "
                "with --replace to read the new one."
            )
        case 416 if span is not None:
            return shorter(url, span.stop, size_of_partial(headers) or 0)
        case _ if status in TRANSIENT_STATUSES:
            return RemoteUnavailable(
                f"The server of {url} cannot answer now (HTTP {status}): try again later.",
                retry_after_s=retry_after_s(headers),
                busy=status in BUSY_STATUSES,
            )
        case _:
            return RemoteError(f"The server answered the request for {url} with HTTP {status}.")


def retry_after_s(headers: Headers) -> float | None:
    """The server's wish in seconds; it may come as a number or as a date (RFC 9110)."""
    text = headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return min(float(text), RETRY_AFTER_S_MAX)
    at_s = http_date_s(text)
    if at_s is None:
        return None
    # Counted from the server's own clock where it shows it.
    now_s = http_date_s(headers.get("Date"))
    if now_s is None:
        now_s = int(datetime.now(UTC).timestamp())
    return min(max(0.0, float(at_s - now_s)), RETRY_AFTER_S_MAX)


def http_date_s(text: str | None) -> int | None:
    """Seconds since the epoch; None for what is no date."""
    if not text:
        return None
    try:
        return int(email.utils.parsedate_to_datetime(text).timestamp())
    except (ValueError, OverflowError):
        return None
