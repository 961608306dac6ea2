"""Whatever a parser of foreign bytes is given, it ends with a value or with the error that its
docstring names, and has read and kept no more than it may: catalogs, manifests, URLs, packets of
SFTP servers, maps and records of the cache.

Endless files stand for files that are too large: the test counts what was read of them.
"""

import contextlib
import io
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stagefs.cache import layout, packed
from stagefs.cache.file_system import read_fully
from stagefs.errors import DamagedEntry, InvalidCatalog, InvalidManifest, InvalidUrl
from stagefs.model import ObjectId
from stagefs.namespace.catalog import LINE_BYTES_MAX, CatalogEntry, read_catalog
from stagefs.namespace.node import NAME_BYTES_MAX
from stagefs.remote import sftp_protocol as protocol
from stagefs.remote.sftp_protocol import PACKET_BYTES_MAX, ProtocolError
from stagefs.remote.sftp_stream import BUFFER_BYTES, PacketStream
from stagefs.remote.url import URL_CHARACTERS_MAX, normalize, parse
from stagefs.staging.manifest import read_manifest

MESSAGE_CHARACTERS_MAX = 2 * URL_CHARACTERS_MAX
HALF_A_PAIR = "\ud800"  # what JSON's escapes can write and no name, path or URL can hold
SPECIAL = (
    *("/", "..", ".", "%2f", "%00", "%", "\0", "\n", "\r", "@", ":", "?", "#", "[", "]", "*", "**"),
    *("=", ",", '"', "{name}", "\udcff", HALF_A_PAIR, "a" * 300, "9" * 40, "٣", "\x1b[2J"),
)
# Text as an attacker would write it: any code point, and what parsers treat in a special way.
PIECES = st.one_of(
    st.text(st.characters(), max_size=8),
    st.sampled_from(SPECIAL),
)
TEXTS = st.lists(PIECES, max_size=6).map("".join)
SCHEMES = st.sampled_from(
    (
        *(
            "http",
            "https",
            "webdav",
            "file",
            "ssh",
            "s3",
            "gs",
            "az",
            "irods",
            "command",
            "staging",
        ),
        "fsspec+ftp",
        "HTTPS",
        "x",
    )
)
URLS = st.one_of(TEXTS, st.builds("{}://{}/{}".format, SCHEMES, TEXTS, TEXTS))


def check_message(error: Exception) -> None:
    assert 0 < len(str(error)) < MESSAGE_CHARACTERS_MAX


# URLs


@given(URLS)
@example(f"https://host/{HALF_A_PAIR}")
@example(f"ssh://{HALF_A_PAIR}@host/x")
@example(f"http://host/?{HALF_A_PAIR}")
@example("x" * 1_000_000)
@example("https://" + ":" * URL_CHARACTERS_MAX)
def test_a_url_is_refused_or_has_one_spelling(text: str) -> None:
    try:
        url = parse(text)
    except InvalidUrl as exc:
        check_message(exc)
        with pytest.raises(InvalidUrl):
            normalize(text)
        return
    normal = normalize(text)
    assert normalize(normal) == normal == str(url)
    # It can be stored, sent and opened, and leads nowhere else.
    normal.encode("utf-8", "surrogateescape")
    assert not {".", ".."} & set(url.path.split("/"))
    assert "\0" not in url.path
    assert "\n" not in url.host


def test_no_part_of_a_password_is_in_the_message_about_a_long_url() -> None:
    with pytest.raises(InvalidUrl) as caught:
        parse(f"https://ada:{'s3cr3t' * 30}@host/{'x' * URL_CHARACTERS_MAX}")
    assert "s3cr3t" not in str(caught.value)


# Catalogs

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=10**29, max_value=10**40),
    st.floats(),
    TEXTS,
    st.lists(st.integers(), max_size=2),
    st.sampled_from(["1" * 5000, "1." + "1" * 5000, "2026-11-21T00:00:00Z", "sha256:" + "a" * 64]),
)
ROWS = st.fixed_dictionaries(
    {"name": st.one_of(VALUES, TEXTS), "url": st.one_of(VALUES, URLS), "size": VALUES},
    optional={"mtime": VALUES, "checksum": VALUES, "other": VALUES},
)
GOOD_ROW = {"name": "d/a", "url": "https://host/a", "size": 1}


def entries(content: bytes, name: str) -> list[CatalogEntry]:
    """What was read, up to the end or the first wrong line."""
    found: list[CatalogEntry] = []
    try:
        found.extend(read_catalog(io.BytesIO(content), name))
    except InvalidCatalog as exc:
        check_message(exc)
    for entry in found:
        assert 0 < len(entry.name) <= NAME_BYTES_MAX
        assert b"/" not in entry.name
        assert not {"", ".", ".."} & (set(entry.directory.split("/")) - {entry.directory})
        assert entry.name not in (b".", b"..")
        assert entry.size_bytes >= 0
        entry.url.encode("utf-8", "surrogateescape")
        assert -(1 << 63) <= entry.mtime_ns < 1 << 63
    return found


