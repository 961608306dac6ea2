"""mount and umount: starting the supervisor, hearing whether the mount answers, ending it.

The supervisor makes the mount and outlives this command; it tells through a pipe, with one
line of JSON, that the mount answers or why there is none.
"""

import contextlib
import json
import os
import pwd
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import click
import msgspec

from stagefs.cli.finding import Supervisor, json_option, supervisor_of
from stagefs.cli.output import human, print_json, print_table
from stagefs.cli.queue import flush_before_umount, parse_deadline
from stagefs.cli.running_mount import failure, running_mount
from stagefs.config import (
    DEFAULT,
    Loaded,
    Settings,
    environment,
    load_with_sources,
    parse_assignments,
)
from stagefs.control.api import SOCKET_NAME
from stagefs.control.client import Client
from stagefs.control.mounts import FoundMount, choose_mount, staging_mounts
from stagefs.errors import MountFailed, NoDaemon, NotPermitted, StageFSError, UnsuitableState
from stagefs.state_directory import (
    acting_as,
    default_state_directory,
    make_private_directory,
    refuse_network,
)

LOG_NAME = "supervisor.log"
# The supervisor has a deadline for each step of a start; this much later it is not believed.
READY_GRACE_S = 60.0
# How long after its last uploads a daemon that does not end is killed.
STOP_GRACE_S = 15.0
END_TIMEOUT_S = 60.0
UNMOUNT_TIMEOUT_S = 30.0
BUSY_TRIES, BUSY_PAUSE_S = 5, 0.1
QUEUE_ANSWER_TIMEOUT_S = 10.0
# What root's environment must not lend to the user that a mount is for.
OWN_VARIABLES = ("XDG_", "AWS_", "SSH_AUTH_SOCK", "SSH_AGENT_PID", "KRB5CCNAME", "NETRC")


class Ready(msgspec.Struct, frozen=True):
    """What the supervisor says of a mount that answers."""

    mountpoint: str
    state: str
    cache: str | None
    capacity_bytes: int
    log: str
    pid: int
    supervisor_pid: int


class Owner(msgspec.Struct, frozen=True):
    """Whom a mount is for."""

    uid: int
    gid: int
    home: str
    name: str | None


@click.command()
@click.argument("mountpoint", metavar="MNT", type=click.Path(path_type=Path))
@click.option("--foreground", is_flag=True, help="Stay until the mount ends.")
@click.option("--state", type=click.Path(path_type=Path), help="Where the mount keeps its state.")
@click.option("--cache", type=click.Path(path_type=Path), help="Cache (default: in the state).")
@click.option("--outputs", type=click.Path(path_type=Path), help="Durable storage for outputs.")
@click.option("--capacity", metavar="SIZE", help="How large the cache may grow (10GiB).")
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="One more file.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Any setting.")
@click.option("--allow-other", is_flag=True, help="Let other users in.")
@click.option("--user", metavar="USER", help="As root: mount for this user, as this user.")
@click.option("--lifetime", metavar="pid:N|job|forever", help="When the mount ends by itself.")
@click.option("--replace", is_flag=True, help="Take a running mount over: an upgrade in place.")
@json_option
def mount(
    *,
    mountpoint: Path,
    foreground: bool,
    state: Path | None,
    cache: Path | None,
    outputs: Path | None,
    capacity: str | None,
    config_file: Path | None,
    assignments: tuple[str, ...],
    allow_other: bool,
    user: str | None,
    lifetime: str | None,
    replace: bool,
    as_json: bool,
) -> None:
    """Mount a staging area on the empty directory MNT; returns when it answers.

    With --replace MNT is a running mount: this version's supervisor and daemon go on with it, and
    open files stay open.  Its settings stay as they are, but for those given here.
    """
    running = running_mount(mountpoint, state=state, user=user) if replace else None
    if running is not None:
        mountpoint, state, user = running.mountpoint, running.state, running.user
    overrides = {**(running.settings if running else {}), **parse_assignments(assignments)}
    named = {
        "cache.capacity_bytes": capacity,
        "cache.directory": str(cache.absolute()) if cache else None,
        "state.outputs": str(outputs.absolute()) if outputs else None,
        "mount.lifetime": lifetime,
        "mount.allow_other": "true" if allow_other else None,
    }
    overrides |= {key: value for key, value in named.items() if value is not None}
    owner = _owner(user)
    with _acting_as(owner):
        loaded = load_with_sources(
            config_file=config_file, overrides=overrides, environment=_environment(owner)
        )
        directory = _state_directory(mountpoint, state, loaded.settings, owner)
    start = Start(
        # Where it is mounted already the daemon may not answer: that path is as the kernel says.
        mountpoint=mountpoint if running else Path(os.path.realpath(mountpoint)),
        state=directory,
        settings=loaded.settings,
        daemon_options=_daemon_options(loaded),
        owner=owner,
        replace=replace,
        keeps_lifetime=replace and lifetime is None,
    )
    supervisor, ready = start.run(foreground=foreground)
    _tell(ready, as_json=as_json)
    if foreground:
        sys.exit(_wait_in_foreground(supervisor, directory))


