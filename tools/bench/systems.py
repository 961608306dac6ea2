"""`python -m bench.systems`: RADICAL-Pilot, Parsl and Pilot-Data, the same tasks on StageFS and
without it, in one run, as ratios.

The systems are those that `make test-systems` has installed below .venvs.  What is timed are the
tasks, from their submission to the end of the last one: pilots and workers are there before.
"""

import argparse
import contextlib
import dataclasses
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from bench.__main__ import FULL, MIB, QUICK, measure, say
from bench.measuring import Contender, MeasureFailed, Sense, Unavailable, Work
from bench.ours import StageFS, stagefs
from bench.points import OURS, Lab, Measured, Point
from bench.report import CHECKOUT, Goal, Row, as_json, compare, table
from bench.workbench import Workbench, installed, opened

TASKS = 8
SHARING_TASKS = 64
SHARED_BYTES = 1 << 20
DISK, SCP, RSYNC = "plain disk", "scp in each task", "RSyncStaging"
PULLED = "pull in each task"
PARSL, RADICAL = "parsl", "radical.pilot"


@contextlib.contextmanager
def _directory(bench: Workbench, name: str) -> Iterator[Path]:
    made = bench.fresh(name)
    try:
        yield made
    finally:
        bench.remove(made)


def _seconds(
    bench: Workbench,
    system: str,
    home: Path,
    *arguments: str | Path,
    environment: Mapping[str, str] | None = None,
) -> float:
    """What a system's program says of itself.  Raises Unavailable, MeasureFailed."""
    top = CHECKOUT / ".venvs" / system
    if not (top / "bin/python").exists():
        raise Unavailable(f"{system} is not in {top}: run `make test-systems` once.")
    program = Path(__file__).with_name(f"systems_{system.partition('.')[0]}.py")
    own = {
        "HOME": str(home),
        "TMPDIR": str(home),
        "VIRTUAL_ENV": str(top),
        "PATH": f"{top / 'bin'}:{bench.identity.environment()['PATH']}",
        **(environment or {}),
    }
    said = bench.run("env", "-C", home, top / "bin/python", program, *arguments, environment=own)
    found = re.search(rb"^seconds ([0-9.]+)$", said, re.MULTILINE)
    if found is None:
        raise MeasureFailed(f"{program.name} said no time: {said[-300:]!r}")
    return float(found[1])


def _work_in(home: Path, place: Path) -> None:
    """Where RADICAL-Pilot's pilots work."""
    configs = home / ".radical/pilot/configs"
    configs.mkdir(parents=True)
    setting = {"localhost": {"default_remote_workdir": str(place)}}
    (configs / "resource_local.json").write_text(json.dumps(setting))


def radical_on_disk(lab: Lab) -> Measured:
    """S7: many small tasks in the mount, and the same on the disk that holds its state."""
    measured, bench = Measured(), lab.bench
    shared = lab.servers.data / "shared.bin"
    shared.write_bytes(b"\x5a" * SHARED_BYTES)
    words = ("share", str(SHARING_TASKS), f"file://localhost{shared}")

    def on(place: Path) -> float:
        with _directory(bench, "rp-home") as home:
            _work_in(home, place)
            return _seconds(bench, RADICAL, home, *words)

    def on_mount() -> float:
        roots = ("--set", "workspace.sandbox_roots=radical.pilot.sandbox/*/*/*")
        with stagefs(bench, options=roots) as ours:
            return on(ours.point)

    def on_disk() -> float:
        with _directory(bench, "rp-work") as place:
            return on(place)

    contenders = [Contender(OURS, on_mount, ours=True), Contender(DISK, on_disk)]
    samples = lab.race("tasks", contenders, Work(SHARING_TASKS, "tasks"), measured)
    measured.rows += compare(
        lab.point,
        f"{SHARING_TASKS} tasks of RADICAL-Pilot, one shared input",
        samples,
        ours=OURS,
        peers=[DISK],
        sense=Sense.TIME,
        bound=1.3,
    )
    return measured


@contextlib.contextmanager
def _cold(lab: Lab) -> Iterator[StageFS]:
    """A mount that knows the big file over ssh and has nothing of it."""
    access = lab.servers.ssh
    environment = {"STAGEFS_SSH_CONFIG": str(access.tuned_config)}
    with stagefs(lab.bench, environment=environment) as ours:
        ours.stage_in(access.url(lab.servers.big), "big.bin")
        yield ours


def radical_over_ssh(lab: Lab) -> Measured:
    """S7: tasks that read one big remote input, and the same tasks that pull it one by one."""
    measured, bench, access = Measured(), lab.bench, lab.servers.ssh

    def linked() -> float:
        with _cold(lab) as ours, _directory(bench, "rp-home") as home:
            _work_in(home, ours.point)
            source = f"file://localhost{ours.point}/staging/big.bin"
            return _seconds(bench, RADICAL, home, "link", str(TASKS), source)

    def pulled() -> float:
        with _directory(bench, "rp-home") as home, _directory(bench, "rp-work") as place:
            _work_in(home, place)
            source = f"{access.host}:{lab.servers.big}"
            environment = {"SCP_CONFIG": str(access.tuned_config)}
            return _seconds(
                bench, RADICAL, home, "pull", str(TASKS), source, environment=environment
            )

    contenders = [Contender(OURS, linked, ours=True), Contender(SCP, pulled)]
    samples = lab.race("tasks", contenders, Work(TASKS, "tasks"), measured)
    what = f"{TASKS} tasks of RADICAL-Pilot read one remote file"
    measured.rows += compare(lab.point, what, samples, ours=OURS, peers=[SCP], bound=5)
    return measured


