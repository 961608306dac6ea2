import stat
from pathlib import Path

import pytest

from stagefs.config import S3Settings
from stagefs.errors import InvalidUrl
from stagefs.remote.access import Access
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.memory import MemoryRemote
from stagefs.remote.registry import Remotes
from stagefs.remote.settings import RemoteSettings

KEYS = Access(access_key_id="K3Y", secret_access_key="S3CR3T", endpoint="http://host:7480")


def test_access_outlives_the_daemon_and_is_shown_to_nobody(tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    store = CredentialStore(path)
    assert store.keep_access("s3://bucket", KEYS)
    assert not store.keep_access("s3://bucket", KEYS), "the same again is news"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = CredentialStore(path)
    assert again.access("s3://bucket") == KEYS
    assert again.access("s3://other") == Access()
    assert "S3CR3T" not in repr(KEYS) + str(KEYS)


def test_it_comes_before_the_settings() -> None:
    settings = RemoteSettings(s3=S3Settings(endpoint="http://mount", region="r", anonymous=True))
    applied = KEYS.applied(settings).s3
    assert applied.endpoint == "http://host:7480"
    assert applied.region == "r"
    assert not applied.anonymous, "keys were given, and would not be used"
    assert Access().applied(settings) == settings


@pytest.mark.parametrize(
    ("url", "access"),
    [
        ("https://host/x", KEYS),
        ("s3://bucket/x", Access(key_file="/k")),
        ("ssh://host/x", Access(resource="r")),
        ("s3://bucket/x", Access(access_key_id="K3Y")),
    ],
)
async def test_what_means_nothing_there_is_refused(url: str, access: Access) -> None:
    with pytest.raises(InvalidUrl) as refused:
        Remotes(RemoteSettings(), CredentialStore(None)).set_access(url, access)
    assert "S3CR3T" not in str(refused.value)


async def test_a_remote_in_use_is_made_anew(autojump_clock: object) -> None:
    made: list[RemoteSettings] = []

    def driver(
        host_url: str, settings: RemoteSettings, credentials: CredentialStore
    ) -> MemoryRemote:
        made.append(settings)
        return MemoryRemote(host_url)

    remotes = Remotes(RemoteSettings(), CredentialStore(None), drivers={"s3": driver})
    first = remotes.for_url("s3://bucket/x")
    remotes.set_access("s3://bucket/y", KEYS)
    assert remotes.for_url("s3://bucket/x") is not first
    remotes.set_access("s3://bucket/z", KEYS)
    remotes.for_url("s3://bucket/x")
    assert [settings.s3.endpoint for settings in made] == [None, "http://host:7480"]
