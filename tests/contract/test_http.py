"""The HTTP remote on the many ways a web server can behave."""

import traceback
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import trio

from stagefs.config import HttpSettings
from stagefs.errors import (
    AccessDenied,
    ObjectChanged,
    ObjectMissing,
    RangesRefused,
    RemoteError,
    RemoteUnavailable,
)
from stagefs.model import MIB, Span
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.http import HttpRemote
from stagefs.remote.settings import Environment, RemoteSettings
from stagefs.remote.url import parse
from tests.contract.subjects import SETTINGS, new_place
from tests.contract.test_remote_contract import Item, content, fetched, listed
from tests.support.faultproxy import fault_proxy
from tests.support.nginx import PASSWORD, USER, Asked, Nginx

pytestmark = pytest.mark.timeout(60)


class Web:
    """A directory on nginx, and remotes for it."""

    def __init__(self, server: Nginx) -> None:
        self.server = server
        self.place = new_place()
        self.top = server.root / self.place
        self.top.mkdir()
        self.credentials = CredentialStore(None)
        self.made: list[HttpRemote] = []

    def put(self, name: str, data: bytes, *, location: str = "plain") -> str:
        (self.top / name).write_bytes(data)
        return self.server.url(f"{self.place}/{name}", location=location)

    def put_tls(self, name: str, data: bytes, *, location: str = "plain") -> str:
        (self.top / name).write_bytes(data)
        return self.server.tls_url(f"{self.place}/{name}", location=location)

    def remote(self, url: str, settings: RemoteSettings = SETTINGS) -> HttpRemote:
        self.made.append(HttpRemote(parse(url).host_url, settings, self.credentials))
        return self.made[-1]

    def asked(self, name: str) -> list[Asked]:
        """The requests for one object, whatever the location."""
        return [one for one in self.server.asked() if one.uri.endswith(f"/{self.place}/{name}")]


@pytest.fixture
async def web(nginx: Nginx) -> AsyncIterator[Web]:
    made = Web(nginx)
    yield made
    for remote in made.made:
        await remote.aclose()


async def test_strong_etags_are_asked_for(web: Web, tmp_path: Path) -> None:
    url = web.put("object", b"0123456789")
    remote = web.remote(url)
    info = await remote.stat(url)
    assert info.validator.startswith('etag:"')
    await fetched(remote, url, Span(2, 3), tmp_path / "s", validator=info.validator)
    last = web.asked("object")[-1]
    assert (last.method, last.range, last.encoding) == ("GET", "bytes=2-4", "identity")
    assert last.if_match, "no If-Match was sent"


@pytest.mark.parametrize("location", ["weak", "nameless"])
async def test_without_etags_times_and_sizes_are_compared(
    web: Web, location: str, tmp_path: Path
) -> None:
    url = web.put("object", b"0123456789", location=location)
    remote = web.remote(url)
    info = await remote.stat(url)
    assert info.validator.startswith("modified:")
    got = await fetched(remote, url, Span(2, 3), tmp_path / "s", validator=info.validator)
    assert got == b"234"
    assert not web.asked("object")[-1].if_match
    web.put("object", b"another size")
    with pytest.raises(ObjectChanged):
        await fetched(remote, url, Span(2, 3), tmp_path / "s", validator=info.validator)


async def test_server_without_ranges(web: Web, tmp_path: Path) -> None:
    data = content(3 * MIB)
    url = web.put("object", data, location="whole")
    remote = web.remote(url)
    info = await remote.stat(url)
    assert not info.ranges
    for span in (Span(0, MIB), Span(MIB, MIB), Span(3 * MIB - 1, 1)):
        with pytest.raises(RangesRefused):
            await fetched(remote, url, span, tmp_path / "s", validator=info.validator)
    whole = Span(0, len(data))
    assert await fetched(remote, url, whole, tmp_path / "s", validator=info.validator) == data


async def test_encoded_body_is_refused(web: Web, tmp_path: Path) -> None:
    url = web.put("object", b"0123456789", location="encoded")
    with pytest.raises(RemoteError, match="Content-Encoding 'gzip'"):
        await web.remote(url).stat(url)
    with pytest.raises(RemoteError, match="Content-Encoding 'gzip'"):
        await fetched(web.remote(url), url, Span(0, 10), tmp_path / "s")


async def test_server_that_refuses_head(web: Web) -> None:
    url = web.put("object", b"0123456789", location="nohead")
    info = await web.remote(url).stat(url)
    assert (info.size_bytes, info.ranges) == (10, True)
    assert [(one.method, one.status) for one in web.asked("object")] == [
        ("HEAD", 405),
        ("GET", 206),
    ]