def _tell(ready: Ready, *, as_json: bool) -> None:
    if as_json:
        print_json(ready)
    else:
        size = human(ready.capacity_bytes)
        cache = f"{ready.cache}, may grow to {size}" if ready.cache else "none: reading streams"
        click.echo(f"mounted {ready.mountpoint}")
        print_table([("  state", ready.state), ("  cache", cache), ("  log", ready.log)])
    sys.stdout.flush()


def _owner(user: str | None) -> Owner:
    if user is None:
        entry = _account(os.geteuid())
        home = entry.pw_dir if entry else "/"
        return Owner(os.geteuid(), os.getegid(), home, None)
    if os.geteuid() != 0:
        raise NotPermitted(f"Only root mounts for {user}: leave --user away.")
    try:
        named = pwd.getpwnam(user)
    except KeyError as exc:
        raise MountFailed(f"There is no user {user} on this machine.") from exc
    return Owner(named.pw_uid, named.pw_gid, named.pw_dir, user)


def _account(uid: int) -> pwd.struct_passwd | None:
    try:
        return pwd.getpwuid(uid)
    except KeyError:
        return None


def _environment(owner: Owner) -> dict[str, str]:
    """Ours; for another user without what leads to our own settings and credentials."""
    if owner.name is None:
        return dict(environment())
    kept = {
        name: value for name, value in environment().items() if not name.startswith(OWN_VARIABLES)
    }
    return {**kept, "HOME": owner.home, "USER": owner.name, "LOGNAME": owner.name}


def _acting_as(owner: Owner) -> contextlib.AbstractContextManager[None]:
    if owner.name is None:
        return contextlib.nullcontext()
    return acting_as(owner.name, owner.uid, owner.gid)


def _state_directory(
    mountpoint: Path, state: Path | None, settings: Settings, owner: Owner
) -> Path:
    """The state directory, there and private.  Raises UnsuitableState."""
    directory = (
        state.absolute()
        if state is not None
        else default_state_directory(
            mountpoint, settings, uid=owner.uid, variables=_environment(owner)
        )
    )
    refuse_network(directory, what="state")
    make_private_directory(directory, uid=owner.uid)
    if settings.cache.directory is not None:
        refuse_network(Path(settings.cache.directory), what="cache")
    if settings.state.outputs is not None and not os.access(settings.state.outputs, os.W_OK):
        raise UnsuitableState(
            f"The outputs directory {settings.state.outputs} cannot be written: make it, or name"
            " another with --outputs."
        )
    return directory


