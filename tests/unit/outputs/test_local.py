"""What single operations on local files do, and what they leave alone."""

import os

import pytest

from stagefs.errors import NewerFormat, StateFailed, TooLarge
from stagefs.model import Inode
from tests.unit.outputs.local_rig import CHUNK, LONG_AGO_NS, Rig

BASE = bytes(range(1, 101))


async def test_a_new_file(rig: Rig) -> None:
    node = rig.node(300)
    assert rig.files.live(node) == node
    assert await rig.read(node) == b""
    assert not rig.files.set_times(node, atime_ns=1, mtime_ns=2)
    assert rig.files.blocks(node) == 0
    assert rig.files.write_now(node, 3, b"abc") == 3
    assert bytes(rig.files.read_now(node, 0, 100) or b"") == b"\0\0\0abc"
    live = rig.files.live(node)
    assert live.size_bytes == 6
    assert live.mtime_ns > LONG_AGO_NS
    assert live.atime_ns == LONG_AGO_NS
    assert live.ctime_ns > LONG_AGO_NS
    assert (rig.directory / "2c" / "300").stat().st_mode & 0o777 == 0o600
    rig.daemon()
    assert await rig.read(node, 4, 1) == b"b"
    assert rig.files.live(node) == live


async def test_a_copy_reads_through_and_makes_nothing(rig: Rig) -> None:
    node = rig.node(1, BASE)
    assert await rig.read(node) == BASE
    assert await rig.read(node, 90, 100) == BASE[90:]
    assert await rig.read(node, 100, 1) == b""
    assert rig.files.read_now(node, 0, 1) is None
    assert rig.files.live(node) == node
    assert rig.files.blocks(node) == 1
    assert not rig.files.set_times(node, atime_ns=1, mtime_ns=2)
    assert not list(rig.directory.glob("*/*"))


@pytest.mark.parametrize(
    ("offset", "length", "fetched"),
    [
        (100, 3, []),  # appended
        (150, 3, []),  # beyond the end
        (96, 4, []),  # the whole rest of the last chunk
        (96, 3, [6]),
        (90, 20, [5]),  # a part of the last but one, all of the last
        (16, 16, []),  # exactly a chunk
        (16, 64, []),
        (17, 15, [1]),
        (10, 80, [0, 5]),
        (0, 100, []),
        (0, 1, [0]),
        (0, 0, []),
    ],
)
async def test_only_chunks_that_are_partly_written_are_copied(
    rig: Rig, offset: int, length: int, fetched: list[int]
) -> None:
    node = rig.node(1, BASE)
    data = b"x" * length
    assert await rig.write(node, offset, data) == length
    assert rig.base_reads == [(1, c * CHUNK, min(CHUNK, 100 - c * CHUNK)) for c in fetched]
    expected = bytearray(BASE.ljust(offset, b"\0")) if length else bytearray(BASE)
    expected[offset : offset + length] = data
    assert await rig.read(node) == expected
    rig.daemon()
    assert await rig.read(node) == expected
    assert rig.files.live(node).size_bytes == len(expected)


async def test_truncating_needs_nothing_of_the_base(rig: Rig) -> None:
    node = rig.node(1, BASE)
    await rig.files.truncate(node, 40)
    assert rig.nodes[Inode(1)].base_bytes == 40
    await rig.files.truncate(node, 90)
    assert rig.base_reads == []
    assert await rig.read(node) == BASE[:40] + bytes(50)
    assert await rig.write(node, 41, b"x") == 1
    assert await rig.read(node) == BASE[:40] + b"\0x" + bytes(48)
    assert rig.base_reads[-1] == (1, 0, 40)
    rig.daemon()
    assert await rig.read(rig.node(1)) == BASE[:40] + b"\0x" + bytes(48)


async def test_filling_does_not_show_in_size_and_times(rig: Rig) -> None:
    node = rig.node(1, BASE)
    await rig.files.truncate(node, 99)
    assert rig.files.set_times(node, atime_ns=5_000, mtime_ns=7_000)
    assert rig.files.set_times(node, atime_ns=None, mtime_ns=8_000)
    before = rig.files.live(node)
    assert (before.atime_ns, before.mtime_ns) == (5_000, 8_000)
    told: list[int] = []
    await rig.files.complete(node, told.append)
    after = rig.files.live(node)
    assert (after.size_bytes, after.atime_ns, after.mtime_ns) == (99, 5_000, 8_000)
    assert told == [0, 16, 32, 48, 64, 80, 96, 99]
    assert rig.nodes[Inode(1)].base_bytes == 0
    assert rig.files.copied_bytes == 99
    del rig.bases[Inode(1)]
    fd = rig.files.open_whole(node)
    try:
        assert os.pread(fd, 200, 0) == BASE[:99]
    finally:
        os.close(fd)


