"""top: a live view of one mount: throughput, hit rate, waiting reads, transfers, queue, tasks.

Asks the daemon every few seconds for its figures and its status, and draws what changed between
two answers.  A daemon that is being restarted shows as that, and the view goes on.
"""

import re
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import click
import msgspec

from stagefs.cache.layout import Paths
from stagefs.cache.leases import read_leases
from stagefs.cli.finding import Target, json_option, mount_option, target
from stagefs.cli.output import human, print_json, shown_name
from stagefs.errors import NoDaemon
from stagefs.staging.values import Status

TRANSFERS_SHOWN_MAX = 8
TASKS_SHOWN_MAX = 5
INTERVAL_S_MIN = 0.2
_SAMPLE = re.compile(r"^(\w+(?:\{[^\n]*\})?) (\S+)$", re.MULTILINE)
_CLEAR = "\x1b[H\x1b[J"


class Rates(msgspec.Struct, frozen=True):
    """Per second, since the answer before (or since the daemon began).  ``hit_share``: of the bytes
    read, what no remote had to send meanwhile; None when nothing was read."""

    read_bytes: float
    written_bytes: float
    fetched_bytes: float
    operations: float
    evicted_bytes: float
    hit_share: float | None


class TaskShare(msgspec.Struct, frozen=True):
    """Who keeps how many objects in the cache."""

    owner: str
    objects: int


class View(msgspec.Struct, frozen=True):
    """One picture."""

    rates: Rates
    status: Status
    tasks: list[TaskShare]


def figures_of(text: str) -> dict[str, float]:
    """The samples of an answer of /metrics."""
    return {name: float(value) for name, value in _SAMPLE.findall(text)}


def rates_between(before: Mapping[str, float], after: Mapping[str, float], s: float) -> Rates:
    """``before`` of another daemon, or of none, counts as nothing."""
    began = "stagefs_start_time_seconds"
    if before.get(began) != after.get(began):
        before = {}

    def grown(*beginnings: str) -> float:
        return sum(
            value - before.get(name, 0.0)
            for name, value in after.items()
            if name.startswith(beginnings)
        )

    read_bytes = grown("stagefs_read_bytes_total")
    fetched_bytes = grown("stagefs_fetched_bytes_total")
    hit_share = max(0.0, 1 - fetched_bytes / read_bytes) if read_bytes else None
    return Rates(
        read_bytes=read_bytes / s,
        written_bytes=grown("stagefs_written_bytes_total") / s,
        fetched_bytes=fetched_bytes / s,
        operations=grown("stagefs_operation_seconds_count", "stagefs_ready_operations_total") / s,
        evicted_bytes=grown("stagefs_cache_evicted_bytes_total") / s,
        hit_share=hit_share,
    )


class _Watching:
    """Remembers the last answer."""

    def __init__(self, chosen: Target) -> None:
        self._chosen = chosen
        self._before: dict[str, float] = {}
        self._asked_s: float | None = None

    def look(self) -> View:
        """Raises NoDaemon."""
        now_s = time.monotonic()
        after = figures_of(self._chosen.client.metrics())
        status = self._chosen.client.status()
        if self._asked_s is None:
            lived_s = time.time() - after.get("stagefs_start_time_seconds", 0.0)
            passed_s = max(lived_s, INTERVAL_S_MIN)
        else:
            passed_s = max(now_s - self._asked_s, 1e-3)
        rates = rates_between(self._before, after, passed_s)
        self._before, self._asked_s = after, now_s
        return View(rates, status, _tasks(status))


def _tasks(status: Status) -> list[TaskShare]:
    if status.cache is None:
        return []
    counts: dict[str, int] = {}
    for lease in read_leases(Paths(Path(status.cache.directory)).leases):
        counts[lease.owner] = counts.get(lease.owner, 0) + 1
    largest = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [TaskShare(*item) for item in largest[:TASKS_SHOWN_MAX]]


@click.command()
@click.option("--interval", "interval_s", type=float, default=2.0, help="Seconds (2).")
@click.option("--count", type=click.IntRange(min=1), help="End after so many pictures.")
@mount_option
@json_option
def top(interval_s: float, count: int | None, mountpoint: str | None, as_json: bool) -> None:
    """Watch a mount: throughput, hit rate, waiting reads, transfers, the queue, the biggest tasks.

    Ends with Ctrl-C.  The first picture shows the averages since the daemon began.
    """
    watching = _Watching(target(mountpoint))
    left = count
    while left is None or left > 0:
        _draw_one(watching, as_json=as_json)
        left = None if left is None else left - 1
        if left != 0:
            _pause(max(interval_s, INTERVAL_S_MIN))


def _draw_one(watching: _Watching, *, as_json: bool) -> None:
    try:
        view = watching.look()
    except NoDaemon as error:
        if not sys.stdout.isatty():
            raise
        click.echo(f"{_CLEAR}{error}")
        return
    if as_json:
        print_json(view)
        return
    text = "\n".join(lines_of(view))
    click.echo(f"{_CLEAR}{text}" if sys.stdout.isatty() else f"{text}\n")


def lines_of(view: View) -> list[str]:
    """The picture."""
    rates, status = view.rates, view.status
    share = "-" if rates.hit_share is None else f"{rates.hit_share:.0%}"
    lines = [
        f"{status.mountpoint}  process {status.pid}, {status.names} names",
        f"  read {_rate(rates.read_bytes)}   hits {share}   fetched {_rate(rates.fetched_bytes)}"
        f"   written {_rate(rates.written_bytes)}   {rates.operations:.0f} operations/s",
    ]
    if status.cache is not None:
        cache = status.cache
        lines.append(
            f"  cache {human(cache.used_bytes)} of {human(cache.capacity_bytes)},"
            f" {cache.entries} entries, {cache.leases} leases,"
            f" evicting {_rate(rates.evicted_bytes)}"
        )
    else:
        lines.append("  cache none: reading streams")
    queue = status.queue
    lines.append(
        f"  outputs {queue.waiting} waiting ({human(queue.waiting_bytes)}),"
        f" {queue.uploading} uploading, {queue.failed} failed"
    )
    lines.append(f"  {status.waiting_reads} reads wait, {len(status.transfers)} transfers")
    by_age = sorted(status.transfers, key=lambda transfer: -transfer.age_s)
    for transfer in by_age[:TRANSFERS_SHOWN_MAX]:
        landed = f"{human(transfer.landed)} of {human(transfer.length)}"
        lines.append(f"    {transfer.age_s:6.1f} s  {landed:>22}  {shown_name(transfer.url)}")
    if view.tasks:
        lines.append("  tasks, by what is kept for them")
        lines += [f"    {task.objects:>8}  {shown_name(task.owner)}" for task in view.tasks]
    return lines


def _rate(per_s: float) -> str:
    return f"{human(int(max(per_s, 0)))}/s"


def _pause(seconds: float) -> None:
    threading.Event().wait(seconds)