@given(st.lists(ROWS, max_size=3))
@example([{**GOOD_ROW, "mtime": 1e300}])
@example([{**GOOD_ROW, "mtime": "1" * 5000}])
@example([{**GOOD_ROW, "size": 10**400}])
@example([{**GOOD_ROW, "url": f"https://host/{HALF_A_PAIR}"}])
def test_a_catalog_in_json_of_anything(rows: list[dict[str, Any]]) -> None:
    entries("".join(json.dumps(row) + "\n" for row in rows).encode(), "c.jsonl")


FIELDS = st.one_of(TEXTS, st.sampled_from(["1", "1" * 5000, "-1", "1.5", "²", "sha256:", "a,b"]))


@given(st.lists(st.lists(FIELDS, min_size=3, max_size=4), max_size=3))
@example([["a", "https://host/a", "1" * 5000]])
@example([["a", "https://host/a", "1", "1" * 5000]])
def test_a_catalog_in_csv_of_anything(rows: list[list[str]]) -> None:
    for columns in ("name,url,size", "size,mtime,url,name"):
        lines = "\n".join([columns, *(",".join(row) for row in rows)])
        entries(lines.encode("utf-8", "surrogatepass"), "c.csv")


@given(st.binary(max_size=300), st.sampled_from(["c.csv", "c.jsonl"]))
def test_a_catalog_of_any_bytes(content: bytes, name: str) -> None:
    entries(content, name)
    entries(b"name,url,size\n" + content, name)
    entries(json.dumps(GOOD_ROW).encode() + b"\n{" + content, name)


