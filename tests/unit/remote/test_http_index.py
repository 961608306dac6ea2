import json

import pytest

from stagefs.errors import RemoteError
from stagefs.model import EntryKind
from stagefs.remote.http_index import html_entries, json_entries

URL = "http://h/d/"

APACHE = """<!DOCTYPE HTML PUBLIC "-//W3C//DTD HTML 3.2 Final//EN">
<html><head><title>Index of /d</title></head><body>
<table><tr><th><a href="?C=N;O=D">Name</a></th><th><a href="?C=M;O=A">Last modified</a></th></tr>
<tr><td><a href="/">Parent Directory</a></td></tr>
<tr><td><a href="below/">below/</a></td><td>-</td></tr>
<tr><td><a href="a%20b.txt">a b.txt</a></td><td>1.2K</td></tr>
<tr><td><a href="x&amp;y">x&amp;y</a></td></tr>
</table></body></html>"""


def names(page: str, page_url: str = URL) -> dict[str, EntryKind]:
    return {entry.name: entry.kind for entry in html_entries(URL, page_url, page)}


def test_apache() -> None:
    assert names(APACHE) == {
        "below": EntryKind.DIRECTORY,
        "a b.txt": EntryKind.FILE,
        "x&y": EntryKind.FILE,
    }


@pytest.mark.parametrize(
    "href",
    [
        "../",
        "../../etc/passwd",
        "/elsewhere/x",
        "below/deeper",
        "http://other/d/x",
        "https://h/d/x",
        "//other/d/x",
        "file:///etc/passwd",
        "javascript:void(0)",
        "mailto:ada@h",
        "?C=N",
        "x?version=2",
        "#top",
        ".",
        "./",
        "..%2F..%2Fetc",
        "a%2Fb",
        "%2e%2e",
        "%00",
        "x" * 256,
        "http://[",
        "",
    ],
)
def test_links_that_are_no_entries(href: str) -> None:
    assert names(f'<a href="{href}">x</a>') == {}


@pytest.mark.parametrize("href", ["x", "./x", "/d/x", "http://h/d/x", "x#part", " x "])
def test_links_to_an_entry(href: str) -> None:
    assert list(names(f'<a href="{href}">x</a>')) == ["x"]


def test_an_entry_counts_once() -> None:
    page = '<a href="x"><img></a><a href="x">x</a><a href="x/">x</a>'
    assert len(list(html_entries(URL, URL, page))) == 1


def test_page_that_came_from_elsewhere() -> None:
    """Links start from where the page really was, names from where it was asked for."""
    (entry,) = html_entries(URL, "http://mirror/pub/d/", '<a href="x">x</a>')
    assert (entry.url, entry.info) == ("http://h/d/x", None)


def test_bytes_that_are_not_utf8() -> None:
    assert list(names('<a href="%E9">x</a>')) == ["\udce9"]


def test_broken_page() -> None:
    assert list(names('<a href="x"><a href="y><p></')) == ["x"]


def test_json() -> None:
    rows = [
        {"name": "below", "type": "directory", "mtime": "Sun, 06 Nov 1994 08:49:37 GMT"},
        {"name": "x", "type": "file", "mtime": "Sun, 06 Nov 1994 08:49:37 GMT", "size": 7},
        {"name": "no size", "type": "file"},
        {"name": "device", "type": "other"},
        {"name": "..", "type": "directory"},
        {"name": "a/b", "type": "file"},
    ]
    below, x, no_size = json_entries(URL, json.dumps(rows))
    assert (below.name, below.kind, below.info) == ("below", EntryKind.DIRECTORY, None)
    assert x.info is not None
    assert (x.info.size_bytes, x.info.validator) == (7, "modified:784111777:7:")
    assert no_size.info is None


@pytest.mark.parametrize("text", ["", "{}", "[1]", "[{}]", '[{"name": 7}]', "<html>"])
def test_json_that_is_no_listing(text: str) -> None:
    with pytest.raises(RemoteError):
        list(json_entries(URL, text))
