"""``stagefs prolog``, ``epilog`` and ``task-prolog``: what batch systems start around a job.

``cli.main`` knows them by name only, because commands and integrations do not import each other.
"""

import importlib
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import click

SCHEDULERS = {
    "grid-engine": "stagefs.integrations.grid_engine",
    "slurm": "stagefs.integrations.slurm",
}
# Those that start a program before each task, too.
TASK_SCHEDULERS = ("slurm",)


def _phase(schedulers: Iterable[str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def options(command: Callable[..., None]) -> Callable[..., None]:
        command = click.option(
            "--config", "config_file", type=click.Path(path_type=Path), help="One more file."
        )(command)
        return click.option(
            "--scheduler",
            type=click.Choice(list(schedulers)),
            required=True,
            help="The batch system that starts this; its own exit codes are kept.",
        )(command)

    return options


@click.command()
@_phase(SCHEDULERS)
def prolog(scheduler: str, config_file: Path | None) -> None:
    """Before a job: mount for its owner, with the inputs it declares.

    Started by the batch system, as root or as the job's owner.  A job that declares nothing
    (STAGEFS_MANIFEST, STAGEFS_IN, STAGEFS_OUT, a comment that begins with stagefs: in Slurm, or
    streams that the system leaves to this command) gets no mount.
    """
    sys.exit(importlib.import_module(SCHEDULERS[scheduler]).prolog(config_file))


@click.command("task-prolog")
@_phase(TASK_SCHEDULERS)
def task_prolog(scheduler: str, config_file: Path | None) -> None:
    """Before each task: tell it where its inputs are, or why there are none.

    Started by the batch system as the job's user; what it prints is for the batch system.
    """
    sys.exit(importlib.import_module(SCHEDULERS[scheduler]).task_prolog(config_file))


@click.command()
@_phase(SCHEDULERS)
def epilog(scheduler: str, config_file: Path | None) -> None:
    """After a job: upload its outputs, and leave no mount.  May be repeated."""
    sys.exit(importlib.import_module(SCHEDULERS[scheduler]).epilog(config_file))


@click.command("burst-buffer")
@click.argument("phase", type=click.Choice(["setup", "data-in", "data-out", "teardown"]))
@click.option("--job", type=click.IntRange(min=1), required=True)
@click.option("--script", type=click.Path(path_type=Path), required=True, help="Of the job.")
@click.option("--directory", type=click.Path(path_type=Path), required=True, help="Of all buffers.")
@click.option("--uid", type=int, help="Of the job's user (setup).")
@click.option("--hurry", is_flag=True, help="Although outputs are not staged out (teardown).")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="One more file.")
def burst_buffer(
    *,
    phase: str,
    job: int,
    script: Path,
    directory: Path,
    uid: int | None,
    hurry: bool,
    config_file: Path | None,
) -> None:
    """For Slurm's burst_buffer.lua: a directory of a job's own, staged in and out.

    Started as root on the host of slurmctld; prints "ok", or why not.
    """
    module = importlib.import_module("stagefs.integrations.slurm_burst_buffer")
    code = module.run_phase(
        phase,
        job=job,
        script=script,
        directory=directory,
        uid=uid,
        hurry=hurry,
        config_file=config_file,
    )
    sys.exit(code)
