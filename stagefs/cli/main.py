"""The command ``stagefs``: which subcommands there are, and how failures end.

Each subcommand's module is imported only when it is called for, so that a short command
starts in a tenth of a second.  A StageFSError is one sentence on standard error and the
exit code of its class; nobody sees a traceback for it.
"""

import importlib
import io
import sys
from collections.abc import Sequence

import click

from stagefs import __version__
from stagefs.errors import StageFSError

# Commands of integrations: only these names of them are known here.
BATCH = "stagefs.integrations.batch_commands"
COPY = "stagefs.integrations.copy_command"
# Subcommand -> (module, its command, the line in the overview).  In the order of use.
COMMANDS = {
    "mount": ("mounting", "mount", "Mount a staging area."),
    "umount": ("mounting", "umount", "Unmount it; wait until its processes have ended."),
    "stage-in": ("names", "stage_in", "Register remote objects under staging:/// names."),
    "bind": ("names", "bind", "Show a remote directory under a staging:/// name."),
    "import": ("names", "import_catalog", "Register the entries of a catalog."),
    "ls": ("names", "ls", "List names."),
    "stat": ("names", "stat", "Show what is known of a name."),
    "replica": ("replicas", "replica", "Say where else the content of a file is."),
    "rm": ("names", "rm", "Remove names (never anything at a remote)."),
    "mv": ("names", "mv", "Rename."),
    "sandbox": ("sandboxes", "sandbox", "Task directories: make, see, commit, remove them."),
    "queue": ("queue", "queue", "See and decide about outputs that are to be uploaded."),
    "flush": ("queue", "flush", "Upload what is queued; say what is left."),
    "remote": ("remotes", "remote", "See how the servers fare that files come from."),
    "run": ("run", "run", "Run a command in a sandbox, and commit what it made."),
    "prolog": (BATCH, "prolog", "For batch systems: stage in before a job."),
    "task-prolog": (BATCH, "task_prolog", "For batch systems: before each task of a job."),
    "epilog": (BATCH, "epilog", "For batch systems: stage out after a job."),
    "burst-buffer": (BATCH, "burst_buffer", "For Slurm: stage a job's buffer in and out."),
    "copy": (COPY, "copy", "Copy files, with scp's arguments, for batch systems."),
    "status": ("seeing", "status", "Show what the daemon is doing."),
    "metrics": ("seeing", "metrics", "Print the daemon's figures for Prometheus."),
    "top": ("top", "top", "Watch what a mount is doing."),
    "why": ("why", "why", "Explain why a file is cached, absent, kept or failing."),
    "doctor": ("doctor", "doctor", "See whether a mount would work here, and what to do."),
    "completion": ("completion", "completion", "Print what makes a shell complete commands."),
    "config": ("configuring", "config", "Show every setting and its source; check them."),
}


class LazyGroup(click.Group):
    """Knows its commands by name, and imports one when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        known = COMMANDS.get(cmd_name)
        if known is None:
            return None
        name = known[0] if "." in known[0] else f"stagefs.cli.{known[0]}"
        module = importlib.import_module(name)
        command = getattr(module, known[1])
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, known[2]) for name, known in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="stagefs")
def stagefs() -> None:
    """Remote inputs appear at once, are fetched once per node, and read like local files."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and exit."""
    run(stagefs, arguments)


def run(command: click.Command, arguments: Sequence[str] | None = None) -> None:
    """``command`` with the failures of StageFS as one sentence; exits."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # names are bytes
    try:
        command.main(arguments, windows_expand_args=False)
    except StageFSError as error:
        click.echo(f"{command.name}: {error}", err=True)
        sys.exit(error.exit_code)
