"""``irods://[user@]host[:port]/zone/path``: data objects of iRODS, by python-irodsclient.

Read only so far.  Needs ``stagefs[irods]``.  Who we are comes from the URL when it has a password,
else from the iRODS environment (``iinit``).  Each call has a session of its own while it runs: a
shared one hangs.  iRODS knows no conditions, so what is read is looked at before and after
(``blocking``).  A version is the registered checksum, else time and size; the catalogue is never
asked to compute a checksum, which would write it.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trio

from stagefs.errors import (
    AccessDenied,
    DeadlineExceeded,
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
from stagefs.remote.url import is_file_name, join, parse

DEFAULT_PORT = 1247
# Of a replica that is whole and the latest.
GOOD = "1"
# By their names, so that the package is imported when it is needed.
_DENIED = frozenset(
    {
        "CAT_INVALID_AUTHENTICATION",
        "CAT_INVALID_USER",
        "CAT_NO_ACCESS_PERMISSION",
        "CAT_PASSWORD_EXPIRED",
        "PAM_AUTH_PASSWORD_FAILED",
        "PlainTextPAMPasswordError",
        "SYS_NO_API_PRIV",
    }
)
_MISSING = frozenset(
    {
        "CAT_NO_ROWS_FOUND",
        "CAT_UNKNOWN_FILE",
        "CollectionDoesNotExist",
        "DataObjectDoesNotExist",
        "OBJ_PATH_DOES_NOT_EXIST",
    }
)


class IrodsRemote(BlockingRemote):
    """The driver of ``irods://`` for one host and user."""

    def __init__(
        self, host_url: str, settings: RemoteSettings, credentials: CredentialStore
    ) -> None:
        super().__init__(settings)
        self._host_url = host_url
        self._credentials = credentials
        self._access = credentials.access(host_url)
        # By the client's name of it: from which resource a replica is read.
        self._options = {} if self._access.resource is None else {"rescName": self._access.resource}
        # Sessions that nobody uses now; appended and popped in single steps.
        self._idle: list[Any] = []

    async def aclose(self) -> None:
        idle, self._idle = self._idle, []
        for session in idle:
            # Says goodbye to the server, which a dead one delays by its timeout.
            await trio.to_thread.run_sync(_end, session, abandon_on_cancel=True)

    def _head(self, call: Call[Any], url: str) -> ObjectInfo:
        path = parse(url).path
        with self._session(url) as session:
            try:
                found = session.data_objects.get(path)
            except Exception as exc:
                if type(exc).__name__ in _MISSING and session.collections.exists(path):
                    raise RemoteError(
                        f"{url} is a directory: name a file, or bind the directory."
                    ) from exc
                raise
        call.answered()
        return described(url, found)

    def _entries(self, call: Call[Any], url: str) -> Iterator[ListedEntry]:
        with self._session(url) as session:
            collection = session.collections.get(parse(url).path.rstrip("/"))
            objects, below = collection.data_objects, collection.subcollections
        call.answered()
        for one in objects:
            if is_file_name(one.name):
                child = join(url, one.name)
                yield ListedEntry(one.name, EntryKind.FILE, child, described(child, one))
        for one in below:
            if is_file_name(one.name):
                yield ListedEntry(one.name, EntryKind.DIRECTORY, join(url, one.name))

    def _read(self, call: Call[Any], info: ObjectInfo, span: Span) -> bytes:
        data = memoryview(bytearray(span.length))
        filled = 0
        with self._session(info.url) as session:
            handle, raw = session.data_objects.open_with_FileRaw(
                parse(info.url).path, "r", **self._options
            )
            with contextlib.closing(handle):
                raw.seek(span.start)
                while filled < span.length:
                    count = raw.readinto(data[filled:])
                    if not count:
                        break
                    filled += count
                    call.answered()
                    call.checkpoint()
        return bytes(data[:filled])

    @contextlib.contextmanager
    def _session(self, url: str) -> Iterator[Any]:
        with translated(url), lent(self._idle, lambda: self._made(url), _end) as session:
            yield session

    def _made(self, url: str) -> Any:  # noqa: ANN401 - the package has no types
        try:
            new_session = importlib.import_module("irods.session").iRODSSession
        except ImportError as exc:
            raise NotSupported(
                f"{url} needs the package python-irodsclient: install stagefs[irods]."
            ) from exc
        parts = parse(self._credentials.reveal(url))
        told = {} if (name := self._access.application) is None else {"application_name": name}
        if parts.password is not None:
            session = new_session(
                **told,
                host=parts.host,
                port=parts.port or DEFAULT_PORT,
                user=parts.user,
                password=parts.password,
                zone=parts.path.split("/")[1],
            )
        else:
            session = new_session(irods_env_file=str(self._environment_file(url)), **told)
            if (session.host, session.port) != (parts.host, parts.port or DEFAULT_PORT):
                raise AccessDenied(
                    f"The iRODS environment is for {session.host}:{session.port}, not for the "
                    f"server of {url}: name another in [remote.irods] environment_file."
                )
        session.connection_timeout = self._settings.progress_timeout_s
        return session

    def _environment_file(self, url: str) -> Path:
        settings = self._settings
        named = settings.irods.environment_file or settings.environment.get(
            "IRODS_ENVIRONMENT_FILE"
        )
        path = Path(named or os.path.join(settings.home or "/", ".irods/irods_environment.json"))
        if not path.is_file():
            raise AccessDenied(
                f"There is no login for {url}: run iinit, or name an environment in "
                "[remote.irods] environment_file."
            )
        return path


def _end(session: Any) -> None:  # noqa: ANN401 - the package has no types
    # It raises what its connections do, of which nobody needs to know any more.
    with contextlib.suppress(Exception):
        session.cleanup()


def described(url: str, found: Any) -> ObjectInfo:  # noqa: ANN401 - the package has no types
    """Of the good replica, where there is one."""
    replicas = [one for one in found.replicas if str(one.status) == GOOD]
    if found.replicas and not replicas:
        raise RemoteUnavailable(f"{url} has no good replica now: it is being written, or damaged.")
    good = replicas[0] if replicas else found
    size_bytes, checksum = int(good.size), good.checksum
    modified_s = int(found.modify_time.timestamp())
    return ObjectInfo(
        url=url,
        size_bytes=size_bytes,
        validator=f"checksum:{checksum}" if checksum else f"changed:{modified_s}:{size_bytes}",
        mtime_ns=modified_s * 1_000_000_000,
    )


@contextlib.contextmanager
def translated(url: str) -> Iterator[None]:
    """The client's exceptions into StageFS's.  Texts are not kept: some quote the login."""
    try:
        yield
    except (StageFSError, CallStopped):
        raise
    except Exception as exc:  # noqa: BLE001 - iRODS has more than a thousand
        raise _of_any(url, exc) from None


def _of_any(url: str, exc: Exception) -> StageFSError:
    name = type(exc).__name__
    if name in _MISSING:
        return ObjectMissing(f"{url} does not exist.")
    if name in _DENIED:
        return AccessDenied(f"The server refuses {url} ({name}): run iinit, or check your rights.")
    if isinstance(exc, TimeoutError):
        return DeadlineExceeded(
            f"{url} did not answer in time: the server or the way to it is stalled; "
            "try again later."
        )
    if isinstance(exc, OSError | EOFError) or name in {"NetworkException", "SYS_SOCK_READ_ERR"}:
        return RemoteUnavailable(f"The connection to the server of {url} failed ({name}).")
    return RemoteError(f"{url} cannot be asked for ({name}).")
