"""``stagefs copy``: scp's arguments, for batch systems that start a copy program themselves.

``cli.main`` knows it by name only.  Here words become a request; another program, which replaces
this one, copies (``stagefs.copying``).
"""

import contextlib
import os
import pwd
import socket
import sys

import click

from stagefs.config import environment, load_settings
from stagefs.control.mounts import choose_mount, staging_mounts
from stagefs.copying.request import CopyRequest, handed_over, variables
from stagefs.copying.request import words as words_of
from stagefs.errors import InvalidName, NoDaemon
from stagefs.integrations.batch_requests import PathMap
from stagefs.integrations.copy_words import Reading, concerns_login, ssh_lines

_NO_MEANING = "Accepted; means nothing here."
_IGNORED = ("-B", "-q", "-A", "-O", "-R", "-s", "-T", "-3")


@click.command(context_settings={"help_option_names": ["--help"]})
@click.argument("words", nargs=-1, required=True, metavar="SOURCE... TARGET")
@click.option("-r", "recursive", is_flag=True, help="Directories with all that is in them.")
@click.option("-p", "preserve", is_flag=True, help="Keep times and modes.")
@click.option("-P", "port", type=click.IntRange(1, 65535), help="The port of host:path.")
@click.option("-v", "verbose", is_flag=True, help="Say on standard error what was copied.")
@click.option("-F", "ssh_config", metavar="FILE", help="ssh_config, in place of ~/.ssh/config.")
@click.option("-i", "identities", multiple=True, metavar="FILE", help="A private key for ssh.")
@click.option("-o", "options", multiple=True, metavar="OPTION", help="An option of ssh_config.")
@click.option("-J", "jump", metavar="HOST", help="As ssh's.")
@click.option("-c", "ciphers", metavar="CIPHER", help="As ssh's.")
@click.option("-S", "program", metavar="PROGRAM", help="In place of ssh.")
@click.option("-4", "family", flag_value="inet", help="IPv4 only, for ssh.")
@click.option("-6", "family", flag_value="inet6", help="IPv6 only, for ssh.")
@click.option("-C", "compression", is_flag=True, help="Compress what ssh sends.")
@click.option(*_IGNORED, "_flags", is_flag=True, help=_NO_MEANING)
@click.option("-l", "-X", "-D", "_values", multiple=True, metavar="VALUE", help=_NO_MEANING)
@click.option("--mount", metavar="MNT", help="Through this mount (else STAGEFS_MOUNT, the only).")
@click.option("--no-mount", is_flag=True, help="Directly, whatever is mounted.")
def copy(
    *,
    words: tuple[str, ...],
    recursive: bool,
    preserve: bool,
    port: int | None,
    verbose: bool,
    ssh_config: str | None,
    identities: tuple[str, ...],
    options: tuple[str, ...],
    jump: str | None,
    ciphers: str | None,
    program: str | None,
    family: str | None,
    compression: bool,
    mount: str | None,
    no_mount: bool,
    _flags: bool,
    _values: tuple[str, ...],
) -> None:
    """Copy files, with scp's arguments: SOURCE and TARGET are [user@]host:path, URLs or paths.

    Through the mount, when there is one, so that a node fetches a file once.  Ends with 0 only
    when everything is at its destination; a file appears there whole or not at all.
    """
    if len(words) < 2:
        raise InvalidName("One word is not enough: write SOURCE... TARGET.")
    settings = load_settings()
    mountpoint = None if no_mount else _mountpoint(mount)
    user = pwd.getpwuid(os.geteuid())
    reading = Reading(
        PathMap(settings.path_map, socket.gethostname()),
        user=user.pw_name,
        home=environment().get("HOME") or user.pw_dir,
        mountpoint=mountpoint,
        port=port,
    )
    sources = [reading.source(word) for word in words[:-1]]
    # A mount makes connections of its own, which these options do not reach.
    own_login = bool(identities or jump or ssh_config or family or ciphers or program)
    if own_login or concerns_login(options):
        direct = any(place.url.startswith(("ssh:", "sftp:")) for place in sources)
        mountpoint = None if direct else mountpoint
    overrides = {"remote.ssh.ciphers": ciphers, "remote.ssh.program": program}
    request = CopyRequest(
        sources=sources,
        target=reading.target(words[-1]),
        recursive=recursive,
        preserve=preserve,
        verbose=verbose,
        mountpoint=mountpoint,
        mount_is_meant=bool(mount or environment().get("STAGEFS_MOUNT")),
        ssh_lines=ssh_lines(
            identities=identities,
            options=options,
            jump=jump,
            family=family,
            compression=compression,
        ),
        ssh_config=None if ssh_config is None else os.path.abspath(ssh_config),
        settings={key: value for key, value in overrides.items() if value is not None},
    )
    fd = handed_over(request)
    sys.stdout.flush()
    os.execve(sys.executable, words_of(fd), variables())  # noqa: S606 - no shell is meant


def _mountpoint(named: str | None) -> str | None:
    """None when there is none, or several: each job of a node may have one."""
    own = [mount for mount in staging_mounts() if mount.uid == os.geteuid()]
    wanted = named or environment().get("STAGEFS_MOUNT")
    if not wanted:
        return own[0].mountpoint if len(own) == 1 else None
    with contextlib.suppress(NoDaemon):
        return choose_mount(wanted, staging_mounts(), uid=os.geteuid()).mountpoint
    if named:
        choose_mount(named, staging_mounts(), uid=os.geteuid())
    return None