class Endless(io.RawIOBase):
    """A file that never ends: ``start``, then ``piece`` for ever."""

    def __init__(self, start: bytes, piece: bytes) -> None:
        self._start = start
        self._piece = piece * (4096 // len(piece))
        self._at = 0
        self.read_bytes_max = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET
        self._at = offset
        return offset

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        data = (
            self._start[self._at :]
            or self._piece[(self._at - len(self._start)) % len(self._piece) :]
        )
        count = min(len(view), len(data))
        view[:count] = data[:count]
        self._at += count
        self.read_bytes_max = max(self.read_bytes_max, self._at)
        assert self._at < 64 << 20, "it reads for ever"
        return count


@pytest.mark.parametrize(
    ("name", "start", "piece"),
    [
        ("c.jsonl", b'{"name": "', b"a"),
        ("c.jsonl", b"{", b" "),
        ("c.csv", b"", b","),
        ("c.csv", b"name,url,size\n", b","),
        ("c.csv", b"name,url,size\n", b"a"),
        ("c.csv", b'name,url,size\n"', b"\n"),
        ("c.csv", b"name,url,size\n", b'""'),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_a_line_without_an_end_is_refused_before_it_fills_memory(
    name: str, start: bytes, piece: bytes
) -> None:
    endless = Endless(start, piece)
    with pytest.raises(InvalidCatalog) as caught:
        list(read_catalog(io.BufferedReader(endless), name))
    check_message(caught.value)
    assert endless.read_bytes_max <= 3 * LINE_BYTES_MAX


# Manifests

WORDS = st.one_of(VALUES, URLS)
TABLES = st.dictionaries(TEXTS, st.one_of(WORDS, st.lists(WORDS, max_size=2)), max_size=3)
DOCUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "inputs": st.one_of(TABLES, VALUES),
        "outputs": st.one_of(TABLES, VALUES),
        "mirrors": st.one_of(TABLES, VALUES),
        "on_write": VALUES,
        "lifetime": VALUES,
        "other": VALUES,
    },
)


def manifest_of(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as top:
        path = Path(top, f"task{suffix}")
        path.write_bytes(content)
        try:
            read = read_manifest(path)
        except InvalidManifest as exc:
            check_message(exc)
            return
    for name in [*read.inputs, *read.mirrors.values()]:
        assert not name.startswith("/")
        assert ".." not in name.split("/")
    for text in [*read.inputs, *read.inputs.values(), *read.mirrors, *read.mirrors.values()]:
        assert "\0" not in text
        text.encode("utf-8", "surrogateescape")
    for output in read.outputs:
        output.to.encode("utf-8", "surrogateescape")
        output.pattern.encode("utf-8", "surrogateescape")


@settings(deadline=None)
@given(DOCUMENTS)
@example({"inputs": {"a": HALF_A_PAIR}})
@example({"outputs": {HALF_A_PAIR: "staging:///x/"}})
@example({"outputs": {"x": f"staging:///{HALF_A_PAIR}/"}})
@example({"mirrors": {HALF_A_PAIR: "x"}})
@example({"on_write": HALF_A_PAIR})
@example({"mirrors": {"x\0": "x"}})
# Every directory above a name is looked at: without a bound this one takes minutes and all memory.
@example({"inputs": {"/".join("a" * 100_000): "x"}})
def test_a_manifest_in_json_of_anything(document: dict[str, Any]) -> None:
    manifest_of(json.dumps(document).encode(), ".json")


@settings(deadline=None)
@given(st.binary(max_size=200), st.sampled_from([".json", ".toml"]))
@example(b"[" * 100_000, ".json")
@example(b"a=" + b"[" * 100_000, ".toml")
@example(b"9" * 5000, ".json")
@example(b"a=" + b"9" * 5000, ".toml")
def test_a_manifest_of_any_bytes(content: bytes, suffix: str) -> None:
    manifest_of(content, suffix)


# SFTP: what a server sends, in pieces of any size


class Sinkless:
    """Takes packets and parses each as what it says it is, as the engine does."""

    PARSERS: Mapping[int, Callable[[memoryview], object]] = {
        protocol.Kind.STATUS: protocol.status,
        protocol.Kind.HANDLE: protocol.string,
        protocol.Kind.DATA: protocol.string,
        protocol.Kind.NAME: protocol.names,
        protocol.Kind.ATTRS: protocol.attributes,
        protocol.Kind.EXTENDED_REPLY: protocol.limits,
    }

    def packet(self, kind: int, request: int, body: memoryview) -> None:
        assert len(body) <= PACKET_BYTES_MAX
        if kind in self.PARSERS:
            self.PARSERS[kind](body)

    def payload_target(self, request: int, length: int) -> None:
        return None

    def payload_ended(self, request: int, length: int) -> None:
        raise AssertionError("no payload was taken")


COUNTS = st.sampled_from([0, 1, 2, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF])
PARTS = st.one_of(
    st.binary(max_size=40),
    COUNTS.map(lambda count: struct.pack(">I", count)),
    st.binary(max_size=10).map(lambda data: struct.pack(">I", len(data)) + data),
    st.just(struct.pack(">IQIIIII", 0xF, 1 << 63, 0, 0, 0o100644, 0, 0)),
)
PACKETS = st.builds(
    lambda kind, parts: struct.pack(">IBI", 5 + len(b"".join(parts)), kind, 7) + b"".join(parts),
    st.sampled_from([*Sinkless.PARSERS, 0, 255]),
    st.lists(PARTS, max_size=4),
)


@given(st.lists(st.one_of(PACKETS, st.binary(max_size=20)), max_size=5), st.integers(1, 100))
# Four thousand million names, or pairs of extended attributes, of which none is there.
@example([struct.pack(">IBII", 9, protocol.Kind.NAME, 7, 0xFFFFFFFF)], 100)
@example([struct.pack(">IBIII", 13, protocol.Kind.ATTRS, 7, 1 << 31, 0xFFFFFFFF)], 100)
def test_what_an_sftp_server_sends(sent: list[bytes], piece: int) -> None:
    data = b"".join(sent)
    out, into = os.pipe()
    try:
        stream = PacketStream(out, Sinkless())
        with contextlib.suppress(ProtocolError):
            for at in range(0, len(data), piece):
                os.write(into, data[at : at + piece])
                stream.pull()
    finally:
        os.close(out)
        os.close(into)


def test_a_packet_larger_than_any_is_refused_before_it_is_waited_for() -> None:
    assert PACKET_BYTES_MAX < BUFFER_BYTES, "the buffer would have to grow"
    out, into = os.pipe()
    try:
        os.write(into, struct.pack(">IBI", PACKET_BYTES_MAX + 1, protocol.Kind.DATA, 7))
        with pytest.raises(ProtocolError):
            PacketStream(out, Sinkless()).pull()
    finally:
        os.close(out)
        os.close(into)


# The cache's files

HEADER = layout.entry_header(
    ObjectId(url="https://host/x", version="etag:1"),
    validator="etag:1",
    size_bytes=3 * layout.CHUNK_BYTES_MIN + 5,
    chunk_bytes=layout.CHUNK_BYTES_MIN,
    mtime_ns=7,
    checksum=None,
)


@contextlib.contextmanager
def file_of(data: bytes) -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        yield file.fileno()


def whole_object_file() -> bytes:
    trailer = layout.encode_trailer(HEADER)
    slots = struct.pack("<4Q", 1, 0, 2, 3)
    data = bytearray(trailer.footer_offset)
    data[trailer.offset : trailer.offset + len(trailer.header)] = trailer.header
    data[trailer.slots_offset : trailer.footer_offset] = slots
    return bytes(data) + trailer.footer


OBJECT_FILE = whole_object_file()
TRAILER_BYTES = len(OBJECT_FILE) - layout.encode_trailer(HEADER).offset


def forged(*, header: bytes, offset: int, header_bytes: int, slots: bytes) -> bytes:
    """A map whose hashes are all right, whatever it says."""
    head = struct.pack(
        "<8sIIQQ",
        b"STGFSOBJ",
        layout.FORMAT,
        header_bytes,
        offset,
        xxhash.xxh3_64_intdigest(header),
    )
    footer = head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head))
    return header + bytes(-len(header) % 512) + slots + footer


