"""stagefs-cache on the files of a cache, of a mount or of a bare directory: leases, history, the
rate of evictions, consistency, drills; and what changes a directory that no daemon has open."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import click

from stagefs.cache.consistency import Difference, compare
from stagefs.cache.drills import Drill, damage
from stagefs.cache.entry import ABSENT
from stagefs.cache.history import eviction_rate, read_events
from stagefs.cache.inspect import CacheDirectory, ShownLease
from stagefs.cache.layout import Paths
from stagefs.cache.leases import read_leases
from stagefs.cache.store import Cache
from stagefs.cli.cache_live import subject_of
from stagefs.cli.finding import target
from stagefs.cli.output import human, print_json, print_json_list, shown_name, when
from stagefs.errors import CacheFailed, InvalidName
from stagefs.model import ObjectId

# Nobody asks for room while a directory is only tended.
_NO_LIMIT = 1 << 62


def place_of(directory: Path | None, mountpoint: str | None) -> Path:
    """The cache directory that is meant."""
    if directory is not None:
        CacheDirectory(directory)  # raises when it is none
        return directory
    return Path(target(mountpoint).client.cache_usage().directory)


def owners_of(directory: Path) -> dict[str, list[str]]:
    owners: dict[str, list[str]] = {}
    for lease in read_leases(Paths(directory).leases):
        owners.setdefault(lease.key, []).append(lease.owner)
    return owners


def show_leases(directory: Path, *, as_json: bool) -> None:
    leases = sorted(read_leases(Paths(directory).leases), key=lambda one: (one.owner, one.url))
    if as_json:
        print_json_list(leases)
        return
    for lease in leases:
        until = ShownLease(lease.owner, lease.since, lease.expires).expires
        ends = "for ever" if until is None else f"until {when(int(until * 1e9))}"
        click.echo(f"{shown_name(lease.owner)}  {ends}  {lease.key}  {shown_name(lease.url)}")


def show_history(directory: Path, *, last: int | None, as_json: bool) -> None:
    events = list(read_events(directory))
    if last is not None:
        events = events[-last:] if last else []
    if as_json:
        print_json_list(events)
        return
    for event in events:
        by = f", by {event.by}" if event.by else ""
        what = shown_name(event.url or event.key)
        click.echo(
            f"{when(int(event.at * 1e9))}  {event.what}  {human(event.size_bytes)}  {what}{by}"
        )


def show_rate(directory: Path, *, minutes: float, as_json: bool) -> None:
    rate = eviction_rate(read_events(directory), minutes=minutes)
    if as_json:
        print_json(rate)
        return
    click.echo(
        f"{rate.entries} entries evicted in the last {minutes:g} minutes, {human(rate.size_bytes)}"
    )
    if rate.again:
        click.echo(
            f"{rate.again} of them more than once: the capacity is too small for what runs here"
        )


def check_consistency(directory: Path, *, as_json: bool) -> bool:
    """True when the index says what the files say."""
    compared = compare(directory)
    if as_json:
        print_json(compared)
        return not compared.differences
    for each in compared.differences:
        click.echo(_difference(each))
    if not compared.has_index:
        click.echo("There is no whole index; the next daemon makes it from the files.")
    click.echo(f"{compared.entries} entries, {len(compared.differences)} differences")
    return not compared.differences


def _difference(found: Difference) -> str:
    named = f"{shown_name(found.url)} ({found.key})" if found.url else found.key
    return f"{named} {found.said}".strip()


def drill(
    directory: Path | None, mountpoint: str | None, subject: str, kind: str, *, as_json: bool
) -> None:
    key = subject
    if directory is None:
        chosen = target(mountpoint)
        key = chosen.client.cache_show(subject_of(chosen, subject)).key
    place = place_of(directory, mountpoint)
    found = CacheDirectory(place).show(key)
    if len(found) != 1:
        raise InvalidName(f"{subject} is {len(found)} entries: name one by its key.")
    try:
        done = damage(place, found[0], Drill(kind))
    except OSError as exc:
        raise CacheFailed(f"{place} cannot be damaged: {exc.strerror}.") from exc
    if as_json:
        print_json(found[0].entry)
    else:
        click.echo(shown_name(done))


@contextlib.contextmanager
def _tended(directory: Path) -> Iterator[Cache]:
    """The cache, for as long as no daemon has it.  Raises StateInUse."""
    CacheDirectory(directory)
    cache = Cache.open(directory, capacity_bytes=_NO_LIMIT, free_floor_bytes=0)
    try:
        yield cache
    finally:
        cache.close()


def cleanup_directory(directory: Path, to_bytes: int, *, as_json: bool) -> None:
    """Evict, the least recently used first, until at most so much is left."""
    with _tended(directory) as cache:
        while (excess := cache.used_bytes - to_bytes) > 0:
            plan = cache.plan_freeing(excess)
            if plan is None or not cache.carry_out(plan):
                break
        cache.flush_index()
        usage = cache.usage()
    if as_json:
        print_json(usage)
    else:
        click.echo(f"{human(usage.used_bytes)} in {usage.entries} entries are left")


def repair_directory(directory: Path, keys: set[str]) -> int:
    """Drop what is damaged of these entries, so that it is fetched again; returns how many."""
    repaired = 0
    with _tended(directory) as cache:
        if not cache.index_complete:
            cache.rebuild_index()
        for row in cache.rows():
            if row.key.hex() not in keys:
                continue
            object_id = ObjectId(_text(row.url), _text(row.version))
            entry = cache.entry(object_id, size_bytes=row.size_bytes)
            if entry is None:  # opening it found the damage, and dropped it
                repaired += 1
                continue
            present = [c for c in range(entry.chunk_count) if entry.state[c] != ABSENT]
            repaired += not all(entry.verify(chunk) for chunk in present)
    return repaired


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
