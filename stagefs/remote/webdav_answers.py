"""What WebDAV servers answer: properties of resources, and why a change was refused.

Multistatus documents are read by patterns, not by a parser of XML: those believe what a
server says of entities.  Pure functions.
"""

import html
import re
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import urlsplit

import msgspec

from stagefs.errors import AccessDenied, NoSpace, RemoteUnavailable, StageFSError
from stagefs.model import EntryKind, ListedEntry, ObjectInfo
from stagefs.remote.http_answers import described, refusal, retry_after_s
from stagefs.remote.url import decode_path, is_file_name, join, parse


class Resource(msgspec.Struct, frozen=True):
    """One resource of a multistatus answer, as far as the server tells."""

    href: str
    collection: bool
    size_bytes: int | None
    etag: str
    modified: str


def resources(document: str) -> list[Resource]:
    return [
        Resource(
            href=_text(one, "href"),
            collection=_COLLECTION.search(one) is not None,
            size_bytes=int(size) if (size := _text(one, "getcontentlength")).isdigit() else None,
            etag=_quoted(_text(one, "getetag")),
            modified=_text(one, "getlastmodified"),
        )
        for one in _RESPONSE.findall(document)
    ]


def info_of(url: str, found: Resource) -> ObjectInfo | None:
    """None when the server tells no size."""
    if found.size_bytes is None:
        return None
    headers = {"ETag": found.etag, "Last-Modified": found.modified}
    return described(url, headers, found.size_bytes)


def entries(url: str, found: Iterable[Resource]) -> Iterator[ListedEntry]:
    """The resources that lie directly in a collection; the collection itself is among the
    answers, and so the one name that has no last component below it."""
    own = decode_path(parse(url).path).strip("/")
    for one in found:
        path = decode_path(urlsplit(one.href).path if "://" in one.href else one.href).rstrip("/")
        directory, _, name = path.rpartition("/")
        if directory.strip("/") != own or not is_file_name(name):
            continue
        child = join(url, name)
        if one.collection:
            yield ListedEntry(name, EntryKind.DIRECTORY, child)
        else:
            yield ListedEntry(name, EntryKind.FILE, child, info_of(child, one))


def write_refusal(
    url: str, status: int, headers: Mapping[str, str], *, verb: str = "written"
) -> StageFSError:
    """The error for a request that did not do what it should."""
    match status:
        case 401 | 403:
            return AccessDenied(
                f"{url} may not be {verb} (HTTP {status}): check user, password and rights "
                "(netrc, or in the URL when it is registered)."
            )
        case 423:
            return RemoteUnavailable(
                f"{url} is locked at the server (HTTP 423): try again later.",
                retry_after_s=retry_after_s(headers),
            )
        case 413 | 507:
            return NoSpace(
                f"{url} cannot be {verb}: the server or its quota is full (HTTP {status})."
            )
        case _:
            return refusal(url, status, headers)


def _text(response: str, name: str) -> str:
    match = re.search(rf"<{_PREFIX}{name}(?:\s[^>]*)?>([^<]*)</{_PREFIX}{name}\s*>", response)
    return "" if match is None else html.unescape(match[1]).strip()


def _quoted(etag: str) -> str:
    """Some servers leave out the quotes in properties."""
    return etag if not etag or etag.startswith(('"', "W/")) else f'"{etag}"'


_PREFIX = r"(?:[\w.-]+:)?"
_RESPONSE = re.compile(rf"<{_PREFIX}response(?:\s[^>]*)?>(.*?)</{_PREFIX}response\s*>", re.DOTALL)
_COLLECTION = re.compile(rf"<{_PREFIX}collection\s*/?>")
