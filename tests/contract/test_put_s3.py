"""Writing to S3 endpoints that are less than S3."""

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from stagefs.config import S3Settings
from stagefs.errors import AccessDenied, NameExists, RemoteError, RemoteUnavailable
from stagefs.model import MIB
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.retry import RetryingRemote
from stagefs.remote.settings import Environment
from stagefs.remote.store import StoreRemote
from tests.contract.subjects import BUCKET, SETTINGS, S3Subject, new_place
from tests.contract.test_put import put_bytes
from tests.contract.test_remote_contract import content
from tests.support.rgw import ACCESS_KEY_ID, SECRET_ACCESS_KEY, Rgw
from tests.support.sloppy_s3 import SloppyS3, sloppy_s3

pytestmark = pytest.mark.timeout(60)

PATH = f"/{BUCKET}/output"
URL = f"s3:/{PATH}"
KEYS = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}


class Sloppy:
    def __init__(self, server: SloppyS3) -> None:
        self.server = server
        self.remote = self.remote_with(KEYS)

    def remote_with(self, environment: dict[str, str], **s3: object) -> StoreRemote:
        settings = msgspec.structs.replace(
            SETTINGS,
            environment=Environment(environment),
            s3=msgspec.structs.replace(S3Settings(endpoint=self.server.endpoint), **s3),
        )
        return StoreRemote(f"s3://{BUCKET}", settings, CredentialStore(None))

    def changes(self) -> list[str]:
        """What changed something, without upload ids."""
        return [
            f"{method} {path.removeprefix(PATH).replace('&uploadId=one', '')}".strip()
            for method, path in self.server.requests
            if method not in {"GET", "HEAD"}
        ]


@pytest.fixture
async def sloppy() -> AsyncIterator[Sloppy]:
    with sloppy_s3() as server:
        made = Sloppy(server)
        yield made
        await made.remote.aclose()


async def test_server_without_conditions(sloppy: Sloppy, tmp_path: Path) -> None:
    """It is asked whether the object exists, and written to without a condition."""
    for conditions in (True, False):
        sloppy.server.conditions = conditions
        sloppy.server.objects.clear()
        await put_bytes(sloppy.remote, URL, b"content", tmp_path / "source")
        assert sloppy.server.objects == {PATH: b"content"}
        with pytest.raises(NameExists):
            await put_bytes(sloppy.remote, URL, b"another", tmp_path / "source")
        assert sloppy.server.objects == {PATH: b"content"}


async def test_only_the_part_that_failed_is_sent_again(sloppy: Sloppy, tmp_path: Path) -> None:
    data = content(80 * MIB)
    sloppy.server.damages = 1
    await put_bytes(sloppy.remote, URL, data, tmp_path / "source")
    assert sloppy.server.objects == {PATH: data}
    parts = [change for change in sloppy.changes() if "partNumber" in change]
    assert len(parts) == 6
    assert len(set(parts)) == 5


async def test_busy_server(sloppy: Sloppy, tmp_path: Path) -> None:
    sloppy.server.busy = 2
    remote = RetryingRemote(sloppy.remote, SETTINGS)
    await put_bytes(remote, URL, b"content", tmp_path / "source")
    assert sloppy.server.objects == {PATH: b"content"}
    assert sloppy.changes() == ["PUT", "PUT", "PUT"]


async def test_parts_that_are_always_damaged(sloppy: Sloppy, tmp_path: Path) -> None:
    sloppy.server.damages = 1000
    with pytest.raises(RemoteUnavailable, match="damaged"):
        await put_bytes(sloppy.remote, URL, content(40 * MIB), tmp_path / "source")
    assert sloppy.server.objects == {}
    assert sloppy.changes()[-1] == "DELETE ?uploadId=one", "the upload was not aborted"


async def test_without_keys(sloppy: Sloppy, tmp_path: Path) -> None:
    nowhere = {"AWS_EC2_METADATA_SERVICE_ENDPOINT": "http://127.0.0.1:9"}
    remote = sloppy.remote_with(nowhere)
    with pytest.raises(AccessDenied, match="keys") as caught:
        await put_bytes(remote, URL, b"x", tmp_path / "source", overwrite=True)
    assert not caught.value.transient
    anonymous = sloppy.remote_with({}, anonymous=True)
    await put_bytes(anonymous, URL, b"x", tmp_path / "source", overwrite=True)
    assert sloppy.server.objects == {PATH: b"x"}


async def test_keys_of_the_url(rgw: Rgw, tmp_path: Path) -> None:
    subject = S3Subject(rgw, BUCKET, new_place())
    credentials = CredentialStore(None)
    url = credentials.public(
        f"s3://{ACCESS_KEY_ID}:{SECRET_ACCESS_KEY}@{subject.directory[5:]}/output"
    )
    settings = msgspec.structs.replace(
        SETTINGS, environment=Environment({"AWS_ENDPOINT_URL": rgw.endpoint})
    )
    remote = StoreRemote(f"s3://{ACCESS_KEY_ID}@{BUCKET}", settings, credentials)
    await put_bytes(remote, url, b"content", tmp_path / "source")
    assert subject.get("output") == b"content"
    await remote.aclose()


@pytest.mark.parametrize("key", ["a//b", "a\tb"])
async def test_keys_that_could_not_be_read_back(sloppy: Sloppy, key: str, tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match="not supported"):
        await put_bytes(sloppy.remote, f"s3://{BUCKET}/{key}", b"x", tmp_path / "source")
    assert sloppy.server.requests == []


async def test_missing_bucket(rgw: Rgw, tmp_path: Path) -> None:
    subject = S3Subject(rgw, "absent-bucket", "top")
    with pytest.raises(RemoteError, match="bucket"):
        await put_bytes(subject.remote, f"{subject.directory}/x", b"x", tmp_path / "source")
