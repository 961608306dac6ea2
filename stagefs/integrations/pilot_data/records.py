"""What is known of pilots and units, kept in the mount they belong to.

A JSON file for each below ``.pilot-data`` in the mount, replaced as a whole; whoever changes one
holds the lock there, so that threads and programs do not overwrite each other.  With these a
program finds again by URL what another one made, as long as the mount's state directory is there.
No secret is ever in them.
"""

import contextlib
import fcntl
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import msgspec

from stagefs.control.client import Client
from stagefs.control.mounts import choose_mount, staging_mounts
from stagefs.errors import NotFound, StageFSError
from stagefs.integrations.pilot_data.stores import Store
from stagefs.integrations.pilot_data.values import FINAL, Affinity, PilotError, State
from stagefs.staging.workers import Worker, has_ended, worker_of

DIRECTORY = ".pilot-data"
# Where data units are in the namespace.
NAMESPACE = "pilot-data"
OTHER_URLS = "pilot-data:///"
UNITS_URL = f"staging:///{NAMESPACE}/"
PENDING, COMPLETE, FAILED = "pending", "complete", "failed"


class File(msgspec.Struct):
    """``source``: where it came from; empty, a compute unit made it."""

    source: str
    size_bytes: int


class Replica(msgspec.Struct):
    """A data unit at one pilot data.  ``worker``: the program that brings it there."""

    state: str = PENDING
    reason: str = ""
    worker: Worker | None = None

    def seen(self) -> "Replica":
        """As it is, if the program that was bringing it there has ended."""
        if self.state == PENDING and self.worker is not None and has_ended(self.worker):
            reason = "the program that brought it there ended before it was whole"
            return Replica(FAILED, reason)
        return self


class DataUnitRecord(msgspec.Struct):
    """``ended`` is Failed or Canceled, or empty.  ``replicas``: by the pilot data's id."""

    id: str
    description: dict[str, Any]
    files: dict[str, File] = {}
    replicas: dict[str, Replica] = {}
    ended: str = ""
    reason: str = ""

    @property
    def url(self) -> str:
        return UNITS_URL + self.id

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files.values())

    def state(self) -> str:
        """Without a pilot data it is complete where it came from, once all its URLs are known."""
        replicas = [replica.seen() for replica in self.replicas.values()]
        states = {replica.state for replica in replicas}
        if self.ended:
            return self.ended
        if not states or COMPLETE in states:
            return State.Running
        return State.Pending if PENDING in states else State.Failed

    def why(self) -> str:
        """Of a unit that failed."""
        if self.reason:
            return self.reason
        reasons = (replica.seen().reason for replica in self.replicas.values())
        return "; ".join(reason for reason in reasons if reason)


class PilotDataRecord(msgspec.Struct):
    id: str
    description: dict[str, Any]
    base: str
    size_bytes: int | None = None
    data_units: list[str] = []
    state: str = State.Running

    @property
    def service_url(self) -> str:
        return str(self.description["service_url"])

    @property
    def store(self) -> Store:
        return Store(self.base)

    @property
    def affinity(self) -> Affinity:
        return Affinity.of(self.description)


class ServiceRecord(msgspec.Struct):
    id: str
    pilots: list[str] = []


class PilotRecord(msgspec.Struct):
    """A compute pilot.  ``directory`` is in the mount, ``shown`` where its user finds it."""

    id: str
    description: dict[str, Any]
    directory: str
    shown: str
    units: list[str] = []
    state: str = State.Running
    worker: Worker | None = None

    def state_now(self) -> str:
        over = self.worker is not None and has_ended(self.worker)
        return State.Done if over and self.state == State.Running else self.state


class ComputeUnitRecord(msgspec.Struct):
    """``details`` is BigJob's dictionary of what happened when."""

    id: str
    description: dict[str, Any]
    pilot: str = ""
    directory: str = ""
    state: str = State.New
    reason: str = ""
    worker: Worker | None = None
    details: dict[str, Any] = {}

    def state_now(self) -> str:
        over = self.worker is not None and has_ended(self.worker)
        return State.Unknown if over and self.state not in FINAL else self.state


_Record = TypeVar(
    "_Record",
    DataUnitRecord,
    PilotDataRecord,
    ServiceRecord,
    PilotRecord,
    ComputeUnitRecord,
)
_own = worker_of(os.getpid())


