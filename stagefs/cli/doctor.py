"""doctor: whether a mount would work here, before there is any, and what to do where not.

The checks are in ``checks`` (this machine) and ``remote_checks`` (URLs); here they are put in
order and printed.  Changes nothing.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from stagefs.cli import checks, remote_checks
from stagefs.cli.checks import Finding, Level
from stagefs.cli.finding import json_option
from stagefs.cli.output import print_json_list, shown_name
from stagefs.config import Loaded, load_with_sources, parse_assignments
from stagefs.errors import StageFSError

WRONG_EXIT_CODE = 1
_SIGNS = {Level.GOOD: "ok  ", Level.NOTE: "note", Level.WARNING: "warn", Level.WRONG: "FAIL"}


@click.command()
@click.argument("urls", nargs=-1, metavar="[URL]...")
@click.option(
    "--mountpoint", metavar="MNT", type=click.Path(path_type=Path), help="Where it shall be."
)
@click.option("--state", type=click.Path(path_type=Path), help="As for mount.")
@click.option("--cache", type=click.Path(path_type=Path), help="As for mount.")
@click.option("--allow-other", is_flag=True, help="As for mount.")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="One more file.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="As for mount.")
@json_option
def doctor(
    *,
    urls: tuple[str, ...],
    mountpoint: Path | None,
    state: Path | None,
    cache: Path | None,
    allow_other: bool,
    config_file: Path | None,
    assignments: tuple[str, ...],
    as_json: bool,
) -> None:
    """See whether a mount would work here, and what to do where not; exit 1 when it would not.

    Needs no mount and changes nothing.  Each URL is asked for once, with the credentials that a
    mount would use.
    """
    overrides = parse_assignments(assignments)
    if allow_other:
        overrides["mount.allow_other"] = "true"
    if cache is not None:
        overrides["cache.directory"] = str(cache.absolute())
    findings = _findings(urls, mountpoint, state, config_file, overrides)
    seen: list[Finding] = []
    if as_json:
        seen = list(findings)
        print_json_list(seen)
    else:
        for finding in findings:
            seen.append(finding)
            _tell(finding)
    if any(finding.level is Level.WRONG for finding in seen):
        sys.exit(WRONG_EXIT_CODE)


def _findings(
    urls: tuple[str, ...],
    mountpoint: Path | None,
    state: Path | None,
    config_file: Path | None,
    overrides: dict[str, str],
) -> Iterator[Finding]:
    yield from checks.of_machine()
    loaded: Loaded | None = None
    try:
        loaded = load_with_sources(config_file=config_file, overrides=overrides)
    except StageFSError as error:
        yield Finding("settings", Level.WRONG, str(error), "Mend the setting that is named.")
    if loaded is not None:
        yield Finding("settings", Level.GOOD, "can be read")
        yield from checks.of_users(allow_other=loaded.settings.mount.allow_other)
        yield from checks.of_disk(mountpoint or Path("mnt"), state, loaded.settings)
    if mountpoint is not None:
        yield from checks.of_mountpoint(mountpoint)
    if loaded is not None:
        given = [f"{one.key}={one.text}" for one in loaded.values if one.source != "default"]
        yield from remote_checks.of_urls(urls, given)


def _tell(finding: Finding) -> None:
    click.echo(f"{_SIGNS[finding.level]}  {finding.check}: {shown_name(finding.said)}")
    if finding.advice:
        click.echo(f"      -> {shown_name(finding.advice)}")
