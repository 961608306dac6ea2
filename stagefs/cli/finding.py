"""Which mount a command is about, and its daemon's socket.

Supervisors are found among the processes, without touching the mount: one whose daemon is stopped
answers nobody.  Only where the supervisor cannot be seen (another pid namespace, hidepid) the
mount's link ``.stagefs/control`` is read, in a thread with a deadline.
"""

import contextlib
import itertools
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import click
import msgspec

from stagefs.control.api import SOCKET_NAME
from stagefs.control.client import Client
from stagefs.control.mounts import FoundMount, choose_mount, staging_mounts
from stagefs.errors import InvalidName, NoDaemon

SUPERVISOR_MODULE = "stagefs.supervisor"
CONTROL_LINK = ".stagefs/control"
ANSWER_TIMEOUT_S = 10.0


class Supervisor(msgspec.Struct, frozen=True):
    """The process that holds a mount, and where that mount keeps its state."""

    pid: int
    state: Path


def supervisor_of(mount: FoundMount, proc: Path = Path("/proc")) -> Supervisor | None:
    """None when it is gone, or cannot be seen.  Anybody can start a process that looks like one:
    only root's, the mount's user's and our own are believed.
    """
    believed = {0, os.geteuid(), mount.uid}
    for entry in proc.iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            words = os.fsdecode((entry / "cmdline").read_bytes()).split("\0")
            if SUPERVISOR_MODULE not in words[:4] or entry.stat().st_uid not in believed:
                continue
            named = dict(itertools.pairwise(words))
            if named.get("--mountpoint") == mount.mountpoint and "--state" in named:
                return Supervisor(int(entry.name), Path(named["--state"]))
    return None


def control_socket(mount: FoundMount) -> Path:
    """Where the daemon of a mount listens.  Raises NoDaemon."""
    supervisor = supervisor_of(mount)
    if supervisor is not None:
        return supervisor.state / SOCKET_NAME
    return linked_socket(mount.mountpoint)


def linked_socket(mountpoint: str) -> Path:
    """What the mount itself says.  Raises NoDaemon when it does not answer in time."""
    answers: queue.SimpleQueue[str | OSError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(os.readlink(os.path.join(mountpoint, CONTROL_LINK)))
        except OSError as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    answer: str | OSError = TimeoutError()
    with contextlib.suppress(queue.Empty):
        answer = answers.get(timeout=ANSWER_TIMEOUT_S)
    if isinstance(answer, str):
        return Path(mountpoint) / ".stagefs" / answer
    if isinstance(answer, TimeoutError):
        why = f"does not answer within {ANSWER_TIMEOUT_S:g} s"
    else:
        why = f"cannot be asked ({answer.strerror})"
    raise NoDaemon(
        f"The mount {mountpoint} {why}: `stagefs umount {mountpoint}` clears it away, or mount"
        " again."
    )


class Target(msgspec.Struct, frozen=True):
    """The mount a command is about, and a client of its daemon."""

    mountpoint: str
    client: Client

    def path(self, text: str) -> str:
        """What the API calls a name that somebody typed: a ``staging:///`` name, or a path in the
        mount.  Raises InvalidName.
        """
        if text.startswith("staging:"):
            return text
        parent, name = os.path.split(os.path.abspath(text))
        path = os.path.join(os.path.realpath(parent), name)
        if path == self.mountpoint:
            return "/"
        if not path.startswith(f"{self.mountpoint}/"):
            raise InvalidName(
                f"{text} is not in the mount {self.mountpoint}: write staging:///name, or a path"
                " below it."
            )
        return path[len(self.mountpoint) :]


def target(named: str | None) -> Target:
    """The mount that is meant.  Raises NoDaemon, InvalidName."""
    mount = choose_mount(named, staging_mounts(), uid=os.geteuid())
    return Target(mount.mountpoint, Client(control_socket(mount)))


def mount_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--mount",
        "mountpoint",
        metavar="MNT",
        help="The mount meant (else STAGEFS_MOUNT, else the only one).",
    )(command)


def json_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)
