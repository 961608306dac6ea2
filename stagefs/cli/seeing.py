"""status and metrics: what a mount is doing."""

import os
import time
from pathlib import Path

import click

from stagefs.cli.finding import json_option, mount_option, target
from stagefs.cli.output import human, print_json, print_table, shown_name
from stagefs.errors import StateFailed
from stagefs.staging.queue_values import QueueTotals
from stagefs.staging.values import CacheUsage, Status

TRANSFERS_SHOWN_MAX = 20


@click.command()
@mount_option
@json_option
def status(mountpoint: str | None, as_json: bool) -> None:
    """Show what the daemon of a mount is doing."""
    chosen = target(mountpoint)
    now = chosen.client.status()
    if as_json:
        print_json(now)
        return
    print_table([*_facts(now), *_cache_facts(now.cache), *_queue_facts(now.queue)])
    for name, value in sorted(now.counters.items()):
        if value:
            click.echo(f"  {name.replace('_', ' ')}: {value}")
    for transfer in now.transfers[:TRANSFERS_SHOWN_MAX]:
        landed = f"{human(transfer.landed)} of {human(transfer.length)}"
        click.echo(f"  fetching {shown_name(transfer.url)}: {landed}, {transfer.age_s:.1f} s")


def _facts(now: Status) -> list[tuple[str, str]]:
    lived_s = max(time.time() - now.started_ns / 1e9, 0)
    return [
        ("mount", now.mountpoint),
        ("daemon", f"{now.version}, process {now.pid}, up {lived_s:.0f} s"),
        ("state", now.state_directory),
        ("log", now.log),
        ("names", str(now.names)),
        ("reads waiting", str(now.waiting_reads)),
        ("open objects", str(now.open_objects)),
    ]


def _cache_facts(cache: CacheUsage | None) -> list[tuple[str, str]]:
    if cache is None:
        return [("cache", "none: reading streams; the log says why")]
    used = f"{human(cache.used_bytes)} of {human(cache.capacity_bytes)}"
    return [("cache", f"{used} in {cache.entries} entries, {cache.directory}")]


def _queue_facts(queue: QueueTotals) -> list[tuple[str, str]]:
    waiting = f"{queue.waiting} waiting ({human(queue.waiting_bytes)})"
    said = [waiting, f"{queue.uploading} uploading", f"{queue.failed} failed"]
    if queue.prepared:
        said.append(f"{queue.prepared} prepared")
    if queue.trouble is not None:
        said.append(queue.trouble.rstrip("."))
    return [("outputs", f"{', '.join(said)}; {queue.directory}")]


@click.command()
@mount_option
@click.option(
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write this file in one step (for the textfile collector of the node exporter).",
)
def metrics(mountpoint: str | None, output: Path | None) -> None:
    """Print the daemon's figures in the text format of Prometheus (docs/METRICS.md)."""
    text = target(mountpoint).client.metrics()
    if output is None:
        click.echo(text, nl=False)
        return
    made = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        made.write_text(text, "utf-8")
        made.replace(output)
    except OSError as exc:
        raise StateFailed(f"{output} cannot be written: {exc.strerror}.") from exc
