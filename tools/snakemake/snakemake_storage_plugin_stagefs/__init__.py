"""Snakemake storage on a StageFS mount.

A query is a ``staging:///`` name, or the URL of any remote of StageFS, which is registered in the
namespace when it is first asked for.  Retrieving makes a link to the mount: nothing is fetched
before a job reads it, and what jobs read is fetched once per node.  Storing returns when the
output is durable where the query says.

Snakemake finds this module by its name, and in it the classes StorageProvider,
StorageProviderSettings and StorageObject.
"""

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from snakemake_interface_common.exceptions import WorkflowError
from snakemake_interface_storage_plugins.common import Operation
from snakemake_interface_storage_plugins.io import (
    WILDCARD_REGEX,
    IOCacheStorageInterface,
    Mtime,
    get_constant_prefix,
)
from snakemake_interface_storage_plugins.settings import StorageProviderSettingsBase
from snakemake_interface_storage_plugins.storage_object import (
    StorageObjectGlob,
    StorageObjectRead,
    StorageObjectWrite,
)
from snakemake_interface_storage_plugins.storage_provider import (
    ExampleQuery,
    QueryType,
    StorageProviderBase,
    StorageQueryValidationResult,
)

from stagefs.control.client import Client, Refused
from stagefs.control.mounts import choose_mount, staging_mounts
from stagefs.copying.request import CopyRequest, Place, carried_out
from stagefs.copying.through_mount import ThroughMount
from stagefs.errors import InvalidUrl, StageFSError
from stagefs.remote.temporaries import temporary_name
from stagefs.remote.url import HTTP_SCHEMES, decode_path, join, last_name, parse, shown

STAGING = "staging"
# Objects that were named by their URL are registered below this name.
REGISTERED = "snakemake"
OURS = f"{STAGING}:///{REGISTERED}"
ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR})


@dataclass
class StorageProviderSettings(StorageProviderSettingsBase):  # type: ignore[misc]
    """The options ``--storage-stagefs-...``."""

    mount: str | None = field(
        default=None,
        metadata={"help": "The mount that is meant (else STAGEFS_MOUNT, else the only one)."},
    )


class StorageProvider(StorageProviderBase):  # type: ignore[misc]
    """One mount."""

    def __post_init__(self) -> None:
        self._mountpoint: str | None = None
        # What the remotes said in this process: URL -> path in the mount, None where nothing is.
        self._registered: dict[str, str | None] = {}

    @property
    def mountpoint(self) -> str:
        """Raises WorkflowError."""
        if self._mountpoint is None:
            named = self.settings.mount if self.settings else None
            with _told():
                option = "--storage-stagefs-mount"
                mounts = staging_mounts()
                found = choose_mount(named, mounts, uid=os.geteuid(), option=option)
            self._mountpoint = found.mountpoint
        return self._mountpoint

    @property
    def client(self) -> Client:
        return Client.of(self.mountpoint)

    def path_of(self, query: str) -> str | None:
        """The path in the mount that a query means; None: a URL at which no object is."""
        parts = parse(query)
        if parts.scheme == STAGING:
            return os.path.join(self.mountpoint, STAGING) + parts.path
        if query not in self._registered:
            self._registered[query] = self._register(query)
        return self._registered[query]

    def forget(self, query: str) -> None:
        """The object at a URL is another one now."""
        self._registered.pop(query, None)

    def _register(self, url: str) -> str | None:
        name = f"{REGISTERED}/{_digest(url)}/{last_name(url) or 'object'}"
        try:
            with _told():
                self.client.stage_in([url], f"staging:///{name}", replace=True)
        except WorkflowError as error:
            cause = error.__cause__
            if isinstance(cause, Refused) and cause.errno == errno.ENOENT:
                return None
            raise
        return os.path.join(self.mountpoint, STAGING, name)

    def files_below(self, query: str) -> list[str]:
        """Of a directory, relative to it.  A remote one is bound, and then listed."""
        with _told():
            if parse(query).scheme == STAGING:
                return [*_files_below(self.client, query)]
            name = f"{OURS}/{_digest(query)}/directory"
            try:
                self.client.bind(query, name)
            except Refused as refused:
                if refused.errno != errno.EEXIST:
                    raise
            return [*_files_below(self.client, name)]

    @classmethod
    def example_queries(cls) -> list[ExampleQuery]:
        return [
            ExampleQuery("staging:///runs/7/result.h5", "A name of the mount", QueryType.ANY),
            ExampleQuery("ssh://host/data/result.h5", "A file at a host", QueryType.ANY),
            ExampleQuery("s3://bucket/key", "An object of a bucket", QueryType.ANY),
            ExampleQuery("https://host/ref.fa", "A file of a web server", QueryType.INPUT),
        ]

    def rate_limiter_key(self, query: str, operation: Operation) -> str | None:
        """The daemon limits what it asks of each remote."""
        return None

    def default_max_requests_per_second(self) -> float:
        return 1000.0

    def use_rate_limiter(self) -> bool:
        return False

    @classmethod
    def is_valid_query(cls, query: str) -> StorageQueryValidationResult:
        try:
            # With a letter in place of each wildcard.
            parse(WILDCARD_REGEX.sub("x", query))
        except InvalidUrl as exc:
            return StorageQueryValidationResult(query, valid=False, reason=str(exc))
        return StorageQueryValidationResult(query, valid=True)

    def safe_print(self, query: str) -> str:
        return shown(query)


