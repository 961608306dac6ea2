import json
from pathlib import Path

import pytest

from stagefs.errors import AccessDenied, NewerFormat, UnsuitableState
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.url import normalize

SECRET = "S3cr3tS1gnature"


@pytest.mark.parametrize(
    ("url", "public"),
    [
        (f"https://ada:{SECRET}@h/x", "https://ada:***@h/x"),
        (f"ssh://ada:{SECRET}@h/x", "ssh://ada:***@h/x"),
        (f"s3://KEY:{SECRET}@bucket/x", "s3://KEY:***@bucket/x"),
        (f"https://ghp_{SECRET}{SECRET}@h/x", "https://***@h/x"),
        (
            f"https://h/x?versionId=7&X-Amz-Date=20260101&X-Amz-Signature={SECRET}",
            "https://h/x?versionId=7&X-Amz-Date=***&X-Amz-Signature=***",
        ),
        (
            f"https://h/x?Expires=1&Signature={SECRET}&Key-Pair-Id=K",
            "https://h/x?Expires=***&Signature=***&Key-Pair-Id=***",
        ),
        (
            f"https://a.blob.core.windows.net/c/x?sv=2024&se=2026&sig={SECRET}",
            "https://a.blob.core.windows.net/c/x?sv=***&se=***&sig=***",
        ),
    ],
)
def test_secrets_leave_the_url_and_come_back(url: str, public: str) -> None:
    store = CredentialStore(None)
    assert store.public(url) == public
    assert store.public(public) == public, "publishing again changes it"
    assert store.reveal(public) == normalize(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://h/x",
        "https://ada@h/x",
        "https://h/x?expires=never&se=north&policy=strict",
        "https://h/x?q=token",
        "s3://bucket/x?token=1",
        "file:///x?sig=1".replace("?", "%3F"),
    ],
)
def test_what_is_no_secret_stays(url: str) -> None:
    store = CredentialStore(None)
    assert store.public(url) == url
    assert store.reveal(url) == url


@pytest.mark.parametrize("name", ["token", "access_token", "api_key", "apikey", "X-Auth-Token"])
def test_tokens_tell_objects_apart(name: str) -> None:
    """A share link's token may be all that names the object."""
    store = CredentialStore(None)
    one, other = (f"https://h/get?{name}={SECRET}{number}" for number in (1, 2))
    assert store.public(one) != store.public(other)
    assert SECRET not in store.public(one)
    assert store.reveal(store.public(one)) == one
    assert store.reveal(store.public(other)) == other


def test_a_fresh_signature_gives_the_same_public_url() -> None:
    store = CredentialStore(None)
    first = store.public("https://h/x?X-Amz-Date=1&X-Amz-Signature=aaa")
    fresh = "https://h/x?X-Amz-Date=2&X-Amz-Signature=bbb"
    assert store.public(fresh) == first
    assert store.reveal(first) == fresh


def test_a_password_serves_all_urls_of_user_and_host() -> None:
    store = CredentialStore(None)
    store.public(f"https://ada:{SECRET}@h/directory/")
    assert store.reveal("https://ada:***@h/directory/x") == f"https://ada:{SECRET}@h/directory/x"


def test_another_host_gets_no_password() -> None:
    store = CredentialStore(None)
    store.public(f"https://ada:{SECRET}@h/x")
    for url in ("https://ada:***@evil/x", "http://ada:***@h/x", "https://bob:***@h/x"):
        with pytest.raises(AccessDenied) as caught:
            store.reveal(url)
        assert "register the URL again" in str(caught.value)


def test_remembered_across_restarts(tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    token = f"https://h/get?token={SECRET}"
    public = CredentialStore(path).public(f"https://ada:{SECRET}@h/x")
    public_token = CredentialStore(path).public(token)
    again = CredentialStore(path)
    assert again.reveal(public) == f"https://ada:{SECRET}@h/x"
    assert again.public(token) == public_token, "the same token has another public URL now"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["credentials.json"]


def test_many_are_written_once(tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    store = CredentialStore(path)
    urls = [f"https://h/{number}?sig={SECRET}" for number in range(1000)]
    public = store.public_many(urls)
    assert public[7] == "https://h/7?sig=***"
    again = CredentialStore(path)
    assert [again.reveal(url) for url in public] == urls


def test_nothing_is_written_without_secrets(tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    CredentialStore(path).public("https://h/x?q=1")
    assert not path.exists()


def test_newer_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    path.write_text(json.dumps({"version": 2, "salt": "x", "secrets": {}}))
    with pytest.raises(NewerFormat):
        CredentialStore(path)


def test_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    path.write_text(f'{{"version": 1, "{SECRET}')
    with pytest.raises(UnsuitableState) as caught:
        CredentialStore(path)
    assert str(path) in str(caught.value)
    assert SECRET not in str(caught.value)


def test_the_disk_format_is_this_one(tmp_path: Path) -> None:
    """Fails when the format changes without a new version."""
    path = tmp_path / "credentials.json"
    store = CredentialStore(path)
    store.public("https://ada:pw@h/x")
    store.public("https://h/x?sig=1")
    stored = json.loads(path.read_bytes())
    assert stored.pop("salt")
    assert stored == {
        "version": 1,
        "secrets": {"user:https://ada@h": "pw", "query:https://h/x?sig=***": "sig=1"},
    }
