"""The bytes on disk.  When one of these fails, the disk format has changed: raise
``layout.FORMAT``, say in docs what becomes of old caches, and only then change the bytes here.
"""

from pathlib import Path

import xxhash

from stagefs.cache import layout
from stagefs.model import Checksum, ChecksumKind, ObjectId
from tests.unit.cache.filling import CHUNK, begin, fetch, object_file, opened, small

FORMAT = 1
OBJECT_FILE_HASH = "f487e20960c6a455"
SEGMENT_HASH = "287b7f1b7b940350"


def hash_of(data: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(data)


def test_the_format_number_is_the_one_these_bytes_belong_to() -> None:
    assert layout.FORMAT == FORMAT


def test_an_objects_file(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        entry = cache.create(
            ObjectId(url="s3://bucket/ref\udcff.fa", version="etag:abc"),
            size_bytes=2 * CHUNK + 100,
            validator='etag:"abc"',
            mtime_ns=1_600_000_000_123_456_789,
            checksum=Checksum(ChecksumKind.SHA256, "ab" * 32),
        )
        cache.hold(entry)
        fetch(entry, "format", range(0, 3, 2))
        key = entry.key
        cache.drop(entry)
    assert key == "3cdc9e5efea786dd2a47ebcd9bb47314af04371d"
    data = (tmp_path / "c" / "objects" / key[:2] / key).read_bytes()
    assert hash_of(data) == OBJECT_FILE_HASH


def test_a_segment(tmp_path: Path) -> None:
    with opened(tmp_path / "c") as cache:
        cache.store_small([small("one"), small("two", 0), small("three", 5000)])
    assert hash_of((tmp_path / "c" / "segments" / "000001").read_bytes()) == SEGMENT_HASH


def test_the_version_file_and_the_tag(tmp_path: Path) -> None:
    with opened(tmp_path / "c"):
        pass
    assert (tmp_path / "c" / "version").read_text() == "stagefs cache format 1\n"
    tag = (tmp_path / "c" / "CACHEDIR.TAG").read_bytes()
    assert tag.startswith(b"Signature: 8a477f597d28d172789f06886806bc55\n")


def test_a_slot_is_eight_bytes_in_order_of_chunks(tmp_path: Path) -> None:
    """Spelled out, so that the hash above is not all there is."""
    with opened(tmp_path / "c") as cache:
        entry = begin(cache, "slots", 3 * CHUNK)
        cache.hold(entry)
        fetch(entry, "slots", range(1, 2))
        cache.drop(entry)
    data = object_file(tmp_path / "c", "slots").read_bytes()
    slots = data[-40 - 24 : -40]
    middle = xxhash.xxh3_64_intdigest(data[CHUNK : 2 * CHUNK])
    assert slots == bytes(8) + middle.to_bytes(8, "little") + bytes(8)
    assert data[-40:-32] == b"STGFSOBJ"
