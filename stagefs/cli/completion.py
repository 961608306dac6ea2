"""completion: the lines that make a shell complete commands, options and names."""

import shutil
import sys

import click
from click.shell_completion import get_completion_class

from stagefs.errors import MountFailed

SHELLS = ("bash", "zsh", "fish")
PROGRAMS = {"stagefs": "_STAGEFS_COMPLETE", "stagefs-cache": "_STAGEFS_CACHE_COMPLETE"}


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print what makes SHELL complete `stagefs` and `stagefs-cache`.

    bash: `eval "$(stagefs completion bash)"` in ~/.bashrc; zsh: the same in ~/.zshrc; fish:
    `stagefs completion fish > ~/.config/fish/completions/stagefs.fish`.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    if shell == "bash" and shutil.which("bash") is None:
        raise MountFailed("There is no bash here: name the shell you use, zsh or fish.")
    for program, variable in PROGRAMS.items():
        made = kind(click.Command(program), {}, program, variable)
        # Not source(): for bash that starts one, to see how old it is.
        sys.stdout.write(made.source_template % made.source_vars() + "\n")
