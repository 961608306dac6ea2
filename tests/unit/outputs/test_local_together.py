"""Several tasks at work on one file while bytes of its base are on their way."""

import itertools
import os
from collections.abc import Callable, Sequence

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from stagefs.errors import NoSpace, RemoteUnavailable
from stagefs.model import MIB, Inode
from stagefs.outputs import local
from tests.unit.outputs.local_rig import CHUNK, Rig

BASE = bytes(range(1, 49))
SIZE = len(BASE)


class Gates:
    """Reads of a base wait here until somebody lets one go; nobody waits after ``open_all``."""

    def __init__(self) -> None:
        self.waiting: list[trio.Event] = []
        self.are_open = False

    async def wait(self) -> None:
        if self.are_open:
            return
        gate = trio.Event()
        self.waiting.append(gate)
        await gate.wait()

    def open(self, pick: int = 0) -> None:
        self.waiting.pop(pick % len(self.waiting)).set()

    async def open_all(self, picks: Sequence[int] = ()) -> None:
        """One after the other, in any order, until no more come."""
        for pick in itertools.chain(picks, itertools.repeat(0)):
            await trio.testing.wait_all_tasks_blocked(0.001)
            if not self.waiting:
                self.are_open = True
                return
            self.open(pick)


@pytest.fixture
def gates(rig: Rig) -> Gates:
    gates = Gates()
    rig.reading = gates.wait
    return gates


async def test_one_copy_of_a_chunk_serves_all_writers(rig: Rig, gates: Gates) -> None:
    node = rig.node(1, BASE)
    async with trio.open_nursery() as nursery:
        for at in range(1, CHUNK, 2):
            nursery.start_soon(rig.write, node, at, b"x")
        await gates.open_all()
    assert rig.base_reads == [(1, 0, CHUNK)]
    assert (await rig.read(node, 0, CHUNK)) == bytes(
        ord("x") if at % 2 else BASE[at] for at in range(CHUNK)
    )


async def test_writers_of_two_chunks_do_not_wait_for_each_other(rig: Rig, gates: Gates) -> None:
    node = rig.node(1, BASE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.write, node, 1, b"x")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(rig.write, node, CHUNK + 1, b"y")
        await trio.testing.wait_all_tasks_blocked()
        gates.open(1)
        await trio.testing.wait_all_tasks_blocked()
        assert await rig.read(node, CHUNK, 3) == bytes([BASE[CHUNK], ord("y"), BASE[CHUNK + 2]])
        # Neither do those that need nothing of the base.
        assert rig.files.write_now(node, 2 * CHUNK, b"z" * CHUNK) == CHUNK
        await rig.files.truncate(node, SIZE + 3)
        gates.open()


async def test_a_writer_that_gives_up_leaves_the_chunk_to_the_others(
    rig: Rig, gates: Gates
) -> None:
    node = rig.node(1, BASE)
    impatient = trio.CancelScope()

    async def write_impatiently() -> None:
        with impatient:
            await rig.write(node, 1, b"x")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write_impatiently)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(rig.write, node, 2, b"y")
        await trio.testing.wait_all_tasks_blocked()
        impatient.cancel()
        await trio.testing.wait_all_tasks_blocked()
        gates.waiting.pop(0)
        await gates.open_all()
    assert await rig.read(node, 0, 4) == bytes([1, 2, ord("y"), 4])
    assert rig.files.copies() == []


async def test_a_base_that_cannot_be_had_fails_the_writer_and_changes_nothing(rig: Rig) -> None:
    node = rig.node(1, BASE)

    async def unreachable() -> None:
        raise RemoteUnavailable("gone for a minute")

    rig.reading = unreachable
    for _try in range(2):
        with pytest.raises(RemoteUnavailable):
            await rig.write(node, 1, b"x")
    before = rig.files.live(node)
    assert before.size_bytes == SIZE
    rig.reading = None
    assert await rig.read(node) == BASE
    assert await rig.write(node, 1, b"x") == 1
    assert await rig.read(node) == b"\x01x" + BASE[2:]


