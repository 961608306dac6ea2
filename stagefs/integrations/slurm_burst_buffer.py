"""Slurm's burst buffer: what mount/slurm/burst_buffer.lua starts on the host of slurmctld.

    #BB_LUA stagefs stage_in source=ssh://host/data/in.dat destination=in.dat
    #BB_LUA stagefs stage_out source=result-*.dat destination=ssh://host/runs/7/

A buffer is a directory of the job's own on a file system that this host and the nodes share,
DIRECTORY/JOB, which the job finds in STAGEFS_BB.  Sources and destinations in it are relative; what
is staged in is there before the job starts, what is staged out leaves when its nodes are free.

As root, or as the one user whose jobs all are; everything below the buffer is done by a program
that runs as the job's user, with his credentials.  Each phase can be repeated.  Not for mounts: on
the nodes there is none.
"""

import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from stagefs.config import load_settings, load_with_sources
from stagefs.errors import InvalidManifest, InvalidName, NotPermitted, RemoteError, StageFSError
from stagefs.integrations.batch_mount import COMMAND, Owner, last_sentence, owner_of
from stagefs.integrations.batch_requests import (
    INPUTS,
    OUTPUTS,
    PathMap,
    Submission,
    declared,
)
from stagefs.staging.manifest import Manifest, Output
from stagefs.state_directory import default_state_directory

OK, FAILED = 0, 1
DIRECTIVE = re.compile(r"#BB_LUA\s+stagefs\s+(.*)")
KINDS = ("stage_in", "stage_out")
SCRIPT_BYTES_MAX = 4 << 20
# Slurm's own StageInTimeout ends it earlier, where that is set.
TIMEOUT_S = 24 * 3600.0
# The outputs of a job that are not away yet: its buffer stays.
PENDING = ".{job}.not-staged-out"
# In the buffer, to the sandbox.  Names come as arguments.
_TO_SANDBOX = 'cd -- "$0" && exec cp -R -L --parents -t "$STAGEFS_SANDBOX" -- "$@"'
_TO_BUFFER = 'exec cp -R -L -T -- . "$0"'
_NAMES = 'cd -- "$0" && exec find . -mindepth 1 -printf "%P\\0"'


class Request(msgspec.Struct, frozen=True):
    inputs: dict[str, str]
    outputs: list[Output]


def request_of(script: str, paths: PathMap) -> Request:
    """What the directives of a job script ask for.  Raises InvalidManifest."""
    pairs: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for line in script.splitlines():
        if (found := DIRECTIVE.fullmatch(line.strip())) is None:
            continue
        kind, *words = found[1].split()
        said = dict(word.partition("=")[::2] for word in words)
        if kind not in KINDS or set(said) != {"source", "destination"} or not all(said.values()):
            raise InvalidManifest(
                f"{line.strip()!r} declares nothing: write #BB_LUA stagefs stage_in (or stage_out)"
                " source=... destination=..., with a blank in a name as %20."
            )
        inside, url = said["destination"], said["source"]
        if kind == "stage_out":
            inside, url = url, inside
        if "=" in inside or "://" not in url:
            raise InvalidManifest(
                f"{line.strip()!r}: the job's side is a name in its buffer without '=', the other"
                " one a URL."
            )
        pairs[kind].append(f"{inside}={url}")
    variables = {INPUTS: " ".join(pairs["stage_in"]), OUTPUTS: " ".join(pairs["stage_out"])}
    manifest = declared(variables, Submission("", "/"), paths) or Manifest()
    return Request(manifest.inputs, manifest.outputs)


