"""What every remote that can be written to promises of ``put``, on a real server each."""

import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import xxhash

from stagefs.errors import (
    ChecksumMismatch,
    InvalidUrl,
    NameExists,
    NotSupported,
    RemoteError,
)
from stagefs.model import MIB, Checksum, ChecksumKind, ObjectInfo, Span
from stagefs.remote.base import Remote
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.http import HttpRemote
from stagefs.remote.url import join
from tests.contract.subjects import SETTINGS, Subject
from tests.contract.test_remote_contract import content, fetched
from tests.support.source_file import SourceFile, source_file

pytestmark = pytest.mark.timeout(120)

WRITABLE = ("memory", "file", "s3", "ssh", "paramiko", "webdav", "az", "command")
LARGE_BYTES = 100 * MIB + 17


@pytest.fixture(params=WRITABLE)
async def subject(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    made: Subject = request.getfixturevalue(f"{request.param}_subject")()
    yield made
    await made.remote.aclose()


async def put(
    remote: Remote,
    url: str,
    source: SourceFile,
    *,
    overwrite: bool = False,
    checksum: Checksum | None = None,
    mode: int | None = None,
) -> ObjectInfo:
    return await remote.put(
        url,
        source=source.fd,
        size_bytes=source.size_bytes,
        overwrite=overwrite,
        checksum=checksum,
        mode=mode,
        progress=source.progress,
    )


async def put_bytes(
    remote: Remote,
    url: str,
    data: bytes,
    path: Path,
    *,
    overwrite: bool = False,
    checksum: Checksum | None = None,
) -> ObjectInfo:
    with source_file(path, data) as source:
        return await put(remote, url, source, overwrite=overwrite, checksum=checksum)


def checksums(data: bytes) -> list[Checksum]:
    return [
        Checksum(ChecksumKind.XXH3, xxhash.xxh3_64_hexdigest(data)),
        Checksum(ChecksumKind.SHA256, hashlib.sha256(data).hexdigest()),
        Checksum(ChecksumKind.MD5, hashlib.md5(data).hexdigest()),
    ]


@pytest.mark.parametrize("size_bytes", [0, 1, 32 << 10, MIB, 9 * MIB + 3], ids=str)
async def test_new_object(subject: Subject, size_bytes: int, tmp_path: Path) -> None:
    data = content(size_bytes)
    url = join(subject.directory, "output")
    with source_file(tmp_path / "source", data) as source:
        info = await put(subject.remote, url, source)
    assert subject.get("output") == data
    assert info == await subject.remote.stat(url)
    assert subject.names() == {"output"}, "something else was left in the directory"
    assert source.told == sorted(source.told)
    assert source.told[-1:] == ([size_bytes] if size_bytes else [])
    whole = Span(0, size_bytes)
    sink = tmp_path / "sink"
    assert await fetched(subject.remote, url, whole, sink, validator=info.validator) == data


async def test_large_object(subject: Subject, tmp_path: Path) -> None:
    data = content(LARGE_BYTES)
    url = join(subject.directory, "output")
    info = await put_bytes(subject.remote, url, data, tmp_path / "source")
    assert info.size_bytes == LARGE_BYTES
    assert subject.get("output") == data
    assert subject.names() == {"output"}


async def test_directories_are_made(subject: Subject, tmp_path: Path) -> None:
    url = join(join(join(subject.directory, "some"), "new place"), "output")
    await put_bytes(subject.remote, url, b"content", tmp_path / "source")
    assert subject.get("some/new place/output") == b"content"
    await put_bytes(subject.remote, f"{url}2", b"content 2", tmp_path / "source")
    assert subject.get("some/new place/output2") == b"content 2"


async def test_odd_names(subject: Subject, tmp_path: Path) -> None:
    names = set(subject.odd_names) - subject.misplaced_names
    for name in names:
        data = name.encode("utf-8", "surrogateescape")
        await put_bytes(subject.remote, join(subject.directory, name), data, tmp_path / "source")
        assert subject.get(name) == data
    assert subject.names() == names


async def test_existing_object_is_never_replaced(subject: Subject, tmp_path: Path) -> None:
    for other in (b"mine!", b"somewhat longer"):
        url = subject.put("output", other)
        before = await subject.remote.stat(url)
        with pytest.raises(NameExists) as caught:
            await put_bytes(subject.remote, url, b"yours", tmp_path / "source")
        assert url in str(caught.value)
        assert subject.get("output") == other
        assert await subject.remote.stat(url) == before
        assert subject.names() == {"output"}


@pytest.mark.parametrize("size_bytes", [0, 7, 9 * MIB + 3], ids=str)
async def test_equal_object_is_as_good(subject: Subject, size_bytes: int, tmp_path: Path) -> None:
    """As after a put whose answer was lost."""
    data = content(size_bytes)
    url = join(subject.directory, "output")
    first = await put_bytes(subject.remote, url, data, tmp_path / "source")
    again = await put_bytes(
        subject.remote, url, data, tmp_path / "source", checksum=checksums(data)[0]
    )
    assert again == first, "the object was written once more"


async def test_overwriting(subject: Subject, tmp_path: Path) -> None:
    url = subject.put("output", b"old content")
    before = await subject.remote.stat(url)
    info = await put_bytes(
        subject.remote, url, b"the new content", tmp_path / "source", overwrite=True
    )
    assert subject.get("output") == b"the new content"
    assert info.validator != before.validator
    assert subject.names() == {"output"}
    url = join(subject.directory, "new")
    await put_bytes(subject.remote, url, b"new", tmp_path / "source", overwrite=True)
    assert subject.get("new") == b"new"


async def test_one_of_many_at_once_wins(subject: Subject, tmp_path: Path) -> None:
    """Without ``overwrite``, whoever is second loses, however close."""
    url = join(subject.directory, "output")
    outcomes: dict[int, str] = {}

    async def compete(number: int) -> None:
        try:
            data = bytes([number]) * (MIB + 1)
            await put_bytes(subject.remote, url, data, tmp_path / f"source{number}")
        except NameExists:
            outcomes[number] = "lost"
        else:
            outcomes[number] = "won"

    async with trio.open_nursery() as nursery:
        for number in range(6):
            nursery.start_soon(compete, number)
    assert sorted(outcomes.values()) == ["lost"] * 5 + ["won"]
    winner = next(number for number, outcome in outcomes.items() if outcome == "won")
    assert subject.get("output") == bytes([winner]) * (MIB + 1)
    assert subject.names() == {"output"}


@pytest.mark.parametrize("size_bytes", [100, 9 * MIB], ids=str)
async def test_declared_checksums(subject: Subject, size_bytes: int, tmp_path: Path) -> None:
    data, other = content(size_bytes), content(size_bytes, seed=2)
    url = join(subject.directory, "output")
    for number, checksum in enumerate(checksums(data)):
        await put_bytes(
            subject.remote, f"{url}{number}", data, tmp_path / "source", checksum=checksum
        )
        assert subject.get(f"output{number}") == data
    for checksum in checksums(other):
        with pytest.raises(ChecksumMismatch) as caught:
            await put_bytes(subject.remote, url, data, tmp_path / "source", checksum=checksum)
        assert checksum.digest in str(caught.value)
    assert subject.names() == {"output0", "output1", "output2"}


async def test_source_that_is_shorter_than_declared(subject: Subject, tmp_path: Path) -> None:
    url = join(subject.directory, "output")
    with source_file(tmp_path / "source", content(3 * MIB)) as source:
        source.size_bytes += 1
        with pytest.raises(ChecksumMismatch):
            await put(subject.remote, url, source)
    assert subject.names() == set()


async def test_source_position_does_not_matter(subject: Subject, tmp_path: Path) -> None:
    """The descriptor belongs to the caller, who may be reading it."""
    url = join(subject.directory, "output")
    with source_file(tmp_path / "source", b"content") as source:
        os.lseek(source.fd, 3, os.SEEK_SET)
        await put(subject.remote, url, source)
        assert os.lseek(source.fd, 0, os.SEEK_CUR) == 3
    assert subject.get("output") == b"content"


async def test_a_directory_is_not_replaced(subject: Subject, tmp_path: Path) -> None:
    subject.put("directory/object", b"x")
    if not subject.directories_have_errors:
        pytest.skip("this protocol has no directories")
    for overwrite in (False, True):
        with pytest.raises(RemoteError, match="directory"):
            await put_bytes(
                subject.remote,
                join(subject.directory, "directory"),
                b"content",
                tmp_path / "source",
                overwrite=overwrite,
            )
    assert subject.get("directory/object") == b"x"
    assert subject.names() == {"directory"}


async def test_a_url_without_a_name(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(InvalidUrl, match="add a name"):
        await put_bytes(subject.remote, f"{subject.directory}/", b"x", tmp_path / "source")


async def test_web_servers_are_read_only(tmp_path: Path) -> None:
    remote = HttpRemote("http://127.0.0.1:9", SETTINGS, CredentialStore(None))
    with pytest.raises(NotSupported, match="read only"):
        await put_bytes(remote, "http://127.0.0.1:9/output", b"x", tmp_path / "source")
