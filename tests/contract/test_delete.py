"""What every remote that can be written to promises of ``delete``, on a real server each."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from stagefs.errors import (
    AccessDenied,
    InvalidUrl,
    NotSupported,
    ObjectMissing,
    RemoteError,
    RemoteUnavailable,
)
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.http import HttpRemote
from stagefs.remote.url import join
from tests.contract.subjects import SETTINGS, FileSubject, S3Subject, SshSubject, Subject, new_place
from tests.contract.test_put import WRITABLE
from tests.support.faultproxy import fault_proxy
from tests.support.rgw import Rgw
from tests.support.sshd import Login, Sshd, running_sshd

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(params=WRITABLE)
async def subject(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    made: Subject = request.getfixturevalue(f"{request.param}_subject")()
    yield made
    await made.remote.aclose()


async def test_an_object_goes_and_no_other(subject: Subject) -> None:
    url = subject.put("output", b"content")
    subject.put("output2", b"content")
    await subject.remote.delete(url)
    assert subject.names() == {"output2"}
    with pytest.raises(ObjectMissing):
        await subject.remote.stat(url)


async def test_what_is_not_there_is_removed_already(subject: Subject) -> None:
    url = subject.put("output", b"content")
    await subject.remote.delete(url)
    await subject.remote.delete(url)
    await subject.remote.delete(join(join(subject.directory, "nowhere"), "output"))
    assert subject.names() == set()


async def test_odd_names(subject: Subject) -> None:
    for name in subject.odd_names:
        subject.put(name, b"x")
    for name in subject.odd_names:
        await subject.remote.delete(join(subject.directory, name))
        assert name not in subject.names()
    assert subject.names() == set()


async def test_a_directory_stays(subject: Subject) -> None:
    subject.put("directory/object", b"x")
    if not subject.directories_have_errors:
        pytest.skip("this protocol has no directories")
    with pytest.raises(RemoteError) as caught:
        await subject.remote.delete(join(subject.directory, "directory"))
    assert join(subject.directory, "directory") in str(caught.value)
    assert subject.get("directory/object") == b"x"


async def test_a_url_without_a_name(subject: Subject) -> None:
    with pytest.raises(InvalidUrl, match="add a name"):
        await subject.remote.delete(f"{subject.directory}/")


async def test_a_link_goes_and_not_what_it_leads_to(tmp_path: Path) -> None:
    subject = FileSubject(tmp_path)
    subject.put("object", b"content")
    (tmp_path / "link").symlink_to("object")
    await subject.remote.delete(subject.url("link"))
    assert subject.names() == {"object"}


async def test_web_servers_are_read_only() -> None:
    remote = HttpRemote("http://127.0.0.1:9", SETTINGS, CredentialStore(None))
    with pytest.raises(NotSupported, match="read only"):
        await remote.delete("http://127.0.0.1:9/output")
    await remote.aclose()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can have a server run as somebody else")
async def test_permission_lost(work: Path) -> None:
    top = work / "objects"
    top.mkdir()
    (work / "sshd").mkdir()
    with running_sshd(work / "sshd", login=Login.of("nobody")) as sshd:
        subject = SshSubject(sshd, top)
        url = subject.put("output", b"content")
        with pytest.raises(AccessDenied) as caught:
            await subject.remote.delete(url)
        assert url in str(caught.value)
        assert subject.names() == {"output"}
        await subject.remote.aclose()


@pytest.mark.parametrize("kind", ["s3", "ssh"])
async def test_server_that_is_away(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    subject: Subject
    if kind == "s3":
        rgw: Rgw = request.getfixturevalue("rgw")
        with fault_proxy(rgw.port) as proxy:
            subject = S3Subject(rgw, "contract", new_place(), port=proxy.port)
            url = subject.put("output", b"content")
            proxy.refuse()
            with pytest.raises(RemoteUnavailable):
                await subject.remote.delete(url)
            proxy.accept_again()
            await subject.remote.delete(url)
            assert subject.names() == set()
            await subject.remote.aclose()
        return
    sshd: Sshd = request.getfixturevalue("sshd")
    with fault_proxy(sshd.port) as proxy:
        subject = SshSubject(sshd, tmp_path, port=proxy.port)
        url = subject.put("output", b"content")
        proxy.refuse()
        with pytest.raises(RemoteUnavailable):
            await subject.remote.delete(url)
        proxy.accept_again()
        await subject.remote.delete(url)
        assert subject.names() == set()
        await subject.remote.aclose()