@pytest.mark.parametrize(
    ("location", "error"),
    [
        ("forbidden", AccessDenied),
        ("private", AccessDenied),
        ("gone", ObjectMissing),
        ("teapot", RemoteError),
        ("busy", RemoteUnavailable),
        ("failing", RemoteUnavailable),
    ],
)
async def test_what_refusals_mean(
    web: Web, location: str, error: type[Exception], tmp_path: Path
) -> None:
    url = web.put("object", b"0123456789", location=location)
    remote = web.remote(url)
    for attempt in (remote.stat(url), fetched(remote, url, Span(0, 1), tmp_path / "s")):
        with pytest.raises(error) as caught:
            await attempt
        assert type(caught.value) is error
        assert url in str(caught.value)
    (result,) = await remote.fetch_batch([Item(url)])
    assert type(result) is error


@pytest.mark.parametrize(("location", "wish_s"), [("busy", 7.0), ("limited", 3.0)])
async def test_retry_after_is_told(web: Web, location: str, wish_s: float) -> None:
    url = web.put("object", b"x", location=location)
    with pytest.raises(RemoteUnavailable) as caught:
        await web.remote(url).stat(url)
    assert caught.value.retry_after_s == wish_s


async def test_redirects_are_followed(web: Web, tmp_path: Path) -> None:
    for location in ("moved", "away"):
        url = web.put("object", b"0123456789", location=location)
        remote = web.remote(url)
        info = await remote.stat(url)
        assert (info.url, info.size_bytes) == (url, 10), location
        got = await fetched(remote, url, Span(3, 4), tmp_path / "s", validator=info.validator)
        assert got == b"3456"
    assert {one.port for one in web.asked("object")} == {web.server.port, web.server.other_port}


async def test_redirects_are_remembered_for_one_version(web: Web, tmp_path: Path) -> None:
    url = web.put("object", b"0123456789", location="away")
    remote = web.remote(url)
    info = await remote.stat(url)
    before = len(web.asked("object"))
    for start in range(5):
        got = await fetched(remote, url, Span(start, 1), tmp_path / "s", validator=info.validator)
        assert got == b"0123456789"[start : start + 1]
    statuses = [one.status for one in web.asked("object")[before:]]
    assert statuses == [302, 206, 206, 206, 206, 206]
    web.put("object", b"another version", location="away")
    with pytest.raises(ObjectChanged):
        await fetched(remote, url, Span(0, 1), tmp_path / "s", validator=info.validator)
    assert (await remote.stat(url)).size_bytes == 15


async def test_redirects_have_an_end(web: Web) -> None:
    url = web.put("object", b"x", location="loop")
    with pytest.raises(RemoteError, match="more than 5 times"):
        await web.remote(url).stat(url)


async def test_redirects_to_other_schemes_are_not_followed(web: Web) -> None:
    url = web.put("object", b"x", location="astray")
    with pytest.raises(RemoteError, match="file URL, which is not followed"):
        await web.remote(url).stat(url)


async def test_credentials_stay_with_their_host(web: Web) -> None:
    url = web.put("object", b"x", location="away")
    public = web.credentials.public(url.replace("://", f"://{USER}:{PASSWORD}@"))
    assert (await web.remote(public).stat(public)).size_bytes == 1
    sent = {one.port: bool(one.authorization) for one in web.asked("object")}
    assert sent == {web.server.port: True, web.server.other_port: False}


async def test_password_in_the_url(web: Web, tmp_path: Path) -> None:
    url = web.put("object", b"private", location="private")
    public = web.credentials.public(url.replace("://", f"://{USER}:{PASSWORD}@"))
    assert PASSWORD not in public
    remote = web.remote(public)
    info = await remote.stat(public)
    assert info.url == public
    assert await fetched(remote, public, Span(0, 7), tmp_path / "s") == b"private"
    wrong = web.credentials.public(url.replace("://", f"://{USER}:wrong-pass@"))
    with pytest.raises(AccessDenied) as caught:
        await remote.stat(wrong)
    assert "wrong-pass" not in str(caught.value)


