"""B6: what tasks write, beside the plain disk and bindfs.

A task's files are real files in the state directory, so the peers that count are the plain disk
that holds it, and bindfs, which passes every request on to that disk and does nothing else.
What was written before is on the disk when a clock starts: nobody pays for another's pages.
"""

import contextlib
import functools
import itertools
import subprocess
import sysconfig
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import peers
from bench.measuring import Contender, MeasureFailed, Sense, Unavailable, Work
from bench.ours import stagefs
from bench.points import OURS, Lab, Measured
from bench.report import compare
from bench.warm import beside, fetched, insist_running, settle
from bench.workbench import end

BINDFS, LOCAL = "bindfs", "plain disk"
SMALL_BYTES = 4096
# Small writes fill this share of the big file.
SMALL_SHARE = 4
WRITER_MIB = 32


@contextlib.contextmanager
def _places(lab: Lab, measured: Measured, *, bindfs: bool) -> Iterator[dict[str, Path]]:
    """A directory to write to for each contender, all of them on one disk."""
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(stagefs(lab.bench))
        plain = lab.bench.fresh("plain")
        stack.callback(lab.bench.remove, plain)
        places = {OURS: lab.bench.identity.directory(ours.point / "tasks" / "writing")}
        if bindfs:
            try:
                behind = lab.bench.fresh("behind")
                stack.callback(lab.bench.remove, behind)
                places[BINDFS] = stack.enter_context(peers.bindfs(lab.bench, behind))
            except (Unavailable, MeasureFailed) as reason:
                measured.missing.append(f"{lab.point}: {reason}")
        places[LOCAL] = plain
        yield places


def _contenders(places: dict[str, Path], measure: Callable[[Path], float]) -> list[Contender]:
    return [
        Contender(name, functools.partial(measure, place), ours=name == OURS)
        for name, place in places.items()
    ]


def _settle_disk(lab: Lab) -> None:
    """All that was written is on the disk, and the clock can start."""
    lab.bench.run("sync", "-f", lab.bench.directory)


def _write(lab: Lab, path: Path, block_bytes: int, count: int, *options: str) -> float:
    _settle_disk(lab)
    return lab.bench.timed(
        *("dd", "if=/dev/zero", f"of={path}", f"bs={block_bytes}", f"count={count}"),
        *("status=none", *options),
    )[0]


def big_file(lab: Lab) -> Measured:
    """Written with fsync, and read back: from the pages that writing left in the kernel, and from
    the file itself, through the daemon."""
    measured, bench = Measured(), lab.bench
    work = Work(bench.amounts.size_bytes)
    with _places(lab, measured, bindfs=True) as places:
        files = {name: place / "big" for name, place in places.items()}

        def written(path: Path) -> float:
            path.unlink(missing_ok=True)
            return _write(lab, path, 1 << 20, work.amount >> 20, "conv=fsync")

        def dropped(path: Path) -> float:
            bench.forget_pages(path)
            return bench.copy_time(path)

        written_goals = ((LOCAL, 0.5), (BINDFS, None))
        samples = lab.race("written, fsync", _contenders(files, written), work, measured)
        for peer, bound in written_goals:
            measured.rows += compare(
                lab.point, "written, fsync", samples, ours=OURS, peers=[peer], bound=bound
            )
        samples = lab.race("read back", _contenders(files, bench.copy_time), work, measured)
        measured.rows += compare(
            lab.point, "read back", samples, ours=OURS, peers=[LOCAL], bound=0.4
        )
        through = {name: path for name, path in files.items() if name != LOCAL}
        contenders = [
            *_contenders(through, dropped),
            Contender(LOCAL, functools.partial(bench.copy_time, files[LOCAL])),
        ]
        samples = lab.race("read back through the daemon", contenders, work, measured)
        for peer in (BINDFS, LOCAL):
            measured.rows += compare(
                lab.point, "read back, pages dropped", samples, ours=OURS, peers=[peer]
            )
    return measured


def small_writes(lab: Lab) -> Measured:
    measured = Measured()
    count = lab.bench.amounts.size_bytes // SMALL_SHARE // SMALL_BYTES
    with _places(lab, measured, bindfs=True) as places:

        def written(place: Path) -> float:
            path = place / "small"
            path.unlink(missing_ok=True)
            return _write(lab, path, SMALL_BYTES, count)

        work = Work(count, "writes")
        samples = lab.race("4 KiB writes", _contenders(places, written), work, measured)
    for peer, bound in ((BINDFS, 1.0), (LOCAL, None)):
        measured.rows += compare(
            lab.point, "4 KiB writes", samples, ours=OURS, peers=[peer], bound=bound
        )
    return measured


def source_tree(lab: Lab) -> Measured:
    measured, numbers = Measured(), itertools.count()
    top = lab.bench.fresh("tar")
    tar = top / "tree.tar"
    files = _pack(tar, lab.bench.amounts.small_files)
    with _places(lab, measured, bindfs=True) as places:

        def unpacked(place: Path) -> float:
            target = lab.bench.identity.directory(place / f"tree-{next(numbers)}")
            _settle_disk(lab)
            seconds = lab.bench.timed("tar", "-xf", tar, "-C", target)[0]
            found = lab.bench.run("find", target, "-type", "f", "-printf", ".")
            if len(found) != files:
                raise MeasureFailed(f"{len(found)} files came of {files}")
            lab.bench.run("rm", "-r", target)
            return seconds

        work = Work(files, "files")
        samples = lab.race("untar", _contenders(places, unpacked), work, measured)
    lab.bench.remove(top)
    for peer, bound in ((BINDFS, 1.5), (LOCAL, None)):
        measured.rows += compare(
            lab.point,
            "untar of a source tree",
            samples,
            ours=OURS,
            peers=[peer],
            sense=Sense.TIME,
            bound=bound,
        )
    return measured


def _pack(tar: Path, files_max: int) -> int:
    """The sources of Python's library and of what is installed beside it; how many files."""
    count = 0
    with tarfile.open(tar, "w") as packed:
        for top in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
            for path in sorted(Path(top).rglob("*.py")):
                if count < files_max and path.is_file() and not path.is_symlink():
                    packed.add(path, arcname=str(path.relative_to(top)), recursive=False)
                    count += 1
    tar.chmod(0o644)
    return count


def readers(lab: Lab) -> Measured:
    """Warm reads while another task writes to the same mount and syncs."""
    with fetched(lab) as (ours, staged):
        target = lab.bench.identity.directory(ours.point / "tasks" / "writing") / "state"

        @contextlib.contextmanager
        def writing() -> Iterator[subprocess.Popen[bytes]]:
            program = lab.bench.program("write_and_sync.py")
            child = lab.bench.start("python", program, target, str(WRITER_MIB))
            try:
                settle()
                yield child
                insist_running(child)
            finally:
                end(child)

        return beside(lab, staged, writing, "writes and fsyncs", bound=0.8)
