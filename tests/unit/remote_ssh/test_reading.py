"""Stat, list, fetch and batches against a real OpenSSH server."""

import contextlib
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from stagefs.errors import ObjectChanged, ObjectMissing, RemoteError
from stagefs.model import MIB, EntryKind, ListedEntry, Span, WholeObject
from stagefs.remote.base import WHOLE_OBJECT_BYTES_MAX
from stagefs.remote.ssh import SshRemote
from tests.support.sshd import Sshd
from tests.unit.remote_ssh.sinks import FileSink, Item

Make = Callable[..., SshRemote]


def random_bytes(count: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(count)


async def everything(remote: SshRemote, url: str) -> dict[str, ListedEntry]:
    async with contextlib.aclosing(remote.list(url)) as pages:
        return {entry.name: entry async for page in pages for entry in page}


async def test_stat_tells_size_time_and_mode(
    server: Sshd, directory: Path, remote_to: Make
) -> None:
    path = directory / "input.dat"
    path.write_bytes(b"x" * 1234)
    path.chmod(0o754)
    os.utime(path, (1_000_000_000, 1_234_567_890))
    found = await remote_to(server).stat(server.url_of(path))
    assert found.size_bytes == 1234
    assert found.validator == "mtime:1234567890:1234"
    assert found.mtime_ns == 1_234_567_890 * 10**9
    assert found.mode == 0o754
    assert found.url == server.url_of(path)


async def test_stat_follows_symbolic_links(server: Sshd, directory: Path, remote_to: Make) -> None:
    (directory / "real").write_bytes(b"12345")
    (directory / "link").symlink_to("real")
    found = await remote_to(server).stat(server.url_of(directory / "link"))
    assert found.size_bytes == 5


@pytest.mark.parametrize("name", ["nothing", "no/such/directory", "dangling"])
async def test_a_missing_file(server: Sshd, directory: Path, remote_to: Make, name: str) -> None:
    (directory / "dangling").symlink_to("nowhere")
    with pytest.raises(ObjectMissing, match=name):
        await remote_to(server).stat(server.url_of(directory / name))


async def test_directories_and_fifos_are_no_objects(
    server: Sshd, directory: Path, remote_to: Make
) -> None:
    remote = remote_to(server)
    with pytest.raises(RemoteError, match="is a directory"):
        await remote.stat(server.url_of(directory))
    os.mkfifo(directory / "fifo")
    with pytest.raises(RemoteError, match="not a regular file"):
        await remote.stat(server.url_of(directory / "fifo"))


async def test_a_path_below_home(server: Sshd, remote_to: Make) -> None:
    # Nothing can be written there: what matters is whose directory is listed.
    home = server.login.home if server.login.home.is_dir() else Path("/")
    listed = await everything(remote_to(server), f"{server.url}/~/")
    assert {name for name, entry in listed.items() if entry.kind is EntryKind.DIRECTORY} == {
        path.name for path in home.iterdir() if path.is_dir()
    }


@pytest.mark.parametrize(
    "name",
    [
        b"plain",
        b"blank and\ttab",
        b"-rf",
        b"$(touch x);`id`",
        b"per%cent%2e?query#fragment",
        b"line\nbreak",
        "Grüße-Ω".encode(),
        b"not-utf8-\xff\xfe",
        b"n" * 255,
    ],
)
async def test_names_of_all_kinds(
    server: Sshd, directory: Path, remote_to: Make, name: bytes
) -> None:
    (directory / os.fsdecode(name)).write_bytes(name)
    remote = remote_to(server)
    entries = await everything(remote, server.url_of(directory))
    assert list(entries) == [os.fsdecode(name)]
    entry = entries[os.fsdecode(name)]
    assert entry.info == await remote.stat(entry.url)
    (whole,) = await remote.fetch_batch([Item(entry.url)])
    assert isinstance(whole, WholeObject)
    assert whole.data == name


async def test_list_leaves_out_what_is_no_file(
    server: Sshd, directory: Path, remote_to: Make
) -> None:
    (directory / "file").write_bytes(b"1")
    (directory / "sub").mkdir()
    (directory / "to-file").symlink_to("file")
    (directory / "to-sub").symlink_to("sub")
    (directory / "dangling").symlink_to("nowhere")
    (directory / "loop").symlink_to("loop")
    os.mkfifo(directory / "fifo")
    entries = await everything(remote_to(server), server.url_of(directory) + "/")
    assert {name: entry.kind for name, entry in entries.items()} == {
        "file": EntryKind.FILE,
        "sub": EntryKind.DIRECTORY,
        "to-file": EntryKind.FILE,
        "to-sub": EntryKind.DIRECTORY,
    }
    info = entries["to-file"].info
    assert info is not None
    assert info.size_bytes == 1
    assert entries["sub"].info is None


async def test_list_of_many_names_comes_in_pages(
    server: Sshd, directory: Path, remote_to: Make
) -> None:
    names = {f"{number:05}-{'x' * 200}" for number in range(3000)}
    for name in names:
        (directory / name).touch()
    remote = remote_to(server)
    assert set(await everything(remote, server.url_of(directory))) == names
    # Leaving early costs nothing later.
    async with contextlib.aclosing(remote.list(server.url_of(directory))) as pages:
        assert len(await anext(pages)) < 3000
    assert set(await everything(remote, server.url_of(directory))) == names


async def test_list_of_nothing(server: Sshd, directory: Path, remote_to: Make) -> None:
    remote = remote_to(server)
    assert await everything(remote, server.url_of(directory)) == {}
    with pytest.raises(ObjectMissing):
        await everything(remote, server.url_of(directory / "nowhere"))
    (directory / "file").touch()
    with pytest.raises(RemoteError):
        await everything(remote, server.url_of(directory / "file"))


@pytest.mark.parametrize(
    ("size", "span"),
    [
        (10 * MIB + 17, Span(0, 10 * MIB + 17)),
        (10 * MIB + 17, Span(10 * MIB, 17)),
        (10 * MIB + 17, Span(3 * MIB + 5, 2 * MIB + 1)),
        (MIB, Span(0, MIB)),
        (1, Span(0, 1)),
        (0, Span(0, 0)),
    ],
)
async def test_fetch_brings_the_span(
    server: Sshd, directory: Path, remote_to: Make, size: int, span: Span
) -> None:
    data = random_bytes(size)
    (directory / "object").write_bytes(data)
    remote, url = remote_to(server), server.url_of(directory / "object")
    info = await remote.stat(url)
    with FileSink(directory / "sink", shift=span.start) as sink:
        assert await remote.fetch(url, span, sink=sink, validator=info.validator) == info
        assert sink.bytes_of(span) == data[span.start : span.stop]
    assert sum(landed.length for landed in sink.spans) == span.length
    assert all(landed.length < 2 * MIB for landed in sink.spans)
    assert (directory / "sink").stat().st_size == span.length


async def test_fetch_without_a_version_tells_it_first(
    server: Sshd, directory: Path, remote_to: Make
) -> None:
    (directory / "object").write_bytes(b"abc")
    remote, url = remote_to(server), server.url_of(directory / "object")
    with FileSink(directory / "sink") as sink:
        info = await remote.fetch(url, Span(0, 3), sink=sink, validator=None)
    assert sink.found == info


async def test_fetch_of_another_version_is_refused(
    server: Sshd, directory: Path, remote_to: Make
) -> None:
    (directory / "object").write_bytes(b"abc")
    remote, url = remote_to(server), server.url_of(directory / "object")
    with FileSink(directory / "sink") as sink:
        with pytest.raises(ObjectChanged):
            await remote.fetch(url, Span(0, 3), sink=sink, validator="mtime:1:3")
        with pytest.raises(ObjectChanged, match="shorter"):
            await remote.fetch(url, Span(0, 4), sink=sink, validator=None)
        assert sink.spans == []


async def test_many_fetches_at_once(server: Sshd, directory: Path, remote_to: Make) -> None:
    remote = remote_to(server)
    contents = {f"object{number}": random_bytes(3 * MIB + number, number) for number in range(20)}
    for name, data in contents.items():
        (directory / name).write_bytes(data)

    async def one(name: str, data: bytes) -> None:
        url, span = server.url_of(directory / name), Span(0, len(data))
        with FileSink(directory / f"sink-{name}") as sink:
            await remote.fetch(url, span, sink=sink, validator=None)
            assert sink.bytes_of(span) == data, name

    async with trio.open_nursery() as nursery:
        for name, data in contents.items():
            nursery.start_soon(one, name, data)


async def test_batch_keeps_the_order_and_has_an_error_for_each(
    server: Sshd, directory: Path, remote_to: Make
) -> None:
    sizes = [0, 1, 4096, WHOLE_OBJECT_BYTES_MAX, WHOLE_OBJECT_BYTES_MAX + 1]
    for size in sizes:
        (directory / str(size)).write_bytes(random_bytes(size, size))
    remote = remote_to(server)
    urls = [server.url_of(directory / str(size)) for size in sizes]
    versions = {url: (await remote.stat(url)).validator for url in urls}
    missing = server.url_of(directory / "missing")
    for known in (True, False):
        items = [
            Item(missing),
            *(Item(url, version if known else None) for url, version in versions.items()),
            Item(server.url_of(directory)),
            Item(urls[2], "mtime:1:4096"),
            Item(urls[2], "etag:something"),
        ]
        results = await remote.fetch_batch(items)
        kinds = [type(result) for result in results]
        assert kinds == [
            ObjectMissing,
            *[WholeObject] * 4,
            ObjectChanged,
            RemoteError,
            ObjectChanged,
            ObjectChanged,
        ]
        for url, size, result in zip(urls[:4], sizes[:4], results[1:5], strict=True):
            assert isinstance(result, WholeObject)
            assert result.data == random_bytes(size, size)
            assert (result.info.url, result.info.validator) == (url, versions[url])


async def test_batches_beyond_every_limit(server: Sshd, directory: Path, remote_to: Make) -> None:
    for number in range(1500):
        (directory / str(number)).write_bytes(random_bytes(number, number))
    remote = remote_to(server)
    items = [Item(server.url_of(directory / str(number))) for number in range(1500)]
    for number, result in enumerate(await remote.fetch_batch(items)):
        assert isinstance(result, WholeObject)
        assert result.data == random_bytes(number, number)
    assert await remote.fetch_batch([]) == []
