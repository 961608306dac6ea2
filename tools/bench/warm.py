"""A4, warm: reads of a big file that was fetched before.

Three kinds of warm.  *Second read*: the pages are in the kernel, no request reaches the daemon.
*From the cache on disk*: the kernel's pages of the mount are gone, so the daemon answers every
request.  Both are tried on an idle machine, and beside an import or another file's cold fetch.
"""

import contextlib
import itertools
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import peers
from bench.catalogs import write_catalog
from bench.measuring import Contender, MeasureFailed, Work
from bench.ours import RequestCount, StageFS, stagefs
from bench.points import OURS, Lab, Measured
from bench.report import Goal, Row, compare
from bench.workbench import end
from tests.support.waiting import wait_until

LOCAL, INLINE = "local file", "bare pyfuse3 mount"
DD, SHA = "dd", "sha256sum"
BUSY_SETTLE_S = 0.8
# Fewer would be imported before the read that goes on beside it has ended.
IMPORT_ENTRIES_MIN = 200_000
# So much is there to fetch beside the read: more than can arrive while it lasts.
OTHER_FILES_MIN, OTHER_BYTES_MIN = 48, 8 << 30
IMPORT_TIMEOUT_S = 600.0


@contextlib.contextmanager
def fetched(lab: Lab) -> Iterator[tuple[StageFS, Path]]:
    """StageFS with the big file in its cache."""
    url = lab.servers.http_url(lab.servers.big)
    with stagefs(lab.bench) as ours:
        staged = ours.stage_in(url, lab.servers.big.name)
        lab.bench.copy_time(staged)
        yield ours, staged


def second_read(lab: Lab) -> Measured:
    measured, bench, servers = Measured(), lab.bench, lab.servers
    work = Work(servers.size_bytes)
    with fetched(lab) as (ours, staged):
        for tool, read, bound in ((DD, bench.copy_time, 0.4), (SHA, bench.hash_time, 0.9)):
            read(staged)
            contenders = [
                Contender(OURS, _call(read, staged), ours=True),
                Contender(LOCAL, _call(read, servers.big)),
            ]
            samples = lab.race(f"second read {tool}", contenders, work, measured)
            what = f"second read, {tool}"
            measured.rows += compare(
                lab.point, what, samples, ours=OURS, peers=[LOCAL], bound=bound
            )
        measured.rows.append(_requests(lab, ours, staged))
    return measured


def _call(read: Callable[[Path], float], path: Path) -> Callable[[], float]:
    return lambda: read(path)


def _requests(lab: Lab, ours: StageFS, staged: Path) -> Row:
    """READ requests of a second read: what dd causes beyond opening and closing the file."""
    count = RequestCount(ours.daemon())

    def caused(*command: str | Path) -> int:
        before = count.reads()
        lab.bench.run(*command)
        return count.reads() - before

    whole = ("dd", f"if={staged}", "of=/dev/null", "bs=1M", "status=none")
    nothing = ("dd", f"if={staged}", "of=/dev/null", "count=0", "status=none")
    beyond = min(max(caused(*whole) - caused(*nothing), 0) for _ in range(lab.bench.amounts.rounds))
    lab.bench.forget_pages(staged)
    if caused(*whole) - caused(*nothing) <= 0:
        raise MeasureFailed("the daemon's reads are not seen in /proc/PID/io: nothing is counted")
    return Row(
        point=lab.point,
        what="second read, READ requests",
        ours=str(beyond),
        peer="",
        peer_figure="",
        value=float(beyond),
        goal=Goal(0, below=True),
    )


def after_restart(lab: Lab) -> Measured:
    measured, bench, servers = Measured(), lab.bench, lab.servers
    work = Work(servers.size_bytes)
    with fetched(lab) as (ours, staged):

        def restarted() -> float:
            ours.remount()
            return bench.copy_time(staged)

        def again() -> float:
            bench.forget_pages(staged)
            return bench.copy_time(staged)

        def bare() -> float:
            with peers.inline_mount(bench, servers.data) as point:
                return bench.copy_time(point / servers.big.name)

        contenders = [
            Contender(OURS, restarted, ours=True),
            Contender(f"{OURS}, verified", again, ours=True),
            Contender(INLINE, bare),
        ]
        samples = lab.race("restarted", contenders, work, measured)
    measured.rows += [
        *compare(lab.point, "after a restart", samples, ours=OURS, peers=[INLINE], bound=0.7),
        *compare(
            lab.point,
            "from the cache on disk",
            samples,
            ours=f"{OURS}, verified",
            peers=[INLINE],
        ),
    ]
    return measured


