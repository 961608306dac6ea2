"""``fsspec+PROTOCOL://host/path``: whatever fsspec has a file system for (ftp, smb, hf, ...).

The last resort, and read only: fsspec promises neither conditions nor that a put is all or
nothing.  Needs the package fsspec and what the protocol needs beside it.  Each call has an
instance of its own while it runs: most of them cannot serve two threads.  The version of an object
is the first that its protocol tells of: entity tag, checksum, time of change; with nothing but
a size, a change that keeps the size goes unnoticed.
"""

import contextlib
import datetime
import importlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

from stagefs.errors import (
    AccessDenied,
    DeadlineExceeded,
    InvalidUrl,
    NotSupported,
    ObjectMissing,
    RemoteError,
    RemoteUnavailable,
    StageFSError,
)
from stagefs.model import EntryKind, ListedEntry, ObjectInfo, Span
from stagefs.remote.blocking import BlockingRemote, lent
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.threads import Call, CallStopped
from stagefs.remote.url import FSSPEC, is_file_name, join, parse

_TAGS = ("ETag", "etag", "e_tag", "checksum", "sha256", "md5Hash", "md5", "content_hash", "oid")
_TIMES = ("mtime", "LastModified", "last_modified", "modified", "modify", "last_commit", "created")
_DENIED = frozenset({401, 403})
_REFUSALS = ("permission denied", "not enough privileges", "access denied")
_LATER = frozenset({408, 425, 429, 500, 502, 503, 504})


class FsspecRemote(BlockingRemote):
    """The driver of one protocol and host."""

    def __init__(
        self, host_url: str, settings: RemoteSettings, credentials: CredentialStore
    ) -> None:
        super().__init__(settings)
        self._host_url = host_url
        self._credentials = credentials
        # Instances that nobody uses now; appended and popped in single steps.
        self._idle: list[tuple[Any, str]] = []

    async def aclose(self) -> None:
        self._idle.clear()

    # In worker threads.

    def _head(self, call: Call[Any], url: str) -> ObjectInfo:
        with self._lent(url) as (files, path):
            found = files.info(path)
        call.answered()
        if found.get("type") == "directory":
            raise RemoteError(f"{url} is a directory: name a file, or bind the directory.")
        info = described(url, found)
        if info is None:
            raise RemoteError(f"The remote tells no size of {url}.")
        return info

    def _entries(self, call: Call[Any], url: str) -> Iterator[ListedEntry]:
        with self._lent(url) as (files, path):
            if files.info(path).get("type") != "directory":
                raise RemoteError(f"{url} is no directory.")
            found = files.ls(path, detail=True)
        call.answered()
        for one in found:
            name = str(one["name"]).rstrip("/").rpartition("/")[2]
            if not is_file_name(name):
                continue
            child = join(url, name)
            if one.get("type") == "directory":
                yield ListedEntry(name, EntryKind.DIRECTORY, child)
            elif one.get("type") == "file":
                yield ListedEntry(name, EntryKind.FILE, child, described(child, one))

    def _read(self, call: Call[Any], info: ObjectInfo, span: Span) -> bytes:
        with self._lent(info.url) as (files, path):
            data: bytes = files.cat_file(path, start=span.start, end=span.stop)
        call.answered()
        return data

    @contextlib.contextmanager
    def _lent(self, url: str) -> Iterator[tuple[Any, str]]:
        """A file system, and the path of an object in it."""
        with translated(url), lent(self._idle, lambda: self._made(url), _drop) as (files, root):
            yield files, root.rstrip("/") + parse(url).path

    def _made(self, url: str) -> tuple[Any, str]:
        parts = parse(self._credentials.reveal(url))
        protocol = parts.scheme.removeprefix(FSSPEC)
        user = "" if parts.user is None else parts.user
        login = f"{user}:{parts.password}@" if parts.password is not None else user and f"{user}@"
        try:
            core = importlib.import_module("fsspec.core")
        except ImportError as exc:
            raise NotSupported(f"{url} needs the package fsspec: install stagefs[fsspec].") from exc
        try:
            files, root = core.url_to_fs(
                f"{protocol}://{login}{parts.authority}/",
                skip_instance_cache=True,
                use_listings_cache=False,
            )
        except ImportError as exc:
            raise NotSupported(f"{url} needs another package: {exc}.") from exc
        except ValueError as exc:
            raise InvalidUrl(f"fsspec knows no protocol {protocol!r}, as in {url}.") from exc
        return files, str(root)


def _drop(one: tuple[Any, str]) -> None:
    """Instances end themselves when nobody holds them."""


def described(url: str, found: Mapping[str, Any]) -> ObjectInfo | None:
    """None where the protocol tells no size."""
    size_bytes = found.get("size")
    if not isinstance(size_bytes, int) or size_bytes < 0:
        return None
    changed = next((found[name] for name in _TIMES if found.get(name) is not None), None)
    mtime_s = _seconds(changed)
    tag = next((str(found[name]) for name in _TAGS if found.get(name)), None)
    return ObjectInfo(
        url=url,
        size_bytes=size_bytes,
        validator=f"tag:{tag}" if tag else f"changed:{changed or ''}:{size_bytes}",
        mtime_ns=None if mtime_s is None else math.floor(mtime_s) * 1_000_000_000,
    )


def _seconds(changed: object) -> float | None:
    match changed:
        case bool():
            return None
        case int() | float():
            return float(changed)
        case datetime.datetime():
            return changed.timestamp()
        # As FTP's MLSD has it.
        case str() if changed[:14].isdigit() and len(changed) >= 14:
            return datetime.datetime.strptime(f"{changed[:14]}Z", "%Y%m%d%H%M%S%z").timestamp()
        case _:
            return None


@contextlib.contextmanager
def translated(url: str) -> Iterator[None]:
    """Whatever a protocol raises into StageFS's errors.  Texts are not kept: some quote the URL
    with its secrets."""
    try:
        yield
    except (StageFSError, CallStopped):
        raise
    except FileNotFoundError as exc:
        raise ObjectMissing(f"{url} does not exist.") from exc
    except PermissionError as exc:
        raise _denied(url) from exc
    except IsADirectoryError as exc:
        raise RemoteError(f"{url} is a directory: name a file, or bind the directory.") from exc
    except TimeoutError as exc:
        raise DeadlineExceeded(
            f"{url} did not answer in time: the server or the way to it is stalled; "
            "try again later."
        ) from exc
    except Exception as exc:  # noqa: BLE001 - fifty protocols raise what they like
        raise _of_any(url, exc) from None


def _of_any(url: str, exc: Exception) -> StageFSError:
    status, text = getattr(exc, "status", None), str(exc).lower()
    if status in _DENIED or text.startswith("530") or any(word in text for word in _REFUSALS):
        return _denied(url)
    if isinstance(exc, NotImplementedError):
        return NotSupported(f"The protocol of {url} cannot do this.")
    if status in _LATER or isinstance(exc, OSError | EOFError) or text.startswith("4"):
        return RemoteUnavailable(f"The connection to {url} failed ({type(exc).__name__}).")
    return RemoteError(f"{url} cannot be asked for ({type(exc).__name__}).")


def _denied(url: str) -> AccessDenied:
    return AccessDenied(f"The server refuses {url}: check user and password, and its rights.")
