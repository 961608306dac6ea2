"""The S3 remote on Ceph's gateway, where it goes beyond the contract, and on a sloppy server."""

from collections.abc import Mapping
from pathlib import Path

import msgspec
import pytest
import trio

from stagefs.config import S3Settings
from stagefs.errors import (
    AccessDenied,
    DeadlineExceeded,
    ObjectChanged,
    ObjectMissing,
    RangesRefused,
    RemoteError,
)
from stagefs.model import MIB, EntryKind, Span
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.settings import Environment
from stagefs.remote.store import StoreRemote
from tests.contract.subjects import BUCKET, SETTINGS, S3Subject, new_place
from tests.contract.test_remote_contract import content, fetched, listed
from tests.support.rgw import ACCESS_KEY_ID, SECRET_ACCESS_KEY, Rgw
from tests.support.sloppy_s3 import sloppy_s3

pytestmark = pytest.mark.timeout(60)


def s3_remote(
    environment: Mapping[str, str],
    *,
    bucket: str = BUCKET,
    s3: S3Settings | None = None,
    home: Path | None = None,
) -> StoreRemote:
    settings = msgspec.structs.replace(
        SETTINGS, environment=Environment(environment), s3=s3 or S3Settings(), home=home
    )
    return StoreRemote(f"s3://{bucket}", settings, CredentialStore(None))


@pytest.fixture
async def subject(rgw: Rgw) -> S3Subject:
    return S3Subject(rgw, BUCKET, new_place())


async def test_missing_bucket(rgw: Rgw) -> None:
    remote = s3_remote(rgw.environment, bucket="absent")
    with pytest.raises(ObjectMissing):
        await remote.stat("s3://absent/object")
    with pytest.raises(ObjectMissing):
        await listed(remote, "s3://absent")


async def test_wrong_keys_are_told_without_showing_them(rgw: Rgw, subject: S3Subject) -> None:
    url = subject.put("object", b"x")
    remote = s3_remote({**rgw.environment, "AWS_SECRET_ACCESS_KEY": "Wr0ngS3cret"})
    for ask in (remote.stat(url), listed(remote, subject.directory)):
        with pytest.raises(AccessDenied) as caught:
            await ask
        assert not caught.value.transient
        assert "Wr0ngS3cret" not in str(caught.value)
        assert ACCESS_KEY_ID not in str(caught.value)


async def test_anonymous_is_refused_for_private_objects(rgw: Rgw, subject: S3Subject) -> None:
    url = subject.put("object", b"x")
    remote = s3_remote(rgw.environment, s3=S3Settings(anonymous=True))
    with pytest.raises(AccessDenied):
        await remote.stat(url)


async def test_endpoint_and_profile_from_files(
    rgw: Rgw, subject: S3Subject, tmp_path: Path
) -> None:
    url = subject.put("object", b"0123456789")
    aws = tmp_path / ".aws"
    aws.mkdir()
    (aws / "config").write_text(f"[profile lab]\nendpoint_url = {rgw.endpoint}\n")
    (aws / "credentials").write_text(
        f"[default]\naws_access_key_id = other\naws_secret_access_key = other\n"
        f"[lab]\naws_access_key_id = {ACCESS_KEY_ID}\n"
        f"aws_secret_access_key = {SECRET_ACCESS_KEY}\n"
    )
    assert (await s3_remote({"AWS_PROFILE": "lab"}, home=tmp_path).stat(url)).size_bytes == 10
    by_setting = s3_remote({}, s3=S3Settings(profile="lab"), home=tmp_path)
    assert (await by_setting.stat(url)).size_bytes == 10


async def test_keys_in_the_url(rgw: Rgw, subject: S3Subject) -> None:
    subject.put("object", b"0123456789")
    credentials = CredentialStore(None)
    url = credentials.public(
        f"s3://{ACCESS_KEY_ID}:{SECRET_ACCESS_KEY}@{subject.directory[5:]}/object"
    )
    assert SECRET_ACCESS_KEY not in url
    settings = msgspec.structs.replace(
        SETTINGS, environment=Environment({"AWS_ENDPOINT_URL": rgw.endpoint})
    )
    remote = StoreRemote(f"s3://{ACCESS_KEY_ID}@{BUCKET}", settings, credentials)
    assert (await remote.stat(url)).url == url


async def test_keys_that_name_no_file_are_left_out(rgw: Rgw, subject: S3Subject) -> None:
    place = subject.directory.rpartition("/")[2]
    subject.put("object", b"x")
    # The empty object that consoles make for a directory.
    rgw.put_raw(BUCKET, f"{place}/", b"")
    rgw.put_raw(BUCKET, f"{place}/below/", b"")
    subject.put("below/object", b"x")
    entries = await listed(subject.remote, subject.directory)
    assert {name: entry.kind for name, entry in entries.items()} == {
        "object": EntryKind.FILE,
        "below": EntryKind.DIRECTORY,
    }
    assert set(await listed(subject.remote, entries["below"].url)) == {"object"}


