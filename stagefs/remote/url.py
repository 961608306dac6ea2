"""URLs: reading, refusing, normalizing and joining them.

Every URL that enters StageFS passes ``normalize``, so that one object has one spelling.
What a character means depends on the scheme:

* ``http``, ``https``, ``webdav``, ``webdavs``: as in RFC 3986.  The path stays percent-encoded as
  it was given; ``?`` starts the query; ``#`` is refused, because a server never sees what follows.
* ``file``, ``ssh``, ``sftp``, ``irods``, ``command``, ``memory``, ``fsspec+<protocol>`` and the
  schemes of plug-ins: the path is percent-decoded (``%20`` is a blank, ``%25`` a percent sign);
  ``?`` and ``#`` are ordinary characters.
* ``s3``, ``gs``, ``az``, ``staging``: the path is taken literally, as the S3 tools do; ``%``, ``?``
  and ``#`` are ordinary characters.

Blanks and characters beyond ASCII may be written as they are.  NUL, line breaks and the
segments ``.`` and ``..`` are refused, encoded or not: no URL leads out of the directory that
it names.  Functions on text; no host is looked up, but an unknown scheme may be a plug-in's.
Messages never show a password or a query.
"""

import re
from urllib.parse import quote, unquote_to_bytes

import msgspec

from stagefs.errors import InvalidUrl, NotSupported
from stagefs.remote import plugins

HTTP_SCHEMES = frozenset({"http", "https", "webdav", "webdavs"})
DECODED_SCHEMES = frozenset({"file", "ssh", "sftp", "irods", "command", "memory"})
# The host is a bucket or container, the path a key.
BUCKET_SCHEMES = frozenset({"s3", "gs", "az"})
LITERAL_SCHEMES = BUCKET_SCHEMES | {"staging"}
SCHEMES = HTTP_SCHEMES | DECODED_SCHEMES | LITERAL_SCHEMES
LOCAL_SCHEMES = frozenset({"file", "staging"})
# Where ``put`` is served.
WRITABLE_SCHEMES = frozenset(
    {"az", "command", "file", "gs", "memory", "s3", "sftp", "ssh", "webdav", "webdavs"}
)
# Any protocol that fsspec knows: ``fsspec+ftp://host/path``.
FSSPEC = "fsspec+"

URL_CHARACTERS_MAX = 16 << 10
NAME_BYTES_MAX = 255
# What stands in a public URL where a secret was.
HIDDEN = "***"

# Most URLs of a catalog of a million are of this kind and already normal.
_PLAIN = re.compile(
    r"https?://[a-z0-9][a-z0-9.-]*(?::(?!80/|443/)[1-9][0-9]{1,3})?"
    r"(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)+"
)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_FORBIDDEN = re.compile(r"[\0\r\n]")
_BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}")
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")
_SECRETS = re.compile(r"(://)[^/@]*@|[?].*", re.DOTALL)
_PATH_SAFE = "/~!$&'()*+,;=:@"
_QUERY_SAFE = "%/?~!$&'()*+,;=:@[]{}|^`\\"


# What authorities without a password mean: many URLs have few hosts.
_HOSTS_MAX = 256
_hosts: dict[tuple[str, str], tuple[str | None, str | None, str, int | None]] = {}


class RemoteUrl(msgspec.Struct, frozen=True, kw_only=True):
    """A URL in its parts.

    ``path`` is decoded text (``surrogateescape`` for bytes that are not UTF-8); of http URLs
    it is the encoded path as it goes over the wire.  It begins with ``/`` except for s3, gs
    and az, where it is the key and may be empty.  ``host`` is the bucket there, the store's name
    of memory and the programs' of command; empty for file and staging.
    """

    scheme: str
    host: str
    path: str
    port: int | None = None
    user: str | None = None
    password: str | None = None
    query: str | None = None

    @property
    def authority(self) -> str:
        """``host`` or ``host:port``, without user."""
        return self.host if self.port is None else f"{self.host}:{self.port}"

    @property
    def host_url(self) -> str:
        """Scheme, user and host: what one connection serves.  No password, no path."""
        user = "" if self.user is None else quote(self.user, safe="*") + "@"
        return f"{self.scheme}://{user}{self.authority}"

    def __str__(self) -> str:
        user = "" if self.user is None else quote(self.user, safe="*")
        if self.password is not None:
            user += ":" + quote(self.password, safe="*")
        at = "@" if self.user is not None or self.password is not None else ""
        path = quote_path(self.path) if is_decoded(self.scheme) else self.path
        slash = "/" if self.scheme in BUCKET_SCHEMES else ""
        query = "" if self.query is None else "?" + self.query
        return f"{self.scheme}://{user}{at}{self.authority}{slash}{path}{query}"


