"""Service URLs: where a pilot data keeps its units, and what reaches that place.

Pure: nothing is asked.  The keys that a description brings go to the daemon alone, for the host
that they are for (``remote.access``).
"""

import os
import re
from collections.abc import Mapping
from urllib.parse import parse_qs

import msgspec

from stagefs.errors import InvalidUrl
from stagefs.integrations.pilot_data.values import PilotError, Words
from stagefs.remote.access import SSH_SCHEMES, Access
from stagefs.remote.url import (
    BUCKET_SCHEMES,
    SCHEMES,
    WRITABLE_SCHEMES,
    RemoteUrl,
    is_decoded,
    join,
    parse,
    quote_path,
    shown,
)

NO_PLUGIN = "No File Plugin found."
# Keys of descriptions that are never kept with a pilot data.
SECRETS = frozenset({"userkey", "access_key_id", "secret_access_key"})
# Eucalyptus' own, where the URL names no port.
WALRUS_PORT, WALRUS_PATH = 8773, "/services/Walrus"
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class Store(msgspec.Struct, frozen=True):
    """``base`` is the URL below which units lie.  ``access``: how its host is reached, if not as
    the mount's settings say."""

    base: str
    access: Access = Access()

    @property
    def is_writable(self) -> bool:
        return parse(self.base).scheme in WRITABLE_SCHEMES

    def url_of(self, *names: str) -> str:
        url = self.base
        for name in names:
            url = join(url, name)
        return url

    def has(self, url: str) -> bool:
        """Whether an object lies below this pilot data's URL already."""
        return url.startswith(self.base.rstrip("/") + "/")


def store_of(description: Words, environment: Mapping[str, str]) -> Store:
    """Raises PilotError: "No File Plugin found." for a scheme that nothing serves."""
    service_url = str(description["service_url"])
    scheme, _, rest = service_url.partition(":")
    scheme = scheme.lower()
    if scheme not in {*SCHEMES - {"staging"}, "walrus"} and not is_decoded(scheme):
        unknown = PilotError(NO_PLUGIN)
        unknown.add_note(f"{shown(service_url)}: use ssh, s3, walrus, gs, irods, http or file.")
        raise unknown
    if not rest.startswith("//"):
        service_url = f"{scheme}://{rest}"
    try:
        if scheme == "walrus":
            return _walrus(service_url, description)
        if scheme == "irods":
            return _irods(service_url, environment)
        return _plain(service_url, description)
    except InvalidUrl as exc:
        raise PilotError(f"{shown(service_url)} is no place for a pilot data: {exc}") from exc


def _plain(service_url: str, description: Words) -> Store:
    parts = parse(service_url)
    if parts.password is not None:
        raise PilotError(
            f"{shown(service_url)} has a password in it: leave it out, and give a userkey, or"
            " access_key_id and secret_access_key, or what the host's configuration needs."
        )
    if parts.query is not None:
        raise PilotError(f"{shown(service_url)} has a query: a pilot data is a directory.")
    if parts.scheme in SSH_SCHEMES and parts.path == "/":
        # Where a login begins.
        parts = msgspec.structs.replace(parts, path="/~")
    return Store(_bare(parts), _access(parts.scheme, description))


def _walrus(service_url: str, description: Words) -> Store:
    """A bucket of the S3 service at the URL's host: ``walrus://HOST[:PORT]/BUCKET[/PREFIX]``."""
    found = re.fullmatch(r"(?i:walrus)://([^/@?#]+)((?:/[^?#]*)?)", service_url)
    host, path = (found[1], found[2]) if found else ("", "")
    service = ""
    if path.startswith(f"{WALRUS_PATH}/") or ":" not in host:
        service, path = WALRUS_PATH, path.removeprefix(WALRUS_PATH)
    bucket, _, prefix = path.strip("/").partition("/")
    if not bucket:
        raise PilotError(
            f"{shown(service_url)} names no bucket: write walrus://HOST:PORT/BUCKET/PREFIX."
        )
    port = "" if ":" in host else f":{WALRUS_PORT}"
    endpoint = f"http://{parse(f'http://{host}{port}/').authority}{service}"
    access = msgspec.structs.replace(_access("s3", description), endpoint=endpoint)
    return Store(_bare(parse(f"s3://{bucket}/{prefix}")), access)


def _irods(service_url: str, environment: Mapping[str, str]) -> Store:
    """``irods://HOST/${VARIABLE}/PATH/?vo=VO&resource-group=GROUP``.  Where the variable is set the
    collections are mounted here."""
    address, _, query = service_url.partition("?")
    top, slash, path = address.removeprefix("irods://").partition("/")
    used = _VARIABLE.search(path)
    if used is not None:
        if used[1] not in environment:
            raise PilotError(
                f"{shown(service_url)} begins in ${{{used[1]}}}, which is not set here: set it"
                " where the collections are mounted, or write the zone's path."
            )
        local = _VARIABLE.sub(lambda found: environment.get(found[1], ""), path)
        return Store(f"file://{quote_path(os.path.normpath('/' + local.lstrip('/')))}")
    fields = {name: values[-1] for name, values in parse_qs(query).items()}
    vo = fields.get("vo")
    access = Access(
        resource=fields.get("resource-group"),
        application=None if vo is None else f"stagefs vo={vo}",
    )
    return Store(_bare(parse(f"irods://{top}{slash}{path}")), access)


def _bare(parts: RemoteUrl) -> str:
    top = "" if parts.scheme in BUCKET_SCHEMES else "/"
    return str(msgspec.structs.replace(parts, path=parts.path.rstrip("/") or top))


def _access(scheme: str, description: Words) -> Access:
    def word(key: str) -> str | None:
        return str(description[key]) if description.get(key) else None

    if scheme in SSH_SCHEMES and (key := word("userkey")):
        return Access(key_file=os.path.abspath(os.path.expanduser(key)))
    if scheme == "s3":
        return Access(
            access_key_id=word("access_key_id"),
            secret_access_key=word("secret_access_key"),
            region=word("region"),
        )
    return Access()
