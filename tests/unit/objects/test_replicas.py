"""Reading an object that has replicas, on remotes in this process."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from stagefs.cache.store import Cache
from stagefs.errors import (
    AccessDenied,
    ChecksumMismatch,
    ObjectChanged,
    ObjectMissing,
    RemoteUnavailable,
    StageFSError,
)
from stagefs.model import MIB, Checksum, Span
from stagefs.namespace.node import STAGING_INODE, Node, Replica, StagedObject
from stagefs.namespace.store import Namespace
from stagefs.objects import replica_choice, replicas
from stagefs.objects.objects import Objects
from stagefs.remote.base import Remote
from stagefs.remote.memory import MemoryRemote
from tests.unit.objects.conftest import SETTINGS
from tests.unit.objects.test_objects import random_bytes, sha256

SIZES = [4096, 20 * MIB]


class Replicated:
    """One daemon's worth of reading from two servers; the object's own URL is at ``first``."""

    def __init__(self, namespace: Namespace, cache: Cache) -> None:
        self.namespace = namespace
        self.first = MemoryRemote("memory://first")
        self.other = MemoryRemote("memory://other")
        self.objects = Objects(
            namespace=namespace,
            cache=cache,
            inline_flags=0,
            remote_for=self._remote_for,
            settings=SETTINGS,
        )

    def _remote_for(self, url: str) -> Remote:
        return self.first if url.startswith("memory://first") else self.other

    async def stage(
        self,
        data: bytes,
        *,
        other: bytes | None = None,
        checksum: Checksum | None = None,
        asked: bool = True,
    ) -> Node:
        """An object with a replica.  Not ``asked``: as a catalog registers it."""
        url = self.first.store("/f", data)
        said = await self.first.stat(url) if asked else None
        staged = StagedObject(
            url=url,
            version=str(checksum) if checksum else said.validator if said else "declared:x",
            size_bytes=len(data),
            mtime_ns=0,
            checksum=checksum,
            validator=said.validator if said else None,
        )
        node = self.namespace.register(STAGING_INODE, "f", staged)
        there = self.other.store("/g", data if other is None else other)
        validator = (await self.other.stat(there)).validator
        assert node.object_id is not None
        self.namespace.put_replica(node.object_id, Replica(url=there, validator=validator))
        self.first.requests.clear()
        self.other.requests.clear()
        return node

    async def read(self, node: Node) -> bytes:
        opened = self.objects.open(node)
        pieces = [
            bytes(await self.objects.read(opened, at, MIB)) for at in range(0, node.size_bytes, MIB)
        ]
        self.objects.release(opened)
        return b"".join(pieces)


Make = Callable[[], AbstractAsyncContextManager[Replicated]]


@pytest.fixture
def replicated(tmp_path: Path) -> Make:
    """Called twice, it is the next daemon."""

    @asynccontextmanager
    async def make() -> AsyncIterator[Replicated]:
        namespace = Namespace.open(tmp_path / "namespace.sqlite")
        cache = Cache.open(tmp_path / "cache", capacity_bytes=256 * MIB, free_floor_bytes=0)
        made = Replicated(namespace, cache)
        try:
            async with made.objects.running():
                yield made
        finally:
            cache.close()
            namespace.close()

    return make


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize(
    "error", [ObjectMissing("no"), AccessDenied("no"), RemoteUnavailable("gone")]
)
async def test_the_other_is_read_when_the_first_is_gone(
    replicated: Make, size: int, asked: bool, error: StageFSError
) -> None:
    data = random_bytes(size)
    async with replicated() as reading:
        node = await reading.stage(data, asked=asked)
        reading.first.forbid("/f", error)
        assert await reading.read(node) == data
        assert reading.other.bytes_requested() or size == 4096
        # Then nothing more is asked of anybody.
        before = len(reading.first.requests), len(reading.other.requests)
        await reading.objects.warm(node)  # returns when it is stored
        assert await reading.read(node) == data
        assert (len(reading.first.requests), len(reading.other.requests)) == before
    async with replicated() as reading:  # the next daemon serves it from the cache
        node = reading.namespace.resolve("staging/f")
        assert await reading.read(node) == data
        assert not reading.first.requests
        assert not reading.other.requests


async def test_a_cut_in_the_middle_goes_on_where_it_was(replicated: Make) -> None:
    data = random_bytes(16 * MIB)
    async with replicated() as reading:
        node = await reading.stage(data)
        reading.first.cut_after_bytes = MIB // 2
        reading.first.failures += [RemoteUnavailable("cut")] * 100
        assert await reading.read(node) == data
        # What had landed was not asked for again.
        firsts = [one.span for one in reading.other.requests if one.span is not None]
        assert Span(MIB // 2, MIB // 2) in firsts


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence counts after two seconds: long beside anything that these tests wait for."""
    for module in (replicas, replica_choice):
        monkeypatch.setattr(module, "STALLED_S", 2.0)
    monkeypatch.setattr(replica_choice, "DEMOTED_S", 0.2)


