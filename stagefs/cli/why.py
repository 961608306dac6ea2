"""why: what is known of one file, in sentences."""

import click

from stagefs.cli.finding import json_option, mount_option, target
from stagefs.cli.output import print_json, shown_name

_MEANINGS = {
    "cached": "all of it is cached",
    "partial": "a part of it is cached",
    "remote": "nothing of it is cached",
    "failing": "fetching it failed",
    "local": "made here",
    "directory": "a directory",
}


@click.command()
@click.argument("name", metavar="NAME")
@click.option("--offline", is_flag=True, help="Do not ask the remote.")
@mount_option
@json_option
def why(name: str, offline: bool, mountpoint: str | None, as_json: bool) -> None:
    """Explain why a file is cached, absent, kept, evicted or failing.

    Asks its remote, too, unless everything is cached.
    """
    chosen = target(mountpoint)
    found = chosen.client.why(chosen.path(name), ask=not offline)
    if as_json:
        print_json(found)
        return
    click.echo(f"{shown_name(found.path)}: {_MEANINGS.get(found.state, found.state)}")
    for sentence in found.because:
        click.echo(f"  {shown_name(sentence)}")