def parse(text: str) -> RemoteUrl:
    """The parts of a URL, checked and normal.  Raises InvalidUrl."""
    if len(text) > URL_CHARACTERS_MAX:
        raise InvalidUrl(
            f"The URL {shown(text)[:80]}... has more than {URL_CHARACTERS_MAX} characters."
        )
    if not has_bytes(text):
        raise InvalidUrl(f"The URL {shown(text)!r} holds characters that are no text.")
    match = _SCHEME.fullmatch(text)
    if match is None:
        raise InvalidUrl(f"{shown(text)!r} is not a URL: write it as scheme://host/path.")
    scheme, rest = match[1].lower(), match[2]
    if scheme not in SCHEMES and not is_decoded(scheme):
        known = ", ".join(sorted({*SCHEMES, *plugins.schemes(), f"{FSSPEC}<protocol>"}))
        raise InvalidUrl(
            f"The scheme {scheme!r} of {shown(text)!r} is not known: use one of {known}."
        )
    if _FORBIDDEN.search(text):
        raise InvalidUrl(
            f"The URL {shown(text)!r} holds a NUL or a line break: write it percent-encoded "
            "where the scheme allows that."
        )
    authority, slash, path = rest.partition("/")
    if scheme in HTTP_SCHEMES and not slash and "?" in authority:
        raise InvalidUrl(f"The URL {shown(text)!r} has no path before its query: add a '/'.")
    user, password, host, port = _authority(scheme, authority, text)
    path, query = _path(scheme, slash + path, text)
    return RemoteUrl(
        scheme=scheme, host=host, port=port, user=user, password=password, path=path, query=query
    )


def normalize(text: str) -> str:
    """The one spelling of a URL.  Secrets stay in it (see ``credentials``).  Raises InvalidUrl."""
    if _PLAIN.fullmatch(text) and len(text) <= URL_CHARACTERS_MAX:
        return text
    return str(parse(text))


def join(base: str, name: str) -> str:
    """The URL of the entry ``name`` (decoded, one path component) of the directory ``base``.

    Raises InvalidUrl for a name that is no file name or that the scheme cannot express.
    """
    if not is_file_name(name):
        raise InvalidUrl(f"{name!r} cannot be the name of an entry of {shown(base)!r}.")
    url = parse(base)
    if url.scheme in BUCKET_SCHEMES:
        prefix = url.path if not url.path or url.path.endswith("/") else url.path + "/"
    else:
        prefix = url.path.rstrip("/") + "/"
    if url.scheme in HTTP_SCHEMES:
        name = quote_path(name)
    elif url.scheme in LITERAL_SCHEMES and _FORBIDDEN.search(name):
        raise InvalidUrl(f"The name {name!r} holds a line break, which {url.scheme} URLs cannot.")
    return str(msgspec.structs.replace(url, path=prefix + name, query=None))


def last_name(text: str) -> str:
    """The decoded last component of the path; empty when there is none."""
    url = parse(text)
    name = url.path.rstrip("/").rpartition("/")[2]
    return decode_path(name) if url.scheme in HTTP_SCHEMES else name


def is_decoded(scheme: str) -> bool:
    """Whether the scheme is known and its paths are percent-decoded."""
    if scheme in SCHEMES:
        return scheme in DECODED_SCHEMES
    return scheme.startswith(FSSPEC) or scheme in plugins.schemes()


def check_writable(text: str) -> None:
    """Whether outputs can be sent to a URL, as far as the URL tells: asked early, so that no
    task runs for a result that has nowhere to go.  Raises InvalidUrl, NotSupported."""
    scheme = parse(text).scheme
    # Of a plug-in only its ``put`` can tell.
    if scheme not in WRITABLE_SCHEMES and scheme not in plugins.schemes():
        raise NotSupported(
            f"{shown(text)} cannot be written to: {scheme} remotes are read only; "
            "name a file, ssh, s3, gs, az, webdav or command URL."
        )


def name_to_write(text: str) -> str:
    """The name of the object that a put is to make.  Raises InvalidUrl when there is none."""
    name = "" if text.endswith("/") else last_name(text)
    if not name:
        raise InvalidUrl(f"{shown(text)} names no file to write: add a name to the directory.")
    return name


def quote_path(path: str) -> str:
    """A path as the URLs of ``file``, ``ssh`` and ``http`` spell it."""
    return quote(path.encode("utf-8", "surrogateescape"), safe=_PATH_SAFE)


def decode_path(encoded: str) -> str:
    """The inverse of ``quote_path``; takes unencoded characters too."""
    raw = unquote_to_bytes(encoded.encode("utf-8", "surrogateescape"))
    return raw.decode("utf-8", "surrogateescape")