@pytest.mark.usefixtures("short_pauses")
async def test_one_that_is_silent_is_left(replicated: Make) -> None:
    data = random_bytes(2 * MIB)
    async with replicated() as reading:
        node = await reading.stage(data)
        reading.first.gate = trio.Event()
        assert await reading.read(node) == data
        assert reading.first.requests


async def test_when_all_are_dead_one_error_names_them(replicated: Make) -> None:
    for size in SIZES:
        async with replicated() as reading:
            node = await reading.stage(random_bytes(size))
            reading.first.forbid("/f", ObjectMissing("memory://first/f does not exist."))
            reading.other.forbid("/g", RemoteUnavailable("connection refused"))
            with pytest.raises(StageFSError) as caught:
                await reading.read(node)
            said = str(caught.value)
            assert said.startswith("No replica of memory://first/f can be read: ")
            assert "memory://first/f does not exist" in said
            assert "memory://other/g: connection refused" in said
            assert "\n" not in said
            reading.namespace.remove(STAGING_INODE, "f")


@pytest.mark.parametrize("size", SIZES)
async def test_a_replica_that_changed_is_left_out(replicated: Make, size: int) -> None:
    data = random_bytes(size)
    async with replicated() as reading:
        node = await reading.stage(data)
        reading.other.store("/g", random_bytes(size, seed=5))
        assert await reading.read(node) == data


async def test_only_a_replica_that_changed_is_left_and_it_is_not_read(replicated: Make) -> None:
    async with replicated() as reading:
        node = await reading.stage(random_bytes(3 * MIB))
        reading.other.store("/g", random_bytes(3 * MIB, seed=5))
        reading.first.forbid("/f", RemoteUnavailable("gone"))
        with pytest.raises(
            StageFSError, match=r"memory://other/g: it has another version than was compared"
        ):
            await reading.read(node)


async def test_the_objects_own_url_decides_about_its_version(replicated: Make) -> None:
    async with replicated() as reading:
        node = await reading.stage(random_bytes(20 * MIB))
        reading.first.store("/f", random_bytes(20 * MIB, seed=5))
        with pytest.raises(ObjectChanged):
            await reading.read(node)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wrong", ["first", "other"])
async def test_a_checksum_finds_the_wrong_one(replicated: Make, size: int, wrong: str) -> None:
    data, bad = random_bytes(size), random_bytes(size, seed=5)
    async with replicated() as reading:
        node = await reading.stage(
            bad if wrong == "first" else data,
            other=bad if wrong == "other" else data,
            checksum=sha256(data),
        )
        assert await reading.read(node) == data


@pytest.mark.parametrize("size", SIZES)
async def test_both_wrong_is_a_mismatch(replicated: Make, size: int) -> None:
    bad = random_bytes(size, seed=5)
    async with replicated() as reading:
        node = await reading.stage(bad, other=bad, checksum=sha256(random_bytes(size)))
        with pytest.raises(ChecksumMismatch):
            await reading.read(node)