async def test_unusable_keys_further_below_do_not_matter(rgw: Rgw, subject: S3Subject) -> None:
    place = subject.directory.rpartition("/")[2]
    subject.put("object", b"x")
    rgw.put_raw(BUCKET, f"{place}/below/a%0Ab", b"x")
    rgw.put_raw(BUCKET, f"{place}/below//b", b"x")
    assert set(await listed(subject.remote, subject.directory)) == {"object", "below"}
    with pytest.raises(RemoteError, match="stage in the objects by their names"):
        await listed(subject.remote, subject.directory + "/below")


async def test_key_that_cannot_be_asked_for(subject: S3Subject) -> None:
    with pytest.raises(RemoteError, match="empty segments"):
        await subject.remote.stat(subject.directory + "/a//b")


async def test_large_directory_with_directories(subject: S3Subject) -> None:
    """More than a page of files before the first directory."""
    names = {f"a{number:04}" for number in range(1100)} | {f"z{number}" for number in range(3)}
    for name in names:
        subject.put(name, b"")
    subject.put("m/object", b"x")
    assert set(await listed(subject.remote, subject.directory)) == names | {"m"}


async def test_whole_bucket(rgw: Rgw) -> None:
    rgw.make_bucket("whole-bucket")
    rgw.put("whole-bucket", "object", b"x")
    rgw.put("whole-bucket", "below/object", b"x")
    remote = s3_remote(rgw.environment, bucket="whole-bucket")
    for url in ("s3://whole-bucket", "s3://whole-bucket/"):
        assert set(await listed(remote, url)) == {"object", "below"}
    rgw.make_bucket("empty-bucket")
    assert (
        await listed(s3_remote(rgw.environment, bucket="empty-bucket"), "s3://empty-bucket") == {}
    )


async def test_frozen_server(rgw: Rgw, tmp_path: Path) -> None:
    hasty = msgspec.structs.replace(SETTINGS, connect_timeout_s=0.5, answer_timeout_s=0.5)
    subject = S3Subject(rgw, BUCKET, new_place(), settings=hasty)
    url = subject.put("object", b"x")
    await subject.remote.stat(url)
    rgw.freeze()
    try:
        with trio.fail_after(20), pytest.raises(DeadlineExceeded):
            await subject.remote.stat(url)
    finally:
        rgw.thaw()
    assert (await subject.remote.stat(url)).size_bytes == 1


@pytest.mark.parametrize("signed_urls", [True, False], ids=["signed urls", "no signed urls"])
async def test_sloppy_server(tmp_path: Path, *, signed_urls: bool) -> None:
    data = content(2 * MIB)
    with sloppy_s3(signed_urls=signed_urls) as server:
        server.objects[f"/{BUCKET}/object"] = data
        remote = s3_remote(
            {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"},
            s3=S3Settings(endpoint=server.endpoint),
        )
        url = f"s3://{BUCKET}/object"
        info = await remote.stat(url)
        for span in (Span(0, MIB), Span(MIB, MIB), Span(2 * MIB - 1, 1)):
            with pytest.raises(RangesRefused):
                await fetched(remote, url, span, tmp_path / "s", validator=info.validator)
        whole = Span(0, len(data))
        assert await fetched(remote, url, whole, tmp_path / "s", validator=info.validator) == data
        server.objects[f"/{BUCKET}/object"] = content(2 * MIB, seed=2)
        with pytest.raises(ObjectChanged):
            await fetched(remote, url, whole, tmp_path / "s", validator=info.validator)
        assert len(server.requests) > 5


async def test_an_endpoint_without_signed_urls_is_asked_for_one_once(tmp_path: Path) -> None:
    data = content(2 * MIB)
    with sloppy_s3(signed_urls=False) as server:
        server.objects[f"/{BUCKET}/object"] = data
        remote = s3_remote(
            {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"},
            s3=S3Settings(endpoint=server.endpoint),
        )
        url, whole = f"s3://{BUCKET}/object", Span(0, len(data))
        for _ in range(2):
            assert await fetched(remote, url, whole, tmp_path / "s", validator=None) == data
        signed = [path for _method, path in server.requests if "X-Amz-Signature" in path]
        assert len(signed) == 1, server.requests


async def test_public_data_without_keys(tmp_path: Path) -> None:
    data = content(2 * MIB)
    with sloppy_s3() as server:
        server.objects[f"/{BUCKET}/object"] = data
        remote = s3_remote({}, s3=S3Settings(endpoint=server.endpoint, anonymous=True))
        url, whole = f"s3://{BUCKET}/object", Span(0, len(data))
        assert await fetched(remote, url, whole, tmp_path / "s", validator=None) == data
        assert not [path for _method, path in server.requests if "?" in path]


async def test_span_of_an_object_with_an_odd_name(subject: S3Subject, tmp_path: Path) -> None:
    """The signature covers the name as it is spelled in the request."""
    data = content(3 * MIB)
    url = subject.put("a b/\N{LATIN SMALL LETTER U WITH DIAERESIS}+%41=(1).bin", data)
    span = Span(MIB - 1, MIB + 2)
    info = await subject.remote.stat(url)
    got = await fetched(subject.remote, url, span, tmp_path / "s", validator=info.validator)
    assert got == data[span.start : span.stop]
