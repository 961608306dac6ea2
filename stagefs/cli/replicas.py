"""replica add, list, remove: other URLs with the content of a file."""

import click

from stagefs.cli.finding import json_option, mount_option, target
from stagefs.cli.names import as_url
from stagefs.cli.output import human, print_json, shown_name
from stagefs.staging.replica_values import ReplicaList, ReplicaStatus


@click.group()
def replica() -> None:
    """Say where else the content of a file is: the nearest healthy place is read."""


@replica.command("add")
@click.argument("name", metavar="NAME")
@click.argument("url", metavar="URL")
@click.option("--affinity", default="", metavar="PLACE", help="Where it is: datacenter/machine.")
@click.option("--trust", is_flag=True, help="Compare sizes only, not contents.")
@mount_option
@json_option
def add(
    name: str, url: str, affinity: str, trust: bool, mountpoint: str | None, as_json: bool
) -> None:
    """Add URL as a replica of NAME, after it was compared with what is there.

    With the URL that NAME was staged in from, say where that is.
    """
    chosen = target(mountpoint)
    found = chosen.client.replica_add(
        chosen.path(name), as_url(url), affinity=affinity, trust=trust
    )
    _show(found, as_json=as_json)


@replica.command("list")
@click.argument("name", metavar="NAME")
@mount_option
@json_option
def list_replicas(name: str, mountpoint: str | None, as_json: bool) -> None:
    """List the replicas of NAME in the order in which they would be asked now."""
    chosen = target(mountpoint)
    _show(chosen.client.replica_list(chosen.path(name)), as_json=as_json)


@replica.command("remove")
@click.argument("name", metavar="NAME")
@click.argument("url", metavar="URL")
@mount_option
@json_option
def remove(name: str, url: str, mountpoint: str | None, as_json: bool) -> None:
    """Forget a replica of NAME.  Nothing at a remote is touched."""
    chosen = target(mountpoint)
    _show(chosen.client.replica_remove(chosen.path(name), as_url(url)), as_json=as_json)


def _show(found: ReplicaList, *, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    for one in found.replicas:
        click.echo(_line(one))


def _line(one: ReplicaStatus) -> str:
    said = [f"{one.state:<8} {shown_name(one.url)}  {shown_name(one.affinity) or '-'}"]
    if one.rate_bytes_per_s is not None:
        said.append(f"{human(int(one.rate_bytes_per_s))}/s")
    if one.again_in_s and one.reason is None:
        said.append(f"asked again in {one.again_in_s:.0f} s")
    if one.reason is not None:
        said.append(one.reason)
    return ", ".join(said)