async def test_one_that_sends_whole_objects_only_is_passed_over(replicated: Make) -> None:
    data = random_bytes(20 * MIB)
    async with replicated() as reading:
        node = await reading.stage(data)
        reading.other.ranges = False
        assert await reading.read(node) == data
        assert len(reading.other.requests) == 1, "it was asked for parts again and again"


async def test_only_one_that_sends_whole_objects_is_left(replicated: Make) -> None:
    data = random_bytes(5 * MIB)
    async with replicated() as reading:
        node = await reading.stage(data)
        reading.other.ranges = False
        reading.first.forbid("/f", ObjectMissing("gone"))
        assert await reading.read(node) == data


async def test_a_catalogs_object_goes_on_at_its_first_remote_when_replicas_are_removed(
    replicated: Make,
) -> None:
    data = random_bytes(20 * MIB)
    async with replicated() as reading:
        node = await reading.stage(data, asked=False)
        opened = reading.objects.open(node)
        reading.first.forbid("/f", RemoteUnavailable("gone"))
        assert bytes(await reading.objects.read(opened, 0, 10)) == data[:10]
        reading.objects.release(opened)
        assert node.object_id is not None
        reading.namespace.remove_replica(node.object_id, "memory://other/g")
    async with replicated() as reading:
        reading.first.store("/f", data)
        node = reading.namespace.resolve("staging/f")
        assert await reading.read(node) == data
        assert reading.namespace.node(node.inode).validator is not None


async def test_with_a_checksum_the_content_stays_when_the_first_changes(replicated: Make) -> None:
    data = random_bytes(20 * MIB)
    async with replicated() as reading:
        node = await reading.stage(data, checksum=sha256(data))
        reading.first.store("/f", random_bytes(20 * MIB, seed=5))
        assert await reading.read(node) == data


async def test_looking_at_an_object_changes_nothing_for_its_readers(replicated: Make) -> None:
    data = random_bytes(3 * MIB)
    async with replicated() as reading:
        node = await reading.stage(data)
        assert node.object_id is not None
        assert [one.url for one in reading.objects.replicas.ordered(node)] == [
            "memory://first/f",
            "memory://other/g",
        ]
        reading.namespace.remove_replica(node.object_id, "memory://other/g")
        reading.objects.replicas.changed(node.object_id)
        assert len(reading.objects.replicas.ordered(node)) == 1
        reading.first.forbid("/f", RemoteUnavailable("gone"))
        with pytest.raises(RemoteUnavailable, match=r"^gone$"):
            await reading.read(node)
        assert len(reading.first.requests) == 1, "its only remote was not asked just once"


@pytest.mark.usefixtures("short_pauses")
async def test_one_that_is_well_again_is_found_out_by_no_reader(replicated: Make) -> None:
    data = random_bytes(64 * MIB)
    async with replicated() as reading:
        node = await reading.stage(data)
        reading.first.gate = trio.Event()
        opened = reading.objects.open(node)
        assert bytes(await reading.objects.read(opened, 0, 10)) == data[:10]

        def asked(kind: str) -> int:
            return [one.kind for one in reading.first.requests].count(kind)

        fetches = asked("fetch")
        for at in range(4 * MIB, node.size_bytes, 4 * MIB):
            await trio.sleep(0.05)
            assert bytes(await reading.objects.read(opened, at, 10)) == data[at : at + 10]
        assert asked("stat") == 1, "nobody asked whether it is well again"
        assert asked("fetch") == fetches, "a reader was to find out"
        reading.first.gate.set()
        await trio.testing.wait_all_tasks_blocked()
        order = reading.objects.replicas.ordered(node)
        assert not any(one.is_demoted(trio.current_time()) for one in order)
        reading.objects.release(opened)