def is_file_name(name: str) -> bool:
    """Whether a name can stand in a directory: one component of 1 to 255 bytes."""
    if name in {"", ".", ".."} or "/" in name or "\0" in name:
        return False
    return has_bytes(name) and len(name.encode("utf-8", "surrogateescape")) <= NAME_BYTES_MAX


def has_bytes(text: str) -> bool:
    """False for half a surrogate pair, as JSON's escapes can write it: it is no character, and
    unlike the surrogates of ``surrogateescape`` it stands for no byte either."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def shown(text: str) -> str:
    """A URL, maybe a wrong one, as it may appear in a message: without userinfo and query."""
    return _SECRETS.sub(lambda found: found[1] or "?" + HIDDEN, text)


def _authority(
    scheme: str, authority: str, text: str
) -> tuple[str | None, str | None, str, int | None]:
    known = _hosts.get((scheme, authority))
    if known is not None:
        return known
    parts = _new_authority(scheme, authority, text)
    if parts[1] is None:
        if len(_hosts) >= _HOSTS_MAX:
            _hosts.clear()
        _hosts[scheme, authority] = parts
    return parts


def _new_authority(
    scheme: str, authority: str, text: str
) -> tuple[str | None, str | None, str, int | None]:
    userinfo, at, host = authority.rpartition("@")
    if scheme in LOCAL_SCHEMES:
        if at or (host and (scheme, host) != ("file", "localhost")):
            raise InvalidUrl(
                f"The URL {shown(text)!r} names a host: write {scheme}:///path with three slashes."
            )
        return None, None, "", None
    user, colon, password = userinfo.partition(":")
    if not authority and scheme.startswith(FSSPEC):
        # Some of its protocols have no hosts.
        return None, None, "", None
    host, port = _host_and_port(host, text)
    if scheme not in BUCKET_SCHEMES:
        host = host.lower()
    default_port = {"http": 80, "https": 443, "webdav": 80, "webdavs": 443}.get(scheme)
    return (
        _decoded_user(user, text) if at else None,
        _decoded_user(password, text) if colon else None,
        host,
        None if port == default_port else port,
    )


def _decoded_user(part: str, text: str) -> str:
    decoded = decode_path(part)
    if not decoded.isprintable():
        raise InvalidUrl(f"The user of the URL {shown(text)!r} holds unprintable characters.")
    return decoded


def _host_and_port(host: str, text: str) -> tuple[str, int | None]:
    port = None
    if match := re.fullmatch(r"(.*[^:]|\[.*\]):([0-9]{0,6})", host):
        host = match[1]
        port = int(match[2]) if match[2] else None
        if port is not None and not 0 < port < 1 << 16:
            raise InvalidUrl(f"The port of the URL {shown(text)!r} is not between 1 and 65535.")
    if not _HOST.fullmatch(host) or host.startswith("-"):
        raise InvalidUrl(
            f"The URL {shown(text)!r} names no valid host: use letters, digits, '.', '-' and '_', "
            "or an IPv6 address in brackets."
        )
    return host, port


def _path(scheme: str, path: str, text: str) -> tuple[str, str | None]:
    query = None
    if scheme in HTTP_SCHEMES:
        if "#" in path:
            raise InvalidUrl(
                f"The URL {shown(text)!r} holds a '#', which no server would see: write %23."
            )
        path, mark, tail = path.partition("?")
        query = quote(tail.encode("utf-8", "surrogateescape"), safe=_QUERY_SAFE) if mark else None
        path = _encoded(path or "/")
        decoded = decode_path(path)
    else:
        if is_decoded(scheme) and ("%" in path or not path.isascii()):
            path = _decoded(path, text)
        if scheme in BUCKET_SCHEMES:
            path = path[1:]
        elif "//" in path or not path:
            path = re.sub("/+", "/", path) or "/"
        decoded = path
    segments = decoded.split("/")
    if "." in segments or ".." in segments:
        raise InvalidUrl(
            f"The path of the URL {shown(text)!r} holds '.' or '..': write it without them."
        )
    if "\0" in decoded:
        raise InvalidUrl(f"The path of the URL {shown(text)!r} holds an encoded NUL.")
    return path, query


def _encoded(path: str) -> str:
    """An http path with everything encoded that must be, and escapes in upper case."""
    path = _BROKEN_ESCAPE.sub("%25", path)
    path = quote(path.encode("utf-8", "surrogateescape"), safe=_PATH_SAFE + "%")
    return _ESCAPE.sub(lambda escape: escape[0].upper(), path)


def _decoded(path: str, text: str) -> str:
    if "%2f" in path.lower():
        raise InvalidUrl(
            f"The path of the URL {shown(text)!r} holds an encoded slash, which no file name can."
        )
    return decode_path(path)
