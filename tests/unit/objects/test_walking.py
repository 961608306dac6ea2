"""Fetching ahead of a task from directory to directory (with bindings: unit/vfs)."""

import trio.testing

from stagefs.model import Inode
from stagefs.namespace.node import STAGING_INODE, Node, StagedObject
from tests.unit.objects.conftest import MakeReading, Reading

FILES = 6


def directories(reading: Reading, count: int) -> list[Inode]:
    made = [reading.namespace.make_directory(STAGING_INODE, f"d{n}") for n in range(count)]
    return [node.inode for node in made]


def fill(reading: Reading, directory: Inode) -> list[Node]:
    nodes = []
    for number in range(FILES):
        data = f"{directory} {number}".encode()
        url = reading.remote.store(f"/{directory}/f{number}", data)
        staged = StagedObject(
            url=url, version="declared", size_bytes=len(data), mtime_ns=0, validator=None
        )
        nodes.append(reading.namespace.register(directory, f"f{number}", staged))
    return nodes


async def fetched(reading: Reading) -> set[str]:
    """What was asked for, when nothing more is under way."""
    await trio.testing.wait_all_tasks_blocked(0.05)
    return {request.url for request in reading.remote.requests if request.kind == "whole"}


def urls(reading: Reading, directory: Inode) -> set[str]:
    return {reading.remote.url(f"/{directory}/f{number}") for number in range(FILES)}


async def test_names_that_become_known_later_are_fetched_ahead_then(
    make_reading: MakeReading,
) -> None:
    async with make_reading() as reading:
        first, second, third, fourth = directories(reading, 4)
        for node in fill(reading, first):
            await reading.read(node)
        await reading.read(fill(reading, second)[0])
        assert await fetched(reading) == urls(reading, first) | urls(reading, second)
        for directory in (third, fourth):
            fill(reading, directory)
            reading.objects.listed(directory)
        assert await fetched(reading) == (
            urls(reading, first) | urls(reading, second) | urls(reading, third)
        ), "the third is the next one, the fourth is not"
