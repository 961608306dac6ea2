"""The one progress bar, drawn by rich on standard error.  Imported only when one is drawn."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from stagefs.staging import values


@contextlib.contextmanager
def bar(unit: str) -> Iterator[values.ProgressCallback]:
    """Draws what it is called with until it is left.  ``unit``: bytes, or what is counted."""
    counts: list[ProgressColumn] = [MofNCompleteColumn()]
    if unit == "bytes":
        counts = [DownloadColumn(binary_units=True), TransferSpeedColumn()]
    drawn = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *counts,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with drawn:
        task = drawn.add_task("", total=None)

        def draw(progress: values.Progress) -> None:
            drawn.update(
                task,
                description=progress.what.encode("utf-8", "replace").decode(),
                completed=progress.done,
                total=progress.total,
            )

        yield draw
