"""A real server that wants to be asked less (nginx: 429 and 503 with Retry-After)."""

import msgspec
import pytest

from stagefs.errors import RemoteUnavailable
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.registry import Remotes
from tests.contract.subjects import SETTINGS
from tests.support.nginx import Nginx

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize(("location", "wish_s"), [("limited", 3), ("busy", 7)])
async def test_a_busy_server_is_seen_as_busy_and_left_alone(
    nginx: Nginx, location: str, wish_s: int
) -> None:
    settings = msgspec.structs.replace(SETTINGS, attempts=1, attempts_deadline_s=1.0)
    remotes = Remotes(settings, CredentialStore(None))
    (nginx.root / "x").write_bytes(b"x")
    url = nginx.url("x", location=location)
    with pytest.raises(RemoteUnavailable) as caught:
        await remotes.for_url(url).stat(url)
    assert caught.value.busy
    (status,) = remotes.statuses()
    assert status.state == "busy"
    assert status.allowed == 1
    assert 0 < status.again_in_s <= wish_s
    asked = len(nginx.asked())
    # Another object of the same host: the wish is the server's, not the object's.
    url = nginx.url("x")
    with pytest.raises(RemoteUnavailable, match="as its server wishes"):
        await remotes.for_url(url).stat(url)
    assert len(nginx.asked()) == asked, "it was asked before the time that it wished for"
    await remotes.aclose()


async def test_one_that_only_refuses_is_well(nginx: Nginx) -> None:
    remotes = Remotes(msgspec.structs.replace(SETTINGS, attempts=1), CredentialStore(None))
    for location in ("forbidden", "gone", "teapot"):
        url = nginx.url("x", location=location)
        with pytest.raises(Exception, match=r"HTTP 4") as caught:
            await remotes.for_url(url).stat(url)
        assert not isinstance(caught.value, RemoteUnavailable)
    (status,) = remotes.statuses()
    assert (status.state, status.attempts, status.errors) == ("well", 3, 0)
    await remotes.aclose()
