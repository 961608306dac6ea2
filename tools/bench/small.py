"""A5: thousands of small files over ssh, opened, read and closed one after another."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

from bench import peers
from bench.catalogs import write_entries
from bench.measuring import Contender, MeasureFailed, Sense, Unavailable, Work
from bench.ours import StageFS, stagefs
from bench.points import OURS, Lab, Measured
from bench.report import compare

OURS_CATALOG = "StageFS, catalog"
SSHFS, SSHFS_TUNED, BINDFS, LOCAL = "sshfs", "sshfs tuned", "bindfs", "local files"


def small_files(lab: Lab) -> Measured:
    measured = Measured()
    _cold(lab, measured)
    _second_pass(lab, measured)
    return measured


def _read_each(lab: Lab, directory: Path) -> float:
    """Seconds of listing the directory and reading each file, by the reader's own clock."""
    program = lab.bench.program("read_each.py")
    seconds, total = lab.bench.run("python", program, directory).split()
    wanted = lab.bench.amounts.small_files * lab.bench.amounts.small_bytes
    if int(total) != wanted:
        raise MeasureFailed(f"{int(total)} bytes came of {wanted}")
    return float(seconds)


@contextlib.contextmanager
def _mounted(lab: Lab) -> Iterator[StageFS]:
    config = str(lab.servers.ssh.tuned_config)
    with stagefs(lab.bench, environment={"STAGEFS_SSH_CONFIG": config}) as ours:
        yield ours


def _cold(lab: Lab, measured: Measured) -> None:
    bench, servers = lab.bench, lab.servers
    access, directory = servers.ssh, servers.small
    work = Work(bench.amounts.small_files, "files")
    catalog = write_entries(
        bench.fresh("catalog") / "small.jsonl",
        ((path.name, access.url(path), path.stat()) for path in sorted(directory.iterdir())),
    )

    def bound() -> float:
        with _mounted(lab) as ours:
            return _read_each(lab, ours.bind(access.url(directory), "small"))

    def imported() -> float:
        with _mounted(lab) as ours:
            ours.import_catalog(catalog, "small")
            return _read_each(lab, ours.point / "staging" / "small")

    def over_sshfs(*, tuned: bool) -> float:
        with peers.sshfs(bench, access, directory, tuned=tuned) as point:
            return _read_each(lab, point)

    contenders = [
        Contender(OURS, bound, ours=True),
        Contender(OURS_CATALOG, imported, ours=True),
        Contender(SSHFS, lambda: over_sshfs(tuned=False)),
        Contender(SSHFS_TUNED, lambda: over_sshfs(tuned=True)),
    ]
    samples = lab.race("cold", contenders, work, measured)
    for name, what in ((OURS, "bound directory"), (OURS_CATALOG, "catalog")):
        measured.rows += compare(
            lab.point,
            f"small files, cold, {what}",
            samples,
            ours=name,
            peers=[peer for peer in (SSHFS, SSHFS_TUNED) if samples.has(peer)] or [SSHFS],
            sense=Sense.TIME,
            bound=0.5,
        )


def _second_pass(lab: Lab, measured: Measured) -> None:
    bench, directory = lab.bench, lab.servers.small
    work = Work(bench.amounts.small_files, "files")
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(_mounted(lab))
        places = {OURS: ours.bind(lab.servers.ssh.url(directory), "small"), LOCAL: directory}
        try:
            places[BINDFS] = stack.enter_context(peers.bindfs(bench, directory))
        except (Unavailable, MeasureFailed) as reason:
            measured.missing.append(f"{lab.point} second pass: {reason}")
        for place in places.values():
            _read_each(lab, place)
        contenders = [
            Contender(name, functools.partial(_read_each, lab, place), ours=name == OURS)
            for name, place in places.items()
        ]
        samples = lab.race("second pass", contenders, work, measured)
    for peer, bound in ((BINDFS, 1.3), (LOCAL, None)):
        measured.rows += compare(
            lab.point,
            "small files, second pass",
            samples,
            ours=OURS,
            peers=[peer],
            sense=Sense.TIME,
            bound=bound,
        )
