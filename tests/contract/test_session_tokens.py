"""Temporary keys of S3, as Ceph's gateway gives them: with a session token, and for a while."""

import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import msgspec
import pytest
import trio

from stagefs.errors import AccessDenied, CredentialsExpired
from stagefs.model import Span
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.settings import Environment
from stagefs.remote.store import StoreRemote
from tests.contract.subjects import BUCKET, SETTINGS, S3Subject, new_place
from tests.contract.test_remote_contract import listed
from tests.support.rgw import Rgw
from tests.support.sinks import FileSink
from tests.support.waiting import wait_until

DATA = b"0123456789"
LONG_S = 3600


class Item(msgspec.Struct, frozen=True):
    url: str
    validator: str | None = None


@pytest.fixture
async def subject(rgw: Rgw) -> S3Subject:
    return S3Subject(rgw, BUCKET, new_place())


@pytest.fixture(scope="session")
def expired(rgw: Rgw) -> Mapping[str, str]:
    keys = rgw.session_keys(1)
    wait_until(lambda: not rgw.takes(BUCKET, keys), "the gateway to refuse them")
    return keys


class Pilot:
    """A user's files, and a remote that reads them."""

    def __init__(self, rgw: Rgw, directory: Path) -> None:
        self._file = directory / "credentials"
        self._environment = {
            "AWS_ENDPOINT_URL": rgw.endpoint,
            "AWS_SHARED_CREDENTIALS_FILE": str(self._file),
        }

    def has(self, keys: Mapping[str, str]) -> None:
        """Replaced in one step, as those do that renew them."""
        fresh = self._file.with_name("fresh")
        fresh.write_text("\n".join(["[default]", *(f"{k} = {v}" for k, v in keys.items())]))
        fresh.rename(self._file)

    def remote(self) -> StoreRemote:
        environment = Environment(self._environment)
        settings = msgspec.structs.replace(SETTINGS, environment=environment)
        return StoreRemote(f"s3://{BUCKET}", settings, CredentialStore(None))


@pytest.fixture
def pilot(rgw: Rgw, tmp_path: Path) -> Pilot:
    return Pilot(rgw, tmp_path)


async def stat(remote: StoreRemote, url: str) -> None:
    assert (await remote.stat(url)).size_bytes == len(DATA)


async def fetch(remote: StoreRemote, url: str) -> None:
    fd = os.memfd_create("sink")
    try:
        with FileSink(Path(f"/proc/self/fd/{fd}"), 3, shift=2) as sink:
            await remote.fetch(url, Span(2, 3), sink=sink, validator=None)
            assert sink.content() == DATA[2:5]
    finally:
        os.close(fd)


async def fetch_batch(remote: StoreRemote, url: str) -> None:
    for result in await remote.fetch_batch([Item(url), Item(url)]):
        if isinstance(result, Exception):
            raise result
        assert result.data == DATA


async def listing(remote: StoreRemote, url: str) -> None:
    assert list(await listed(remote, url.rpartition("/")[0])) == ["object"]


async def delete(remote: StoreRemote, url: str) -> None:
    await remote.delete(url)


async def put(remote: StoreRemote, url: str) -> None:
    source = os.memfd_create("source")
    try:
        os.pwrite(source, DATA * 2, 0)
        info = await remote.put(
            url,
            source=source,
            size_bytes=2 * len(DATA),
            overwrite=True,
            checksum=None,
            mode=None,
            progress=lambda _: None,
        )
    finally:
        os.close(source)
    assert info.size_bytes == 2 * len(DATA)


ASKED = [stat, fetch, fetch_batch, listing, delete, put]


@pytest.mark.parametrize("ask", ASKED, ids=lambda ask: ask.__name__)
async def test_an_expired_token_is_refused_and_a_renewed_one_taken_at_once(
    subject: S3Subject,
    pilot: Pilot,
    rgw: Rgw,
    expired: Mapping[str, str],
    ask: Callable[[StoreRemote, str], Awaitable[None]],
) -> None:
    url = subject.put("object", DATA)
    remote = pilot.remote()
    pilot.has(expired)
    for _ in range(2):
        with pytest.raises(AccessDenied) as caught:
            await ask(remote, url)
        assert isinstance(caught.value, CredentialsExpired) is (ask is put)
        assert expired["aws_session_token"] not in str(caught.value)
    pilot.has(rgw.session_keys(LONG_S))
    await ask(remote, url)
    await remote.aclose()


async def test_all_that_were_refused_at_a_time_take_the_renewed_token(
    subject: S3Subject, pilot: Pilot, rgw: Rgw, expired: Mapping[str, str]
) -> None:
    url = subject.put("object", DATA)
    remote = pilot.remote()
    pilot.has(expired)
    with pytest.raises(AccessDenied):
        await stat(remote, url)
    pilot.has(rgw.session_keys(LONG_S))
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(fetch, remote, url)
            nursery.start_soon(stat, remote, url)
    await remote.aclose()


async def test_a_token_of_the_environment(subject: S3Subject, rgw: Rgw) -> None:
    url = subject.put("object", DATA)
    environment = {name.upper(): value for name, value in rgw.session_keys(LONG_S).items()}
    settings = msgspec.structs.replace(
        SETTINGS, environment=Environment({**environment, "AWS_ENDPOINT_URL": rgw.endpoint})
    )
    remote = StoreRemote(f"s3://{BUCKET}", settings, CredentialStore(None))
    for ask in (stat, fetch, fetch_batch, listing, put, delete):
        await ask(remote, url)
    await remote.aclose()