def own_worker() -> Worker:
    """This program, also when it is a fork of the one that imported the module."""
    return _own if _own.pid == os.getpid() else worker_of(os.getpid())


def new_id(prefix: str) -> str:
    """As BigJob makes them: ``du-54aaba6c-32ec-11e1-a4e5-00264a13ca4c``."""
    return f"{prefix}-{uuid.uuid1()}"


def id_of(url: str, prefix: str) -> str:
    """The last part of a URL that begins with the prefix.  Raises PilotError."""
    for part in reversed(str(url).replace(":", "/").split("/")):
        name = part.partition("?")[0]
        if name.startswith(f"{prefix}-") and name.isprintable():
            return name
    raise PilotError(f"{url} is no URL of a {prefix}-...: give one that get_url() returned.")


class _Lock:
    """One mount's, for the threads of this program and for other programs.  May be nested."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._threads = threading.RLock()
        self._depth = 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        with self._threads, contextlib.ExitStack() as stack:
            if self._depth == 0:
                fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                # Closing it unlocks it.
                stack.callback(os.close, fd)
                fcntl.flock(fd, fcntl.LOCK_EX)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1


_locks: dict[str, _Lock] = {}
_making = threading.Lock()


class Place:
    """One mount, and what is known there.  Thread-safe."""

    def __init__(self, mountpoint: str) -> None:
        self.mountpoint = mountpoint
        self.client = Client.of(mountpoint)
        self._directory = f"{mountpoint}/{DIRECTORY}"
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        with _making:
            self._lock = _locks.setdefault(mountpoint, _Lock(f"{self._directory}/lock"))

    def local(self, name: str) -> str:
        """Where a ``staging:///`` name lies in the mount."""
        return f"{self.mountpoint}/staging/{name.removeprefix('staging:///')}"

    def locked(self) -> contextlib.AbstractContextManager[None]:
        return self._lock.held()

    def read(self, kind: type[_Record], identity: str) -> _Record:
        """Raises NotFound, PilotError."""
        try:
            with open(f"{self._directory}/{identity}.json", "rb") as file:
                return msgspec.json.decode(file.read(), type=kind)
        except FileNotFoundError:
            raise NotFound(
                f"{identity} is not known in the mount {self.mountpoint}: it was made in another"
                " one, or in another state directory, or nothing is mounted there any more."
            ) from None
        except OSError as exc:
            raise self._lost(exc) from exc

    def pilot_datas(self) -> Iterator[PilotDataRecord]:
        """All that this mount knows."""
        for name in sorted(os.listdir(self._directory)):
            identity, dot, kind = name.partition(".")
            if identity.startswith("pd-") and (dot, kind) == (".", "json"):
                yield self.read(PilotDataRecord, identity)

    def write(self, record: _Record) -> None:
        """Raises PilotError."""
        path = f"{self._directory}/{record.id}.json"
        temporary = f"{path}.{os.getpid()}.{threading.get_ident()}"
        try:
            with open(temporary, "wb", opener=_private) as file:
                file.write(msgspec.json.encode(record))
            os.replace(temporary, path)
        except OSError as exc:
            raise self._lost(exc) from exc

    def _lost(self, why: OSError) -> PilotError:
        return PilotError(
            f"The mount {self.mountpoint} keeps nothing of Pilot-Data any more ({why.strerror}):"
            " look at its log, or mount again."
        )

    def change(
        self, kind: type[_Record], identity: str, change: Callable[[_Record], object]
    ) -> _Record:
        """Read, change, write: one at a time.  What ``change`` raises leaves it as it was."""
        with self.locked():
            record = self.read(kind, identity)
            change(record)
            self.write(record)
            return record


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


Mount = str | os.PathLike[str] | Place | None


def place_for(mount: Mount) -> Place:
    """The mount that is named, else that of STAGEFS_MOUNT, else the only one.  Raises
    PilotError."""
    if isinstance(mount, Place):
        return mount
    named = None if mount is None else os.fspath(mount)
    try:
        found = choose_mount(named, staging_mounts(), uid=os.geteuid(), option="mount=")
        place = Place(found.mountpoint)
        place.client.status()
    except (StageFSError, OSError) as exc:
        raise PilotError(f"Pilot-Data needs a mount: {exc}") from exc
    return place
