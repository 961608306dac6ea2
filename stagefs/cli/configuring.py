"""config show and config check: which settings are in force, and whether a mount would take them.

`stagefs config` alone shows them with their sources.
"""

from pathlib import Path

import click

from stagefs.cli.finding import json_option
from stagefs.cli.output import print_json_list
from stagefs.config import DEFAULT, Loaded, load_with_sources, parse_assignments

_file = click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="One more file."
)
_assignments = click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE", help="As for mount."
)


@click.group(invoke_without_command=True)
@_file
@_assignments
@json_option
@click.pass_context
def config(
    context: click.Context, config_file: Path | None, assignments: tuple[str, ...], as_json: bool
) -> None:
    """See every setting that a mount made now would have, or check whether all are usable."""
    if context.invoked_subcommand is None:
        _print(_load(config_file, assignments), sources=True, changed=False, as_json=as_json)


@config.command("show")
@click.option("--sources", is_flag=True, help="Say where each value comes from.")
@click.option("--changed", is_flag=True, help="Only what is not as it comes.")
@_file
@_assignments
@json_option
def show(
    *,
    sources: bool,
    changed: bool,
    config_file: Path | None,
    assignments: tuple[str, ...],
    as_json: bool,
) -> None:
    """Show every setting that a mount made now would have."""
    loaded = _load(config_file, assignments)
    _print(loaded, sources=sources, changed=changed, as_json=as_json)


@config.command("check")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@_assignments
def check(file: Path | None, assignments: tuple[str, ...]) -> None:
    """Read all settings as `stagefs mount --config FILE` would; fail at what is wrong in them."""
    loaded = _load(file, assignments)
    set_values = [value for value in loaded.values if value.source != DEFAULT]
    for source in dict.fromkeys(value.source for value in set_values):
        keys = [value.key for value in set_values if value.source == source]
        click.echo(f"{source}: {', '.join(keys)}")
    click.echo(f"{len(loaded.values)} settings are usable, {len(set_values)} of them set")


def _load(config_file: Path | None, assignments: tuple[str, ...]) -> Loaded:
    return load_with_sources(config_file=config_file, overrides=parse_assignments(assignments))


def _print(loaded: Loaded, *, sources: bool, changed: bool, as_json: bool) -> None:
    values = [value for value in loaded.values if not changed or value.source != DEFAULT]
    if as_json:
        print_json_list(values)
        return
    for value in values:
        click.echo(f"{value.key} = {value.text}{f'  ({value.source})' if sources else ''}")
