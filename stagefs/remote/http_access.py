"""Who a web server is told we are, and the way to it: logins, tokens, proxies, certificates.

Where credentials come from, first found first taken: the URL itself; a bearer token, for the hosts
in ``token_hosts`` and over https only; netrc.  The token is that of ``[remote.http] token_file``,
else it is looked for as the WLCG's "Bearer Token Discovery" says: BEARER_TOKEN,
BEARER_TOKEN_FILE, ``$XDG_RUNTIME_DIR/bt_u$UID``, ``/tmp/bt_u$UID``.  Files are read again for each
request, because pilots renew them in place.  No message holds what was read.
"""

import netrc
import os
import ssl
import stat
from pathlib import Path

import urllib3

from stagefs.errors import AccessDenied, RemoteError
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.url import RemoteUrl

USUAL_DIRECTORY = "/tmp"  # noqa: S108 - the convention's, and only files of our own are read


def authorization(settings: RemoteSettings, target: RemoteUrl) -> dict[str, str]:
    """The Authorization header for a request, or none.  ``target`` has its secrets."""
    user, password = target.user, target.password
    if user is None:
        token = _bearer_token(settings, target)
        if token is not None:
            return {"Authorization": f"Bearer {token}"}
        login = _netrc_login(settings, target.host)
        if login is None:
            return {}
        user, password = login
    elif password is None:
        # A lone user is a name that netrc knows, or a token (as git hosts take it).
        login = _netrc_login(settings, target.host)
        password = login[1] if login is not None and login[0] == user else ""
    return urllib3.make_headers(basic_auth=f"{user}:{password}")


def proxy_of(settings: RemoteSettings, target: RemoteUrl) -> str | None:
    """The proxy that the environment names for a URL."""
    environment = settings.environment
    excluded = environment.get("no_proxy", "NO_PROXY")
    if excluded and names_host(excluded, target.host):
        return None
    # The upper-case HTTP_PROXY is left alone by most programs: a CGI server lets clients set it.
    proxy = environment.get(f"{target.scheme}_proxy")
    if proxy is None and target.scheme == "https":
        proxy = environment.get("HTTPS_PROXY")
    proxy = proxy or environment.get("all_proxy", "ALL_PROXY")
    if proxy is not None and "://" not in proxy:
        proxy = "http://" + proxy
    return proxy


def names_host(names: str, host: str) -> bool:
    """Whether a list separated by commas names the host: ``*``, itself, or a domain it is in."""
    domains = (name.strip().lower().removeprefix("*.").lstrip(".") for name in names.split(","))
    return any(d == "*" or (d and (host == d or host.endswith("." + d))) for d in domains)


def trusting(ca_file: str, setting: str = "[remote.http] ca_file") -> ssl.SSLContext:
    """Trust in the certificates of a file alone.  Raises RemoteError."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as exc:
        raise RemoteError(
            f"The certificates in {ca_file} ({setting}) cannot be read "
            f"({exc.strerror or 'no PEM certificate'}): name a file of PEM certificates."
        ) from exc


def wants_token(settings: RemoteSettings, target: RemoteUrl) -> bool:
    """Whether a host gets the bearer token, when there is one and the URL names no user."""
    hosts = settings.http.token_hosts or ""
    return target.scheme == "https" and target.user is None and names_host(hosts, target.host)


def _bearer_token(settings: RemoteSettings, target: RemoteUrl) -> str | None:
    if not wants_token(settings, target):
        return None
    path = settings.http.token_file
    if path is None:
        token = settings.environment.get("BEARER_TOKEN")
        if token is not None:
            return _whole_token(token.strip(), "variable BEARER_TOKEN", target.host)
        path = settings.environment.get("BEARER_TOKEN_FILE") or _usual_token_file(settings)
    if path is None:
        return None
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise AccessDenied(
            f"The token for {target.host} in {path} cannot be read: renew it, or mend "
            "[remote.http] token_file."
        ) from exc
    return _whole_token(token, f"file {path}", target.host)


def _whole_token(token: str, place: str, host: str) -> str:
    if not token or not token.isprintable() or not token.isascii():
        raise AccessDenied(f"The {place} holds no token for {host}: renew it.")
    return token


def _usual_token_file(settings: RemoteSettings) -> str | None:
    """Where tokens lie by custom.  In /tmp anybody can make a file: only one's own counts."""
    runtime = settings.environment.get("XDG_RUNTIME_DIR")
    for directory in (runtime, USUAL_DIRECTORY):
        path = Path(directory or "/nonexistent") / f"bt_u{os.geteuid()}"
        try:
            found = path.lstat()
        except OSError:
            continue
        if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
            return str(path)
    return None


def _netrc_login(settings: RemoteSettings, host: str) -> tuple[str, str] | None:
    """User and password for this very host; netrc's ``default`` would send a password to any
    server."""
    named = settings.environment.get("NETRC")
    if not settings.http.netrc or not (named or settings.home):
        return None
    path = Path(named) if named else (settings.home or Path()) / ".netrc"
    try:
        entry = netrc.netrc(str(path)).hosts.get(host)
    except FileNotFoundError:
        return None
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError) as exc:
        raise AccessDenied(f"The file {path} cannot be read: mend it or remove it.") from exc
    return None if entry is None else (entry[0], entry[2])
