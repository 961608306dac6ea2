"""``staging://`` for whatever reads through fsspec: pandas, Dask, zarr, xarray, pyarrow, Ray.

    pandas.read_csv("staging:///table.csv")
    dask.dataframe.read_parquet("staging:///rows/")
    zarr.open("staging:///cube.zarr", storage_options={"mount": "/mnt/pilot"})

fsspec finds it by the entry point ``fsspec.specs``, and imports this module when ``staging://`` is
first used; nothing else of StageFS does.

``staging:///x`` is that entry of the namespace, read and written through the mount of this machine:
the one that ``mount`` names, else STAGEFS_MOUNT, else the only one.  It is looked for at each
call, so a file system that was pickled to a worker uses the worker's mount, and a mount that is
gone is an error instead of an empty directory.  Names are taken literally, as everywhere in
``staging:``.

Thread-safe: it keeps nothing but its options.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any

from fsspec.implementations.local import LocalFileOpener, LocalFileSystem
from fsspec.spec import AbstractFileSystem
from fsspec.utils import stringify_path, tokenize

from stagefs.control.mounts import choose_mount, staging_mounts
from stagefs.errors import InvalidUrl

TESTED_WITH = ("fsspec 2026.9.0", "pandas 3.1.1", "dask 2026.8.0", "zarr 3.1.6")

SCHEME = "staging:"
Found = dict[str, Any]
"""What fsspec calls the info of a file."""


class StagingFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """The namespace of one mount.  ``mount`` is its mountpoint; ``auto_mkdir`` makes directories
    that a written name needs, as in an object store.

    Its operations raise what the mount answers (OSError), NoDaemon when nothing is mounted and
    InvalidName when it is not clear which mount is meant.
    """

    protocol = "staging"
    root_marker = "/"
    # open_local() hands out the paths in the mount, for libraries that want a real file.
    local_file = True

    def __init__(
        self,
        mount: str | os.PathLike[str] | None = None,
        *,
        auto_mkdir: bool = True,
        **options: object,
    ) -> None:
        super().__init__(**options)
        self.mount = None if mount is None else os.fspath(mount)
        self.auto_mkdir = auto_mkdir
        self._files = LocalFileSystem(auto_mkdir=auto_mkdir)

    # Names

    @classmethod
    def _strip_protocol(cls, path: object) -> Any:  # noqa: ANN401  a name, or a list of names
        """``/x/y`` of ``staging:///x/y``."""
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        name = str(stringify_path(path))
        if name.startswith(SCHEME):
            name = name.removeprefix(SCHEME)
            if name.startswith("//") and not name.startswith("///") and name != "//":
                raise InvalidUrl(
                    f"staging:{name} names a host, and there is none: write staging:///{name[2:]}."
                )
        # A name cannot lead out of the namespace: '..' ends at its root.
        return os.path.normpath(f"/{name.strip('/')}")

    @property
    def fsid(self) -> str:
        return f"staging {self._top()}"

    def local_path(self, path: str) -> str:
        """Where a name lies in the mount.  Raises NoDaemon, InvalidName."""
        return f"{self._top()}{self._strip_protocol(path)}".rstrip("/")

    def _top(self) -> str:
        found = choose_mount(
            self.mount, staging_mounts(), uid=os.geteuid(), option='storage_options={"mount": ...}'
        )
        return f"{found.mountpoint}/staging"

    @contextlib.contextmanager
    def _at(self, *names: str) -> Iterator[tuple[str, ...]]:
        """Where names lie.  Errors name them, and not these places."""
        top = self._top()
        try:
            yield tuple(f"{top}{self._strip_protocol(name)}".rstrip("/") for name in names)
        except OSError as exc:
            if exc.errno is None or not str(exc.filename).startswith(top):
                raise
            name = f"{SCHEME}//{str(exc.filename)[len(top) :] or '/'}"
            raise type(exc)(exc.errno, exc.strerror, name) from exc

    def _named(self, found: Found) -> Found:
        top = self._top()
        return {**found, "name": found["name"].removeprefix(top) or "/"}

    # Seeing

    def info(self, path: str, **_options: object) -> Found:
        with self._at(path) as (place,):
            return self._named(self._files.info(place))

    def ls(self, path: str, detail: bool = True, **_options: object) -> list[Any]:
        with self._at(path) as (place,):
            named = [self._named(one) for one in self._files.ls(place, detail=True)]
        return named if detail else [one["name"] for one in named]

    def exists(self, path: str, **_options: object) -> bool:
        # fsspec's own takes every error for "no", also that nothing is mounted.
        return os.path.exists(self.local_path(path))

    lexists = exists

    def isfile(self, path: str) -> bool:
        return os.path.isfile(self.local_path(path))

    def isdir(self, path: str) -> bool:
        return os.path.isdir(self.local_path(path))

    def created(self, path: str) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self.info(path)["created"], tz=datetime.UTC)

    def modified(self, path: str) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self.info(path)["mtime"], tz=datetime.UTC)

    def ukey(self, path: str) -> str:
        """Other content under a name has another key; links to it change nothing."""
        found = self.info(path)
        return str(tokenize([found[key] for key in ("name", "ino", "size", "mtime")]))

    def checksum(self, path: str) -> int:
        return int(self.ukey(path), 16)

    # Changing names

    def mkdir(self, path: str, create_parents: bool = True, **_options: object) -> None:
        with self._at(path) as (place,):
            self._files.mkdir(place, create_parents=create_parents)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        with self._at(path) as (place,):
            os.makedirs(place, exist_ok=exist_ok)

    def rmdir(self, path: str) -> None:
        with self._at(path) as (place,):
            os.rmdir(place)

    def rm_file(self, path: str) -> None:
        with self._at(path) as (place,):
            os.remove(place)

    def rm(
        self, path: str | list[str], recursive: bool = False, maxdepth: int | None = None
    ) -> None:
        if maxdepth is not None:
            super().rm(path, recursive=recursive, maxdepth=maxdepth)
            return
        with self._at(*(path if isinstance(path, list) else [path])) as places:
            for place in places:
                self._files.rm(place, recursive=recursive)

    def mv(self, path1: str, path2: str, **_options: object) -> None:
        """One rename, also of a directory: nothing is copied or fetched."""
        with self._at(path1, path2) as (source, target):
            self._make_parent(target)
            inside = os.path.join(target, os.path.basename(source))
            os.rename(source, inside if os.path.isdir(target) else target)

    mv_file = mv

    def link(self, src: str, dst: str, **_options: object) -> None:
        """Another name of the same entry, without a copy."""
        with self._at(src, dst) as (source, target):
            self._make_parent(target)
            os.link(source, target)

    def _make_parent(self, place: str) -> None:
        if self.auto_mkdir:
            os.makedirs(os.path.dirname(place), exist_ok=True)

    # Content

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: object = None,
        **options: object,
    ) -> LocalFileOpener:
        """A file of the mount.  What is written is published under its name when it is closed."""
        with self._at(path) as (place,):
            if mode[0] in "wxa":
                self._make_parent(place)
            return LocalFileOpener(place, mode, fs=self, autocommit=autocommit, **options)

    def cp_file(self, path1: str, path2: str, **_options: object) -> None:
        with self._at(path1, path2) as (source, target):
            self._files.cp_file(source, target)

    def get_file(
        self, rpath: str, lpath: object, callback: object = None, **_options: object
    ) -> None:
        with self._at(rpath) as (place,):
            self._files.get_file(place, lpath)

    def put_file(self, lpath: str, rpath: str, callback: object = None, **_options: object) -> None:
        with self._at(rpath) as (place,):
            self._files.put_file(lpath, place)

    def touch(self, path: str, truncate: bool = True, **_options: object) -> None:
        with self._at(path) as (place,):
            self._files.touch(place, truncate=truncate)
