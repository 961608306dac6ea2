"""Choosing, sorting, summing and exporting what a cache holds: the same for a mount and for a bare
directory, because both list the same facts."""

import csv
import fnmatch
import sys
from collections.abc import Callable, Iterable, Iterator

import click
import msgspec

from stagefs.cache.inspect import EntrySummary
from stagefs.cli.output import human, print_json_list, shown_name, when
from stagefs.staging.values import CacheEntry

Entry = EntrySummary | CacheEntry
EXPORTED = (
    "key", "url", "version", "size_bytes", "cached_bytes", "disk_bytes", "used_ns", "pinned",
)  # fmt: skip
SORTS: dict[str, Callable[[Entry], object]] = {
    "used": lambda entry: -entry.used_ns,
    "size": lambda entry: -entry.size_bytes,
    "cached": lambda entry: -entry.cached_bytes,
    "url": lambda entry: entry.url,
}
GROUPS = ("remote", "prefix", "task")


class Choice(msgspec.Struct, frozen=True):
    """What of a listing is wanted, and in which order (None: as it comes)."""

    pattern: str | None = None
    pinned: bool = False
    sort: str | None = None
    limit: int | None = None

    def of(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        chosen: Iterable[Entry] = (entry for entry in entries if self._has(entry))
        if self.sort is not None:
            chosen = sorted(chosen, key=SORTS[self.sort])  # type: ignore[arg-type]
        for number, entry in enumerate(chosen):
            if number == self.limit:
                return
            yield entry

    def _has(self, entry: Entry) -> bool:
        if self.pinned and not entry.pinned:
            return False
        return self.pattern is None or fnmatch.fnmatchcase(entry.url, self.pattern)


def entry_table(entries: Iterable[Entry]) -> Iterator[str]:
    yield f"{'cached':>10}  {'of':>10}  {'last used':<19}  {'':1} {'key':<40}  URL"
    for entry in entries:
        pin = "P" if entry.pinned else ""
        yield (
            f"{human(entry.cached_bytes):>10}  {human(entry.size_bytes):>10}"
            f"  {when(entry.used_ns):<19}  {pin:1} {entry.key}  {shown_name(entry.url)}"
        )


class Share(msgspec.Struct, frozen=True):
    """What one group of entries takes."""

    group: str
    entries: int
    cached_bytes: int
    disk_bytes: int


def shares(entries: Iterable[Entry], owners: dict[str, list[str]], by: str) -> list[Share]:
    """The largest first.  ``owners``: who leases a key; an entry counts for each of them."""
    sums: dict[str, list[int]] = {}
    for entry in entries:
        for group in _groups(entry, owners, by):
            total = sums.setdefault(group, [0, 0, 0])
            total[0] += 1
            total[1] += entry.cached_bytes
            total[2] += entry.disk_bytes
    found = [Share(group, *total) for group, total in sums.items()]
    return sorted(found, key=lambda share: (-share.cached_bytes, share.group))


def _groups(entry: Entry, owners: dict[str, list[str]], by: str) -> list[str]:
    if by == "task":
        return owners.get(entry.key) or ["(nobody)"]
    scheme, _, rest = entry.url.partition("://")
    remote = f"{scheme}://{rest.partition('/')[0]}"
    return [remote if by == "remote" else entry.url.rpartition("/")[0] + "/"]


def print_shares(found: list[Share], *, as_json: bool) -> None:
    if as_json:
        print_json_list(found)
        return
    click.echo(f"{'cached':>10}  {'on disk':>10}  {'entries':>8}")
    for share in found:
        click.echo(
            f"{human(share.cached_bytes):>10}  {human(share.disk_bytes):>10}"
            f"  {share.entries:>8}  {shown_name(share.group)}"
        )


def export(entries: Iterable[Entry], form: str) -> None:
    """Everything, to standard output, as JSON or as CSV with a line of names."""
    if form == "json":
        print_json_list(entries)
        return
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(EXPORTED)
    for entry in entries:
        writer.writerow([getattr(entry, name) for name in EXPORTED])
