"""What is known of the mount that `stagefs mount --replace` takes over, without touching it."""

import contextlib
import itertools
import json
import os
import pwd
from pathlib import Path

import msgspec

from stagefs.cli.finding import supervisor_of
from stagefs.config import KEYS, parse_assignments
from stagefs.control.mounts import choose_mount, staging_mounts
from stagefs.errors import MountFailed

RECORD_NAME = "supervisor.json"


class RunningMount(msgspec.Struct, frozen=True):
    mountpoint: Path
    state: Path
    user: str | None
    """As root: for whom it was mounted."""
    settings: dict[str, str]
    """Those that are not defaults."""


def running_mount(mountpoint: Path, *, state: Path | None, user: str | None) -> RunningMount:
    """Raises NoDaemon when nothing is mounted there, MountFailed when it is not to be replaced."""
    chosen = choose_mount(str(mountpoint), staging_mounts(), uid=os.geteuid())
    supervisor = supervisor_of(chosen)
    if supervisor is None:
        raise MountFailed(
            f"The supervisor of {chosen.mountpoint} is gone, or hidden from here: without --replace"
            " `stagefs mount` clears a dead mount and makes it anew."
        )
    words = _words(supervisor.pid)
    running = RunningMount(
        Path(chosen.mountpoint), supervisor.state, _user(words), _settings(words)
    )
    if state is not None and state.absolute() != running.state:
        raise MountFailed(
            f"{chosen.mountpoint} has its state in {running.state}, and takes it along: leave"
            " --state away."
        )
    if user is not None and user != running.user:
        name = running.user or pwd.getpwuid(chosen.uid).pw_name
        raise MountFailed(f"{chosen.mountpoint} is a mount for {name}: leave --user away.")
    if Path(f"/proc/{supervisor.pid}").stat().st_uid != os.geteuid():
        raise MountFailed(
            f"The supervisor of {chosen.mountpoint} runs as another user: replace it as that user."
        )
    return running


def _words(pid: int) -> list[str]:
    return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")


def _user(words: list[str]) -> str | None:
    ours = words[: words.index("--")]
    return dict(itertools.pairwise(ours)).get("--user")


def _settings(words: list[str]) -> dict[str, str]:
    """A setting that this version does not know any more is left behind."""
    daemon = words[words.index("--") :]
    assigned = [value for word, value in itertools.pairwise(daemon) if word == "--set"]
    return {key: text for key, text in parse_assignments(assigned).items() if key in KEYS}


def failure(state: Path) -> str | None:
    """Why the supervisor of that state directory gave its mount up."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        failed = json.loads((state / RECORD_NAME).read_text("utf-8")).get("failed")
        return failed if isinstance(failed, str) else None
    return None
