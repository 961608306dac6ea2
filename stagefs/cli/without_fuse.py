"""``stagefs run --no-fuse``: a real directory with real files, for nodes where FUSE is forbidden.

A daemon does the work: that of a mount where there is one, which has the cache, else one without
a mount (``stagefs.no_fuse``), which all such commands of one state directory share.  It ends
when the last of them has.
"""

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import msgspec

from stagefs.cli.finding import control_socket
from stagefs.cli.output import progress_bar, shown_name
from stagefs.cli.running import Task, why
from stagefs.cli.sandboxes import print_record
from stagefs.config import (
    DEFAULT,
    Settings,
    environment,
    load_with_sources,
    parse_assignments,
)
from stagefs.control.api import SOCKET_NAME
from stagefs.control.client import Client
from stagefs.control.mounts import choose_mount, staging_mounts
from stagefs.errors import InvalidName, MountFailed, NoDaemon, RemoteError, StageFSError
from stagefs.staging.manifest import Manifest
from stagefs.staging.values import CommitRecord
from stagefs.state_directory import (
    default_state_directory,
    make_private_directory,
    refuse_network,
)

USERS_LOCK, START_LOCK = "users.lock", "start.lock"
START_TIMEOUT_S = 60.0
# The state directory of commands without a mount is named after this.
NO_MOUNT = Path("/stagefs-run")
DIRECTORIES_NAME = "tmp"


class Serving(msgspec.Struct, frozen=True):
    """A daemon, and the directory below which tasks get theirs."""

    client: Client
    directories: Path


@contextlib.contextmanager
def serving_without_fuse(
    mountpoint: str | None, state: Path | None, assignments: Sequence[str]
) -> Iterator[Serving]:
    """Raises NoDaemon, MountFailed, UnsuitableState, InvalidConfig."""
    mount = None if state is not None else _mounted(mountpoint)
    if mount is not None:
        directories = Path(mount.status().state_directory) / DIRECTORIES_NAME
        make_private_directory(directories, uid=os.geteuid())
        yield Serving(mount, directories)
        return
    loaded = load_with_sources(overrides=parse_assignments(assignments))
    options = [
        word
        for value in loaded.values
        if value.source != DEFAULT
        for word in ("--set", f"{value.key}={value.text}")
    ]
    directory = _state_directory(state, loaded.settings)
    directories = directory / DIRECTORIES_NAME
    make_private_directory(directories, uid=os.geteuid())
    with _locked(directory / USERS_LOCK, fcntl.LOCK_SH):
        yield Serving(_started(directory, options), directories)


def _mounted(named: str | None) -> Client | None:
    """The daemon of the mount that is meant; None when there is none at all."""
    mounts = staging_mounts()
    if not mounts and named is None and not environment().get("STAGEFS_MOUNT"):
        return None
    try:
        return Client(control_socket(choose_mount(named, mounts, uid=os.geteuid())))
    except NoDaemon:
        if named is not None:
            raise
        return None


def _state_directory(state: Path | None, settings: Settings) -> Path:
    directory = (
        state.absolute()
        if state is not None
        else default_state_directory(NO_MOUNT, settings, uid=os.geteuid())
    )
    refuse_network(directory, what="state")
    make_private_directory(directory, uid=os.geteuid())
    return directory


@contextlib.contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, how)
        yield
    finally:
        os.close(fd)


def _started(state: Path, options: Sequence[str]) -> Client:
    """The daemon of a state directory, started when none answers.  Raises MountFailed."""
    client = Client(state / SOCKET_NAME)
    with _locked(state / START_LOCK, fcntl.LOCK_EX):
        with contextlib.suppress(NoDaemon):
            client.status()
            return client
        words = [sys.executable, "-m", "stagefs.no_fuse", "--state", str(state), *options]
        child = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
            umask=0o077,
        )
        assert child.stdout is not None
        with child.stdout:
            said = _line(child.stdout.fileno())
    if "error" in said:
        refused = MountFailed(str(said["error"]))
        code = said.get("exit_code")
        refused.exit_code = code if isinstance(code, int) else MountFailed.exit_code
        raise refused
    if not said:
        raise MountFailed(f"No daemon began in {state}: see {state / 'stagefs.log'}.")
    return client


def _line(fd: int) -> dict[str, object]:
    """What the daemon says first; nothing when it does not within START_TIMEOUT_S."""
    line = b""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not line.endswith(b"\n"):
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not select.select([fd], [], [], left_s)[0]:
            return {}
        piece = os.read(fd, 65536)
        if not piece:
            return {}
        line += piece
    return msgspec.convert(json.loads(line), dict[str, object])


class WithoutFuse:
    """One command in a real directory."""

    def __init__(
        self, task: Task, manifest: Manifest, name: str, keep: bool, verbose: bool
    ) -> None:
        if "/" in name:
            raise InvalidName(f"{name!r} cannot be the name of a sandbox without a mount.")
        self._task = task
        self._manifest = manifest
        self._name = name
        self._keep = keep
        self._verbose = verbose

    def run(
        self, serving: contextlib.AbstractContextManager[Serving], command: Sequence[str]
    ) -> int:
        with serving as served:
            return self._run(served.client, served.directories / self._name, command)

    def _run(self, client: Client, directory: Path, command: Sequence[str]) -> int:
        with progress_bar() as progress:
            client.sandbox_create(self._name, self._manifest, progress=progress)
            try:
                directory.mkdir(mode=0o700)
                client.sandbox_materialize(self._name, str(directory), progress=progress)
            except (OSError, StageFSError) as exc:
                client.sandbox_remove(self._name)
                if isinstance(exc, OSError):
                    raise InvalidName(f"{directory} cannot be made: {exc.strerror}.") from exc
                shutil.rmtree(directory, ignore_errors=True)
                raise
        variables = {
            **environment(),
            "STAGEFS_SANDBOX": str(directory),
            "PWD": str(directory),
        }
        code = self._task.run(command, directory=str(directory), variables=variables)
        if code:
            reason = why(command, code)
            client.sandbox_fail(self._name, reason)
            _say(f"{reason}; its directory is kept: {directory}")
            return code
        try:
            with progress_bar() as progress:
                client.sandbox_absorb(self._name, str(directory), progress=progress)
                record = client.sandbox_commit(self._name, progress=progress)
        except StageFSError:
            _say(f"{command[0]} succeeded, but was not committed: {directory} is kept")
            raise
        self._upload(client, record)
        if self._verbose:
            print_record(record, to_stderr=True)
        client.sandbox_remove(self._name)
        if self._keep:
            _say(f"the directory is kept: {directory}")
        else:
            shutil.rmtree(directory, ignore_errors=True)
        return 0

    def _upload(self, client: Client, record: CommitRecord) -> None:
        """Until the outputs are where they shall be.  Raises RemoteError for those that are not."""
        if not any(output.queued for output in record.outputs):
            return
        with progress_bar() as progress:
            client.flush(progress=progress)
        left = [
            upload
            for upload in client.queue_list(["queued", "uploading", "failed"])
            if upload.commit == record.id
        ]
        if left:
            raise RemoteError(
                f"{len(left)} outputs are not uploaded, {left[0].url} for one"
                f" ({left[0].reason or 'the server did not take it in time'}): they stay in the"
                " queue, and the next `stagefs run --no-fuse` of this state directory goes on."
            )


def _say(text: str) -> None:
    click.echo(shown_name(f"stagefs run: {text}"), err=True)