def _daemon_options(loaded: Loaded) -> list[str]:
    """The settings in force, for every daemon of this mount: the files may change meanwhile."""
    set_values = [value for value in loaded.values if value.source != DEFAULT]
    return [word for value in set_values for word in ("--set", f"{value.key}={value.text}")]


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """One start of a supervisor."""

    mountpoint: Path
    state: Path
    settings: Settings
    daemon_options: Sequence[str]
    owner: Owner
    replace: bool
    keeps_lifetime: bool

    def run(self, *, foreground: bool) -> tuple[subprocess.Popen[bytes], Ready]:
        """Raises what the supervisor refuses with; then none of it is left running."""
        receiving, sending = os.pipe()
        try:
            supervisor = self._start(sending, foreground=foreground)
        finally:
            os.close(sending)
        with os.fdopen(receiving, "rb", buffering=0) as pipe:
            try:
                timeout_s = self.settings.mount.start_timeout_s + READY_GRACE_S
                return supervisor, self._heard(_line(pipe.fileno(), timeout_s))
            except BaseException:
                supervisor.terminate()
                raise

    def _start(self, ready_fd: int, *, foreground: bool) -> subprocess.Popen[bytes]:
        with _acting_as(self.owner):
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
            log = os.open(self.state / LOG_NAME, flags, 0o600)
        try:
            return subprocess.Popen(
                self._arguments(ready_fd),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=_environment(self.owner),
                pass_fds=[ready_fd],
                start_new_session=not foreground,
                umask=0o077,  # whatever is made in the state directory is the user's alone
            )
        finally:
            os.close(log)

    def _arguments(self, ready_fd: int) -> list[str]:
        here = ["--mountpoint", str(self.mountpoint), "--state", str(self.state)]
        wanted = self.settings.mount
        options = ["--ready-fd", str(ready_fd)]
        if not self.keeps_lifetime:
            options += ["--lifetime", wanted.lifetime]
        options += ["--start-timeout-s", f"{wanted.start_timeout_s:g}"]
        # The daemon goes on uploading for a while at its end.
        stop_timeout_s = self.settings.stage_out.drain_s + STOP_GRACE_S
        options += ["--stop-timeout-s", f"{stop_timeout_s:g}"]
        options += ["--probe-period-s", f"{wanted.probe_period_s:g}"]
        options += ["--probe-timeout-s", f"{wanted.probe_timeout_s:g}"]
        options += ["--standby-after-s", f"{wanted.standby_after_s:g}"]
        if (socket := environment().get("NOTIFY_SOCKET")) is not None:
            options += ["--notify-socket", socket]
        if self.replace:
            options.append("--replace")
        if wanted.allow_other:
            options.append("--allow-other")
        if self.owner.name is not None:
            options += ["--user", self.owner.name]
        daemon = [sys.executable, "-m", "stagefs.daemon", *here, *self.daemon_options]
        return [sys.executable, "-m", "stagefs.supervisor", *here, *options, "--", *daemon]

    def _heard(self, line: bytes) -> Ready:
        if not line:
            raise MountFailed(
                f"Nothing was mounted on {self.mountpoint}: its supervisor ended without a word;"
                f" see {self.state / LOG_NAME}."
            )
        said = json.loads(line)
        if "error" in said:
            refused = MountFailed(said["error"])
            refused.exit_code = int(said.get("exit_code", MountFailed.exit_code))
            raise refused
        return msgspec.convert(said["ready"], Ready)


def _line(fd: int, timeout_s: float) -> bytes:
    """What the pipe brings, to the end of the line.  Raises MountFailed at the deadline."""
    deadline = time.monotonic() + timeout_s
    line = b""
    while not line.endswith(b"\n"):
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not select.select([fd], [], [], left_s)[0]:
            raise MountFailed(f"The mount was not ready within {timeout_s:g} s: see its log.")
        piece = os.read(fd, 65536)
        if not piece:
            break
        line += piece
    return line


def _wait_in_foreground(supervisor: subprocess.Popen[bytes], state: Path) -> int:
    """Until the mount ends, with its exit status; what is to end this command ends the mount."""

    def forward(number: int, _frame: FrameType | None) -> None:
        supervisor.send_signal(number)

    # Ctrl-C reaches the supervisor by itself: it is in the same process group.
    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGHUP, forward)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    status = supervisor.wait()
    if status and (reason := failure(state)) is not None:
        click.echo(f"stagefs: {reason}", err=True)
    return status