class StorageObject(StorageObjectRead, StorageObjectWrite, StorageObjectGlob):  # type: ignore[misc]
    """One name or URL."""

    provider: StorageProvider

    @property
    def _is_staged(self) -> bool:
        return bool(self.query.startswith(f"{STAGING}:"))

    def local_suffix(self) -> str:
        """The query itself, as a path; wildcards stay in it.  A password does not."""
        scheme, _, rest = self.query.partition("://")
        authority, slash, path = rest.partition("/")
        return f"{scheme}/{authority.rpartition('@')[2]}{slash}{path}".replace("//", "/").rstrip(
            "/"
        )

    async def inventory(self, cache: IOCacheStorageInterface) -> None:
        """Of a name: all that are in its directory, by one listing."""
        key = self.cache_key()
        if key in cache.exists_in_storage:
            return
        status = self._status()
        _note(cache, key, status)
        if not self._is_staged or status is None:
            return
        path = self._path()
        assert path is not None
        directory, prefix = os.path.dirname(path), os.path.dirname(self.local_suffix())
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    _note(cache, self.cache_key(f"{prefix}/{entry.name}"), entry.stat())

    def get_inventory_parent(self) -> str | None:
        return self.query.rpartition("/")[0] if self._is_staged else None

    def cleanup(self) -> None:
        """Links that are left need no room."""

    def exists(self) -> bool:
        return self._status() is not None

    def mtime(self) -> float:
        return self._present().st_mtime

    def size(self) -> int:
        status = self._present()
        return 0 if stat.S_ISDIR(status.st_mode) else status.st_size

    def checksum(self) -> str | None:
        """As it was declared in the namespace."""
        path = self._path()
        with contextlib.suppress(OSError):
            if path is not None:
                return os.fsdecode(os.getxattr(path, "user.stagefs.checksum")) or None
        return None

    def local_footprint(self) -> int:
        """A link takes no room here."""
        return 0

    def retrieve_object(self) -> None:
        """A hard link where the local path is in the mount, too (a virtual link, which a job may
        write through without changing the object), else a symbolic one."""
        self._present()
        path, local = self._path(), self.local_path()
        assert path is not None
        if local.is_symlink() or local.is_file():
            local.unlink()
        try:
            os.link(path, local)
        except OSError:
            local.symlink_to(path)

    def store_object(self) -> None:
        local = self.local_path()
        if self._is_staged:
            self._publish(local)
            return
        self.provider.forget(self.query)
        self._copy(local, Place(url=self.query))

    def _publish(self, local: Path) -> None:
        path = self._path()
        assert path is not None
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if local.is_dir():
            # Its content goes into what is there, and -r would make a directory in it.
            self.remove()
        elif _linked(local, path):
            with _told():
                ThroughMount(self.provider.mountpoint).await_uploads([path])
            return
        self._copy(local, Place(path=path))

    def _copy(self, local: Path, target: Place) -> None:
        with _told():
            carried_out(
                CopyRequest(
                    sources=[Place(path=str(local))],
                    target=target,
                    recursive=True,
                    preserve=True,
                    mountpoint=self.provider.mountpoint,
                )
            )

    def remove(self) -> None:
        """A name of the mount; of a URL, the object: Snakemake asks for that before it makes an
        output anew."""
        if not self._is_staged:
            self.provider.forget(self.query)
            with _told():
                carried_out(CopyRequest(sources=[], target=Place(url=self.query), removes=True))
        elif self.exists():
            with _told():
                self.provider.client.remove(self.query, recursive=True)

    def list_candidate_matches(self) -> Iterable[str]:
        """Queries of all files below the constant part of this one."""
        prefix = get_constant_prefix(self.query, strip_incomplete_parts=True)
        if not prefix.endswith("/"):
            return [prefix] if self.exists() else []
        names = self.provider.files_below(prefix)
        if self._is_staged:
            return [f"{prefix}{name}" for name in names]
        return [_below(prefix, name) for name in names]

    def _path(self) -> str | None:
        return self.provider.path_of(self.query)

    def _status(self) -> os.stat_result | None:
        path = self._path()
        if path is None:
            return None
        try:
            return os.stat(path)
        except OSError as exc:
            if exc.errno in ABSENT:
                return None
            raise WorkflowError(f"{self.print_query} cannot be asked for: {exc.strerror}") from exc

    def _present(self) -> os.stat_result:
        status = self._status()
        if status is None:
            raise WorkflowError(f"{self.print_query} does not exist.")
        return status


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What StageFS refuses, as Snakemake shows it."""
    try:
        yield
    except StageFSError as exc:
        raise WorkflowError(str(exc)) from exc


def _note(cache: IOCacheStorageInterface, key: str, status: os.stat_result | None) -> None:
    cache.exists_in_storage[key] = status is not None
    if status is not None:
        cache.mtime[key] = Mtime(storage=status.st_mtime)
        cache.size[key] = 0 if stat.S_ISDIR(status.st_mode) else status.st_size


def _linked(local: Path, path: str) -> bool:
    """Publish a file of the same mount without copying it; False when it is elsewhere."""
    directory, name = os.path.split(path)
    temporary = os.path.join(directory, temporary_name(name, _digest(path)[:12]))
    try:
        os.link(local, temporary)
    except OSError:
        return False
    try:
        os.rename(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise
    for each in (path, directory):
        fd = os.open(each, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    return True


def _files_below(client: Client, directory: str, below: str = "") -> Iterator[str]:
    for entry in client.list_names(directory):
        if entry.path == OURS:
            continue
        if entry.kind == "directory":
            yield from _files_below(client, entry.path, f"{below}{entry.name}/")
        else:
            yield f"{below}{entry.name}"


def _below(prefix: str, name: str) -> str:
    """The URL of a file, spelled as the query was: with blanks and braces as they are."""
    url = prefix.rstrip("/")
    for component in name.split("/"):
        url = join(url, component)
    as_it_is = parse(prefix).scheme in HTTP_SCHEMES or "%25" in url
    return url if as_it_is else decode_path(url)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
