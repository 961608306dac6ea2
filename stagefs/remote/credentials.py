"""Keeping secrets out of URLs.

A URL may bring a secret along: a password, or a signature or token in its query.  ``public``
takes it out, remembers it, and returns the URL that everything above the drivers sees:
``***`` stands where a secret was.  ``reveal`` puts it back; only drivers call it, for the
request itself, and never let the result into a message.

Two objects must never get the same public URL.  A signature says nothing of which object it
signs, so it becomes ``***`` with all that was signed along with it (dates, expiry), and a
fresh one gives the same public URL.  A token may be all that tells two objects apart (share
links), so it becomes ``***`` and a few digits of a keyed digest.

What is remembered lies in one JSON file (mode 0600, replaced as a whole), so that a restarted
daemon can go on.  A password is kept per user and host, so that it serves every URL below
it; a query is kept per URL, and registering the URL again with a fresh signature replaces it.
What a program said of one host through the control socket (``access``) is kept here too, per host.
Other credentials (agent, netrc, AWS profiles) never pass here.

Writing happens in the trio thread and is short; reading is a dictionary look-up and may
happen in any thread.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from stagefs.errors import AccessDenied, NewerFormat, UnsuitableState
from stagefs.remote.access import Access
from stagefs.remote.url import HIDDEN, HTTP_SCHEMES, RemoteUrl, normalize, parse

FORMAT_VERSION = 1
# A user name this long that comes without a password is a token (as for git hosts).
TOKEN_CHARACTERS_MIN = 20
_SIGNATURE = re.compile(r"(x-(amz|goog)-)?signature|sig", re.IGNORECASE)
# The parameters of S3, GCS, CloudFront and Azure signatures that differ with each signing.
_SIGNED_ALONG = re.compile(
    r"x-(amz|goog)-.*|signature|expires|awsaccesskeyid|googleaccessid|key-pair-id|policy"
    r"|sig|sv|ss|srt|sp|se|st|spr|sr|sip|si|skoid|sktid|skt|ske|sks|skv",
    re.IGNORECASE,
)
_TOKEN = re.compile(
    r"(.*[_-])?(token|secret|password|passwd|pwd|credential|authorization|auth|jwt|signature)"
    r"|(api|access|private|secret)?[_-]?key",
    re.IGNORECASE,
)


class _Stored(msgspec.Struct):
    version: int
    salt: str
    secrets: dict[str, str]


class CredentialStore:
    """The secrets that came in URLs.  ``path`` None keeps them in memory only."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        stored = None if path is None else _load(path)
        if stored is None:
            stored = _Stored(version=FORMAT_VERSION, salt=secrets.token_hex(16), secrets={})
        self._stored = stored
        self._secrets = stored.secrets

    def public(self, url: str) -> str:
        """The URL without secrets, normalized.  Remembers them.  Raises InvalidUrl."""
        public, found = _split(normalize(url), self._stored.salt)
        self._remember(found)
        return public

    def public_many(self, urls: Iterable[str]) -> list[str]:
        """As ``public`` for each, but writes the file once."""
        results: list[str] = []
        found: dict[str, str] = {}
        for url in urls:
            public, found_here = _split(normalize(url), self._stored.salt)
            results.append(public)
            found |= found_here
        self._remember(found)
        return results

    def reveal(self, url: str) -> str:
        """The URL as the request needs it.  Raises AccessDenied when the secret is not known."""
        if HIDDEN not in url:
            return url
        parts = parse(url)
        if parts.user == HIDDEN:
            parts = msgspec.structs.replace(parts, user=self._known(_password_key(parts), url))
        elif parts.password == HIDDEN:
            password = self._known(_password_key(parts), url)
            parts = msgspec.structs.replace(parts, password=password)
        if parts.query is not None and HIDDEN in parts.query:
            parts = msgspec.structs.replace(parts, query=self._known(_query_key(url), url))
        return str(parts)

    def access(self, host_url: str) -> Access:
        """What was said of the host, or nothing."""
        kept = self._secrets.get(_access_key(host_url))
        return Access() if kept is None else msgspec.json.decode(kept, type=Access)

    def keep_access(self, host_url: str, access: Access) -> bool:
        """Whether that is news.  In place of what was said of the host before."""
        if self.access(host_url) == access:
            return False
        self._remember({_access_key(host_url): msgspec.json.encode(access).decode()})
        return True

    def _known(self, key: str, url: str) -> str:
        try:
            return self._secrets[key]
        except KeyError:
            raise AccessDenied(
                f"The secret that belongs to {url} is not known here: register the URL again."
            ) from None

    def _remember(self, found: Mapping[str, str]) -> None:
        if all(self._secrets.get(key) == secret for key, secret in found.items()):
            return
        self._secrets |= found
        if self._path is not None:
            _save(self._path, self._stored)