@click.command()
@click.argument("mountpoint", metavar="MNT", required=False)
@click.option("--lazy", is_flag=True, help="Although it is in use: it ends when nobody uses it.")
@click.option("--force", is_flag=True, help="Although outputs are not uploaded: they are kept.")
@click.option("--deadline", metavar="TIME", help="Wait so long for uploads (as for flush).")
@json_option
def umount(
    mountpoint: str | None, lazy: bool, force: bool, deadline: str | None, as_json: bool
) -> None:
    """Upload what is queued, unmount, and wait until its processes have ended."""
    deadline_s = parse_deadline(deadline)
    chosen = choose_mount(mountpoint, staging_mounts(), uid=os.geteuid())
    holder = supervisor_of(chosen)
    if holder is not None and not (lazy or force):
        client = Client(holder.state / SOCKET_NAME, answer_timeout_s=QUEUE_ANSWER_TIMEOUT_S)
        # A daemon that does not answer uploads nothing either; the queue is on disk.
        with contextlib.suppress(NoDaemon):
            flush_before_umount(client, deadline_s=deadline_s, quiet=as_json)
    supervisor = _opened(holder)
    # Without a supervisor the connection is closed, and nothing can be lost by letting go.
    _unmount(chosen, lazy=lazy or supervisor is None)
    if supervisor is not None and not lazy:
        _wait_for_end(supervisor, chosen.mountpoint)
    if as_json:
        print_json(chosen)
    else:
        click.echo(f"unmounted {chosen.mountpoint}")


def _opened(supervisor: Supervisor | None) -> int | None:
    """A pidfd, or None when nobody holds the mount any more."""
    if supervisor is None:
        return None
    try:
        return os.pidfd_open(supervisor.pid)
    except ProcessLookupError:
        return None


def _unmount(chosen: FoundMount, *, lazy: bool) -> None:
    """Raises MountFailed.  The supervisor's own look at the mount keeps it busy for a moment."""
    for tries_left in reversed(range(BUSY_TRIES)):
        refused = _refused_unmount(chosen, lazy=lazy)
        if refused is None:
            return
        if not tries_left or "busy" not in refused.lower() or _users_of(chosen.mountpoint):
            raise _refusal(chosen, refused)
        threading.Event().wait(BUSY_PAUSE_S)


def _refused_unmount(chosen: FoundMount, *, lazy: bool) -> str | None:
    """What the program that unmounts says when it does not; None when it does."""
    flag = ["-z"] if lazy else []
    if os.geteuid() == 0:
        command = ["umount", "-i", *(["-l"] if lazy else []), "--", chosen.mountpoint]
    else:
        command = ["fusermount3", "-u", *flag, "--", chosen.mountpoint]
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=UNMOUNT_TIMEOUT_S, cwd="/", check=False
        )
    except FileNotFoundError as exc:
        raise MountFailed(f"{command[0]} is missing: install Debian's package fuse3.") from exc
    except subprocess.TimeoutExpired as exc:
        raise MountFailed(
            f"{chosen.mountpoint} was not unmounted within {UNMOUNT_TIMEOUT_S:g} s: its daemon does"
            " not answer; `stagefs umount --lazy` takes it away all the same."
        ) from exc
    return done.stderr.decode("utf-8", "replace").strip() if done.returncode else None


def _refusal(chosen: FoundMount, said: str) -> StageFSError:
    if "busy" in said.lower():
        users = _users_of(chosen.mountpoint)
        named = f" by {', '.join(users)}" if users else ""
        return MountFailed(
            f"{chosen.mountpoint} is in use{named}: end that first, or use --lazy; nothing was"
            " changed."
        )
    last = (said.splitlines() or ["nobody says why"])[-1].rstrip(".")
    return MountFailed(f"{chosen.mountpoint} was not unmounted: {last}.")


def _users_of(mountpoint: str) -> list[str]:
    """Programs with their working directory or an open file in the mount, as far as we may see."""
    inside = f"{mountpoint}/"
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            links = [entry / "cwd", *(entry / "fd").iterdir()]
            if any(f"{link.readlink()}/".startswith(inside) for link in links):
                name = (entry / "comm").read_text("utf-8", "replace").strip()
                found.append(f"{name} ({entry.name})")
    return found[:5]


def _wait_for_end(pidfd: int, mountpoint: str) -> None:
    with contextlib.closing(os.fdopen(pidfd)):
        if not select.select([pidfd], [], [], END_TIMEOUT_S)[0]:
            raise MountFailed(
                f"{mountpoint} is unmounted, but its supervisor has not ended within"
                f" {END_TIMEOUT_S:g} s: see its log."
            )
