"""A kill at every step of every change: the file is as it was, or as it shall be.

Then the operation is sent again, as the kernel does, and takes effect once.
"""

import contextlib
from collections.abc import Awaitable, Callable

import pytest

from stagefs.model import Inode
from tests.unit.outputs.local_mortal import Killed, born
from tests.unit.outputs.local_rig import CHUNK, Rig

BASE = bytes(range(1, 101))
STEPS_MAX = 100

# On the file with this number.
Operation = Callable[[Rig, int], Awaitable[object]]


def write(offset: int, data: bytes) -> Operation:
    return lambda rig, number: rig.write(rig.node(number), offset, data)


def truncate(size: int) -> Operation:
    return lambda rig, number: rig.files.truncate(rig.node(number), size)


def complete() -> Operation:
    return lambda rig, number: rig.files.complete(rig.node(number), lambda _bytes: None)


def sync() -> Operation:
    return lambda rig, number: rig.files.sync(rig.node(number), data_only=False)


class Case:
    """``before`` are operations that have succeeded, ``change`` is the one that is killed."""

    def __init__(self, name: str, base: bytes, before: list[Operation], change: Operation) -> None:
        self.name = name
        self.base = base
        self.before = before
        self.change = change

    @property
    def writes(self) -> bool:
        return "write" in self.name


CASES = [
    Case("first write of a new file", b"", [], write(3, b"new")),
    Case("write over", b"", [write(0, b"old" * 9)], write(3, b"new" * 9)),
    Case("first write of a copy", BASE, [], write(40, b"new")),
    Case("write over whole chunks", BASE, [], write(CHUNK, b"n" * 3 * CHUNK)),
    Case("write over parts of two chunks", BASE, [write(50, b"o")], write(40, b"n" * CHUNK)),
    Case("write over the end", BASE, [], write(90, b"n" * 40)),
    Case("write at the end", BASE, [], write(100, b"n" * 40)),
    Case("write after a cut", BASE, [truncate(40)], write(38, b"n" * 30)),
    Case("first cut of a copy", BASE, [], truncate(40)),
    Case("cut within a chunk that was changed", BASE, [write(35, b"o")], truncate(40)),
    Case("cut to nothing", BASE, [write(35, b"o")], truncate(0)),
    Case("longer after a cut", BASE, [truncate(40)], truncate(90)),
    Case("longer", BASE, [], truncate(190)),
    Case("complete", BASE, [write(50, b"o"), truncate(90)], complete()),
    Case("complete what was never changed", BASE, [], complete()),
    Case("sync", BASE, [write(50, b"o")], sync()),
]


async def state(rig: Rig, number: int) -> bytes:
    data = await rig.read(rig.node(number))
    assert len(data) == rig.files.live(rig.node(number)).size_bytes
    return data


async def prepare(rig: Rig, number: int, case: Case) -> None:
    rig.node(number, case.base)
    for operation in case.before:
        await operation(rig, number)


async def killed(rig: Rig, number: int, case: Case, step: int, *, half: bool) -> bool:
    """Carry it out in a daemon of its own; False when that ended before ``step``."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        mortal = born(monkeypatch, step, half=half)
        remember = rig.base_shrunk

        def base_shrunk(inode: Inode, base_bytes: int) -> None:
            mortal.step("base_shrunk")
            remember(inode, base_bytes)

        monkeypatch.setattr(rig, "base_shrunk", base_shrunk)
        rig.daemon()
        with contextlib.suppress(Killed):
            await case.change(rig, number)
    rig.daemon()
    return mortal.dead


def explained(found: bytes, old: bytes, new: bytes) -> bool:
    """Each byte, and the size, is an old one or a new one: the part of a write that goes to chunks
    which the file has already needs no other step."""
    size = max(len(old), len(new))
    return len(old) <= len(found) <= len(new) and all(
        byte in pair
        for byte, *pair in zip(found, old.ljust(size, b"\0"), new.ljust(size, b"\0"), strict=False)
    )


@pytest.mark.parametrize("half", [False, True], ids=["between", "within"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_killed_at_every_step(rig: Rig, case: Case, half: bool) -> None:
    await prepare(rig, 1, case)
    old = await state(rig, 1)
    await case.change(rig, 1)
    new = await state(rig, 1)
    for step in range(STEPS_MAX):
        number = 2 + step
        await prepare(rig, number, case)
        dead = await killed(rig, number, case, step, half=half)
        found = await state(rig, number)
        at = f"{found!r} after step {step}"
        assert found in (old, new) or (case.writes and explained(found, old, new)), at
        await case.change(rig, number)
        assert await state(rig, number) == new, f"sent again: {at}"
        rig.daemon()
        assert await state(rig, number) == new, f"the next daemon: {at}"
        if not dead:
            assert found == new
            assert step > 0, "the case has no step at which it could be killed"
            return
    pytest.fail(f"{case.name} takes more than {STEPS_MAX} steps")
