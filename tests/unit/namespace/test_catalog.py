"""Catalogs: what is read from a line, and which lines are refused with which sentence."""

import io
import json

import pytest

from stagefs.errors import InvalidCatalog
from stagefs.namespace.catalog import CatalogEntry, read_catalog

GOOD = {"name": "d/a", "url": "https://host/a", "size": 5}
SHA = "sha256:" + "ab" * 32


def read(content: str | bytes, name: str = "catalog.jsonl") -> list[CatalogEntry]:
    raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")
    return list(read_catalog(io.BytesIO(raw), name))


def line(**changes: object) -> str:
    return json.dumps({**GOOD, **changes})


def test_json_lines() -> None:
    first, second = read(
        line(mtime=1_700_000_000, checksum=SHA.upper()) + "\n\n" + line(name="b", size=0) + "\n"
    )
    assert (first.line, first.directory, first.name) == (1, "d", b"a")
    assert (first.url, first.size_bytes) == ("https://host/a", 5)
    assert (first.mtime_ns, first.checksum, first.version) == (1_700_000_000 * 10**9, SHA, SHA)
    assert (second.line, second.directory, second.name) == (3, "", b"b")
    assert second.version == "declared:0:0"


def test_csv_with_columns_in_any_order() -> None:
    entries = read(
        'size,name,url,mtime\r\n5,"a, b",https://host/a,2023-11-14T22:13:20Z\r\n'
        "6,d/c,s3://bucket/c,\n",
        "catalog.CSV",
    )
    assert [(e.name, e.size_bytes, e.mtime_ns) for e in entries] == [
        (b"a, b", 5, 1_700_000_000 * 10**9),
        (b"c", 6, 0),
    ]


def test_csv_is_recognized_without_its_ending() -> None:
    assert len(read("name,url,size\na,https://host/a,1\n", "catalog.txt")) == 1


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_an_empty_catalog(content: str) -> None:
    assert read(content) == []


def test_a_byte_order_mark_is_no_character() -> None:
    assert read("\ufeff" + line())[0].name == b"a"
    assert read("\ufeffname,url,size\na,https://host/a,1\n", "c.csv")[0].name == b"a"


@pytest.mark.parametrize(
    "name",
    ["a%2Fb", "a%00b", "..a", "a\\b", "~", "-rf", "new\nline", " blank ", "ä", "x" * 255],
)
def test_strange_names_are_taken_literally(name: str) -> None:
    assert read(line(name=name))[0].name == name.encode()


def test_names_of_any_bytes() -> None:
    expected = b"\xff\xfe"
    assert read(b'{"name":"\xff\xfe","url":"https://host/a","size":1}')[0].name == expected
    assert read(line(name="\udcff\udcfe"))[0].name == expected
    assert read(b"name,url,size\n\xff\xfe,https://host/a,1\n", "c.csv")[0].name == expected


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "/etc/passwd", "/", "//x", "../x", "a/../b", "a/./b", "a//b", "a/", "a\0b",
     "x" * 256, "y" * 256 + "/x", "/".join(["d"] * 2100), "\ud800"],
)  # fmt: skip
def test_hostile_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidCatalog, match=r"^Line 2 of the catalog"):
        read(line() + "\n" + line(name=name))


@pytest.mark.parametrize(
    ("mtime", "expected_ns"),
    [
        (0, 0),
        (-1, -(10**9)),
        (1.5, 1_500_000_000),
        ("1.000000001", 1_000_000_001),
        ("-0.5", -500_000_000),
        ("1970-01-01T00:00:01.000001+00:00", 1_000_001_000),
        ("1970-01-01T02:00:00+02:00", 0),
        ("1970-01-02", 86_400 * 10**9),
    ],
)
def test_times(mtime: object, expected_ns: int) -> None:
    assert read(line(mtime=mtime))[0].mtime_ns == expected_ns


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{", "is not JSON"),
        ("[]", "Expected `object`"),
        ('"x"', "Expected `object`"),
        (line(colour="red"), "unknown field `colour`"),
        ('{"name": "a", "size": 1}', "missing required field `url`"),
        ('{"name": "a", "url": "https://host/a"}', "gives no size for 'a'"),
        (line(size=None), "gives no size"),
        (line(size=-1), "-1 cannot be a size"),
        (line(size=1.5), "Expected `int"),
        (line(size=1 << 62), "cannot be a size"),
        (line(mtime="yesterday"), "is no time"),
        (line(mtime=1_700_000_000_000), "not in seconds"),
        (line(mtime="99999999999999999999"), "not in seconds"),
        ('{"name":"a","url":"https://host/a","size":1,"mtime":1e999}', "out of range|no time"),
        (line(checksum="sha256:12"), "is no checksum"),
        (line(checksum="crc32:12345678"), "is no checksum"),
        (line(url="host/a"), "is not a URL"),
        (line(url="gopher://host/a"), "scheme 'gopher'"),
        (line(url="https://host/../a"), r"holds '\.' or '\.\.'"),
        (line(url="staging:///a"), "is a name in the mount"),
        ("x" * (1 << 20), "longer than 1 MiB"),
    ],
)
def test_wrong_lines_are_refused_with_their_number(bad: str, reason: str) -> None:
    with pytest.raises(InvalidCatalog, match=f"^Line 2 of the catalog.*({reason})"):
        read(line() + "\n" + bad + "\n" + line(name="never read"))


@pytest.mark.parametrize(
    "url",
    ["https://user:hunter2@host/a", "https://host/a?X-Amz-Signature=hunter2",
     "https://host/a?token=hunter2", "ssh://user:hunter2@host/a"],
)  # fmt: skip
def test_secrets_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidCatalog, match="password, token or signature") as caught:
        read(line(url=url))
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("name,url\na,https://host/a\n", "Line 1 .* names no column 'size'"),
        ("name,url,size,colour\n", "Line 1 .* no column 'colour'"),
        ("name,url,size,size\n", "Line 1 .* a column twice"),
        ("name,url,size\na,https://host/a\n", "Line 2 .* has 2 fields"),
        ("name,url,size\na,https://host/a,\n", "Line 2 .* gives no size"),
        ("name,url,size\na,https://host/a,1e3\n", "Line 2 .* is no number"),
        ("name,url,size\na,https://host/a,٣\n", "Line 2 .* is no number"),
        ('name,url,size\n"a,https://host/a,1\n', "Line 2 .* is not CSV"),
        ("name,url,size\na,https://host/a,1\n../b,https://host/b,1\n", "Line 3"),
    ],
)
def test_wrong_csv_is_refused(content: str, reason: str) -> None:
    with pytest.raises(InvalidCatalog, match=reason):
        read(content, "c.csv")
