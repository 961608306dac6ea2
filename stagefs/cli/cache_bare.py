"""stagefs-cache on a bare cache directory: list, usage, show, verify, without any daemon."""

import contextlib
import os
import time
from pathlib import Path

import click
import msgspec

from stagefs.cache.inspect import (
    CacheDirectory,
    DirectoryUsage,
    EntryDetail,
    FoundDamage,
    Verifying,
)
from stagefs.cli.cache_tables import Choice, entry_table
from stagefs.cli.cache_tending import repair_directory
from stagefs.cli.chunk_maps import chunk_map
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
from stagefs.staging.values import Progress

# A verify that is stopped loses at most so much of its work.
POSITION_WRITTEN_S = 2.0
POSITION_NAME = "verify.position"


class VerifiedDirectory(msgspec.Struct, frozen=True):
    entries: int
    bytes_read: int
    damaged: list[FoundDamage]


def list_directory(directory: Path, choice: Choice, *, as_json: bool) -> None:
    entries = choice.of(CacheDirectory(directory).entries())
    if as_json:
        print_json_list(entries)
        return
    print_lines(entry_table(entries))


def show_usage(directory: Path, *, as_json: bool) -> None:
    usage = CacheDirectory(directory).usage()
    if as_json:
        print_json(usage)
    else:
        print_table(_usage_facts(usage))


def _usage_facts(usage: DirectoryUsage) -> list[tuple[str, str]]:
    return [
        ("cache", usage.directory),
        ("daemon", usage.daemon or "none has it open"),
        ("entries", str(usage.entries)),
        ("cached", human(usage.cached_bytes)),
        ("on disk", human(usage.used_bytes)),
        ("pinned", f"{human(usage.pinned_bytes)} by {usage.leases} leases"),
        ("segments", str(usage.segments)),
        ("disk free", human(usage.disk_free_bytes)),
        ("index", "whole" if usage.index_complete else "none that is whole: files were read"),
    ]


def show_entry(directory: Path, subject: str, *, as_json: bool) -> None:
    details = CacheDirectory(directory).show(subject)
    if as_json:
        print_json_list(details)
        return
    for number, detail in enumerate(details):
        if number:
            click.echo()
        print_table(_entry_facts(detail))


def _entry_facts(detail: EntryDetail) -> list[tuple[str, str]]:
    entry = detail.entry
    present = sum(count for _, count in detail.present)
    facts = [
        ("key", entry.key),
        ("URL", shown_name(entry.url)),
        ("version", shown_name(entry.version)),
        ("validator", shown_name(detail.validator)),
        ("cached", f"{human(entry.cached_bytes)} of {human(entry.size_bytes)}"),
        ("on disk", f"{human(entry.disk_bytes)} in {entry.place}"),
        ("chunks", f"{present} of {detail.chunk_count}, {human(detail.chunk_bytes)} each"),
        ("map", chunk_map(detail)),
        ("last used", when(entry.used_ns)),
    ]
    if detail.mtime_ns is not None:
        facts.append(("modified", when(detail.mtime_ns)))
    if detail.checksum is not None:
        facts.append(("checksum", detail.checksum))
    for lease in detail.leases:
        until = "" if lease.expires is None else f" until {when(int(lease.expires * 1e9))}"
        facts.append(("pinned", f"by {shown_name(lease.owner)}{until}"))
    return facts


class _Position(msgspec.Struct, frozen=True):
    """Where a verify that was stopped goes on: behind this entry, with what it had found."""

    after: str
    entries: int
    bytes_read: int
    damaged: list[FoundDamage]


def verify_directory(
    directory: Path, *, repair: bool = False, resume: bool = False, as_json: bool
) -> bool:
    """True when everything is as it was fetched.  ``resume``: go on where the last one stopped, if
    it was stopped; ``repair``: drop what is damaged (no daemon may have the directory open)."""
    begin = _read_position(directory) if resume else None
    damaged: list[FoundDamage] = [*begin.damaged] if begin else []
    entries, read_bytes = (begin.entries, begin.bytes_read) if begin else (0, 0)
    reached = Verifying(entries=0, done_bytes=0, total_bytes=0)
    steps = CacheDirectory(directory).verify(after=begin.after if begin else "")
    written_s = time.monotonic()
    with contextlib.closing(steps), progress_bar(quiet=as_json) as draw:
        for step in steps:
            if isinstance(step, FoundDamage):
                damaged.append(step)
                continue
            reached = step
            draw(Progress("verify", read_bytes + step.done_bytes, step.total_bytes))
            if step.after and time.monotonic() - written_s > POSITION_WRITTEN_S:
                written_s = time.monotonic()
                _write_position(
                    directory,
                    _Position(
                        step.after, entries + step.entries, read_bytes + step.done_bytes, damaged
                    ),
                )
    (directory / POSITION_NAME).unlink(missing_ok=True)
    found = VerifiedDirectory(entries + reached.entries, read_bytes + reached.done_bytes, damaged)
    if as_json:
        print_json(found)
    else:
        _tell_verified(found)
    if not damaged or not repair:
        return not damaged
    repaired = repair_directory(directory, {each.key for each in damaged if each.key})
    if not as_json:
        click.echo(
            f"{repaired} entries repaired: what was damaged is fetched again when it is read"
        )
    return repaired == len({each.key for each in damaged})


def _tell_verified(found: VerifiedDirectory) -> None:
    for each in found.damaged:
        chunk = "" if each.chunk is None else f", chunk {each.chunk}"
        url = "" if each.url is None else f" ({shown_name(each.url)})"
        click.echo(f"damaged: {each.path}{chunk}{url}: {each.reason}")
    click.echo(
        f"{found.entries} entries, {human(found.bytes_read)} read, {len(found.damaged)} damaged"
    )


def _read_position(directory: Path) -> _Position | None:
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode((directory / POSITION_NAME).read_bytes(), type=_Position)
    return None


def _write_position(directory: Path, position: _Position) -> None:
    """Where the directory cannot be written, a verify begins anew the next time."""
    path = directory / POSITION_NAME
    with contextlib.suppress(OSError):
        made = path.with_name(f".{POSITION_NAME}.{os.getpid()}")
        made.write_bytes(msgspec.json.encode(position))
        made.replace(path)
