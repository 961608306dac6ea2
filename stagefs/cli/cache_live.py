"""What stagefs-cache does on a mount whose daemon lives: through the control API."""

from pathlib import Path

import click

from stagefs.cache.inspect import CacheDirectory
from stagefs.cli.cache_tables import Choice, entry_table
from stagefs.cli.chunk_maps import chunk_map
from stagefs.cli.finding import Target, target
from stagefs.cli.output import (
    human,
    print_json,
    print_json_list,
    print_lines,
    print_table,
    progress_bar,
    shown_name,
    when,
)
from stagefs.errors import InvalidName, StageFSError
from stagefs.staging.values import CacheEntry, CacheUsage
from stagefs.units import parse_size


def subject_of(chosen: Target, text: str) -> str:
    """A path in the mount, a staging:/// name, a URL or a key, as the API takes it."""
    is_path = "/" in text and "://" not in text
    return chosen.path(text) if is_path or text.startswith("staging:") else text


def list_entries(mountpoint: str | None, choice: Choice, *, as_json: bool) -> None:
    entries = choice.of(target(mountpoint).client.cache_list())
    if as_json:
        print_json_list(entries)
        return
    print_lines(entry_table(entries))


def show_entry(mountpoint: str | None, subject: str, *, as_json: bool) -> None:
    chosen = target(mountpoint)
    entry = chosen.client.cache_show(subject_of(chosen, subject))
    if as_json:
        print_json(entry)
    else:
        print_table([*_rows(entry), *_map_row(chosen, entry)])


def _map_row(chosen: Target, entry: CacheEntry) -> list[tuple[str, str]]:
    """Which chunks are here is read from the entry's own file, as without a daemon."""
    directory = Path(chosen.client.cache_usage().directory)
    try:
        (detail,) = CacheDirectory(directory).show(entry.key)
    except (StageFSError, ValueError):  # evicted meanwhile
        return []
    return [("map", chunk_map(detail))]


def _rows(entry: CacheEntry) -> list[tuple[str, str]]:
    return [
        ("key", entry.key),
        ("url", shown_name(entry.url)),
        ("version", shown_name(entry.version)),
        ("size", f"{human(entry.size_bytes)} ({entry.size_bytes} bytes)"),
        ("cached", f"{human(entry.cached_bytes)} ({entry.cached_bytes} bytes)"),
        ("on disk", human(entry.disk_bytes)),
        ("last used", when(entry.used_ns)),
        ("pinned by", ", ".join(entry.pins) or "nobody"),
    ]


def show_usage(mountpoint: str | None, *, as_json: bool) -> None:
    print_usage(target(mountpoint).client.cache_usage(), as_json=as_json)


def print_usage(usage: CacheUsage, *, as_json: bool) -> None:
    if as_json:
        print_json(usage)
        return
    rows = [
        ("directory", usage.directory),
        ("used", f"{human(usage.used_bytes)} of {human(usage.capacity_bytes)}"),
        ("objects", f"{human(usage.cached_bytes)} in {usage.entries} entries"),
        ("pins and leases", str(usage.leases)),
        (
            "disk free",
            f"{human(usage.free_bytes)}, {human(usage.free_floor_bytes)} of it kept free",
        ),
    ]
    happened = [
        (name.replace("_", " "), str(count)) for name, count in usage.counters.items() if count
    ]
    print_table([*rows, *happened])


def verify(mountpoint: str | None, subject: str | None, *, resume: bool, as_json: bool) -> bool:
    """False when there was damage."""
    chosen = target(mountpoint)
    wanted = None if subject is None else subject_of(chosen, subject)
    with progress_bar(quiet=as_json) as progress:
        verified = chosen.client.cache_verify(wanted, resume=resume, progress=progress)
    if as_json:
        print_json(verified)
    else:
        for line in verified.damaged:
            click.echo(shown_name(line))
        what = f"{verified.entries} entries, {verified.chunks} chunks"
        said = f"{len(verified.damaged)} damaged" if verified.damaged else "all right"
        click.echo(f"verified {what}, {human(verified.bytes_read)}: {said}")
    return not verified.damaged


def evict(
    mountpoint: str | None, subjects: tuple[str, ...], *, everything: bool, as_json: bool
) -> None:
    if everything == bool(subjects):
        raise InvalidName("Say what to evict: names, URLs or keys; or --all.")
    chosen = target(mountpoint)
    with progress_bar(quiet=as_json) as progress:
        if everything:
            results = [chosen.client.cache_evict(everything=True, progress=progress)]
        else:
            results = [
                chosen.client.cache_evict(subject_of(chosen, subject), progress=progress)
                for subject in subjects
            ]
    if as_json:
        print_json_list(results)
        return
    entries = sum(result.entries for result in results)
    kept = sum(result.kept for result in results)
    freed = human(sum(result.freed_bytes for result in results))
    stay = f"; {kept} stay, because they are pinned or open" if kept else ""
    click.echo(f"evicted {entries} entries, {freed}{stay}")


def pin(mountpoint: str | None, subjects: tuple[str, ...], *, pinned: bool, as_json: bool) -> None:
    chosen = target(mountpoint)
    with progress_bar(quiet=as_json) as progress:
        results = [
            chosen.client.cache_pin(subject_of(chosen, subject), pinned=pinned, progress=progress)
            for subject in subjects
        ]
    if as_json:
        print_json_list(results)
    else:
        click.echo(
            f"{'pinned' if pinned else 'unpinned'} {sum(result.objects for result in results)}"
            " objects"
        )


def warm(
    mountpoint: str | None, subjects: tuple[str, ...], *, priority: int, as_json: bool
) -> None:
    chosen = target(mountpoint)
    paths = [chosen.path(subject) for subject in subjects]
    with progress_bar(quiet=as_json) as progress:
        warmed = chosen.client.cache_warm(paths, priority=priority, progress=progress)
    if as_json:
        print_json(warmed)
    else:
        click.echo(f"{warmed.entries} files cached, {human(warmed.bytes_total)}")


def size_of(text: str) -> int:
    """Raises InvalidName."""
    try:
        return parse_size(text)
    except ValueError as exc:
        raise InvalidName(f"{exc}.") from exc


def cleanup(mountpoint: str | None, to_bytes: int, *, as_json: bool) -> None:
    chosen = target(mountpoint)
    with progress_bar(quiet=as_json) as progress:
        usage = chosen.client.cache_cleanup(to_bytes, progress=progress)
    if as_json:
        print_json(usage)
    else:
        click.echo(f"{human(usage.used_bytes)} in {usage.entries} entries are left")


def capacity(mountpoint: str | None, size: str | None, *, as_json: bool) -> None:
    is_default = size == "default"
    capacity_bytes = None if size is None or is_default else size_of(size)
    chosen = target(mountpoint)
    with progress_bar(quiet=as_json) as progress:
        usage = chosen.client.cache_capacity(capacity_bytes, default=is_default, progress=progress)
    if as_json:
        print_json(usage)
    else:
        click.echo(f"{human(usage.capacity_bytes)}, {human(usage.used_bytes)} of it used")