def parsl_over_ssh(lab: Lab) -> Measured:
    """D2: eight tasks on one cold object, and Parsl's own staging of the same."""
    measured, bench, access = Measured(), lab.bench, lab.servers.ssh

    def staged() -> float:
        with _cold(lab) as ours, _directory(bench, "parsl") as home:
            words = ("stagefs", str(TASKS), "staging:///big.bin", ours.point)
            return _seconds(bench, PARSL, home, *words)

    def copied() -> float:
        with _directory(bench, "parsl") as home:
            words = ("rsync", str(TASKS), lab.servers.big, access.host)
            environment = {"RSYNC_RSH": f"ssh -F {access.tuned_config}"}
            return _seconds(bench, PARSL, home, *words, environment=environment)

    contenders = [Contender(OURS, staged, ours=True), Contender(RSYNC, copied)]
    samples = lab.race("tasks", contenders, Work(TASKS, "tasks"), measured)
    what = f"{TASKS} tasks of Parsl read one remote file"
    measured.rows += compare(lab.point, what, samples, ours=OURS, peers=[RSYNC], bound=3)
    return measured


def pilot_data_bytes(lab: Lab) -> Measured:
    """D2: the Pilot-Data paper's example; what is compared is what the server sent."""
    bench, servers = lab.bench, lab.servers
    url = servers.http_url(servers.big)
    curl = installed("curl")

    def sent_by(work: Callable[[], None]) -> int:
        before = len(servers.http.asked())
        work()
        return sum(asked.sent_bytes for asked in servers.http.asked()[before:])

    def linked() -> None:
        program = Path(__file__).with_name("systems_pilot_data.py")
        with stagefs(bench) as ours:
            environment = {"STAGEFS_MOUNT": str(ours.point)}
            words = (str(TASKS), url, str(servers.size_bytes))
            bench.run("python", program, *words, environment=environment)

    def pulled() -> None:
        for number in range(TASKS):
            with _directory(bench, f"task{number}") as place:
                bench.run(curl, "-sSf", "-o", place / "big.bin", url)

    bench.say(f"{lab.point}: {TASKS} units that each read a quarter")
    ours = sent_by(linked)
    bench.say(f"{lab.point}: {TASKS} tasks that each pull the file")
    peer = sent_by(pulled)
    row = Row(
        point=lab.point,
        what=f"bytes that {TASKS} tasks get which read a quarter of one file",
        ours=f"{ours / MIB:.0f} MiB",
        peer=PULLED,
        peer_figure=f"{peer / MIB:.0f} MiB",
        value=ours / peer,
        goal=Goal(0.333, below=True),
    )
    return Measured([row])


POINTS = (
    Point("s7-disk", "RADICAL-Pilot in the mount and on plain disk", radical_on_disk),
    Point("s7-ssh", "RADICAL-Pilot's tasks on one cold file over ssh", radical_over_ssh),
    Point("d2-parsl", "Parsl's tasks on one cold file over ssh", parsl_over_ssh),
    Point("d2-pilot", "Pilot-Data: bytes that units get of one shared file", pilot_data_bytes),
)


def arguments() -> argparse.Namespace:
    known = "\n".join(f"  {point.name:<12}{point.summary}" for point in POINTS)
    parser = argparse.ArgumentParser(
        prog="python -m bench.systems",
        description="RADICAL-Pilot, Parsl and Pilot-Data with and without StageFS, as ratios.",
        epilog=f"points:\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=[point.name for point in POINTS], action="append")
    parser.add_argument("--mib", type=int, metavar="N", help="size of the big file (1024)")
    parser.add_argument("--pairs", type=int, metavar="N", help="rounds of each comparison (3)")
    parser.add_argument("--quick", action="store_true", help="tiny amounts, no verdicts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep all that was measured")
    parser.add_argument("--work", type=Path, default=CHECKOUT / ".bench", metavar="DIR")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    amounts = QUICK if options.quick else dataclasses.replace(FULL, rounds=3)
    if options.mib is not None:
        amounts = dataclasses.replace(amounts, size_bytes=options.mib * MIB)
    if options.pairs is not None:
        amounts = dataclasses.replace(amounts, rounds=options.pairs)
    # An exception unwinds all that was started; the signal's default would leave it behind.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
    chosen = [point for point in POINTS if options.only is None or point.name in options.only]
    try:
        with opened(options.work, as_user=False, amounts=amounts, say=say) as bench:
            everything, sound = measure(bench, chosen)
    except Unavailable as reason:
        print(f"bench: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; nothing is left behind", file=sys.stderr)
        return 130
    claim = amounts.size_bytes >= FULL.size_bytes
    print(table(everything.rows, verdicts=claim))
    for sentence in everything.missing:
        print(sentence)
    if not claim:
        print("The file is smaller than 1 GiB: no verdict counts.")
    if options.json is not None:
        settings: dict[str, object] = {
            "size_bytes": amounts.size_bytes,
            "rounds": amounts.rounds,
            "tasks": TASKS,
        }
        text = as_json(everything.rows, everything.missing, settings=settings, claim=claim)
        options.json.write_text(text, encoding="utf-8")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
