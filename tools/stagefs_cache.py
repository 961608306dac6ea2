"""stagefs-cache: looking into a cache, and tending it.

Only puts together: what works on a bare directory is stagefs.cli.cache_bare, what asks the
daemon of a mount is stagefs.cli.cache_live.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from stagefs import __version__
from stagefs.cli import cache_bare, cache_live
from stagefs.cli.finding import json_option, mount_option
from stagefs.cli.main import run

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
@mount_option
@json_option
def list_entries(directory: Path | None, mountpoint: str | None, as_json: bool) -> None:
    """List the entries, the most recently used first."""
    if directory is not None:
        cache_bare.list_directory(directory, as_json=as_json)
    else:
        cache_live.list_entries(mountpoint, as_json=as_json)


@stagefs_cache.command()
@_directory_argument
@mount_option
@json_option
def usage(directory: Path | None, mountpoint: str | None, as_json: bool) -> None:
    """Show how much is cached and what it takes on disk."""
    if directory is not None:
        cache_bare.show_usage(directory, as_json=as_json)
    else:
        cache_live.show_usage(mountpoint, as_json=as_json)


@stagefs_cache.command()
@click.option("--dir", "directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("subject", metavar="NAME|URL|KEY")
@mount_option
@json_option
def show(directory: Path | None, subject: str, mountpoint: str | None, as_json: bool) -> None:
    """Show one entry (with --dir: and which chunks of it are here)."""
    if directory is not None:
        cache_bare.show_entry(directory, subject, as_json=as_json)
    else:
        cache_live.show_entry(mountpoint, subject, as_json=as_json)


@stagefs_cache.command()
@_directory_argument
@click.option("--only", "subject", metavar="NAME|URL|KEY", help="On a mount: this one only.")
@mount_option
@json_option
def verify(
    directory: Path | None, subject: str | None, mountpoint: str | None, as_json: bool
) -> None:
    """Read everything that is cached and compare it with its hashes; exit 1 on damage.

    On a mount what is damaged goes at once, and is fetched again when it is read.
    """
    if directory is not None:
        is_right = cache_bare.verify_directory(directory, as_json=as_json)
    else:
        is_right = cache_live.verify(mountpoint, subject, as_json=as_json)
    if not is_right:
        sys.exit(DAMAGE_FOUND_EXIT_CODE)


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
@mount_option
@json_option
def warm(subjects: tuple[str, ...], mountpoint: str | None, as_json: bool) -> None:
    """Fetch files, and directories with all that is below them, now."""
    cache_live.warm(mountpoint, subjects, as_json=as_json)


@stagefs_cache.command()
@click.argument("size", metavar="[SIZE]", required=False)
@mount_option
@json_option
def capacity(size: str | None, mountpoint: str | None, as_json: bool) -> None:
    """Show how large the cache of a mount may grow, or set it for as long as its daemon lives."""
    cache_live.capacity(mountpoint, size, as_json=as_json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and exit."""
    run(stagefs_cache, arguments)
