"""Small objects fetched whole, for remotes whose protocol cannot pipeline.

A few requests at a time, each its own call; the results keep the order of the items.
"""

from collections.abc import Awaitable, Callable, Sequence

import trio

from stagefs.errors import ObjectChanged, StageFSError
from stagefs.model import WholeObject
from stagefs.remote.base import WHOLE_OBJECT_BYTES_MAX, BatchItem

BATCH_CONCURRENCY = 8


async def fetch_each(
    fetch_whole: Callable[[BatchItem], Awaitable[WholeObject]],
    items: Sequence[BatchItem],
    *,
    concurrency: int = BATCH_CONCURRENCY,
) -> list[WholeObject | StageFSError]:
    """One result of ``fetch_whole``, or the error it raised, for each item, in order."""
    results: dict[int, WholeObject | StageFSError] = {}
    waiting = iter(enumerate(items))

    async def work() -> None:
        for position, item in waiting:
            try:
                results[position] = await fetch_whole(item)
            except StageFSError as exc:
                results[position] = exc

    async with trio.open_nursery() as nursery:
        for _ in range(min(concurrency, len(items))):
            nursery.start_soon(work)
    return [results[position] for position in range(len(items))]


def too_large(url: str, size_bytes: int) -> ObjectChanged:
    return ObjectChanged(
        f"{url} has {size_bytes} bytes, more than the {WHOLE_OBJECT_BYTES_MAX} that are fetched "
        "whole: it has changed since its size was registered."
    )


def not_the_version(url: str, wanted: str, found: str) -> ObjectChanged:
    return ObjectChanged(
        f"{url} is no longer the version that was asked for ({wanted}), it is {found} now: "
        "stage it in again with --replace to read the new one."
    )


def shorter(url: str, stop: int, size_bytes: int) -> ObjectChanged:
    return ObjectChanged(
        f"{url} has only {size_bytes} bytes where bytes up to {stop} were asked for: "
        "it has changed since it was registered."
    )
