"""`python -m bench`: measure the points that were asked for and print the table."""

import argparse
import contextlib
import dataclasses
import signal
import sys
from pathlib import Path

from bench import far, inspection, linking, million, sequential, small, tree, warm, writing
from bench.measuring import MeasureFailed, Unavailable
from bench.points import Lab, Measured, Point
from bench.report import CHECKOUT, CLAIM_ROUNDS_MIN, as_json, table
from bench.servers import Servers
from bench.workbench import Amounts, Workbench, opened

MIB, GIB = 1 << 20, 1 << 30
POINTS = (
    Point("a4-ssh", "a cold file over ssh", sequential.over_ssh),
    Point("a4-s3", "a cold file over S3", sequential.over_s3),
    Point("a4-http", "a cold file over http", sequential.over_http),
    Point("a4-again", "the second read of a file", warm.second_read),
    Point("a4-restart", "a cached file after a daemon's restart", warm.after_restart),
    Point("a4-import", "warm reads during an import", warm.during_import),
    Point("a4-fetch", "warm reads during another file's cold fetch", warm.during_fetch),
    Point("a5", "thousands of small files over ssh", small.small_files),
    Point("a6", "a catalog of a million entries", million.million),
    Point("b6-big", "a big file written with fsync, and read back", writing.big_file),
    Point("b6-small", "writes of 4 KiB", writing.small_writes),
    Point("b6-untar", "a source tree unpacked", writing.source_tree),
    Point("b6-readers", "warm reads while another task writes and syncs", writing.readers),
    Point("b6-links", "a million virtual links from one template", linking.links),
    Point("c5-http", "a cold file over http, 20 ms away", far.over_http),
    Point("c5-s3", "a cold file over S3, 20 ms away", far.over_s3),
    Point("c5-ssh", "a cold file over ssh, 20 ms away", far.over_ssh),
    Point("c6-ssh", "a cold tree of small files over ssh", tree.over_ssh),
    Point("c6-s3", "a cold tree of small files over S3", tree.over_s3),
    Point("e3", "stagefs-cache on a cache of 100,000 entries", inspection.inspection),
)
FULL = Amounts(
    size_bytes=GIB,
    rounds=5,
    small_files=5000,
    small_bytes=4096,
    catalog_entries=1_000_000,
    sandboxes=1000,
    links=1000,
    tree_directories=100,
)
QUICK = Amounts(
    size_bytes=32 * MIB,
    rounds=1,
    small_files=200,
    small_bytes=4096,
    catalog_entries=20_000,
    sandboxes=50,
    links=20,
    tree_directories=10,
)


def say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _size(text: str) -> int:
    for unit, factor in (("GiB", GIB), ("MiB", MIB)):
        if text.endswith(unit) and text.removesuffix(unit).isdigit():
            return int(text.removesuffix(unit)) * factor
    raise argparse.ArgumentTypeError(f"{text!r} is no size such as 128MiB or 1GiB")


def _points(text: str) -> list[Point]:
    found = []
    for name in text.split(","):
        chosen = [p for p in POINTS if p.name == name or p.name.startswith(f"{name}-")]
        if not chosen:
            known = ", ".join(point.name for point in POINTS)
            raise argparse.ArgumentTypeError(f"there is no point {name!r}, only {known}")
        found += chosen
    return found


def arguments() -> argparse.Namespace:
    known = "\n".join(f"  {point.name:<12}{point.summary}" for point in POINTS)
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="StageFS beside its peers on the same data in one run, as ratios.",
        epilog=f"points (a4 means all that begin so):\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", type=_points, default=list(POINTS), metavar="POINT,...")
    parser.add_argument("--size", type=_size, metavar="SIZE", help="of the big file (1GiB)")
    parser.add_argument("--pairs", type=int, metavar="N", help="rounds of each comparison (5)")
    parser.add_argument(
        "--files", type=int, metavar="N", help="small files, of a5 and of the source tree (5000)"
    )
    parser.add_argument("--entries", type=int, metavar="N", help="of the catalog (1000000)")
    parser.add_argument("--quick", action="store_true", help="tiny amounts, no verdicts")
    parser.add_argument("--user", action="store_true", help="as root: measure as nobody")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep all that was measured")
    parser.add_argument(
        "--work", type=Path, default=CHECKOUT / ".bench", metavar="DIR", help="(.bench)"
    )
    return parser.parse_args()


def _amounts(options: argparse.Namespace) -> Amounts:
    given = {
        "size_bytes": options.size,
        "rounds": options.pairs,
        "small_files": options.files,
        "catalog_entries": options.entries,
    }
    named = {key: value for key, value in given.items() if value is not None}
    return dataclasses.replace(QUICK if options.quick else FULL, **named)


def measure(bench: Workbench, points: list[Point]) -> tuple[Measured, bool]:
    """All that was found, and whether StageFS did what was asked of it at every point."""
    everything, sound = Measured(), True
    with contextlib.ExitStack() as stack:
        servers = Servers(bench, stack)
        for point in points:
            try:
                found = point.measure(Lab(point.name, bench, servers))
            except Unavailable as reason:
                found = Measured(missing=[f"{point.name}: {reason}"])
            except (MeasureFailed, AssertionError) as reason:
                sound = False
                found = Measured(missing=[f"{point.name} FAILED: {reason}"])
                say(found.missing[0])
            everything.rows += found.rows
            everything.missing += found.missing
    return everything, sound


def main() -> int:
    options = arguments()
    amounts = _amounts(options)
    # An exception unwinds all that was started; the signal's default would leave it behind.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
    try:
        with opened(options.work, as_user=options.user, amounts=amounts, say=say) as bench:
            everything, sound = measure(bench, options.only)
            who = bench.identity.name
    except Unavailable as reason:
        print(f"bench: {reason}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; nothing is left behind", file=sys.stderr)
        return 130
    claim = (
        amounts.rounds >= CLAIM_ROUNDS_MIN
        and amounts.size_bytes >= FULL.size_bytes
        and amounts.catalog_entries >= FULL.catalog_entries
        and amounts.small_files >= FULL.small_files
    )
    settings = {**dataclasses.asdict(amounts), "user": who}
    print(", ".join(f"{key}={value}" for key, value in settings.items()))
    print(table(everything.rows, verdicts=not options.quick))
    for sentence in everything.missing:
        print(sentence)
    if not claim:
        print("Smaller than what is claimed (see docs/BENCHMARKS.md): no verdict counts.")
    if options.json is not None:
        text = as_json(everything.rows, everything.missing, settings=settings, claim=claim)
        options.json.write_text(text, encoding="utf-8")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
