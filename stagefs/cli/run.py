"""run: a sandbox, a command in it, and a commit when that went well."""

import errno
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import click

from stagefs.cli.finding import Target, mount_option, target
from stagefs.cli.output import progress_bar, shown_name
from stagefs.cli.running import Task, why
from stagefs.cli.sandboxes import declared, declaring, print_record, sandbox_name
from stagefs.cli.without_fuse import WithoutFuse, serving_without_fuse
from stagefs.config import environment
from stagefs.control.client import Refused
from stagefs.errors import InvalidName, NoDaemon, StageFSError
from stagefs.staging.manifest import Manifest
from stagefs.staging.values import ProgressCallback, Sandbox

# A daemon that died is back within seconds.
RESTART_S = 30.0
ASK_AGAIN_S = 0.2

_Answer = TypeVar("_Answer")


@click.command(context_settings={"allow_interspersed_args": False})
@declaring
@click.option("--name", help="Of the sandbox (a new one).")
@click.option("--no-fuse", is_flag=True, help="In a real directory: no mount is needed.")
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    help="With --no-fuse: where cache and outputs are kept.",
)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="With --no-fuse.")
@click.option("--keep", is_flag=True, help="Keep the sandbox of a command that succeeded, too.")
@click.option("-v", "--verbose", is_flag=True, help="Tell on standard error what was committed.")
@mount_option
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
def run(
    *,
    name: str | None,
    no_fuse: bool,
    state: Path | None,
    assignments: tuple[str, ...],
    keep: bool,
    verbose: bool,
    mountpoint: str | None,
    command: tuple[str, ...],
    **declarations: object,
) -> None:
    """Run COMMAND in a new sandbox, and commit its outputs if it succeeds.

    Signals are passed on, and the exit code is that of the command.  The sandbox of a command
    that failed is kept.
    """
    manifest = declared(**declarations)  # type: ignore[arg-type]
    if not no_fuse and (state is not None or assignments):
        raise InvalidName("--state and --set are for --no-fuse: `stagefs mount` takes them.")
    task = Task()
    name = name or f"run-{os.getpid()}-{secrets.token_hex(3)}"
    with task.passing_signals():
        if no_fuse:
            serving = serving_without_fuse(mountpoint, state, assignments)
            code = WithoutFuse(task, manifest, name, keep, verbose).run(serving, command)
        else:
            code = _run(task, manifest, name, mountpoint, command, keep=keep, verbose=verbose)
    sys.exit(code)


def _run(
    task: Task,
    manifest: Manifest,
    name: str,
    mountpoint: str | None,
    command: tuple[str, ...],
    *,
    keep: bool,
    verbose: bool,
) -> int:
    chosen = target(mountpoint)
    client = chosen.client
    called = sandbox_name(chosen, name)
    with progress_bar() as progress:
        made = _made(chosen, called, manifest, progress)
    directory = f"{chosen.mountpoint}{made.path}"
    variables = {
        **environment(),
        "STAGEFS_MOUNT": chosen.mountpoint,
        "STAGEFS_SANDBOX": directory,
        "PWD": directory,
    }
    code = task.run(command, directory=directory, variables=variables)
    if code:
        reason = why(command, code)
        patiently(lambda: client.sandbox_fail(called, reason))
        _say(f"{reason}; its sandbox is kept: {directory}")
        return code
    try:
        with progress_bar() as progress:
            # Committed sandboxes answer their record again: asking twice does no harm.
            record = patiently(lambda: client.sandbox_commit(called, progress=progress))
    except StageFSError:
        _say(f"{command[0]} succeeded, but was not committed; its sandbox is kept: {directory}")
        raise
    if verbose:
        print_record(record, to_stderr=True)
    if keep or manifest.persistent:
        _say(f"the sandbox is kept: {directory}")
    else:
        _remove(chosen, called)
    return 0


def _made(chosen: Target, name: str, manifest: Manifest, progress: ProgressCallback) -> Sandbox:
    tries = 0

    def make() -> Sandbox:
        nonlocal tries
        tries += 1
        try:
            return chosen.client.sandbox_create(name, manifest, progress=progress)
        except Refused as error:
            # The answer to the first try was lost with its daemon.
            if tries == 1 or error.errno != errno.EEXIST:
                raise
            return chosen.client.sandbox_show(name).sandbox

    return patiently(make)


def _remove(chosen: Target, name: str) -> None:
    tries = 0

    def remove() -> None:
        nonlocal tries
        tries += 1
        try:
            chosen.client.sandbox_remove(name)
        except Refused as error:
            if tries == 1 or error.errno != errno.ENOENT:
                raise

    patiently(remove)


def patiently(ask: Callable[[], _Answer]) -> _Answer:
    """The answer, also when the daemon dies and is started again meanwhile.  Raises NoDaemon when
    none answers for RESTART_S."""
    pause = threading.Event()
    deadline: float | None = None
    while True:
        try:
            return ask()
        except NoDaemon:
            deadline = deadline or time.monotonic() + RESTART_S
            if time.monotonic() > deadline:
                raise
            pause.wait(ASK_AGAIN_S)


def _say(text: str) -> None:
    click.echo(shown_name(f"stagefs run: {text}"), err=True)
