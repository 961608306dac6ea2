"""What commands print: sizes, JSON, tables, and progress bars.  No decisions here."""

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import click
import msgspec

from stagefs.control.api import encode
from stagefs.errors import StageFSError
from stagefs.staging.values import Progress, ProgressCallback

# A bar for what is over in a moment is only flicker.
BAR_AFTER_S = 0.7
LINES_AT_ONCE = 500

_T = TypeVar("_T")


def human(size_bytes: int) -> str:
    """``10 GiB``, ``1.5 MiB``, ``812 B``."""
    if size_bytes < 1024:
        return f"{size_bytes} B"
    size = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        size /= 1024
        if size < 1023.95 or unit == "PiB":
            break
    return f"{size:.1f}".removesuffix(".0") + f" {unit}"


def when(time_ns: int) -> str:
    """A wall-clock time in the local zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_ns / 1e9))


def shown_name(name: str) -> str:
    """On a terminal a name cannot move the cursor; into a pipe it goes as it is."""
    if not sys.stdout.isatty() or name.isprintable():
        return name
    return "".join(character if character.isprintable() else "?" for character in name)


def print_json(value: msgspec.Struct) -> None:
    click.echo(encode(value))


def print_json_list(values: Iterable[msgspec.Struct]) -> None:
    """One JSON array, written as the values come, some at a time."""
    before = b"["
    for texts in _together(map(encode, values)):
        click.echo(before + b"\n" + b",\n".join(texts), nl=False)
        before = b","
    click.echo(b"[]" if before == b"[" else b"\n]")


def print_lines(lines: Iterable[str]) -> None:
    """Many lines, written as they come, some at a time."""
    for some in _together(lines):
        click.echo("\n".join(some))


def _together(values: Iterable[_T]) -> Iterator[list[_T]]:
    """Lists of them, because each ``echo`` is a system call or two.  What came before an error is
    shown."""
    held: list[_T] = []
    try:
        for value in values:
            held.append(value)
            if len(held) == LINES_AT_ONCE:
                yield held
                held = []
    except StageFSError:
        if held:
            yield held
        raise
    if held:
        yield held


def print_table(rows: Iterable[tuple[str, str]]) -> None:
    listed = list(rows)
    width = max((len(name) for name, _ in listed), default=0)
    for name, value in listed:
        click.echo(f"{name:<{width}}  {value}")


@contextlib.contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[ProgressCallback]:
    """A callback that draws a bar on a terminal's standard error once it is worth it."""
    if quiet or not sys.stderr.isatty() or os.get_terminal_size(2).columns < 20:
        yield lambda _progress: None
        return
    bar = _Bar()
    try:
        yield bar.update
    finally:
        bar.close()


class _Bar:
    """Imports rich when the first bar is drawn."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._close = contextlib.ExitStack()
        self._draw: ProgressCallback | None = None

    def update(self, progress: Progress) -> None:
        if self._draw is None:
            if time.monotonic() - self._started_s < BAR_AFTER_S:
                return
            self._draw = self._start(progress.unit)
        self._draw(progress)

    def _start(self, unit: str) -> ProgressCallback:
        from stagefs.cli.bars import bar  # noqa: PLC0415 - rich takes 80 ms to import

        return self._close.enter_context(bar(unit))

    def close(self) -> None:
        self._close.close()
