import pytest

from stagefs.errors import InvalidUrl
from stagefs.remote.url import (
    decode_path,
    is_file_name,
    join,
    last_name,
    normalize,
    parse,
    quote_path,
)


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("HTTP://Data.Example.ORG/x", "http://data.example.org/x"),
        ("http://h:80/x", "http://h/x"),
        ("https://h:443/x", "https://h/x"),
        ("http://h:443/x", "http://h:443/x"),
        ("http://h", "http://h/"),
        ("http://h/a b/ü", "http://h/a%20b/%C3%BC"),
        ("http://h/a%2fb%c3%bc", "http://h/a%2Fb%C3%BC"),
        ("http://h/100%", "http://h/100%25"),
        ("http://h/x?a=1&b=%20 c", "http://h/x?a=1&b=%20%20c"),
        ("http://h//double//slash/", "http://h//double//slash/"),
        ("http://[::1]:8080/x", "http://[::1]:8080/x"),
        ("file:///a//b/", "file:///a/b/"),
        ("file://localhost/x", "file:///x"),
        ("file:///a b#c?d%25", "file:///a%20b%23c%3Fd%25"),
        ("file:///%7euser", "file:///~user"),
        ("ssh://u@Host:22/x", "ssh://u@host:22/x"),
        ("sftp://h/%E9", "sftp://h/%E9"),
        ("ssh://h/~/x", "ssh://h/~/x"),
        ("s3://Bucket/a%20b #?c", "s3://Bucket/a%20b #?c"),
        ("s3://b", "s3://b/"),
        ("s3://b/a//b/", "s3://b/a//b/"),
        ("webdav://H:80/a b", "webdav://h/a%20b"),
        ("webdavs://h/%7euser?x", "webdavs://h/%7Euser?x"),
        ("gs://Bucket/a%20b #?c", "gs://Bucket/a%20b #?c"),
        ("az://Account@Box/a b", "az://Account@Box/a b"),
        ("irods://u@H:1247/zone//x%20y", "irods://u@h:1247/zone/x%20y"),
        ("command://tape/a#b", "command://tape/a%23b"),
        ("fsspec+ftp://H/a b", "fsspec+ftp://h/a%20b"),
        ("fsspec+memory:///a b", "fsspec+memory:///a%20b"),
        ("staging:///a//100% #1", "staging:///a/100% #1"),
        ("staging:///", "staging:///"),
        ("memory://m/x", "memory://m/x"),
    ],
)
def test_one_spelling(given: str, normal: str) -> None:
    assert normalize(given) == normal
    assert normalize(normal) == normal, "normalizing again changes it"


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("data.txt", "not a URL"),
        ("/data.txt", "not a URL"),
        ("http:/h/x", "not a URL"),
        ("gopher://h/x", "'gopher'"),
        ("http:///x", "no valid host"),
        ("http://a b/x", "no valid host"),
        ("http://h:0/x", "between 1 and 65535"),
        ("http://h:70000/x", "between 1 and 65535"),
        ("http://-oProxyCommand=x/y", "no valid host"),
        ("ssh://-oProxyCommand=x/y", "no valid host"),
        ("ssh://h;rm/y", "no valid host"),
        ("http://h?x=1", "no path before its query"),
        ("http://h/x#part", "'#'"),
        ("http://h/a\nb", "line break"),
        ("http://h/a\0b", "NUL"),
        ("http://h/a%00b", "NUL"),
        ("ssh://h/a%00b", "NUL"),
        ("file:///a/../b", "'..'"),
        ("file:///a/./b", "'..'"),
        ("http://h/a/%2E%2e/b", "'..'"),
        ("s3://b/../x", "'..'"),
        ("staging:///..", "'..'"),
        ("file:///a%2Fb", "encoded slash"),
        ("file://host/x", "three slashes"),
        ("staging://dir/x", "three slashes"),
        ("http://h/" + "x" * 20_000, "more than"),
    ],
)
def test_refused(url: str, why: str) -> None:
    with pytest.raises(InvalidUrl) as caught:
        parse(url)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "gopher://me:S3cret@h/x?token=S3cret",
        "http://me:S3cret@h:0/x?sig=S3cret",
        "http://me:S3cret@h/x#?sig=S3cret",
        "file://me:S3cret@h/x",
        "http://me:S3cret@h\n/x?S3cret",
    ],
)
def test_refusals_show_no_secret(url: str) -> None:
    with pytest.raises(InvalidUrl) as caught:
        parse(url)
    assert "S3cret" not in str(caught.value)


def test_parts() -> None:
    url = parse("https://a%40b:p%3Aw@h:8443/x%20y?q=1")
    assert (url.user, url.password, url.host, url.port) == ("a@b", "p:w", "h", 8443)
    assert (url.path, url.query) == ("/x%20y", "q=1")
    assert url.host_url == "https://a%40b@h:8443"
    assert parse("ssh://h/x%20y").path == "/x y"
    assert parse("s3://b/x%20y").path == "x%20y"
    assert parse("file:///%E9").path == "/\udce9"


@pytest.mark.parametrize(
    ("base", "name", "url"),
    [
        ("http://h", "x", "http://h/x"),
        ("http://h/d/", "a b#?%/".rstrip("/"), "http://h/d/a%20b%23%3F%25"),
        ("http://h/d?list=1", "x", "http://h/d/x"),
        ("http://h/d", "\udce9", "http://h/d/%E9"),
        ("ssh://h/d", "new\nline", "ssh://h/d/new%0Aline"),
        ("file:///", "x", "file:///x"),
        ("s3://b", "a%20b", "s3://b/a%20b"),
        ("s3://b/d/", "#", "s3://b/d/#"),
        ("staging:///d", "x", "staging:///d/x"),
    ],
)
def test_join(base: str, name: str, url: str) -> None:
    assert join(base, name) == url
    assert last_name(url) == name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "x" * 256, "é" * 128])
def test_names_that_lead_elsewhere_are_not_joined(name: str) -> None:
    assert not is_file_name(name)
    for base in ("http://h/d", "file:///d", "s3://b/d", "ssh://h/d"):
        with pytest.raises(InvalidUrl):
            join(base, name)


def test_what_a_scheme_cannot_express_is_not_joined() -> None:
    with pytest.raises(InvalidUrl, match="line break"):
        join("s3://b/d", "new\nline")


def test_paths_survive_quoting() -> None:
    for path in ("/a b", "/100%", "/é/\udcff", "/new\nline", "/#?&;"):
        assert decode_path(quote_path(path)) == path