class BurstBuffer:
    """``directory`` is shared with the nodes, and root's alone to write.  ``job`` is a number."""

    def __init__(self, directory: Path, job: int, script: Path, config_file: Path | None) -> None:
        self.place = directory / str(job)
        self._pending = directory / PENDING.format(job=job)
        self._job = job
        self._script = script
        self._config_file = config_file

    def setup(self, uid: int) -> None:
        """A directory of the user's."""
        owner = _acted_for(_owner(uid))
        self._request()
        if not self.place.is_dir():
            self.place.mkdir(mode=0o700)
        os.chown(self.place, owner.uid, owner.gid)

    def data_in(self) -> None:
        """Everything that is to be staged in, or nothing."""
        inputs = self._request().inputs
        if inputs:
            words = [word for name, url in inputs.items() for word in ("--in", f"{name}={url}")]
            self._run_as_user(words, ["sh", "-c", _TO_BUFFER, str(self.place)])

    def data_out(self) -> None:
        """What the job has made of that which is to be staged out."""
        outputs = self._request().outputs
        if not outputs or not self.place.is_dir():
            return
        self._pending.touch()
        names = self._names()
        made = {
            one: [name for name in names if one.glob.matches(name.split("/"))] for one in outputs
        }
        words = [
            word for one, found in made.items() if found
            for word in ("--out", f"{one.pattern}={one.to}")
        ]  # fmt: skip
        if words:
            sources = sorted({name for found in made.values() for name in found})
            copy = ["sh", "-c", _TO_SANDBOX, str(self.place), *sources]
            self._run_as_user(["--overwrite", *words], copy)
        self._pending.unlink()

    def teardown(self, *, hurry: bool) -> None:
        """The buffer goes, unless it has outputs that could not be brought away."""
        if self._pending.exists() and not hurry:
            return
        shutil.rmtree(self.place, ignore_errors=True)
        self._pending.unlink(missing_ok=True)

    def _request(self) -> Request:
        try:
            with self._script.open("rb") as file:
                script = file.read(SCRIPT_BYTES_MAX).decode("utf-8", "surrogateescape")
        except OSError as exc:
            raise InvalidName(f"{self._script} cannot be read: {exc.strerror}.") from exc
        settings = load_settings(config_file=self._config_file)
        return request_of(script, PathMap(settings.path_map, socket.gethostname()))

    def _user(self) -> Owner:
        """Whose buffer it is: nobody else than root could have said so."""
        try:
            return _acted_for(_owner(self.place.lstat().st_uid))
        except FileNotFoundError as exc:
            raise InvalidName(f"The buffer {self.place} is gone: submit the job again.") from exc

    def _names(self) -> list[str]:
        done = self._as_user(["sh", "-c", _NAMES, str(self.place)])
        return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]

    def _run_as_user(self, declarations: Sequence[str], command: Sequence[str]) -> None:
        """A `stagefs run` of its own state directory, of which nothing is left."""
        user = self._user()
        loaded = load_with_sources(config_file=self._config_file)
        with user.acting():
            state = default_state_directory(
                Path(f"/burst-buffer/{self._job}"), loaded.settings, uid=user.uid, variables={}
            )
        # Of the file that only root was told; the others, the user's program finds by itself.
        options = [
            word
            for value in loaded.values
            if self._config_file is not None and value.source == str(self._config_file)
            for word in ("--set", f"{value.key}={value.text}")
        ]
        words = ["run", "--no-fuse", "--state", str(state), *options, *declarations]
        try:
            done = self._as_user([sys.executable, "-c", COMMAND, *words, "--", *command])
        finally:
            with user.acting():
                shutil.rmtree(state, ignore_errors=True)
        if done.returncode:
            raise RemoteError(last_sentence(done))

    def _as_user(self, command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
        user = self._user()
        entry = pwd.getpwnam(user.name)
        switched = os.geteuid() == 0
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            cwd="/",
            env={
                "PATH": "/usr/bin:/bin",
                "LANG": "C.UTF-8",
                "HOME": entry.pw_dir,
                "USER": user.name,
                "LOGNAME": user.name,
            },
            user=user.uid if switched else None,
            group=user.gid if switched else None,
            extra_groups=os.getgrouplist(user.name, user.gid) if switched else None,
            umask=0o077,
            timeout=TIMEOUT_S,
            check=False,
        )


def _owner(uid: int) -> Owner:
    try:
        return owner_of(pwd.getpwuid(uid).pw_name)
    except KeyError as exc:
        raise InvalidName(f"There is no user {uid} on {socket.gethostname()}.") from exc


def _acted_for(user: Owner) -> Owner:
    """Raises NotPermitted: only root can act for others, and to act as somebody else would take
    his credentials."""
    if os.geteuid() not in (0, user.uid):
        me = _owner(os.geteuid()).name
        raise NotPermitted(
            f"The buffer of {user.name}'s job cannot be served by {me}, who is SlurmUser: let"
            " burst_buffer.lua start stagefs with sudo (mount/slurm/README.md)."
        )
    return user


def run_phase(
    phase: str,
    *,
    job: int,
    script: Path,
    directory: Path,
    uid: int | None,
    hurry: bool,
    config_file: Path | None,
) -> int:
    """The exit code; the reason is the last line on standard output, for Slurm to show."""
    buffer = BurstBuffer(directory, job, script, config_file)
    try:
        if phase == "setup":
            if uid is None:
                raise InvalidName("The phase setup needs --uid.")
            buffer.setup(uid)
        elif phase == "data-in":
            buffer.data_in()
        elif phase == "data-out":
            buffer.data_out()
        else:
            buffer.teardown(hurry=hurry)
    except (StageFSError, OSError, subprocess.TimeoutExpired) as exc:
        sys.stdout.write(f"stagefs: {' '.join(str(exc).split())}\n")
        return FAILED
    sys.stdout.write("ok\n")
    return OK