def _split(url: str, salt: str) -> tuple[str, dict[str, str]]:
    """The public form of a normal URL, and the secrets that were in it by key."""
    if "@" not in url and "?" not in url:
        return url, {}
    parts = parse(url)
    found: dict[str, str] = {}
    query = parts.query
    if parts.password is not None and parts.password != HIDDEN:
        found[_password_key(parts)] = parts.password
        parts = msgspec.structs.replace(parts, password=HIDDEN)
    elif parts.password is None and _is_token(parts):
        hidden = msgspec.structs.replace(parts, user=HIDDEN)
        found[_password_key(hidden)] = parts.user or ""
        parts = hidden
    if query is not None:
        parts = msgspec.structs.replace(parts, query=_public_query(query, salt))
    public = str(parts)
    if query is not None and parts.query != query:
        found[_query_key(public)] = query
    return public, found


def _is_token(parts: RemoteUrl) -> bool:
    return (
        parts.scheme in HTTP_SCHEMES
        and parts.user is not None
        and parts.user != HIDDEN
        and len(parts.user) >= TOKEN_CHARACTERS_MIN
    )


def _public_query(query: str, salt: str) -> str:
    fields = [field.partition("=") for field in query.split("&")]
    signed = any(value and _SIGNATURE.fullmatch(name) for name, _, value in fields)
    public = []
    for name, equals, value in fields:
        shown = value
        if signed and _SIGNED_ALONG.fullmatch(name):
            shown = HIDDEN
        elif value and not value.startswith(HIDDEN) and _TOKEN.fullmatch(name):
            digest = hashlib.blake2b(value.encode(), key=salt.encode(), digest_size=6)
            shown = HIDDEN + digest.hexdigest()
        public.append(name + equals + shown)
    return "&".join(public)


def _password_key(parts: RemoteUrl) -> str:
    return f"user:{parts.host_url}"


def _query_key(public_url: str) -> str:
    return f"query:{public_url}"


def _access_key(host_url: str) -> str:
    return f"access:{host_url}"


def _load(path: Path) -> _Stored | None:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise UnsuitableState(
            f"The credentials file {path} cannot be read ({exc.strerror}): mend its permissions."
        ) from exc
    try:
        stored = msgspec.json.decode(raw, type=_Stored)
    except msgspec.DecodeError as exc:
        raise UnsuitableState(
            f"The credentials file {path} is damaged: remove it and register its URLs again."
        ) from exc
    if stored.version > FORMAT_VERSION:
        raise NewerFormat(
            f"The credentials file {path} has format {stored.version}, this StageFS knows "
            f"{FORMAT_VERSION}: use the newer StageFS."
        )
    return stored


def _save(path: Path, stored: _Stored) -> None:
    """Replace the file as a whole.  The secrets can be given again, but a torn file would stop
    the daemon from starting, so it is synced before it gets its name."""
    temporary = path.with_name(path.name + ".new")
    content = msgspec.json.encode(stored)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(fd)
        temporary.replace(path)
    except OSError as exc:
        raise UnsuitableState(
            f"The credentials file {path} cannot be written ({exc.strerror}): "
            "mend the state directory."
        ) from exc
