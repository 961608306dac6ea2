"""scp's words: what its sources, destinations and options mean to ``stagefs copy``.

A word with ``://`` is a URL; ``[user@]host:path`` is a file at a host that one logs in to, unless
a slash comes before the colon; anything else is a path of this machine.  ``host:path`` goes
through ``[path_map]``, as in batch systems.  Pure, but for asking who the user is.
"""

import os
import re
from collections.abc import Iterable, Sequence

import msgspec

from stagefs.copying.request import Place
from stagefs.errors import InvalidName, NoDaemon
from stagefs.integrations.batch_requests import PathMap
from stagefs.remote.url import LOCAL_SCHEMES, parse, quote_path

STAGING = "staging"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LOGIN = re.compile(r"(?:(?P<user>[^/]*)@)?(?P<host>\[[^]/]+\]|[^:/@]+):(?P<path>.*)", re.DOTALL)
_SPECIAL = re.compile(r"[*?\[\\]")
# PBS writes a backslash before each blank of a remote path: rcp's server is a shell.
_ESCAPED_BLANK = re.compile(r"\\(\s)")


class Reading(msgspec.Struct, frozen=True):
    """What is needed to read places.  ``mountpoint``: of the mount that staging:/// means;
    ``user``: who runs this; ``port``: of -P."""

    paths: PathMap
    user: str
    home: str
    mountpoint: str | None = None
    port: int | None = None

    def source(self, word: str) -> Place:
        """Raises InvalidName, InvalidUrl, NoDaemon."""
        place = self._place(word)
        login = None if _URL.match(word) else _LOGIN.fullmatch(word)
        if login is not None and _SPECIAL.search(login["path"]):
            return msgspec.structs.replace(place, is_pattern=True)
        return place

    def target(self, word: str) -> Place:
        """Raises InvalidName, InvalidUrl, NoDaemon."""
        if not _URL.match(word) and _LOGIN.fullmatch(word):
            word = _ESCAPED_BLANK.sub(r"\1", word)
        return self._place(word)

    def _place(self, word: str) -> Place:
        if not word:
            raise InvalidName("An empty word names no file: write SOURCE... TARGET.")
        if _URL.match(word):
            return self._of_url(word)
        login = _LOGIN.fullmatch(word)
        if login is None:
            return Place(path=word)
        return self._of_login(login["user"], login["host"], login["path"])

    def _of_url(self, word: str) -> Place:
        if word.lower().startswith("scp://"):
            word = f"ssh{word[3:]}"
        url = parse(word)
        if url.scheme not in LOCAL_SCHEMES:
            return Place(url=word)
        if url.scheme != STAGING:
            return Place(path=url.path)
        if self.mountpoint is None:
            raise NoDaemon(
                f"{word} is a name in a mount, and it is not clear which: say --mount or"
                " STAGEFS_MOUNT, or make one with `stagefs mount`."
            )
        return Place(path=os.path.join(self.mountpoint, STAGING) + url.path)

    def _of_login(self, user: str | None, host: str, path: str) -> Place:
        if host.startswith("-") or (user or "").startswith("-"):
            raise InvalidName(f"{host}:{path} names no host: it cannot begin with '-'.")
        absolute = path.startswith("/")
        mapped = self.paths.mapped(host, path) if absolute else None
        if mapped is not None:
            return self._of_url(mapped)
        if self._is_here(user, host):
            return Place(path=os.path.join(self.home, path))
        if not absolute:
            # Relative to the home directory there, where a login begins.
            path = f"/~/{path.removeprefix('~/').removeprefix('./')}".rstrip("/")
        at = "" if not user else f"{quote_path(user).replace('@', '%40').replace(':', '%3A')}@"
        port = "" if self.port is None else f":{self.port}"
        url = f"ssh://{at}{host}{port}{quote_path(path)}"
        parse(url)
        return Place(url=url)

    def _is_here(self, user: str | None, host: str) -> bool:
        """This machine, without another user or port: no login is needed."""
        if self.port is not None or user not in (None, "", self.user):
            return False
        return self.paths.is_here(host)


def ssh_lines(
    *,
    identities: Iterable[str] = (),
    options: Iterable[str] = (),
    jump: str | None = None,
    family: str | None = None,
    compression: bool = False,
) -> list[str]:
    """Lines of an ssh configuration that say what scp's options say.  Raises InvalidName."""
    lines = [_option(option) for option in options]
    for identity in identities:
        if '"' in identity or "\n" in identity:
            raise InvalidName(f"-i {identity!r} cannot be named to ssh: rename that file.")
        lines.append(f'IdentityFile "{os.path.abspath(os.path.expanduser(identity))}"')
    if jump is not None:
        lines.append(_option(f"ProxyJump={jump}"))
    if family is not None:
        lines.append(f"AddressFamily {family}")
    if compression:
        lines.append("Compression yes")
    return lines


def _option(option: str) -> str:
    if "\n" in option or not re.match(r"\s*[A-Za-z0-9]+\s*[=\s]\s*\S", option):
        raise InvalidName(f"-o {option!r} is no option of ssh: write -o 'Name value'.")
    return option.strip()


# What scp is usually given by batch systems so that it asks nothing.
_HARMLESS = frozenset({"batchmode", "connecttimeout", "loglevel", "stricthostkeychecking"})


def concerns_login(options: Sequence[str]) -> bool:
    """Whether -o says anything that a mount's own connections do not have already."""
    return any(re.split(r"[=\s]", one.strip())[0].lower() not in _HARMLESS for one in options)
