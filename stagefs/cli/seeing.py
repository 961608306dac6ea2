"""status and config: what a mount is doing, and which settings are in force."""

import time
from pathlib import Path

import click

from stagefs.cli.finding import json_option, mount_option, target
from stagefs.cli.output import human, print_json, print_json_list, print_table, shown_name
from stagefs.config import load_with_sources, parse_assignments
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
    print_table([*_facts(now), *_cache_facts(now.cache)])
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


@click.command()
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="One more file.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="As for mount.")
@json_option
def config(config_file: Path | None, assignments: tuple[str, ...], as_json: bool) -> None:
    """Show every setting that a mount made now would have, and where each comes from."""
    loaded = load_with_sources(config_file=config_file, overrides=parse_assignments(assignments))
    if as_json:
        print_json_list(loaded.values)
        return
    for value in loaded.values:
        click.echo(f"{value.key} = {value.text}  ({value.source})")
