import base64
import os
from pathlib import Path

import pytest

from stagefs.config import HttpSettings
from stagefs.errors import AccessDenied, RemoteError
from stagefs.remote import http_access
from stagefs.remote.http_access import authorization, names_host, proxy_of, trusting
from stagefs.remote.settings import Environment, RemoteSettings
from stagefs.remote.url import parse


@pytest.fixture
def settings(tmp_path: Path) -> RemoteSettings:
    (tmp_path / "token").write_text("t0ken\n")
    (tmp_path / ".netrc").write_text("machine h.example login ada password pw\n")
    return RemoteSettings(
        home=tmp_path,
        http=HttpSettings(
            token_file=str(tmp_path / "token"), token_hosts="data.example, *.lab.example"
        ),
    )


def sent(settings: RemoteSettings, url: str) -> str:
    """The Authorization header, decoded."""
    header = next(iter(authorization(settings, parse(url)).values()), "")
    kind, _, value = header.partition(" ")
    return base64.b64decode(value).decode() if kind == "Basic" else header


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://data.example/x", "Bearer t0ken"),
        ("https://deep.data.example/x", "Bearer t0ken"),
        ("https://node1.lab.example:8443/x", "Bearer t0ken"),
        ("http://data.example/x", ""),
        ("https://otherdata.example/x", ""),
        ("https://data.example.evil/x", ""),
        ("https://bob:b0b@data.example/x", "bob:b0b"),
        ("https://h.example/x", "ada:pw"),
        ("https://ada@h.example/x", "ada:pw"),
        ("https://bob@h.example/x", "bob:"),
        ("https://other.example/x", ""),
    ],
)
def test_who_we_are(settings: RemoteSettings, url: str, expected: str) -> None:
    assert sent(settings, url) == expected


def test_token_file_of_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("first")
    settings = RemoteSettings(
        environment=Environment({"BEARER_TOKEN_FILE": str(path)}),
        http=HttpSettings(token_hosts="*"),
    )
    assert sent(settings, "https://h/x") == "Bearer first"
    path.write_text("renewed")
    assert sent(settings, "https://h/x") == "Bearer renewed"


def test_tokens_are_found_where_they_lie_by_custom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"bt_u{os.geteuid()}"
    last = tmp_path / "tmp"
    runtime = tmp_path / "run"
    for directory in (last, runtime):
        directory.mkdir()
    monkeypatch.setattr(http_access, "USUAL_DIRECTORY", str(last))

    def token(**variables: str) -> str:
        environment = Environment({"XDG_RUNTIME_DIR": str(runtime), **variables})
        settings = RemoteSettings(environment=environment, http=HttpSettings(token_hosts="h"))
        return sent(settings, "https://h/x")

    assert token() == ""
    (last / name).symlink_to("/etc/hostname")
    assert token() == "", "a link that anybody may have made was followed"
    (last / name).unlink()
    (last / name).write_text("in-tmp\n")
    assert token() == "Bearer in-tmp"
    (runtime / name).write_text("in-runtime\n")
    assert token() == "Bearer in-runtime"
    (tmp_path / "file").write_text("named")
    assert token(BEARER_TOKEN_FILE=str(tmp_path / "file")) == "Bearer named"
    assert token(BEARER_TOKEN_FILE=str(tmp_path / "file"), BEARER_TOKEN="set") == "Bearer set"
    with pytest.raises(AccessDenied, match="BEARER_TOKEN holds no token") as caught:
        token(BEARER_TOKEN="s3cret\nline")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"two\nlines", b"\xff"])
def test_unusable_tokens_are_told(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    settings = RemoteSettings(http=HttpSettings(token_file=str(path), token_hosts="h"))
    with pytest.raises(AccessDenied) as caught:
        authorization(settings, parse("https://h/x"))
    assert str(path) in str(caught.value)


def test_broken_netrc_is_told_without_its_content(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine h login ada passwort S3cret\n")
    with pytest.raises(AccessDenied) as caught:
        authorization(RemoteSettings(home=tmp_path), parse("https://h/x"))
    assert "S3cret" not in str(caught.value)


def test_named_netrc(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("machine h login ada password pw\n")
    settings = RemoteSettings(environment=Environment({"NETRC": str(tmp_path / "mine")}))
    assert sent(settings, "https://h/x") == "ada:pw"


@pytest.mark.parametrize(
    ("environment", "url", "proxy"),
    [
        ({}, "http://h/x", None),
        ({"http_proxy": "http://p:3128"}, "http://h/x", "http://p:3128"),
        ({"http_proxy": "p:3128"}, "http://h/x", "http://p:3128"),
        ({"http_proxy": "http://p:3128"}, "https://h/x", None),
        ({"HTTP_PROXY": "http://p:3128"}, "http://h/x", None),
        ({"HTTPS_PROXY": "http://p:3128"}, "https://h/x", "http://p:3128"),
        ({"all_proxy": "http://p:1"}, "http://h/x", "http://p:1"),
        ({"all_proxy": "http://p:1", "no_proxy": "a, .example"}, "http://h.example/x", None),
        ({"all_proxy": "http://p:1", "NO_PROXY": "*"}, "http://h/x", None),
        ({"all_proxy": "http://p:1", "no_proxy": "xample"}, "http://example/x", "http://p:1"),
    ],
)
def test_proxies(environment: dict[str, str], url: str, proxy: str | None) -> None:
    assert proxy_of(RemoteSettings(environment=Environment(environment)), parse(url)) == proxy


def test_no_list_names_no_host() -> None:
    assert not names_host("", "h")
    assert not names_host(" , ", "h")


def test_certificates_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    path.write_text("no certificate")
    with pytest.raises(RemoteError, match=r"ca\.pem"):
        trusting(str(path))
