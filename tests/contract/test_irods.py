"""``irods://`` against what a real server was recorded to answer, and against any real server
that IRODS_ENVIRONMENT_FILE names.

No iRODS server can be installed here, so the contract suite cannot run on one: these tests are
of the read path with the unmodified client.
"""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
import trio

from stagefs.config import environment
from stagefs.errors import (
    AccessDenied,
    NotSupported,
    ObjectChanged,
    ObjectMissing,
    RemoteError,
    RemoteUnavailable,
)
from stagefs.model import EntryKind, Span, WholeObject
from stagefs.remote.access import Access
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.irods import IrodsRemote
from stagefs.remote.settings import Environment
from stagefs.remote.url import parse
from tests.contract.subjects import SETTINGS
from tests.contract.test_put import put_bytes
from tests.contract.test_remote_contract import Item, fetched, listed
from tests.support.irods_server import CONTENT, OBJECT, PASSWORD, USER, Irods

pytestmark = [
    pytest.mark.timeout(60),
    # The client's own: it leaves its log files and sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning"),
]
HOME = OBJECT.rpartition("/")[0]


@pytest.fixture
def server() -> Iterator[Irods]:
    irods = Irods()
    yield irods
    irods.stop()
    assert not irods.unknown, (
        f"requests that no real server was recorded to answer: {irods.unknown}"
    )


def urls(server: Irods, credentials: CredentialStore, password: str = PASSWORD) -> str:
    """The public URL of the server's top."""
    given = server.url.replace("://", f"://{USER}:{password}@")
    return credentials.public(f"{given}/x").removesuffix("/x")


@pytest.fixture
async def remote(server: Irods) -> AsyncIterator[tuple[IrodsRemote, str]]:
    credentials = CredentialStore(None)
    top = urls(server, credentials)
    driver = IrodsRemote(server.url, SETTINGS, credentials)
    yield driver, top
    await driver.aclose()


async def test_stat(remote: tuple[IrodsRemote, str]) -> None:
    driver, top = remote
    info = await driver.stat(top + OBJECT)
    assert (info.url, info.size_bytes) == (top + OBJECT, len(CONTENT))
    assert await driver.stat(top + OBJECT) == info
    assert PASSWORD + "@" not in info.url


async def test_spans(remote: tuple[IrodsRemote, str], tmp_path: Path) -> None:
    driver, top = remote
    info = await driver.stat(top + OBJECT)
    for span in (Span(1000, 100), Span(0, len(CONTENT)), Span(len(CONTENT) - 1, 1), Span(0, 0)):
        got = await fetched(driver, top + OBJECT, span, tmp_path / "sink", validator=info.validator)
        assert got == CONTENT[span.start : span.stop], span
    (whole,) = await driver.fetch_batch([Item(top + OBJECT, info.validator)])
    assert isinstance(whole, WholeObject)
    assert whole.data == CONTENT


async def test_another_version_and_another_size(
    remote: tuple[IrodsRemote, str], tmp_path: Path
) -> None:
    driver, top = remote
    for span, validator in ((Span(0, 4), "checksum:other"), (Span(0, len(CONTENT) + 1), None)):
        with pytest.raises(ObjectChanged):
            await fetched(driver, top + OBJECT, span, tmp_path / "sink", validator=validator)


async def test_listing(remote: tuple[IrodsRemote, str]) -> None:
    driver, top = remote
    found = await listed(driver, top + HOME)
    entry = found["rec"]
    assert entry.kind is EntryKind.FILE
    assert entry.info == await driver.stat(top + OBJECT)


async def test_missing_and_directory(remote: tuple[IrodsRemote, str]) -> None:
    driver, top = remote
    with pytest.raises(ObjectMissing) as caught:
        await driver.stat(f"{top}{HOME}/nope")
    assert "/nope" in str(caught.value)
    with pytest.raises(RemoteError, match="is a directory"):
        await driver.stat(top + HOME)


async def test_wrong_password(server: Irods) -> None:
    credentials = CredentialStore(None)
    top = urls(server, credentials, password="b4d-s3cr3t")
    driver = IrodsRemote(server.url, SETTINGS, credentials)
    with pytest.raises(AccessDenied) as caught:
        await driver.stat(top + OBJECT)
    assert "b4d-s3cr3t" not in str(caught.value)
    assert caught.value.__cause__ is None, "the cause's text might quote the login"
    await driver.aclose()


async def test_no_login_and_no_server(tmp_path: Path) -> None:
    settings = msgspec.structs.replace(SETTINGS, home=tmp_path)
    driver = IrodsRemote("irods://127.0.0.1:9", settings, CredentialStore(None))
    with pytest.raises(AccessDenied, match="run iinit"):
        await driver.stat("irods://127.0.0.1:9/zone/x")
    credentials = CredentialStore(None)
    url = credentials.public("irods://rods:rods@127.0.0.1:9/zone/x")
    away = IrodsRemote("irods://127.0.0.1:9", settings, credentials)
    with pytest.raises(RemoteUnavailable):
        await away.stat(url)


async def test_a_resource_and_a_name_of_who_asks_reach_the_server(tmp_path: Path) -> None:
    """Whose recorded session had neither, so it ends there."""
    server = Irods()
    credentials = CredentialStore(None)
    top = urls(server, credentials)
    told = Access(application="stagefs vo=osg")
    for access, sent in ((told, b"stagefs vo=osg"), (Access(resource="osgGroup"), b"osgGroup")):
        credentials.keep_access(parse(top).host_url, access)
        driver = IrodsRemote(parse(top).host_url, SETTINGS, credentials)
        with pytest.raises(RemoteError):
            await fetched(driver, top + OBJECT, Span(0, 16), tmp_path / "sink")
        await driver.aclose()
        assert any(sent in message for message in server.asked), access
    assert any(b"rescName" in message and b"osgGroup" in message for message in server.asked)
    server.stop()


async def test_it_is_read_only(remote: tuple[IrodsRemote, str], tmp_path: Path) -> None:
    driver, top = remote
    with pytest.raises(NotSupported, match="read only"):
        await put_bytes(driver, top + OBJECT, b"x", tmp_path / "source")


@pytest.mark.skipif(
    not environment().get("IRODS_ENVIRONMENT_FILE"), reason="IRODS_ENVIRONMENT_FILE names no server"
)
async def test_a_real_server() -> None:
    """Everything in the user's home is listed and told of in the same way."""
    kept = Environment(dict(environment()))
    settings = msgspec.structs.replace(SETTINGS, environment=kept)
    named = trio.Path(environment()["IRODS_ENVIRONMENT_FILE"])
    login = msgspec.json.decode(await named.read_bytes())
    host = f"irods://{login['irods_host']}:{login.get('irods_port', 1247)}"
    driver = IrodsRemote(host, settings, CredentialStore(None))
    zone, user = login["irods_zone_name"], login["irods_user_name"]
    for entry in (await listed(driver, f"{host}/{zone}/home/{user}")).values():
        if entry.kind is EntryKind.FILE:
            assert entry.info == await driver.stat(entry.url)
    await driver.aclose()