async def test_reading_never_shows_in_times(rig: Rig) -> None:
    node = rig.node(1)
    await rig.write(node, 0, b"abc")
    rig.files.set_times(node, atime_ns=5_000, mtime_ns=7_000)
    assert await rig.read(node) == b"abc"
    rig.daemon()
    assert await rig.read(node) == b"abc"
    assert rig.files.live(node).atime_ns == 5_000


async def test_an_empty_file_can_be_opened_whole(rig: Rig) -> None:
    node = rig.node(1)
    fd = rig.files.open_whole(node)
    assert os.pread(fd, 1, 0) == b""
    os.close(fd)
    assert rig.files.live(node).mtime_ns == LONG_AGO_NS


async def test_more_files_than_descriptors(rig: Rig) -> None:
    rig.daemon(open_files_max=4)
    nodes = [rig.node(n, BASE) for n in range(1, 20)]
    for node in nodes:
        await rig.write(node, node.inode, b"!")
    before = len(os.listdir("/proc/self/fd"))
    for node in nodes:
        expected = bytearray(BASE)
        expected[node.inode] = ord("!")
        assert await rig.read(node) == expected
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_removed_files_leave_nothing(rig: Rig) -> None:
    nodes = [rig.node(1, BASE), rig.node(2), rig.node(3, BASE)]
    for node in nodes:
        await rig.write(node, 5, b"x")
    rig.files.remove([node.inode for node in nodes[:2]])
    assert {each.name for each in rig.directory.glob("*/*")} == {"3", "3.map"}
    rig.files.remove([nodes[0].inode])


async def test_a_sweep_spares_what_is_wanted_and_what_is_new(rig: Rig) -> None:
    for number in (1, 2, 3, 257):
        await rig.write(rig.node(number, BASE), 5, b"x")
    (rig.directory / "01" / "1.new").touch()
    (rig.directory / "01" / "notes.txt").touch()
    files = rig.daemon()
    await rig.write(rig.node(4, BASE), 5, b"x")
    assert files.sweep({Inode(1), Inode(3)}) == 2
    assert {each.name for each in rig.directory.glob("*/*")} == {
        *("1", "1.map", "3", "3.map", "4", "4.map", "notes.txt")
    }


async def test_what_was_written_is_not_guessed_at_without_its_map(rig: Rig) -> None:
    node = rig.node(1, BASE)
    await rig.write(node, 5, b"x")
    path = rig.directory / "01" / "1.map"
    header = path.read_bytes()
    path.unlink()
    rig.daemon()
    with pytest.raises(StateFailed, match="has lost its chunk map"):
        rig.files.read_now(node, 0, 1)
    path.write_bytes(b"nonsense")
    with pytest.raises(StateFailed, match="is damaged"):
        await rig.files.write(node, 0, b"x")
    path.write_bytes(header[:7] + b"\x02" + header[8:])
    with pytest.raises(NewerFormat, match="format 2, this one knows 1"):
        await rig.files.truncate(node, 0)
    path.write_bytes(header)
    assert await rig.read(node) == BASE[:5] + b"x" + BASE[6:]


async def test_the_format_of_maps_is_what_it_was(rig: Rig) -> None:
    """A change of the format needs a new number, and a way to read the old."""
    await rig.write(rig.node(1, BASE), 40, b"x")
    assert (rig.directory / "01" / "1.map").read_bytes() == (
        b"SFSMAP\0\x01" + (16).to_bytes(8, "little") + b"\0\0\x01"
    )


async def test_maps_keep_the_size_of_their_chunks(rig: Rig) -> None:
    node = rig.node(1, BASE)
    await rig.write(node, 40, b"x")
    rig.daemon(chunk_bytes=64)
    rig.base_reads.clear()
    await rig.write(node, 17, b"y")
    assert rig.base_reads == [(1, 16, 16)]
    assert await rig.read(node, 16, 32) == b"\x11y" + BASE[18:40] + b"x" + BASE[41:48]


async def test_sizes_that_no_file_can_have(rig: Rig) -> None:
    node = rig.node(1)
    with pytest.raises(TooLarge):
        rig.files.write_now(node, (1 << 63) - 10, b"x")
    with pytest.raises(TooLarge):
        await rig.files.truncate(node, 1 << 62)
    assert rig.files.live(node).size_bytes == 0


async def test_syncing(rig: Rig) -> None:
    for node in (rig.node(1), rig.node(2, BASE)):
        await rig.files.sync(node, data_only=False)
        await rig.write(node, 5, b"x")
        await rig.files.sync(node, data_only=True)
        await rig.files.sync(node, data_only=False)
    assert (await rig.read(rig.node(2)))[5:6] == b"x"


async def test_a_base_that_comes_in_pieces_or_ends_early(rig: Rig) -> None:
    node = rig.node(1, BASE)
    rig.base_read_max = 3
    assert await rig.read(node) == BASE
    await rig.write(node, 17, b"y")
    assert await rig.read(node, 10, 20) == BASE[10:17] + b"y" + BASE[18:30]
    rig.bases[Inode(1)] = BASE[:50]
    with pytest.raises(StateFailed, match="ends at 50"):
        await rig.read(node)
