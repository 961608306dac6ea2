"""queue list, retry, cancel; flush; and what `umount` asks of the queue."""

import math
import time

import click

from stagefs.cli.finding import json_option, mount_option, target
from stagefs.cli.output import human, print_json, print_json_list, progress_bar, shown_name
from stagefs.control.client import Client
from stagefs.errors import Busy, InvalidName
from stagefs.staging.queue_values import Flushed, UploadStatus
from stagefs.units import parse_duration

# As the API knows them; "uploading" is one of those that wait.
STATES = ("prepared", "queued", "uploading", "done", "replaced", "failed", "cancelled")


class NotUploaded(Busy):
    """Outputs are left in the queue."""


@click.group()
def queue() -> None:
    """See and decide about outputs that are to be uploaded."""


@queue.command("list")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(STATES),
    help="Only these; may be repeated (default: all that are not done with).",
)
@click.option("--all", "everything", is_flag=True, help="Finished ones, too.")
@mount_option
@json_option
def list_uploads(
    states: tuple[str, ...], everything: bool, mountpoint: str | None, as_json: bool
) -> None:
    """List uploads, the oldest first, with the reason of what failed."""
    if everything and states:
        raise InvalidName("--all and --state exclude each other.")
    open_states = ("prepared", "queued", "uploading", "failed")
    chosen = None if everything else states or open_states
    uploads = target(mountpoint).client.queue_list(chosen)
    if as_json:
        print_json_list(uploads)
        return
    for upload in uploads:
        click.echo(_line(upload))
        if upload.reason:
            click.echo(f"        {shown_name(upload.reason)}")


def _line(upload: UploadStatus) -> str:
    size = human(upload.size_bytes)
    if upload.state == "uploading":
        size = f"{human(upload.sent_bytes)} of {size}"
    what = "remove the object" if upload.removes else size
    said = [f"{upload.id:>6}", f"{upload.state:<9}", shown_name(upload.url), f"({what}"]
    if upload.attempts:
        said.append(f"attempts {upload.attempts}")
    if upload.state == "queued" and upload.next_try_ns > time.time_ns():
        said.append(f"again in {(upload.next_try_ns - time.time_ns()) / 1e9:.0f} s")
    if upload.origin is not None:
        said.append(f"left by {upload.origin}")
    return f"{' '.join(said[:3])} {', '.join(said[3:])})"


def _numbers(ids: tuple[int, ...], *, everything: bool) -> list[int] | None:
    if everything == bool(ids):
        raise InvalidName("Say which uploads: the numbers of `stagefs queue list`, or --all.")
    return None if everything else list(ids)


@queue.command("retry")
@click.argument("ids", nargs=-1, type=int, metavar="NUMBER...")
@click.option("--all", "everything", is_flag=True, help="Everything that waits or failed.")
@mount_option
@json_option
def retry(ids: tuple[int, ...], everything: bool, mountpoint: str | None, as_json: bool) -> None:
    """Try again now what failed, waits or was cancelled."""
    chosen = _numbers(ids, everything=everything)
    changed = target(mountpoint).client.queue_retry(chosen)
    if as_json:
        print_json(changed)
    else:
        click.echo(f"{_counted(changed.uploads)} queued")


@queue.command("cancel")
@click.argument("ids", nargs=-1, type=int, metavar="NUMBER...")
@click.option("--all", "everything", is_flag=True, help="Everything that waits or failed.")
@click.option("--discard", is_flag=True, help="Remove the files at once: no retry is possible.")
@mount_option
@json_option
def cancel(
    ids: tuple[int, ...], everything: bool, discard: bool, mountpoint: str | None, as_json: bool
) -> None:
    """Give up uploads.  For a while `stagefs queue retry` brings them back."""
    chosen = _numbers(ids, everything=everything)
    changed = target(mountpoint).client.queue_cancel(chosen, discard=discard)
    if as_json:
        print_json(changed)
    else:
        click.echo(f"{_counted(changed.uploads)} cancelled")


def parse_deadline(text: str | None) -> float | None:
    """Raises InvalidName."""
    if text is None:
        return None
    try:
        deadline_s = parse_duration(text)
    except ValueError as exc:
        raise InvalidName(f"{exc}.") from exc
    return deadline_s if math.isfinite(deadline_s) else None


@click.command()
@click.option(
    "--deadline",
    metavar="TIME",
    help="Give up after so long (120, 5m); default: when nothing has moved for two minutes.",
)
@mount_option
@json_option
def flush(deadline: str | None, mountpoint: str | None, as_json: bool) -> None:
    """Upload what is queued now; fails when something is left, and says what."""
    deadline_s = parse_deadline(deadline)
    client = target(mountpoint).client
    with progress_bar(quiet=as_json) as progress:
        flushed = client.flush(deadline_s, progress=progress)
    if as_json:
        print_json(flushed)
    else:
        click.echo(_what_went(flushed))
    if (left := what_is_left(flushed)) is not None:
        raise NotUploaded(f"{left}; `stagefs queue list` shows them all.")


def _what_went(flushed: Flushed) -> str:
    """The daemon uploads all the time: often nothing is left for the command."""
    here = f"uploaded {_counted(flushed.uploads)}, {human(flushed.bytes_sent)}"
    before = f"{_counted(flushed.before)}, {human(flushed.before_bytes)}"
    if flushed.uploads:
        return f"{here}; before that {before}" if flushed.before else here
    waits = what_is_left(flushed) is not None
    if flushed.before:
        return f"uploaded already: {before}{'' if waits else '; nothing waits'}"
    return here if waits else "nothing waits to be uploaded"


def flush_before_umount(client: Client, *, deadline_s: float | None, quiet: bool) -> None:
    """Wait for the queue.  Raises NotUploaded; NoDaemon and Refused as the client does."""
    queued = client.status().queue
    if not (queued.waiting or queued.failed or queued.prepared):
        return
    with progress_bar(quiet=quiet) as progress:
        flushed = client.flush(deadline_s, progress=progress)
    if (left := what_is_left(flushed)) is not None:
        raise NotUploaded(
            f"{left}; nothing was unmounted: `stagefs umount --force` does it all the same, they"
            f" stay in {shown_name(flushed.left.directory)} for the next mount with these outputs."
        )


def what_is_left(flushed: Flushed) -> str | None:
    """The beginning of a sentence, or None."""
    left = flushed.left
    counts = [
        (left.waiting, "waiting"),
        (left.failed, "failed"),
        (left.prepared, "of a commit that another mount left unfinished"),
    ]
    said = [f"{count} {what}" for count, what in counts if count]
    if not said:
        return None
    outputs = sum(count for count, _ in counts)
    size = human(left.waiting_bytes + left.failed_bytes)
    sentence = f"{_counted(outputs)} ({size}) not uploaded ({', '.join(said)})"
    named = next((one for one in flushed.examples if one.reason), None)
    if named is not None and named.reason is not None:
        sentence += f": upload {named.id}: {named.reason.rstrip('.')}"
    elif flushed.examples:
        sentence += f": upload {flushed.examples[0].id} to {flushed.examples[0].url}"
    if left.trouble is not None:
        sentence += f"; {left.trouble.rstrip('.')}"
    return shown_name(sentence)


def _counted(outputs: int) -> str:
    return f"{outputs} output{'' if outputs == 1 else 's'}"
