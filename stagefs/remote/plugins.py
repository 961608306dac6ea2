"""Remotes of other packages, found through the entry point group ``stagefs.remotes``.

The name of an entry point is a URL scheme; it leads to what the registry calls with (host URL,
settings, credentials) and which returns a ``base.Remote``.  Their URLs are read as those of ssh.
Schemes of StageFS itself cannot be taken.  What is installed is looked up once, when a scheme is
met that StageFS does not know; a package is imported when its scheme is first used.
"""

import functools
import importlib.metadata
import re
from collections.abc import Callable, Mapping
from typing import Any

from stagefs.errors import RemoteError

GROUP = "stagefs.remotes"
_SCHEME = re.compile(r"[a-z][a-z0-9.-]*")


def schemes() -> frozenset[str]:
    """The schemes that installed packages serve."""
    return frozenset(_found())


def driver(scheme: str) -> Callable[..., Any]:
    """What makes the remote of a plug-in's scheme.  Raises RemoteError when it cannot be loaded."""
    entry = _found()[scheme]
    try:
        made = entry.load()
    except Exception as exc:  # a package may fail to import in any way
        raise RemoteError(
            f"The remote for {scheme} URLs ({entry.value}) cannot be loaded ({exc}): "
            "mend or remove the package that brings it."
        ) from exc
    if not callable(made):
        raise RemoteError(
            f"The remote for {scheme} URLs ({entry.value}) is no driver: "
            "mend or remove the package that brings it."
        )
    return made  # type: ignore[no-any-return]


@functools.cache
def _found() -> Mapping[str, importlib.metadata.EntryPoint]:
    entries = importlib.metadata.entry_points(group=GROUP)
    return {entry.name: entry for entry in entries if _SCHEME.fullmatch(entry.name)}
