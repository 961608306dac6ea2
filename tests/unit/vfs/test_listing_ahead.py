"""A task that goes through a bound tree as `find` does: names and small files come ahead of it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio.testing

from stagefs.cache.store import Cache
from stagefs.config import NamespaceSettings
from stagefs.model import MIB, Inode
from stagefs.namespace.node import STAGING_INODE, Node
from stagefs.namespace.store import Namespace
from stagefs.vfs.bindings import Bindings
from tests.unit.objects.conftest import SETTINGS, Reading

DIRECTORIES, FILES = 12, 8


class Tree:
    """``/top/d00/f0`` and so on at a remote, bound as ``top``."""

    def __init__(self, reading: Reading, bindings: Bindings) -> None:
        self._reading = reading
        self._bindings = bindings
        for number in range(DIRECTORIES):
            for part in range(FILES):
                path = f"/top/d{number:02d}/f{part}"
                reading.remote.store(path, path.encode())
        url = reading.remote.url("/top")
        self._top = reading.namespace.bind(STAGING_INODE, "top", url, 60.0, mode=0o755)

    async def directory(self, number: int) -> Node:
        """As a task sees it that lists it."""
        await self._bindings.listed(self._reading.namespace.node(self._top.inode))
        node = self._found(self._top.inode, f"d{number:02d}")
        await self._bindings.listed(node)
        return node

    async def read(self, directory: Node, part: int) -> bytes:
        return await self._reading.read(self._found(directory.inode, f"f{part}"))

    def _found(self, directory: Inode, name: str) -> Node:
        return self._reading.namespace.lookup(directory, name)

    async def asked(self, kind: str) -> list[str]:
        """The paths below top of such requests, sorted, when nothing more is under way."""
        await trio.testing.wait_all_tasks_blocked(0.05)
        above = f"{self._reading.remote.url('/top')}/"
        requests = [one for one in self._reading.remote.requests if one.kind == kind]
        return sorted(one.url.removeprefix(above) for one in requests if one.url.startswith(above))


@asynccontextmanager
async def bound_tree(tmp_path: Path) -> AsyncIterator[Tree]:
    namespace = Namespace.open(tmp_path / "namespace.sqlite")
    cache = Cache.open(tmp_path / "cache", capacity_bytes=256 * MIB, free_floor_bytes=0)
    reading = Reading(namespace, cache, SETTINGS)
    bindings = Bindings(
        namespace=namespace,
        objects=reading.objects,
        remote_for=lambda _url: reading.remote,
        read=SETTINGS,
        settings=NamespaceSettings(),
        names_changed=lambda _names: None,
    )
    try:
        async with reading.objects.running(), bindings.running():
            yield Tree(reading, bindings)
    finally:
        cache.close()
        namespace.close()


async def test_one_directory_brings_no_other(tmp_path: Path) -> None:
    async with bound_tree(tmp_path) as tree:
        await tree.directory(3)
        assert await tree.asked("list") == ["d03"]


async def test_directories_are_listed_ahead_of_who_goes_from_one_to_the_next(
    tmp_path: Path,
) -> None:
    async with bound_tree(tmp_path) as tree:
        await tree.directory(0)
        await tree.directory(1)
        assert await tree.asked("list") == ["d00", "d01", "d02", "d03"]
        await tree.directory(2)
        assert await tree.asked("list") == [f"d{number:02d}" for number in range(7)]
        for number in range(3, DIRECTORIES):
            await tree.directory(number)
        assert await tree.asked("list") == [f"d{number:02d}" for number in range(DIRECTORIES)]


async def test_a_jump_ends_it(tmp_path: Path) -> None:
    async with bound_tree(tmp_path) as tree:
        await tree.directory(5)
        await tree.directory(1)
        assert await tree.asked("list") == ["d01", "d05"]


async def test_names_alone_fetch_no_file(tmp_path: Path) -> None:
    async with bound_tree(tmp_path) as tree:
        for number in range(DIRECTORIES):
            await tree.directory(number)
        assert await tree.asked("whole") == []


async def test_files_of_the_next_directories_come_ahead(tmp_path: Path) -> None:
    async with bound_tree(tmp_path) as tree:
        for number in range(2):
            directory = await tree.directory(number)
            for part in range(FILES if number == 0 else 1):
                assert await tree.read(directory, part) == f"/top/d{number:02d}/f{part}".encode()
        here = {f"d{number:02d}/f{part}" for number in range(2) for part in range(FILES)}
        fetched = set(await tree.asked("whole"))
        assert here <= fetched, "the rest of the second directory is not fetched at once"
        assert {path.partition("/")[0] for path in fetched} == {"d00", "d01", "d02"}


async def test_a_tree_is_read_with_few_waits_and_each_file_fetched_once(tmp_path: Path) -> None:
    async with bound_tree(tmp_path) as tree:
        waits = 0
        for number in range(DIRECTORIES):
            directory = await tree.directory(number)
            for part in range(FILES):
                fetched = await tree.asked("whole")
                waits += f"d{number:02d}/f{part}" not in fetched
                assert await tree.read(directory, part) == f"/top/d{number:02d}/f{part}".encode()
        fetched = await tree.asked("whole")
        assert len(fetched) == len(set(fetched)) == DIRECTORIES * FILES
        assert waits <= 4, "of the first directory two files, of the second one"


async def test_one_file_of_each_directory_brings_no_other(tmp_path: Path) -> None:
    async with bound_tree(tmp_path) as tree:
        for number in range(DIRECTORIES):
            await tree.read(await tree.directory(number), 0)
        assert await tree.asked("whole") == [f"d{number:02d}/f0" for number in range(DIRECTORIES)]


async def test_what_nobody_reads_ends_it(tmp_path: Path) -> None:
    """All of the first directory, then one file of each: little comes in vain."""
    async with bound_tree(tmp_path) as tree:
        first = await tree.directory(0)
        for part in range(FILES):
            await tree.read(first, part)
        for number in range(1, DIRECTORIES):
            await tree.read(await tree.directory(number), 0)
            await tree.asked("whole")
        touched = {path.partition("/")[0] for path in await tree.asked("whole") if path[-1] != "0"}
        assert touched <= {"d00", "d01", "d02"}
