"""A disk with no room left: NoSpace to the writer, and nothing that was written is damaged."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagefs.errors import NoSpace
from stagefs.model import KIB, MIB, Inode
from stagefs.namespace.node import Node
from tests.unit.outputs.local_rig import Rig

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a tmpfs")

CHUNK = 64 * KIB
BASE = bytes(1 + n % 250 for n in range(4 * CHUNK + 100))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.fixture
def small(disk: Path) -> Rig:
    rig = Rig(disk / "scratch")
    rig.daemon(chunk_bytes=CHUNK)
    return rig


def fill_up(disk: Path, *, leaving: int = 0) -> None:
    """All but ``leaving`` bytes are taken."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(4096)) == 4096:
                pass
        file.truncate(file.tell() - leaving)


async def refused(rig: Rig, node: Node, offset: int, data: bytes) -> None:
    with pytest.raises(NoSpace, match="is full"):
        rig.files.write_now(node, offset, data)
    with pytest.raises(NoSpace, match="is full"):
        await rig.files.write(node, offset, data)


async def test_a_write_takes_what_there_is_room_for(small: Rig, disk: Path) -> None:
    node, other = small.node(1), small.node(2)
    await small.write(node, 0, b"old" * 1000)
    fill_up(disk, leaving=8192)
    done = await small.write(node, 3000, b"n" * MIB)
    assert 0 < done < MIB
    assert await small.read(node) == b"old" * 1000 + b"n" * done
    await refused(small, node, 3000 + done, b"n" * 4096)
    await refused(small, other, 0, b"x")
    assert await small.read(other) == b""
    assert await small.read(node) == b"old" * 1000 + b"n" * done
    # What has its room already can be written.
    assert await small.write(node, 0, b"new") == 3
    (disk / "filler").unlink()
    assert await small.write(other, 0, b"x") == 1
    assert await small.write(node, 3000 + done, b"n") == 1


async def test_a_chunk_that_cannot_be_copied_stays_the_base_s(small: Rig, disk: Path) -> None:
    node = small.node(1, BASE)
    await small.write(node, CHUNK + 1, b"x")
    expected = bytearray(BASE)
    expected[CHUNK + 1] = ord("x")
    fill_up(disk, leaving=CHUNK // 2)
    before = small.files.live(node)
    with pytest.raises(NoSpace, match="is full"):
        await small.write(node, 5, b"y")
    after = small.files.live(node)
    assert (after.size_bytes, after.mtime_ns) == (before.size_bytes, before.mtime_ns)
    assert await small.read(node) == expected
    with pytest.raises(NoSpace, match="is full"):
        await small.files.complete(node, lambda _bytes: None)
    small.daemon()
    assert await small.read(node) == expected
    assert await small.write(node, CHUNK + 2, b"z") == 1
    (disk / "filler").unlink()
    expected[CHUNK + 2] = ord("z")
    await small.files.complete(node, lambda _bytes: None)
    assert await small.read(node) == expected
    assert small.nodes[Inode(1)].base_bytes == 0


async def test_whole_chunks_of_which_a_part_fits_are_not_there(small: Rig, disk: Path) -> None:
    """A part of a chunk cannot hide the base's."""
    node = small.node(1, BASE)
    await small.write(node, len(BASE), b"end")
    fill_up(disk, leaving=CHUNK + CHUNK // 2)
    done = await small.write(node, 0, b"n" * 3 * CHUNK)
    assert done == CHUNK
    assert await small.read(node) == b"n" * CHUNK + BASE[CHUNK:] + b"end"
    await refused(small, node, CHUNK, b"n" * 3 * CHUNK)
    assert await small.read(node) == b"n" * CHUNK + BASE[CHUNK:] + b"end"


async def test_a_full_disk_can_be_relieved_from_inside(small: Rig, disk: Path) -> None:
    """Cutting works although the namespace, on the same disk, cannot note it at once."""
    node = small.node(1, BASE)
    await small.write(node, 0, b"n" * 2 * CHUNK)
    fill_up(disk)
    small.is_full = True
    await small.files.truncate(node, 10)
    assert small.files.live(node).size_bytes == 10
    assert await small.read(node) == b"n" * 10
    # It must not grow as long as the namespace has more of the base than can be seen.
    for _again in range(2):
        with pytest.raises(NoSpace, match="namespace"):
            await small.files.truncate(node, 3 * CHUNK)
        with pytest.raises(NoSpace, match="namespace"):
            await small.write(node, 3 * CHUNK, b"x")
        assert await small.write(node, 5, b"abc") == 3
        small.daemon()
    small.is_full = False
    await small.files.truncate(node, 2 * CHUNK)
    assert small.nodes[Inode(1)].base_bytes == 10
    assert await small.read(node) == b"nnnnnabcnn" + bytes(2 * CHUNK - 10)
