"""stagefs-cache: looking into a cache, and tending it.

Only puts together: what works on a bare directory is stagefs.cli.cache_bare, what asks the
daemon of a mount is stagefs.cli.cache_live.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click

from stagefs import __version__
from stagefs.cache.inspect import CacheDirectory
from stagefs.cli import cache_bare, cache_live, cache_tables, cache_tending
from stagefs.cli.finding import json_option, mount_option, target
from stagefs.cli.main import run
from stagefs.errors import InvalidName

DAMAGE_FOUND_EXIT_CODE = 1

_Command = Callable[..., None]


def _directory_argument(command: _Command) -> _Command:
    return click.argument(
        "directory", metavar="[DIR]", required=False, type=click.Path(path_type=Path)
    )(command)


def _subjects_argument(command: _Command) -> _Command:
    return click.argument("subjects", nargs=-1, required=True, metavar="NAME|URL|KEY...")(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="stagefs-cache")
def stagefs_cache() -> None:
    """See what is cached, why, and whether it is right; and tend it.

    With DIR, a cache directory (the one that holds CACHEDIR.TAG), no daemon is needed, and the
    directory may be in use.  Without it the daemon of a mount is asked.
    """


@stagefs_cache.command("list")
@_directory_argument
@click.option("--glob", "pattern", metavar="PATTERN", help="Only URLs like this (* and ?).")
@click.option("--pinned", is_flag=True, help="Only what somebody keeps.")
@click.option("--sort", type=click.Choice(list(cache_tables.SORTS)), help="In this order.")
@click.option("--limit", type=click.IntRange(min=0), help="At most so many.")
@mount_option
@json_option
def list_entries(
    *,
    directory: Path | None,
    pattern: str | None,
    pinned: bool,
    sort: str | None,
    limit: int | None,
    mountpoint: str | None,
    as_json: bool,
) -> None:
    """List the entries."""
    choice = cache_tables.Choice(pattern, pinned, sort, limit)
    if directory is not None:
        cache_bare.list_directory(directory, choice, as_json=as_json)
    else:
        cache_live.list_entries(mountpoint, choice, as_json=as_json)


@stagefs_cache.command()
@_directory_argument
@click.option(
    "--by", type=click.Choice(cache_tables.GROUPS), help="Sums by remote, by prefix, by task."
)
@mount_option
@json_option
def usage(directory: Path | None, by: str | None, mountpoint: str | None, as_json: bool) -> None:
    """Show how much is cached and what it takes on disk."""
    if by is not None:
        owners = cache_tending.owners_of(cache_tending.place_of(directory, mountpoint))
        found = cache_tables.shares(_all_entries(directory, mountpoint), owners, by)
        cache_tables.print_shares(found, as_json=as_json)
    elif directory is not None:
        cache_bare.show_usage(directory, as_json=as_json)
    else:
        cache_live.show_usage(mountpoint, as_json=as_json)


def _all_entries(directory: Path | None, mountpoint: str | None) -> Iterator[cache_tables.Entry]:
    if directory is not None:
        yield from CacheDirectory(directory).entries()
    else:
        yield from target(mountpoint).client.cache_list()


@stagefs_cache.command()
@_directory_argument
@click.option("--format", "form", type=click.Choice(["json", "csv"]), default="json", help="(json)")
@mount_option
@json_option
def export(directory: Path | None, form: str, mountpoint: str | None, as_json: bool) -> None:
    """Print all entries for other programs, as JSON or CSV."""
    form = "json" if as_json else form
    cache_tables.export(_all_entries(directory, mountpoint), form)


@stagefs_cache.command()
@click.option("--dir", "directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("subject", metavar="NAME|URL|KEY")
@mount_option
@json_option
def show(directory: Path | None, subject: str, mountpoint: str | None, as_json: bool) -> None:
    """Show one entry, and which chunks of it are here."""
    if directory is not None:
        cache_bare.show_entry(directory, subject, as_json=as_json)
    else:
        cache_live.show_entry(mountpoint, subject, as_json=as_json)


@stagefs_cache.command()
@_directory_argument
@click.option("--only", "subject", metavar="NAME|URL|KEY", help="On a mount: this one only.")
@click.option(
    "--repair", is_flag=True, help="With DIR: drop what is damaged (a mount always does)."
)
@click.option("--resume", is_flag=True, help="Go on where the last verify of all was stopped.")
@mount_option
@json_option
def verify(
    *,
    directory: Path | None,
    subject: str | None,
    repair: bool,
    resume: bool,
    mountpoint: str | None,
    as_json: bool,
) -> None:
    """Read everything that is cached and compare it with its hashes; exit 1 on damage.

    On a mount what is damaged goes at once, and is fetched again when it is read.
    """
    if directory is not None:
        is_right = cache_bare.verify_directory(
            directory, repair=repair, resume=resume, as_json=as_json
        )
    else:
        is_right = cache_live.verify(mountpoint, subject, resume=resume, as_json=as_json)
    if not is_right:
        sys.exit(DAMAGE_FOUND_EXIT_CODE)


@stagefs_cache.command()
@_directory_argument
@mount_option
@json_option
def consistency(directory: Path | None, mountpoint: str | None, as_json: bool) -> None:
    """Compare the index with the files; exit 1 when they differ."""
    place = cache_tending.place_of(directory, mountpoint)
    if not cache_tending.check_consistency(place, as_json=as_json):
        sys.exit(DAMAGE_FOUND_EXIT_CODE)


@stagefs_cache.command()
@_directory_argument
@mount_option
@json_option
def leases(directory: Path | None, mountpoint: str | None, as_json: bool) -> None:
    """List who keeps what in the cache, and until when."""
    cache_tending.show_leases(cache_tending.place_of(directory, mountpoint), as_json=as_json)


@stagefs_cache.command()
@_directory_argument
@click.option("--last", type=click.IntRange(min=0), help="Only so many, the newest.")
@mount_option
@json_option
def history(
    directory: Path | None, last: int | None, mountpoint: str | None, as_json: bool
) -> None:
    """Show what happened: evictions, damage, changes of the capacity."""
    place = cache_tending.place_of(directory, mountpoint)
    cache_tending.show_history(place, last=last, as_json=as_json)


@stagefs_cache.command()
@_directory_argument
@click.option("--to", "size", metavar="SIZE", required=True, help="What may be left (10GiB, 0).")
@mount_option
@json_option
def cleanup(directory: Path | None, size: str, mountpoint: str | None, as_json: bool) -> None:
    """Evict, the least recently used first, until at most SIZE is left."""
    to_bytes = cache_live.size_of(size)
    if directory is not None:
        cache_tending.cleanup_directory(directory, to_bytes, as_json=as_json)
    else:
        cache_live.cleanup(mountpoint, to_bytes, as_json=as_json)


@stagefs_cache.command("cleanup-rate")
@_directory_argument
@click.option("--minutes", type=float, default=60.0, help="Of the last so many (60).")
@mount_option
@json_option
def cleanup_rate(
    directory: Path | None, minutes: float, mountpoint: str | None, as_json: bool
) -> None:
    """Show how much was evicted lately, and what of it more than once (thrash)."""
    place = cache_tending.place_of(directory, mountpoint)
    cache_tending.show_rate(place, minutes=minutes, as_json=as_json)


@stagefs_cache.command()
@click.argument("kind", type=click.Choice(["corrupt", "truncate", "drop-map"]))
@click.argument("subject", metavar="NAME|URL|KEY")
@click.option("--dir", "directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--yes", is_flag=True, help="I mean it.")
@mount_option
@json_option
def chaos(
    *,
    kind: str,
    subject: str,
    directory: Path | None,
    yes: bool,
    mountpoint: str | None,
    as_json: bool,
) -> None:
    """For drills: damage what is cached of one object, as a bad disk would.

    Readers must see nothing of it: what is damaged is found and fetched again.
    """
    if not yes:
        raise InvalidName("This damages the cache on purpose: say --yes.")
    cache_tending.drill(directory, mountpoint, subject, kind, as_json=as_json)


@stagefs_cache.command()
@click.argument("subjects", nargs=-1, metavar="[NAME|URL|KEY]...")
@click.option("--all", "everything", is_flag=True, help="All that is neither pinned nor open.")
@mount_option
@json_option
def evict(
    subjects: tuple[str, ...], everything: bool, mountpoint: str | None, as_json: bool
) -> None:
    """Drop what is cached of objects; they are fetched again when they are read."""
    cache_live.evict(mountpoint, subjects, everything=everything, as_json=as_json)


@stagefs_cache.command()
@_subjects_argument
@mount_option
@json_option
def pin(subjects: tuple[str, ...], mountpoint: str | None, as_json: bool) -> None:
    """Keep objects in the cache, fetched or not yet."""
    cache_live.pin(mountpoint, subjects, pinned=True, as_json=as_json)


@stagefs_cache.command()
@_subjects_argument
@mount_option
@json_option
def unpin(subjects: tuple[str, ...], mountpoint: str | None, as_json: bool) -> None:
    """Let objects be evicted again."""
    cache_live.pin(mountpoint, subjects, pinned=False, as_json=as_json)


@stagefs_cache.command()
@click.argument("subjects", nargs=-1, required=True, metavar="NAME...")
@click.option(
    "--priority",
    type=click.IntRange(-100, 100),
    default=0,
    help="Of several warm commands the files of the one with the highest go first.",
)
@mount_option
@json_option
def warm(
    *, subjects: tuple[str, ...], priority: int, mountpoint: str | None, as_json: bool
) -> None:
    """Fetch files, and directories with all that is below them, now."""
    cache_live.warm(mountpoint, subjects, priority=priority, as_json=as_json)


@stagefs_cache.command()
@click.argument("size", metavar="[SIZE|default]", required=False)
@mount_option
@json_option
def capacity(size: str | None, mountpoint: str | None, as_json: bool) -> None:
    """Show how large the cache of a mount may grow, or set it.

    What is set holds for later daemons and mounts, too, until `default`, or until another
    capacity is configured.
    """
    cache_live.capacity(mountpoint, size, as_json=as_json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and exit."""
    run(stagefs_cache, arguments)
