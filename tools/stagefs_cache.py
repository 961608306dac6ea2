"""stagefs-cache: looking into a cache, and tending it.

Only puts together: what works on a bare directory is stagefs.cli.cache_bare.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from stagefs import __version__
from stagefs.cli import cache_bare
from stagefs.cli.finding import json_option
from stagefs.cli.main import run

DAMAGE_FOUND_EXIT_CODE = 1

_Command = Callable[..., None]


def _directory_argument(command: _Command) -> _Command:
    return click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="stagefs-cache")
def stagefs_cache() -> None:
    """See what is cached, why, and whether it is right.

    DIR is a cache directory: the one that holds CACHEDIR.TAG.  It may be in use.
    """


@stagefs_cache.command("list")
@_directory_argument
@json_option
def list_entries(directory: Path, as_json: bool) -> None:
    """List the entries, the most recently used first."""
    cache_bare.list_directory(directory, as_json=as_json)


@stagefs_cache.command()
@_directory_argument
@json_option
def usage(directory: Path, as_json: bool) -> None:
    """Show how much is cached and what it takes on disk."""
    cache_bare.show_usage(directory, as_json=as_json)


@stagefs_cache.command()
@click.option("--dir", "directory", metavar="DIR", type=click.Path(path_type=Path), required=True)
@click.argument("subject", metavar="KEY|URL")
@json_option
def show(directory: Path, subject: str, as_json: bool) -> None:
    """Show one entry and which chunks of it are here."""
    cache_bare.show_entry(directory, subject, as_json=as_json)


@stagefs_cache.command()
@_directory_argument
@json_option
def verify(directory: Path, as_json: bool) -> None:
    """Read everything that is cached and compare it with its hashes; exit 1 on damage."""
    if not cache_bare.verify_directory(directory, as_json=as_json):
        sys.exit(DAMAGE_FOUND_EXIT_CODE)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and exit."""
    run(stagefs_cache, arguments)
