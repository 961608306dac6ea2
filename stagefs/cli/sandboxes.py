"""sandbox create, list, remove."""

import click

from stagefs.cli.finding import json_option, mount_option, target
from stagefs.cli.names import as_url
from stagefs.cli.output import print_json, print_json_list, progress_bar, shown_name
from stagefs.errors import InvalidName


@click.group()
def sandbox() -> None:
    """Make, list and remove task directories (MNT/tasks/NAME)."""


def parse_inputs(words: tuple[str, ...]) -> dict[str, str]:
    """``NAME=URL`` each.  Raises InvalidName."""
    inputs: dict[str, str] = {}
    for word in words:
        name, equals, source = word.partition("=")
        if not equals or not name or not source:
            raise InvalidName(f"--in {word!r} links nothing: write --in NAME=URL.")
        if name in inputs:
            raise InvalidName(f"--in names {name} twice.")
        inputs[name] = as_url(source)
    return inputs


@sandbox.command("create")
@click.argument("name")
@click.option(
    "--in",
    "inputs",
    multiple=True,
    metavar="NAME=URL",
    help="Link NAME to a staging:/// name or any URL; may be repeated.",
)
@mount_option
@json_option
def create(name: str, inputs: tuple[str, ...], mountpoint: str | None, as_json: bool) -> None:
    """Make a sandbox with its inputs; nothing is fetched before it is read."""
    links = parse_inputs(inputs)
    chosen = target(mountpoint)
    with progress_bar(quiet=as_json) as progress:
        made = chosen.client.sandbox_create(name, links, progress=progress)
    if as_json:
        print_json(made)
    else:
        click.echo(shown_name(f"{chosen.mountpoint}{made.path}"))


@sandbox.command("list")
@mount_option
@json_option
def list_all(mountpoint: str | None, as_json: bool) -> None:
    """List the sandboxes of a mount."""
    sandboxes = target(mountpoint).client.sandbox_list()
    if as_json:
        print_json_list(sandboxes)
        return
    for one in sandboxes:
        click.echo(shown_name(one.name))


@sandbox.command("remove")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@mount_option
@json_option
def remove(names: tuple[str, ...], mountpoint: str | None, as_json: bool) -> None:
    """Remove sandboxes with all that is in them; what they link stays."""
    chosen = target(mountpoint)
    with progress_bar(quiet=as_json) as progress:
        removed = [chosen.client.sandbox_remove(name, progress=progress) for name in names]
    if as_json:
        print_json_list(removed)
