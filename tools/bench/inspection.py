"""E3: stagefs-cache on a cache of 100,000 entries and a TiB of sparse files: list, usage, and a
verify that is killed and goes on, on the bare directory and on a mount.

The files of the cache are not in the page cache when a command begins; names and programs may be.
"""

import dataclasses
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.measuring import MeasureFailed
from bench.ours import Memory, stagefs
from bench.points import Lab, Measured
from bench.report import Goal, Row
from bench.workbench import MEASURE_TIMEOUT_S, end
from tests.support.waiting import wait_until

ENTRIES_SHARE = 10
"""The cache has this part of the catalog's entries."""
LIST_S, PEAK_MB = 3.0, 200.0
STOPPED_WITHIN_S = 60.0
# What a stopped verify leaves: on a bare directory, and on a mount.
BARE_POSITION, LIVE_POSITION = "verify.position", "verify.live.position"


def inspection(lab: Lab) -> Measured:
    measured = Measured()
    count = lab.bench.amounts.catalog_entries // ENTRIES_SHARE
    cache = lab.bench.fresh("cache")
    seconds, _ = lab.bench.timed("python", lab.bench.program("fill_cache.py"), cache, str(count))
    lab.bench.say(f"{lab.point} cache of {count} entries made in {seconds:.1f} s")
    _looks(lab, measured, cache, count)
    _verifies(lab, measured, Verifier(lab, cache, count, BARE_POSITION, (str(cache),)), "bare")
    with stagefs(lab.bench, options=("--cache", str(cache))) as ours:
        live = ("--mount", str(ours.point))
        _verifies(lab, measured, Verifier(lab, cache, count, LIVE_POSITION, live), "live")
        peak = Memory(ours.daemon()).peak_bytes / 1e6
        lab.bench.say(f"{lab.point} daemon, peak after both: {peak:.0f} MB")
    lab.bench.remove(cache)
    return measured


@dataclasses.dataclass(frozen=True)
class Ran:
    seconds: float
    peak_bytes: int
    status: int
    output: bytes


def _stagefs_cache(lab: Lab, *words: str) -> Ran:
    program = lab.bench.program("peak_memory.py")
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = lab.bench.start(
            "python", program, "stagefs-cache", *words, output=output, errors=errors
        )
        try:
            status = child.wait(MEASURE_TIMEOUT_S)
        finally:
            end(child)
        output.seek(0)
        errors.seek(0)
        seconds, peak_bytes = errors.read().split()[-2:]
        return Ran(float(seconds), int(peak_bytes), status, output.read())


def _looks(lab: Lab, measured: Measured, cache: Path, count: int) -> None:
    for words, what in (
        (("list", str(cache), "--json"), "list"),
        (("usage", str(cache)), "usage"),
    ):
        _forget(cache)
        ran = _stagefs_cache(lab, *words)
        if ran.status != 0 or (what == "list" and len(json.loads(ran.output)) != count):
            raise MeasureFailed(f"stagefs-cache {what} did not tell of {count} entries")
        measured.rows += [
            _alone(lab, f"{what} of {count} entries", ran.seconds, "s", LIST_S),
            _alone(lab, f"{what}, peak memory", ran.peak_bytes / 1e6, "MB", PEAK_MB),
        ]


@dataclasses.dataclass(frozen=True)
class Verifier:
    """One way to verify; ``place`` are the words that say of what."""

    lab: Lab
    cache: Path
    count: int
    position_name: str
    place: tuple[str, ...]

    def killed(self) -> str | None:
        """The key of the last entry that was done; None when it ended before it could be killed."""
        position = self.cache / self.position_name
        child = self.lab.bench.start("stagefs-cache", "verify", *self.place)
        try:
            wait_until(
                lambda: position.exists() or child.poll() is not None,
                "the position of a verify",
                deadline_s=STOPPED_WITHIN_S,
            )
            child.send_signal(signal.SIGKILL)
            child.wait()
        finally:
            end(child)
        # A daemon hears of it a moment later, and then writes where it really is.
        done = json.loads(position.read_bytes())["after"] if position.exists() else None
        assert done is None or isinstance(done, str)
        return done

    def resumed(self) -> Ran:
        return _stagefs_cache(self.lab, "verify", *self.place, "--resume", "--json")


def _verifies(lab: Lab, measured: Measured, verifier: Verifier, how: str) -> None:
    _forget(verifier.cache)
    done = verifier.killed()
    if done is None:
        measured.missing.append(f"{lab.point}: verify ({how}) ended before it could be killed.")
        return
    # Damage to what was done is not seen by one that goes on; damage to the last one is.
    files = list(_object_files(verifier.cache))
    _damage(files[0])
    _damage(files[-1])
    ran = verifier.resumed()
    found = json.loads(ran.output)
    told = json.dumps(found["damaged"])
    if ran.status != 1 or found["entries"] != verifier.count or len(found["damaged"]) != 1:
        raise MeasureFailed(f"verify ({how}) told of {found['entries']} entries, damaged: {told}")
    left = sum(file.name > done for file in files)
    what = f"verify ({how}) goes on: the last {left} of {verifier.count}"
    measured.rows += [
        _alone(lab, what, ran.seconds, "s", None),
        _alone(lab, f"verify ({how}), peak memory", ran.peak_bytes / 1e6, "MB", PEAK_MB),
    ]
    # As it was: the same bit again.  A daemon has removed what it found.
    for path in (files[0], files[-1]):
        if path.exists():
            _damage(path)


def _object_files(cache: Path) -> Iterator[Path]:
    """In the order of their keys."""
    for directory in sorted((cache / "objects").iterdir()):
        yield from sorted(directory.iterdir())


def _damage(path: Path) -> None:
    """One bit of the only chunk that is there."""
    with path.open("r+b") as file:
        offset = os.lseek(file.fileno(), 0, os.SEEK_DATA)
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)


def _forget(cache: Path) -> None:
    """The kernel's cached pages of all files go."""
    os.sync()
    for top, _directories, files in os.walk(cache):
        for name in files:
            fd = os.open(os.path.join(top, name), os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def _alone(lab: Lab, what: str, value: float, unit: str, bound: float | None) -> Row:
    return Row(
        point=lab.point,
        what=what,
        ours=f"{value:.1f} {unit}",
        peer="",
        peer_figure="",
        value=value,
        goal=None if bound is None else Goal(bound, below=True),
    )
