"""Servers that are not OpenSSH: fewer bytes than asked for, any order, nonsense."""

import contextlib
import hashlib
import random
from pathlib import Path

import pytest

from stagefs.config import SshSettings
from stagefs.errors import (
    InvalidUrl,
    NameExists,
    ObjectChanged,
    ObjectMissing,
    RemoteError,
    RemoteUnavailable,
)
from stagefs.model import (
    MIB,
    Checksum,
    ChecksumKind,
    EntryKind,
    ListedEntry,
    Span,
    WholeObject,
)
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.ssh import SshRemote
from stagefs.remote.url import quote_path
from tests.support.source_file import source_file
from tests.unit.remote_ssh import odd_sftp_server
from tests.unit.remote_ssh.sinks import FileSink, Item


def remote_with(program: Path) -> SshRemote:
    settings = RemoteSettings(ssh=SshSettings(program=str(program), client="openssh"))
    return SshRemote("ssh://odd.example", settings, CredentialStore(None))


@pytest.fixture
async def odd(directory: Path) -> SshRemote:
    return remote_with(odd_sftp_server.program(directory))


def url_of(path: Path) -> str:
    return f"ssh://odd.example{quote_path(str(path))}"


async def test_a_fetch_asks_again_for_what_is_lacking(odd: SshRemote, directory: Path) -> None:
    data = random.Random(1).randbytes(MIB + 12345)
    (directory / "object").write_bytes(data)
    url, span = url_of(directory / "object"), Span(100, MIB)
    info = await odd.stat(url)
    with FileSink(directory / "sink", shift=100) as sink:
        await odd.fetch(url, span, sink=sink, validator=info.validator)
        assert sink.bytes_of(span) == data[100 : 100 + MIB]
    with FileSink(directory / "sink2") as sink, pytest.raises(ObjectChanged):
        await odd.fetch(url, Span(0, 2 * MIB), sink=sink, validator=None)
    await odd.aclose()


@pytest.mark.parametrize("versions_known", [True, False])
async def test_a_batch_asks_again_for_what_is_lacking(
    odd: SshRemote, directory: Path, versions_known: bool
) -> None:
    sizes = [0, 1, 999, 1000, 1001, 5000, 65536]
    items = []
    for size in sizes:
        (directory / str(size)).write_bytes(random.Random(size).randbytes(size))
        url = url_of(directory / str(size))
        items.append(Item(url, (await odd.stat(url)).validator if versions_known else None))
    items.append(Item(url_of(directory / "missing")))
    results = await odd.fetch_batch(items)
    for size, result in zip(sizes, results, strict=False):
        assert isinstance(result, WholeObject), result
        assert result.data == random.Random(size).randbytes(size)
    assert isinstance(results[-1], ObjectMissing)
    await odd.aclose()


async def test_a_listing_without_attributes(odd: SshRemote, directory: Path) -> None:
    for number in range(50):
        (directory / f"file{number}").write_bytes(bytes(number))
    (directory / "sub").mkdir()
    entries: dict[str, ListedEntry] = {}
    async with contextlib.aclosing(odd.list(url_of(directory))) as pages:
        async for page in pages:
            entries |= {entry.name: entry for entry in page}
    assert len(entries) == 52  # the server's own script is there too
    info = entries["file49"].info
    assert info is not None
    assert info.size_bytes == 49
    assert entries["sub"].kind is EntryKind.DIRECTORY
    await odd.aclose()


def script(directory: Path, body: str) -> Path:
    path = directory / "fake-ssh"
    path.write_text(f'#!/bin/sh\nfor word in "$@"; do [ "$word" = -G ] && exit 0; done\n{body}\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("echo Welcome to this machine; cat >/dev/null", RemoteUnavailable, "not SFTP"),
        ("head -c 12 /dev/zero; cat >/dev/null", RemoteUnavailable, "not SFTP"),
        ("exit 0", RemoteUnavailable, "odd.example broke"),
        ("echo 'subsystem request failed on channel 0' >&2; exit 1", RemoteError, "offers no SFTP"),
        ("echo 'Permission denied (publickey).' >&2; exit 255", RemoteError, "refused the login"),
        ("kill -9 $$", RemoteUnavailable, "odd.example broke"),
    ],
)
async def test_clients_that_fail(
    directory: Path, body: str, error: type[Exception], message: str
) -> None:
    remote = remote_with(script(directory, body))
    for _ in range(2):
        with pytest.raises(error, match=message):
            await remote.stat("ssh://odd.example/x")
    await remote.aclose()


async def test_a_client_that_cannot_be_started(directory: Path) -> None:
    for program in (directory / "nowhere", directory):
        remote = remote_with(program)
        with pytest.raises(RemoteError, match="cannot be started"):
            await remote.stat("ssh://odd.example/x")
        await remote.aclose()


async def test_a_server_that_dies_after_its_greeting(directory: Path) -> None:
    """One new session is tried, and then it is the caller's turn."""
    greeting = r"printf '\000\000\000\005\002\000\000\000\003'"
    remote = remote_with(script(directory, f"echo >>{directory}/starts; {greeting}; head -c 15"))
    with pytest.raises(RemoteUnavailable):
        await remote.stat("ssh://odd.example/x")
    assert (directory / "starts").read_text() == "\n\n"
    await remote.aclose()


def test_hosts_and_users_that_look_like_options_are_refused() -> None:
    settings, credentials = RemoteSettings(), CredentialStore(None)
    for url in ("ssh://-oProxyCommand=x", "ssh://-oProxyCommand%3Dx@host"):
        with pytest.raises(InvalidUrl, match="host"):
            SshRemote(url, settings, credentials)


async def put(
    remote: SshRemote, url: str, data: bytes, directory: Path, *, overwrite: bool = False
) -> None:
    checksum = Checksum(ChecksumKind.SHA256, hashlib.sha256(data).hexdigest())
    with source_file(directory / "source", data) as source:
        await remote.put(
            url,
            source=source.fd,
            size_bytes=source.size_bytes,
            overwrite=overwrite,
            checksum=checksum,
            mode=0o640,
            progress=source.progress,
        )


async def test_a_put_without_any_extension(odd: SshRemote, directory: Path) -> None:
    place = directory / "some" / "place"
    url = url_of(place / "output")
    data, other = random.Random(1).randbytes(3 * MIB + 1), random.Random(2).randbytes(3 * MIB + 1)
    await put(odd, url, data, directory)
    assert (place / "output").read_bytes() == data
    assert (place / "output").stat().st_mode & 0o777 == 0o640
    await put(odd, url, data, directory)
    with pytest.raises(NameExists):
        await put(odd, url, other, directory)
    assert (place / "output").read_bytes() == data
    await put(odd, url, other, directory, overwrite=True)
    assert (place / "output").read_bytes() == other
    assert [path.name for path in place.iterdir()] == ["output"]
    await odd.aclose()