def read_map(data: bytes) -> layout.LoadedMap | None:
    with file_of(data) as fd:
        try:
            return layout.read_map(fd, len(data))
        except DamagedEntry as exc:
            check_message(exc)
            return None


def test_the_map_that_the_following_tests_damage_is_whole() -> None:
    found = read_map(OBJECT_FILE)
    assert found is not None
    assert list(layout.present_chunks(found.slots)) == [1, 0, 1, 1]


@given(st.integers(1, TRAILER_BYTES), st.integers(0, 255), st.integers(0, 4096))
def test_a_damaged_map(place: int, byte: int, cut: int) -> None:
    data = bytearray(OBJECT_FILE)
    data[-place] = byte
    for damaged in (bytes(data), OBJECT_FILE[: len(OBJECT_FILE) - cut], OBJECT_FILE + bytes(cut)):
        found = read_map(damaged)
        # Slots have no hash of their own: a wrong one is found when its chunk is verified.
        assert found is None or found.header == HEADER


NUMBERS = st.one_of(st.integers(0, 1 << 20), st.integers(-(1 << 63), (1 << 64) - 1))


@given(st.binary(max_size=60), NUMBERS, st.integers(0, 1 << 32), st.binary(max_size=64))
def test_a_forged_map(header: bytes, offset: int, header_bytes: int, slots: bytes) -> None:
    data = forged(
        header=header,
        offset=offset % (1 << 64),
        header_bytes=min(header_bytes, (1 << 32) - 1),
        slots=slots,
    )
    read_map(data)
    read_map(forged(header=header, offset=0, header_bytes=len(header), slots=slots))


def test_a_forged_map_of_a_sparse_file_is_not_read_into_memory(tmp_path: Path) -> None:
    encoded = layout.encode_trailer(HEADER).header
    data = forged(header=encoded, offset=0, header_bytes=len(encoded), slots=b"")
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(data[:512])
        file.seek(1 << 40)
        file.write(data[-40:])
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(DamagedEntry):
            layout.read_map(fd, (1 << 40) + 40)
    finally:
        os.close(fd)


def record(name: str, data: bytes) -> bytes:
    header = layout.entry_header(
        ObjectId(url=f"https://host/{name}", version="etag:1"),
        validator="etag:1",
        size_bytes=len(data),
        chunk_bytes=layout.CHUNK_BYTES_MIN,
        mtime_ns=None,
        checksum=None,
    )
    return layout.encode_record(header, data)[0]


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=64).map(lambda data: data + bytes(-len(data) % 8)),
            st.binary(max_size=40).map(lambda data: record("x", data)),
            st.tuples(st.sampled_from([layout.LIVE, layout.DEAD]), NUMBERS).map(
                lambda pair: pair[0] + struct.pack("<Q", pair[1] % (1 << 64))[:4] + bytes(24)
            ),
        ),
        max_size=6,
    )
)
def test_a_segment_of_anything(parts: list[bytes]) -> None:
    data = layout.SEGMENT_HEAD + b"".join(parts)
    with file_of(data) as fd:
        last = 0
        for found in packed.scan(fd):
            if found is not None:
                assert last <= found.offset < found.end <= len(data) + 7
                last = found.end
                assert len(read_fully(fd, found.data_bytes, found.data_offset)) == found.data_bytes


def test_content_that_looks_like_records_everywhere_costs_no_hours() -> None:
    """Each mark claims a header of nearly 1 MiB, which must be read to be found wrong."""
    mark = layout.LIVE + struct.pack("<I", (1 << 20) - 200)
    # Records begin at multiples of 8, where data begins depends on the header before it.
    payload = mark * 512 + bytes(2 << 20)
    shift = bytes(-record("hostile", payload).index(mark) % 8)
    hostile = bytearray(record("hostile", shift + payload))
    hostile[8] ^= 1  # its own head is damaged, so that the scan looks for the next one
    data = layout.SEGMENT_HEAD + bytes(hostile) + record("good", b"good")
    with file_of(data) as fd:
        assert list(packed.scan(fd)) == [None]