async def test_no_secret_in_the_log(web: Web, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    url = web.put("object", b"x")
    public = web.credentials.public(f"{url}?X-Amz-Signature=S3cret&token=S3cret")
    remote = web.remote(public)
    assert (await remote.stat(public)).size_bytes == 1
    assert web.server.asked()[-1].uri.count("S3cret") == 2
    missing = web.credentials.public(f"{url}-absent?X-Amz-Signature=S3cret")
    with pytest.raises(ObjectMissing) as caught:
        await remote.stat(missing)
    report = "".join(traceback.format_exception(caught.value))
    assert "S3cret" not in report + caplog.text


@pytest.mark.parametrize("with_user", [False, True], ids=["host", "user"])
async def test_netrc(web: Web, with_user: bool, tmp_path: Path) -> None:
    url = web.put("object", b"private", location="private")
    if with_user:
        url = url.replace("://", f"://{USER}@")
    netrc = tmp_path / ".netrc"
    netrc.write_text(f"machine 127.0.0.1 login {USER} password {PASSWORD}\n")
    settings = msgspec.structs.replace(SETTINGS, home=tmp_path)
    assert (await web.remote(url, settings).stat(url)).size_bytes == 7
    unwanted = msgspec.structs.replace(settings, http=HttpSettings(netrc=False))
    with pytest.raises(AccessDenied):
        await web.remote(url, unwanted).stat(url)


async def test_netrc_is_not_sent_to_other_hosts(web: Web, tmp_path: Path) -> None:
    url = web.put("object", b"x")
    (tmp_path / ".netrc").write_text(
        f"machine elsewhere.example login {USER} password {PASSWORD}\n"
        f"default login {USER} password {PASSWORD}\n"
    )
    await web.remote(url, msgspec.structs.replace(SETTINGS, home=tmp_path)).stat(url)
    assert not any(one.authorization for one in web.asked("object"))


async def test_own_certificate_authority(web: Web, tmp_path: Path) -> None:
    url = web.put_tls("object", b"0123456789")
    trusting = msgspec.structs.replace(SETTINGS, http=HttpSettings(ca_file=str(web.server.ca_file)))
    remote = web.remote(url, trusting)
    info = await remote.stat(url)
    got = await fetched(remote, url, Span(1, 2), tmp_path / "s", validator=info.validator)
    assert got == b"12"
    assert set(await listed(remote, web.server.tls_url(web.place))) == {"object"}
    with pytest.raises(RemoteError, match="is not trusted") as caught:
        await web.remote(url).stat(url)
    assert not caught.value.transient


async def test_no_way_down_from_https(web: Web) -> None:
    url = web.put_tls("object", b"x", location="down")
    trusting = msgspec.structs.replace(SETTINGS, http=HttpSettings(ca_file=str(web.server.ca_file)))
    with pytest.raises(RemoteError, match="may lead to https only"):
        await web.remote(url, trusting).stat(url)


async def test_unreadable_certificates(web: Web, tmp_path: Path) -> None:
    url = web.put_tls("object", b"x")
    nothing = msgspec.structs.replace(
        SETTINGS, http=HttpSettings(ca_file=str(tmp_path / "absent.pem"))
    )
    with pytest.raises(RemoteError, match=r"absent\.pem"):
        await web.remote(url, nothing).stat(url)


async def test_proxy_of_the_environment(web: Web) -> None:
    """nginx takes the absolute URL that a proxy gets as its own."""
    url = web.put("object", b"0123456789").replace(
        f"127.0.0.1:{web.server.port}", "data.example.org"
    )
    environment = Environment({"http_proxy": f"http://127.0.0.1:{web.server.port}"})
    proxied = msgspec.structs.replace(SETTINGS, environment=environment)
    assert (await web.remote(url, proxied).stat(url)).size_bytes == 10


async def test_excluded_from_the_proxy(web: Web) -> None:
    url = web.put("object", b"0123456789")
    environment = Environment({"http_proxy": "http://127.0.0.1:1", "no_proxy": "127.0.0.1"})
    direct = msgspec.structs.replace(SETTINGS, environment=environment)
    assert (await web.remote(url, direct).stat(url)).size_bytes == 10


async def test_connections_are_kept(web: Web, tmp_path: Path) -> None:
    data = content(100_000)
    url = web.put("object", data)
    with fault_proxy(web.server.port) as proxy:
        url = url.replace(str(web.server.port), str(proxy.port))
        remote = web.remote(url)
        for start in range(0, 100_000, 10_000):
            await fetched(remote, url, Span(start, 10_000), tmp_path / "s")
        await remote.stat(url)
        assert proxy.connections == 1
        await remote.aclose()


async def test_unlisted_directory(web: Web) -> None:
    web.put("object", b"x")
    url = web.server.url(web.place, location="unlisted")
    with pytest.raises(AccessDenied):
        await listed(web.remote(url), url)


async def test_directory_url_is_no_object(web: Web) -> None:
    url = web.server.url(web.place + "/")
    with pytest.raises(RemoteError, match="directory"):
        await web.remote(url).stat(url)


async def test_cancelled_transfer_ends_at_once(web: Web, tmp_path: Path) -> None:
    """The server would need half a minute for the rest."""
    url = web.put("object", content(8 * MIB), location="slow")
    with trio.fail_after(10), trio.move_on_after(0.3) as scope:
        await fetched(web.remote(url), url, Span(0, 8 * MIB), tmp_path / "s")
    assert scope.cancelled_caught


async def test_slow_transfer_is_no_stall(web: Web, tmp_path: Path) -> None:
    """Bytes that keep coming, however slowly, are progress."""
    data = content(600_000)
    url = web.put("object", data, location="slow")
    hasty = msgspec.structs.replace(SETTINGS, answer_timeout_s=1.5, progress_timeout_s=1.5)
    got = await fetched(web.remote(url, hasty), url, Span(0, len(data)), tmp_path / "s")
    assert got == data