Busy = Callable[[], contextlib.AbstractContextManager[subprocess.Popen[bytes]]]


def during_import(lab: Lab) -> Measured:
    entries = max(lab.bench.amounts.catalog_entries // 2, IMPORT_ENTRIES_MIN)
    catalog = write_catalog(lab.bench.fresh("catalog"), entries)
    prefixes = (f"imported-{number}" for number in itertools.count())
    with fetched(lab) as (ours, staged):

        @contextlib.contextmanager
        def importing() -> Iterator[subprocess.Popen[bytes]]:
            child = ours.begin_import(catalog, next(prefixes))
            try:
                settle()
                yield child
                insist_running(child)
                if child.wait(IMPORT_TIMEOUT_S) != 0:
                    raise MeasureFailed(f"the import ended with {child.returncode}")
            finally:
                end(child)

        return beside(lab, staged, importing, "an import")


def during_fetch(lab: Lab) -> Measured:
    numbers = itertools.count()
    files = max(OTHER_FILES_MIN, OTHER_BYTES_MIN // lab.servers.size_bytes)
    with fetched(lab) as (ours, staged):
        ours.keep_only(staged.name)

        @contextlib.contextmanager
        def fetching() -> Iterator[subprocess.Popen[bytes]]:
            """Fetched, but read by nobody: a second reader would share the daemon by right."""
            names = [f"other-{next(numbers)}.bin" for _ in range(files)]
            urls = [lab.servers.http_url(lab.servers.big, name) for name in names]
            before = ours.counter("fetched_bytes")
            child = ours.begin_fetch(urls, f"{names[0]}-and-more/")
            try:
                wait_until(lambda: ours.counter("fetched_bytes") > before, "another file's fetch")
                yield child
                insist_running(child, ours.fetch_words())
            finally:
                end(child)
                wait_until(lambda: ours.counter("in_flight_bytes") == 0, "the end of the fetch")
                ours.keep_only(staged.name)

        return beside(lab, staged, fetching, "another file's cold fetch")


def settle() -> None:
    """Polls nothing: gives a command the time to be in the middle of its work."""
    begun = time.monotonic()
    wait_until(lambda: time.monotonic() - begun > BUSY_SETTLE_S, "a moment")


def insist_running(child: subprocess.Popen[bytes], words: str = "") -> None:
    if child.poll() is not None:
        raise MeasureFailed(
            f"what was to go on beside the read ended first (status {child.returncode}) {words}"
        )


def beside(lab: Lab, staged: Path, busy: Busy, what: str, *, bound: float = 0.7) -> Measured:
    """Both kinds of warm read, idle and busy in turn; and a local file, for what the machine
    itself leaves under that load."""
    measured, bench = Measured(), lab.bench
    work = Work(lab.servers.size_bytes)
    local = lab.servers.big

    def from_disk() -> float:
        bench.forget_pages(staged)
        return bench.copy_time(staged)

    def several(read: Callable[[], float], times: int) -> Callable[[], float]:
        """One read of what is cached is over before the other work has had its turn."""
        return lambda: statistics.fmean(read() for _ in range(times))

    def while_busy(read: Callable[[], float]) -> Callable[[], float]:
        def measure() -> float:
            with busy():
                return read()

        return measure

    kinds: list[tuple[str, Callable[[], float], float | None, bool]] = [
        ("second read", several(lambda: bench.copy_time(staged), 8), bound, True),
        ("from the cache on disk", several(from_disk, 3), bound, True),
        ("local file", several(lambda: bench.copy_time(local), 8), None, False),
    ]
    for kind, read, goal, ours in kinds:
        read()
        contenders = [
            Contender("busy", while_busy(read), ours=ours),
            Contender("idle", read, ours=ours),
        ]
        samples = lab.race(f"{kind} during {what}", contenders, work, measured)
        measured.rows += compare(
            lab.point, f"{kind} during {what}", samples, ours="busy", peers=["idle"], bound=goal
        )
    return measured
