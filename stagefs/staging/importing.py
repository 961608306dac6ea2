"""Running the importer, which reads a catalog in a process of its own.

Its progress becomes ours.  A caller that goes away ends it; what it had imported by then
stays, and importing again goes on from there.
"""

import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import msgspec
import trio

from stagefs.errors import InvalidCatalog, StateFailed
from stagefs.staging.values import Imported, Progress, ProgressCallback

LINE_BYTES_MAX = 1 << 20
END_TIMEOUT_S = 10.0
_UNITS = {"check": "bytes", "import": "names"}


class _Result(msgspec.Struct, frozen=True):
    imported: int
    replaced: int = 0
    unchanged: int = 0
    directories: int = 0


class _Line(msgspec.Struct, frozen=True):
    """A line of the importer, see its docstring."""

    phase: str | None = None
    done: int = 0
    total: int = 0
    result: _Result | None = None
    error: str | None = None
    exit_code: int = 1


class ImportRefused(InvalidCatalog):
    """The importer's own sentence and exit code."""

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


async def run_import(
    database: Path,
    catalog: str,
    prefix: str,
    *,
    replace: bool,
    file_mode: int,
    progress: ProgressCallback,
) -> Imported:
    """Raises ImportRefused with what the importer says is wrong; StateFailed when it dies."""
    command = [sys.executable, "-m", "stagefs.namespace.importer"]
    command += [str(database), catalog, prefix, "--file-mode", f"{file_mode:o}"]
    if replace:
        command.append("--replace")
    process = await trio.lowlevel.open_process(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=None
    )
    assert process.stdout is not None
    try:
        async with process.stdout as output:
            result = await _heard(output, progress)
        await process.wait()
    finally:
        await _end(process)
    if result is None:
        raise StateFailed(
            f"The import of {catalog} ended without a word (status {process.returncode}): see the"
            " log, and import again."
        )
    return Imported(
        entries=result.imported,
        replaced=result.replaced,
        unchanged=result.unchanged,
        directories=result.directories,
    )


async def _heard(output: trio.abc.ReceiveStream, progress: ProgressCallback) -> _Result | None:
    async with aclosing(_lines(output)) as lines:
        async for text in lines:
            line = msgspec.json.decode(text, type=_Line)
            if line.error is not None:
                raise ImportRefused(line.error, line.exit_code)
            if line.result is not None:
                return line.result
            if line.phase is not None:
                unit = _UNITS.get(line.phase, "names")
                what = "checking the catalog" if unit == "bytes" else "importing"
                progress(Progress(what, line.done, line.total, unit=unit))
    return None


async def _lines(output: trio.abc.ReceiveStream) -> AsyncGenerator[bytes, None]:
    left = b""
    while piece := await output.receive_some():
        *lines, left = (left + piece).split(b"\n")
        for line in lines:
            yield line
        if len(left) > LINE_BYTES_MAX:
            raise StateFailed("The importer wrote a line without an end.")


async def _end(process: trio.Process) -> None:
    """Not to be left running, whatever happened: asked first, then forced."""
    if process.returncode is not None:
        return
    with trio.CancelScope(shield=True):
        process.terminate()
        with trio.move_on_after(END_TIMEOUT_S):
            await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()
