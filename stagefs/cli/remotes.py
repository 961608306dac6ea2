"""remote list: how the servers fare that files come from."""

import click

from stagefs.cli.finding import json_option, mount_option, target
from stagefs.cli.output import human, print_json_list, shown_name
from stagefs.remote.health import RemoteStatus


@click.group()
def remote() -> None:
    """See how the servers fare that files come from and go to."""


@remote.command("list")
@mount_option
@json_option
def list_remotes(mountpoint: str | None, as_json: bool) -> None:
    """List the remotes in use: state, rate, errors, and the reason of the last one."""
    remotes = target(mountpoint).client.remote_list()
    if as_json:
        print_json_list(remotes)
        return
    for one in remotes:
        click.echo(_line(one))
        if one.reason is not None:
            click.echo(f"        {one.reason_age_s or 0:.0f} s ago: {shown_name(one.reason)}")


def _line(one: RemoteStatus) -> str:
    rate = "-" if one.rate_bytes_per_s is None else f"{human(int(one.rate_bytes_per_s))}/s"
    said = [f"{one.state:<8}{shown_name(one.url)}  {rate}", f"{human(one.fetched_bytes)} fetched"]
    said.append(f"{one.errors} of {one.attempts} attempts failed")
    if one.slow_transfers:
        said.append(f"{one.slow_transfers} too slow")
    if one.allowed is not None:
        said.append(f"at most {one.allowed} at a time")
    if one.again_in_s:
        said.append(f"asked again in {one.again_in_s:.0f} s")
    return ", ".join(said)