async def test_copies_under_way_can_be_seen(rig: Rig, gates: Gates) -> None:
    node = rig.node(1, BASE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.files.complete, node, lambda _bytes: None)
        nursery.start_soon(rig.write, node, SIZE - 1, b"x")
        await trio.testing.wait_all_tasks_blocked()
        gates.open()
        await trio.testing.wait_all_tasks_blocked()
        (copy,) = rig.files.copies()
        assert (copy.inode, copy.copied_bytes, copy.size_bytes) == (1, CHUNK, SIZE)
        await gates.open_all()
    assert rig.files.copies() == []
    assert rig.nodes[Inode(1)].base_bytes == 0


async def test_a_slow_disk_is_written_to_in_threads(rig: Rig) -> None:
    """The event loop goes on, writes and cuts keep their order."""
    rig.daemon(slow_write_s=0.0)
    node, plain = rig.node(1, BASE), rig.node(2)
    assert rig.files.write_now(plain, 0, b"slow") == 4
    assert rig.files.write_now(plain, 4, b"x") is None
    async with trio.open_nursery() as nursery:
        for at in range(0, 40, 4):
            nursery.start_soon(rig.write, plain, at, b"abcd")
            nursery.start_soon(rig.write, node, at + 1, b"abcd")
    assert await rig.read(plain) == b"abcd" * 10
    assert await rig.read(node) == BASE[:1] + b"abcd" * 10 + BASE[41:]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.write, node, 2, b"12345678")
        nursery.start_soon(rig.files.truncate, node, 5)
    assert await rig.read(node) in (b"\x01a123", b"\x01a12345678")


class WatchedOs:
    """In place of ``os``: what it names in ``waiting`` begins only after ``go_on``."""

    def __init__(self, *waiting: str) -> None:
        self._waiting = waiting
        self.called: list[str] = []
        self.begun = trio.Event()
        self.go_on = trio.Event()

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def fsync(self, fd: int) -> None:
        self._call("fsync")
        os.fsync(fd)

    def fdatasync(self, fd: int) -> None:
        self._call("fdatasync")
        os.fdatasync(fd)

    def ftruncate(self, fd: int, size_bytes: int) -> None:
        self._call("ftruncate")
        os.ftruncate(fd, size_bytes)

    def _call(self, name: str) -> None:
        self.called.append(name)
        if name in self._waiting and not self.go_on.is_set():
            trio.from_thread.run_sync(self.begun.set)
            trio.from_thread.run(self.go_on.wait)


async def test_callers_of_sync_share_it(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    node = rig.node(1)
    await rig.write(node, 0, b"x")
    watched = WatchedOs("fsync")
    monkeypatch.setattr(local, "os", watched)

    async def sync(data_only: bool) -> None:
        await rig.files.sync(node, data_only=data_only)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sync, False)
        await watched.begun.wait()
        for _caller in range(5):
            nursery.start_soon(sync, False)
        await trio.testing.wait_all_tasks_blocked()
        for _caller in range(5):
            nursery.start_soon(sync, True)
        await trio.testing.wait_all_tasks_blocked()
        # What the first one may have missed is in the second.
        watched.go_on.set()
    assert watched.called == ["fsync", "fsync"]
    await sync(True)
    assert watched.called == ["fsync", "fsync", "fdatasync"]


async def test_a_large_cut_is_not_overtaken(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    node = rig.node(1)
    await rig.write(node, 100 * MIB, b"end")
    watched = WatchedOs("ftruncate")
    monkeypatch.setattr(local, "os", watched)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.files.truncate, node, 2)
        await watched.begun.wait()
        assert rig.files.write_now(node, 0, b"early") is None
        nursery.start_soon(rig.write, node, 0, b"abcdef")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(rig.files.truncate, node, 90 * MIB)
        await trio.testing.wait_all_tasks_blocked()
        assert rig.files.live(node).size_bytes == 100 * MIB + 3
        watched.go_on.set()
    assert rig.files.live(node).size_bytes == 90 * MIB
    assert await rig.read(node, 0, 8) == b"abcdef\0\0"


async def test_nothing_grows_behind_a_cut_that_was_not_noted(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.daemon(chunk_bytes=MIB)
    node = rig.node(1, bytes(70 * MIB))
    await rig.write(node, 0, b"abc")
    watched = WatchedOs("ftruncate")
    monkeypatch.setattr(local, "os", watched)
    rig.is_full = True

    async def grow_in_vain() -> None:
        with pytest.raises(NoSpace):
            await rig.files.truncate(node, MIB)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.files.truncate, node, 2)
        await watched.begun.wait()
        nursery.start_soon(grow_in_vain)
        await trio.testing.wait_all_tasks_blocked()
        watched.go_on.set()
    assert await rig.read(node) == b"ab"


