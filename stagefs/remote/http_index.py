"""Reading the directory pages of HTTP servers: nginx's JSON, and HTML index pages.

Only names that lie directly below the page count.  HTML pages round sizes and times, so
their files come without ObjectInfo.  Pure functions on text.
"""

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from urllib.parse import urldefrag, urljoin, urlsplit

from stagefs.errors import InvalidUrl, RemoteError
from stagefs.model import EntryKind, ListedEntry, ObjectInfo
from stagefs.remote.http_answers import http_date_s, modified_validator
from stagefs.remote.url import decode_path, is_file_name, join


def json_entries(url: str, text: str) -> Iterator[ListedEntry]:
    """The entries of ``autoindex_format json``.  Raises RemoteError when it is something else."""
    try:
        rows = json.loads(text)
    except ValueError as exc:
        raise RemoteError(f"The listing of {url} is not valid JSON.") from exc
    if not isinstance(rows, list):
        raise RemoteError(f"The listing of {url} is not a JSON array of names.")
    for row in rows:
        if not isinstance(row, dict) or not isinstance(name := row.get("name"), str):
            raise RemoteError(f"The listing of {url} holds something that is no entry.")
        if not is_file_name(name):
            continue
        child = join(url, name)
        match row.get("type"):
            case "directory":
                yield ListedEntry(name, EntryKind.DIRECTORY, child)
            case "file":
                yield ListedEntry(name, EntryKind.FILE, child, _json_info(child, row))


def _json_info(url: str, row: dict[str, object]) -> ObjectInfo | None:
    size, mtime = row.get("size"), row.get("mtime")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        return None
    modified_s = http_date_s(mtime) if isinstance(mtime, str) else None
    if modified_s is None:
        return None
    return ObjectInfo(
        url=url,
        size_bytes=size,
        validator=modified_validator(modified_s, size),
        mtime_ns=modified_s * 1_000_000_000,
    )


def html_entries(url: str, page_url: str, text: str) -> Iterator[ListedEntry]:
    """The entries that an index page links to.  ``page_url`` is where the page really came from
    (after redirects), which relative links start from; ``url`` is its public name."""
    parser = _Links()
    parser.feed(text)
    parser.close()
    base = urlsplit(page_url)
    seen: set[str] = set()
    for link in parser.links:
        try:
            target = urlsplit(urljoin(page_url, urldefrag(link.strip()).url))
        except ValueError:
            continue
        if (target.scheme, target.netloc) != (base.scheme, base.netloc) or target.query:
            continue
        prefix, slash, tail = target.path.rstrip("/").rpartition("/")
        name = decode_path(tail)
        if decode_path(prefix + slash) != decode_path(base.path) or name in seen:
            continue
        if not is_file_name(name):
            continue
        seen.add(name)
        try:
            child = join(url, name)
        except InvalidUrl:
            continue
        directory = target.path.endswith("/")
        yield ListedEntry(name, EntryKind.DIRECTORY if directory else EntryKind.FILE, child)


class _Links(HTMLParser):
    """Collects the targets of ``<a href>``."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.links += [value for name, value in attrs if name == "href" and value]
