"""``stagefs prolog`` and ``stagefs epilog``: what batch systems start before and after a job.

``cli.main`` knows them by name only, because commands and integrations do not import each other.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import click

SCHEDULERS = {"grid-engine": "stagefs.integrations.grid_engine"}


def _phase(command: Callable[..., None]) -> Callable[..., None]:
    command = click.option(
        "--config", "config_file", type=click.Path(path_type=Path), help="One more file."
    )(command)
    return click.option(
        "--scheduler",
        type=click.Choice(list(SCHEDULERS)),
        required=True,
        help="The batch system that starts this; its own exit codes are kept.",
    )(command)


@click.command()
@_phase
def prolog(scheduler: str, config_file: Path | None) -> None:
    """Before a job: mount for its owner, with the inputs it declares.

    Started by the batch system, as root or as the job's owner.  A job that declares nothing
    (STAGEFS_MANIFEST, STAGEFS_IN, STAGEFS_OUT, or streams that the system leaves to this
    command) gets no mount.
    """
    sys.exit(importlib.import_module(SCHEDULERS[scheduler]).prolog(config_file))


@click.command()
@_phase
def epilog(scheduler: str, config_file: Path | None) -> None:
    """After a job: upload its outputs, and leave no mount.  May be repeated."""
    sys.exit(importlib.import_module(SCHEDULERS[scheduler]).epilog(config_file))