async def test_a_file_at_work_stays_in_the_table(rig: Rig, gates: Gates) -> None:
    rig.daemon(open_files_max=2)
    node = rig.node(1, BASE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.write, node, 1, b"x")
        await trio.testing.wait_all_tasks_blocked()
        for number in range(2, 9):
            await rig.write(rig.node(number), 0, b"other")
        nursery.start_soon(rig.write, node, 2, b"y")
        await trio.testing.wait_all_tasks_blocked()
        assert len(gates.waiting) == 1
        await gates.open_all()
    assert await rig.read(node, 0, 4) == b"\x01xy\x04"


async def test_what_is_not_in_memory_is_waited_for(rig: Rig) -> None:
    """A read that cannot be answered at once is not answered in part."""
    node = rig.node(1)
    data = bytes(n % 251 for n in range(MIB))
    # In pieces: the kernel forgets no part of what it holds as one.
    for at in range(0, MIB, MIB // 16):
        await rig.write(node, at, data[at : at + MIB // 16])
    await rig.files.sync(node, data_only=False)
    fd = rig.files.open_whole(node)
    os.posix_fadvise(fd, MIB // 2, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    now = rig.files.read_now(node, 0, MIB)
    assert now is None or now == data
    assert await rig.files.read(node, 0, MIB) == data


# Any few operations at once, the base's bytes coming in any order: the outcome is that of the
# operations one after the other, in some order.

Change = tuple[str, int, int]
CHANGE = st.one_of(
    st.tuples(st.just("write"), st.integers(0, SIZE + 4), st.integers(1, 40)),
    st.tuples(st.just("truncate"), st.integers(0, SIZE + 8), st.just(0)),
    st.tuples(st.just("complete"), st.just(0), st.just(0)),
)


def applied(content: bytes, change: Change, mark: int) -> bytes:
    kind, at, length = change
    if kind == "complete":
        return content
    if kind == "truncate":
        return content[:at].ljust(at, b"\0")
    longer = content.ljust(at, b"\0")
    return longer[:at] + bytes([mark]) * length + longer[at + length :]


def outcomes(changes: Sequence[Change]) -> set[bytes]:
    found = set()
    for order in itertools.permutations(enumerate(changes)):
        content = BASE
        for number, change in order:
            content = applied(content, change, 200 + number)
        found.add(content)
    return found


def carried_out(rig: Rig, change: Change, mark: int) -> Callable[[], object]:
    node = rig.node(1)
    kind, at, length = change
    if kind == "complete":
        return lambda: rig.files.complete(node, lambda _bytes: None)
    if kind == "truncate":
        return lambda: rig.files.truncate(node, at)
    return lambda: rig.write(node, at, bytes([mark]) * length)


@settings(max_examples=150, deadline=None)
@given(
    changes=st.lists(CHANGE, min_size=2, max_size=4),
    picks=st.lists(st.integers(0, 5), max_size=8),
    slow=st.booleans(),
)
def test_changes_at_once_are_as_if_one_after_the_other(
    tmp_path_factory: pytest.TempPathFactory,
    changes: list[Change],
    picks: list[int],
    slow: bool,
) -> None:
    rig = Rig(tmp_path_factory.getbasetemp() / "together")
    rig.files.remove([Inode(1)])
    rig.daemon(slow_write_s=0.0 if slow else 60.0)
    gates = Gates()
    rig.reading = gates.wait
    rig.node(1, BASE)
    expected = outcomes(changes)

    async def all_at_once() -> None:
        async with trio.open_nursery() as nursery:
            for number, change in enumerate(changes):
                nursery.start_soon(carried_out(rig, change, 200 + number))  # type: ignore[arg-type]
            nursery.start_soon(read_beside)
            await gates.open_all(picks)
        rig.reading = None
        assert await rig.read(rig.node(1)) in expected
        rig.daemon()
        assert await rig.read(rig.node(1)) in expected

    async def read_beside() -> None:
        for byte, *possible in zip(await rig.read(rig.node(1)), *padded, strict=False):
            assert byte in possible or byte >= 200

    longest = max(map(len, expected | {BASE}))
    padded = [each.ljust(longest, b"\0") for each in expected | {BASE, bytes(longest)}]
    trio.run(all_at_once)
