"""What ``stagefs copy`` hands to the program that copies: its places and options, decoded.

It goes as JSON through a file in memory, never over a command line: URLs may hold passwords.
Free of trio, because commands import it.
"""

import json
import os
import subprocess
import sys

import msgspec

from stagefs.config import environment
from stagefs.errors import RemoteError

REQUEST_BYTES_MAX = 64 << 20


class Place(msgspec.Struct, frozen=True, omit_defaults=True):
    """A source or destination: the ``path`` of a file of this machine, or a ``url``.

    ``is_pattern``: wildcards and backslashes in it mean what they mean to scp.
    """

    path: str = ""
    url: str = ""
    is_pattern: bool = False

    def __str__(self) -> str:
        return self.url or self.path

    @property
    def is_remote(self) -> bool:
        return bool(self.url)


class CopyRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """``mountpoint``: of the mount whose cache files come through; without ``mount_is_meant`` (it
    was found, not named) what it cannot reach comes directly.  ``ssh_lines``: what is to be
    in force of an ssh configuration before the user's own; ``settings`` as in stagefs.conf.
    ``removes``: there are no sources, and the object at the target's URL is to go."""

    sources: list[Place]
    target: Place
    removes: bool = False
    recursive: bool = False
    preserve: bool = False
    verbose: bool = False
    mountpoint: str | None = None
    mount_is_meant: bool = False
    ssh_lines: list[str] = []
    ssh_config: str | None = None
    settings: dict[str, str] = {}


def handed_over(request: CopyRequest) -> int:
    """A descriptor of a file in memory that has the request, for ``received`` in another program
    that inherits it."""
    fd = os.memfd_create("stagefs-copy", 0)
    # Not msgspec's own encoder: names that are no UTF-8 have surrogates.
    os.write(fd, json.dumps(msgspec.to_builtins(request)).encode())
    os.lseek(fd, 0, os.SEEK_SET)
    os.set_inheritable(fd, True)
    return fd


def received(fd: int) -> CopyRequest:
    with os.fdopen(fd, "rb") as file:
        return msgspec.convert(json.loads(file.read(REQUEST_BYTES_MAX)), CopyRequest)


def carried_out(request: CopyRequest) -> None:
    """Copy, in a program of its own.  Raises RemoteError with the sentence that it ends with."""
    fd = handed_over(request)
    try:
        done = subprocess.run(
            words(fd),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            pass_fds=[fd],
            env=variables(),
            check=False,
        )
    finally:
        os.close(fd)
    if done.returncode:
        said = os.fsdecode(done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
        raise RemoteError(said[-1].removeprefix("stagefs: "))


def words(fd: int) -> list[str]:
    """The command line of the program that copies, as ``handed_over`` prepared it."""
    return [sys.executable, "-m", "stagefs.copying", "--request-fd", str(fd)]


def variables() -> dict[str, str]:
    """Its environment: nothing of the directory that a job happens to be in is imported."""
    return {**environment(), "PYTHONSAFEPATH": "1"}
