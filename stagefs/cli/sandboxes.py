"""sandbox create, list, show, commit, fail, remove."""

from collections.abc import Callable
from pathlib import Path

import click

from stagefs.cli.finding import Target, json_option, mount_option, target
from stagefs.cli.output import (
    human,
    print_json,
    print_json_list,
    print_table,
    progress_bar,
    shown_name,
    when,
)
from stagefs.errors import InvalidManifest
from stagefs.model import OnWrite
from stagefs.staging.manifest import LeaseLifetime, Manifest, from_options, read_manifest
from stagefs.staging.values import CommitRecord, Sandbox, SandboxDetails, SandboxReads

LISTED_MAX = 20


@click.group()
def sandbox() -> None:
    """Task directories: make them, see them, publish what they made, remove them."""


def declaring(command: Callable[..., None]) -> Callable[..., None]:
    """The options that declare what a sandbox takes and gives."""
    options = [
        click.option(
            "--in",
            "inputs",
            multiple=True,
            metavar="NAME=URL",
            help="Link NAME to a staging:/// name or any URL; may be repeated.",
        ),
        click.option(
            "--mirror",
            "mirrors",
            multiple=True,
            metavar="'GLOB=DIR'",
            help="Link what GLOB matches on this machine into DIR of the sandbox.",
        ),
        click.option(
            "--out",
            "outputs",
            multiple=True,
            metavar="'GLOB=URL'",
            help="Commit what GLOB matches in the sandbox to URL (below it, if it ends with '/').",
        ),
        click.option(
            "--overwrite", is_flag=True, help="Outputs replace what is there at their URLs."
        ),
        click.option(
            "--on-write",
            type=click.Choice([str(policy) for policy in OnWrite]),
            help="What writing to an input does (copy-up, unless the mount says otherwise).",
        ),
        click.option("--persistent", is_flag=True, help="It can be committed and made again."),
        click.option("--record", is_flag=True, help="Note what the sandbox reads."),
        click.option(
            "--lifetime",
            type=click.Choice([str(lifetime) for lifetime in LeaseLifetime]),
            help="How long its inputs are kept in the cache (task).",
        ),
        click.option(
            "--manifest",
            "manifest_file",
            type=click.Path(path_type=Path),
            help="All of that from a JSON or TOML file.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def declared(
    *,
    inputs: tuple[str, ...],
    mirrors: tuple[str, ...],
    outputs: tuple[str, ...],
    overwrite: bool,
    on_write: str | None,
    persistent: bool,
    record: bool,
    lifetime: str | None,
    manifest_file: Path | None,
) -> Manifest:
    """The manifest that the options of ``declaring`` mean.  Raises InvalidManifest."""
    if manifest_file is not None:
        options = (inputs, mirrors, outputs, overwrite, on_write, persistent, record, lifetime)
        if any(options):
            raise InvalidManifest(
                f"{manifest_file} declares everything: write what the other options say into it."
            )
        return read_manifest(manifest_file)
    return from_options(
        inputs=inputs,
        mirrors=mirrors,
        outputs=outputs,
        overwrite=overwrite,
        on_write=None if on_write is None else OnWrite(on_write),
        persistent=persistent,
        record=record,
        lifetime=LeaseLifetime.TASK if lifetime is None else LeaseLifetime(lifetime),
    )


def sandbox_name(chosen: Target, text: str) -> str:
    """What the API calls a sandbox: a name below ``tasks/``, or a path in the mount."""
    return chosen.path(text) if "/" in text else text


@sandbox.command("create")
@click.argument("name")
@declaring
@click.option(
    "--template",
    type=click.Path(path_type=Path),
    help="A manifest file from which --count sandboxes are made at once.",
)
@click.option("--count", type=click.IntRange(1, 1_000_000), help="How many: NAME.000000, ...")
@click.option(
    "--worker-pid",
    type=click.IntRange(min=1),
    metavar="PID",
    help="The program that works in it: once it has ended, the next mount removes the sandbox.",
)
@mount_option
@json_option
def create(
    *,
    name: str,
    template: Path | None,
    count: int | None,
    worker_pid: int | None,
    mountpoint: str | None,
    as_json: bool,
    **declarations: object,
) -> None:
    """Make a sandbox with its inputs; nothing is fetched before it is read."""
    manifest = declared(**declarations)  # type: ignore[arg-type]
    if (template is None) != (count is None):
        raise InvalidManifest("Say both: --template FILE and --count N.")
    if template is not None and (worker_pid is not None or manifest != Manifest()):
        raise InvalidManifest(f"{template} declares everything: leave the other options away.")
    chosen = target(mountpoint)
    with progress_bar(quiet=as_json) as progress:
        if template is not None and count is not None:
            made = chosen.client.sandbox_create_many(
                sandbox_name(chosen, name), count, read_manifest(template), progress=progress
            )
        else:
            made = [
                chosen.client.sandbox_create(
                    sandbox_name(chosen, name),
                    manifest,
                    worker_pid=worker_pid,
                    progress=progress,
                )
            ]
    if as_json and template is None:
        print_json(made[0])
    elif as_json:
        print_json_list(made)
    else:
        for one in made if len(made) <= LISTED_MAX else (made[0], made[-1]):
            click.echo(shown_name(f"{chosen.mountpoint}{one.path}"))
        if len(made) > LISTED_MAX:
            click.echo(f"{len(made)} sandboxes")


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
        click.echo(f"{one.state:<10}  {when(one.changed_ns)}  {shown_name(one.name)}")


@sandbox.command("show")
@click.argument("name")
@click.option("--hashes", is_flag=True, help="Of the chunks that it read, where it records.")
@mount_option
@json_option
def show(name: str, hashes: bool, mountpoint: str | None, as_json: bool) -> None:
    """Show a sandbox: its inputs, which of them the task modified, what was committed."""
    chosen = target(mountpoint)
    with progress_bar(quiet=as_json) as progress:
        found = chosen.client.sandbox_show(
            sandbox_name(chosen, name), hashes=hashes, progress=progress
        )
    if as_json:
        print_json(found)
        return
    print_table([(label, shown_name(fact)) for label, fact in _facts(found)])


def _facts(found: SandboxDetails) -> list[tuple[str, str]]:
    one = found.sandbox
    facts = [
        ("sandbox", one.name),
        ("path", one.path),
        ("state", f"{one.state} since {when(one.changed_ns)}"),
        ("on write", one.on_write + (", persistent" if one.persistent else "")),
    ]
    if found.reason:
        facts.append(("reason", found.reason))
    if found.worker is not None:
        facts.append(("worker", f"program {found.worker.pid}"))
    facts += [(f"input, {each.state}", f"{each.name}  {each.source}") for each in found.inputs]
    facts += [("mirror", f"{what}  {to or '.'}") for what, to in found.manifest.mirrors.items()]
    facts += [("output", f"{each.pattern}  {each.to}") for each in found.manifest.outputs]
    facts += [("modified", name) for name in found.modified]
    facts.append(("leases", f"{found.leases}, lifetime {found.lifetime}"))
    for record in found.commits:
        facts.append((f"commit {record.id}", when(record.time_ns)))
        facts += [("  to", _output_line(each.to, each.size_bytes)) for each in record.outputs]
    return [*facts, *_reads(found.reads)]


def _reads(reads: SandboxReads | None) -> list[tuple[str, str]]:
    if reads is None:
        return []
    facts = [
        (
            "read",
            f"{human(reads.served_bytes)}, of which {human(reads.fetched_bytes)} were fetched;"
            f" waited {reads.blocked_s:.1f} s ({reads.note})",
        )
    ]
    for one in reads.objects:
        read = f"{human(one.served_bytes)} of {human(one.size_bytes)}"
        facts.append(("  object", f"{one.name}  {read}  {one.url}"))
        facts += [(f"    chunk {chunk}", digest) for chunk, digest in one.chunk_hashes.items()]
    return facts + [("  never opened", name) for name in reads.never_opened]


def _output_line(to: str, size_bytes: int) -> str:
    return f"{to}  {human(size_bytes)}"


@sandbox.command("commit")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option(
    "--out",
    "outputs",
    multiple=True,
    metavar="'GLOB=URL'",
    help="Further outputs, besides those the sandbox was made with.",
)
@click.option("--overwrite", is_flag=True, help="Those replace what is there at their URLs.")
@mount_option
@json_option
def commit(
    *,
    names: tuple[str, ...],
    outputs: tuple[str, ...],
    overwrite: bool,
    mountpoint: str | None,
    as_json: bool,
) -> None:
    """Publish the outputs of a task that succeeded, all or none; queue what goes to remotes."""
    more = from_options(outputs=outputs, overwrite=overwrite).outputs
    chosen = target(mountpoint)
    with progress_bar(quiet=as_json) as progress:
        records = [
            chosen.client.sandbox_commit(
                sandbox_name(chosen, name), outputs=more, progress=progress
            )
            for name in names
        ]
    if as_json:
        print_json_list(records)
        return
    for record in records:
        print_record(record)


def print_record(record: CommitRecord, *, to_stderr: bool = False) -> None:
    for each in record.outputs:
        fate = "queued" if each.queued else "published"
        line = f"{each.name}: {fate}, {_output_line(each.to, each.size_bytes)}"
        click.echo(shown_name(line), err=to_stderr)


@sandbox.command("fail")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--reason", metavar="TEXT", help="Shown with the sandbox.")
@mount_option
@json_option
def fail(names: tuple[str, ...], reason: str | None, mountpoint: str | None, as_json: bool) -> None:
    """The task failed: publish nothing, keep everything for inspection, end its leases."""
    chosen = target(mountpoint)
    failed: list[Sandbox] = [
        chosen.client.sandbox_fail(sandbox_name(chosen, name), reason) for name in names
    ]
    if as_json:
        print_json_list(failed)


@sandbox.command("remove")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@mount_option
@json_option
def remove(names: tuple[str, ...], mountpoint: str | None, as_json: bool) -> None:
    """Remove sandboxes with all that is in them; what they link stays."""
    chosen = target(mountpoint)
    with progress_bar(quiet=as_json) as progress:
        removed = [
            chosen.client.sandbox_remove(sandbox_name(chosen, name), progress=progress)
            for name in names
        ]
    if as_json:
        print_json_list(removed)
