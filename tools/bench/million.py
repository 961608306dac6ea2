"""A6: a catalog of a million entries: imported, mounted again, listed, searched."""

from pathlib import Path

from bench.catalogs import DIRECTORY_ENTRIES, write_catalog
from bench.measuring import Contender, MeasureFailed, Samples, Sense, Work, ratio
from bench.ours import Memory, StageFS, stagefs
from bench.points import Lab, Measured
from bench.report import Goal, Row
from tests.support import kernel

PREFIX = "catalog"
TENTH = 10
IMPORT_S, REMOUNT_S, LISTING_S, RESIDENT_MB = 60.0, 1.0, 1.0, 150.0
# The cost of one entry may grow by this much from a tenth of the entries to all of them.
LINEAR_BOUND = 1.25


def million(lab: Lab) -> Measured:
    measured = Measured()
    entries = lab.bench.amounts.catalog_entries
    with stagefs(lab.bench) as ours, stagefs(lab.bench) as tenth:
        _import(lab, measured, ours, entries)
        _import(lab, Measured(), tenth, entries // TENTH)
        _memory(lab, measured, ours, "daemon after the import")
        samples = lab.race(
            "mounted again",
            [Contender("remount", ours.remount, ours=True)],
            Work(1, "mounts"),
            measured,
        )
        measured.rows.append(_alone(lab, "mount again", samples, "remount", REMOUNT_S))
        _list(lab, measured, ours)
        _find(lab, measured, ours, tenth)
        _memory(lab, measured, ours, "daemon after find")
    return measured


def _import(lab: Lab, measured: Measured, ours: StageFS, entries: int) -> None:
    catalog = write_catalog(lab.bench.fresh("catalog"), entries)
    seconds = ours.import_catalog(catalog, PREFIX)
    lab.bench.say(f"{lab.point} import of {entries} entries: {seconds:.1f} s")
    lab.bench.remove(catalog.parent)
    measured.rows.append(
        Row(
            point=lab.point,
            what=f"import of {entries} entries",
            ours=f"{seconds:.1f} s",
            peer="",
            peer_figure="",
            value=seconds,
            goal=Goal(IMPORT_S, below=True),
        )
    )


def _alone(lab: Lab, what: str, samples: Samples, name: str, bound: float) -> Row:
    return Row(
        point=lab.point,
        what=what,
        ours=samples.text(name),
        peer="",
        peer_figure="",
        value=samples.median(name),
        goal=Goal(bound, below=True),
        seconds=samples.seconds,
    )


def _memory(lab: Lab, measured: Measured, ours: StageFS, what: str) -> None:
    """Resident and highest memory of the daemon; what its other processes hold goes into
    the log."""
    pid = ours.daemon()
    memory = Memory(pid)
    for program in kernel.programs_naming(ours.state):
        if program.pid != pid:
            held = Memory(program.pid).resident_bytes / 1e6
            words = " ".join(program.command[1:4])
            lab.bench.say(f"{lab.point} beside the daemon: {held:.0f} MB in {words}")
    for kind, value in (("resident", memory.resident_bytes), ("peak", memory.peak_bytes)):
        measured.rows.append(
            Row(
                point=lab.point,
                what=f"{what}, {kind}",
                ours=f"{value / 1e6:.0f} MB",
                peer="",
                peer_figure="",
                value=value / 1e6,
                goal=Goal(RESIDENT_MB, below=True) if kind == "resident" else None,
            )
        )


def _list(lab: Lab, measured: Measured, ours: StageFS) -> None:
    """`ls -f` of one directory, each time by a new mount that knows nothing yet."""
    entries = min(DIRECTORY_ENTRIES, lab.bench.amounts.catalog_entries)
    directory = ours.point / "staging" / PREFIX / "set-00"

    def listed() -> float:
        ours.remount()
        seconds, output = lab.bench.timed("ls", "-f", directory)
        _expect(output.count(b"\n"), entries + 2, "names by ls -f")
        return seconds

    contenders = [Contender("ls", listed, ours=True)]
    samples = lab.race("ls -f", contenders, Work(entries, "names"), measured)
    what = f"ls -f of {entries} names"
    measured.rows.append(_alone(lab, what, samples, "ls", LISTING_S))


def _find(lab: Lab, measured: Measured, ours: StageFS, tenth: StageFS) -> None:
    """`find` over all of them and over a tenth: the cost of one entry must stay the same."""
    entries = lab.bench.amounts.catalog_entries

    def found(area: StageFS, wanted: int) -> float:
        area.remount()
        return _find_files(lab, area.point / "staging" / PREFIX, wanted)

    contenders = [
        Contender("all", lambda: found(ours, entries), ours=True),
        Contender("tenth", lambda: found(tenth, entries // TENTH) * TENTH, ours=True),
    ]
    work = Work(entries, "names")
    samples = lab.race("find", contenders, work, measured)
    what = f"find over {entries} names"
    measured.rows.append(
        Row(
            point=lab.point,
            what=f"{what}, each beside a tenth",
            ours=work.rate(samples.median("all")),
            peer="find over a tenth, times ten",
            peer_figure=work.rate(samples.median("tenth")),
            value=ratio(samples, "all", ["tenth"], Sense.TIME),
            goal=Goal(LINEAR_BOUND, below=True),
            seconds=samples.seconds,
        )
    )


def _find_files(lab: Lab, top: Path, wanted: int) -> float:
    seconds, output = lab.bench.timed("find", top, "-type", "f", "-printf", ".")
    _expect(len(output), wanted, "files by find")
    return seconds


def _expect(count: int, wanted: int, what: str) -> None:
    if count != wanted:
        raise MeasureFailed(f"{count} {what}, {wanted} were imported")
