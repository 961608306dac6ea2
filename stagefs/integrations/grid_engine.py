"""Grid Engine's prolog and epilog: delegated file staging, and what jobs declare themselves.

sge_shepherd starts them for each job, as root (``root@...``) or as the job's owner.  Only the
phase comes from the arguments: the shepherd damages the expanded ``$fs_*`` words when an output
is staged.  All else is read from the job's spool directory, its files ``config`` and
``environment``; the reason of a refusal goes into its file ``error``, which `qstat -j` shows.
Nothing is printed for a job: that would be in its output.

An exit code is 0; 100, which puts the job into error (Eqw); or 99, which runs the job again.  Any
other would take the queue instance out of service.
"""

import contextlib
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from stagefs.config import Settings, environment, load_settings
from stagefs.errors import (
    InvalidName,
    RemoteError,
    StageFSError,
)
from stagefs.integrations.batch_mount import JobMount, Owner, keeper_text, owner_of
from stagefs.integrations.batch_outcome import is_transient
from stagefs.integrations.batch_requests import PathMap, Submission, declared
from stagefs.integrations.batch_staging import JobStaging
from stagefs.staging.manifest import Manifest, Output

TESTED_WITH = ("Grid Engine 8.1.9 (Debian 12)",)

OK, AGAIN, JOB_ERROR = 0, 99, 100
SHEPHERD = "sge_shepherd"
LINK_NAME = "stagefs"
UNUSED = {"", '""', "/dev/null"}


class Stream(msgspec.Struct, frozen=True):
    """A standard stream that Grid Engine left to us: ``name`` in the job's $TMPDIR, and the file
    on the host that it comes from or goes to."""

    name: str
    host: str
    path: str


class Streams(msgspec.Struct, frozen=True):
    stdin: Stream | None = None
    outputs: tuple[Stream, ...] = ()


class SpooledJob(msgspec.Struct, frozen=True, kw_only=True):
    """What the job's spool directory tells."""

    spool: Path
    name: str
    owner: str
    scratch: Path
    streams: Streams
    submission: Submission
    variables: dict[str, str]


def spooled_job(spool: Path) -> SpooledJob:
    """Raises InvalidName when this is no spool directory of a job."""
    try:
        config = _assignments(spool / "config")
        variables = _assignments(spool / "environment")
        job = SpooledJob(
            spool=spool,
            name=f"{int(config['job_id'])}.{int(config['ja_task_id'])}",
            owner=config["job_owner"],
            scratch=Path(config["tmpdir"]),
            streams=streams_of(config),
            submission=Submission(
                variables.get("SGE_O_HOST") or socket.gethostname(), config["cwd"]
            ),
            variables=variables,
        )
    except (OSError, KeyError, ValueError) as exc:
        raise InvalidName(
            f"{spool} is no spool directory of a Grid Engine job ({exc!r}): `stagefs prolog` and"
            " `stagefs epilog` are started by sge_shepherd."
        ) from exc
    return job


def _assignments(path: Path) -> dict[str, str]:
    pairs = (line.partition("=") for line in path.read_text("utf-8", "surrogateescape").split("\n"))
    return {name: value for name, equals, value in pairs if equals}


def streams_of(config: Mapping[str, str]) -> Streams:
    """Which standard streams are staged.  With joined output there is no other one for errors."""
    found: dict[str, Stream] = {}
    for kind in ("stdin", "stdout", "stderr"):
        path = config.get(f"{kind}_path", "")
        if config.get(f"fs_{kind}_file_staging") == "1" and path not in UNUSED:
            host = config.get(f"fs_{kind}_host", "")
            name = os.path.basename(path)
            found[kind] = Stream(name, "" if host in UNUSED else host, path)
    if config.get("merge_stderr") == "1":
        found.pop("stderr", None)
    stdin = found.pop("stdin", None)
    return Streams(stdin, tuple(found.values()))


def spool_directory() -> Path:
    """Of the job that this was started for.  Root asks the shepherd, whose working directory it
    is, because variables may be the user's.  Raises InvalidName."""
    named = environment().get("SGE_JOB_SPOOL_DIR")
    if os.geteuid() != 0 and named:
        return Path(named)
    with contextlib.suppress(OSError):
        if (pid := shepherd()) is not None:
            return Path(f"/proc/{pid}/cwd").readlink()
    raise InvalidName(
        f"No {SHEPHERD} has started this: `stagefs prolog --scheduler grid-engine` and `stagefs"
        " epilog` are for Grid Engine's configuration."
    )


def shepherd() -> int | None:
    """The process that lives as long as the job."""
    pid = os.getppid()
    while pid > 1:
        process = Path(f"/proc/{pid}")
        try:
            if (process / "comm").read_text("utf-8", "replace").strip() == SHEPHERD:
                return pid
            pid = int(
                (process / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()[1]
            )
        except OSError:
            break
    return None


def prolog(config_file: Path | None = None) -> int:
    """The exit code.  Whatever goes wrong is the job's error or a reason to run it again."""
    return _guarded("prolog", config_file)


def epilog(config_file: Path | None = None) -> int:
    """The exit code: 0, or 100 when outputs are not where they shall be; they are kept then."""
    return _guarded("epilog", config_file)


def _guarded(phase: str, config_file: Path | None) -> int:
    spool: Path | None = None
    owner: Owner | None = None
    try:
        spool = spool_directory()
        job = spooled_job(spool)
        owner = owner_of(job.owner)
        settings = load_settings(config_file=config_file)
        staging = _Staging(job, owner, settings, config_file)
        return staging.prolog() if phase == "prolog" else staging.epilog()
    except Exception as exc:  # noqa: BLE001 - any other exit code takes the queue out of service
        sentence = str(exc) if isinstance(exc, StageFSError) else repr(exc)
        if spool is None:
            # Nobody's job: whoever typed it is told.
            sys.stderr.write(f"stagefs: {sentence}\n")
        elif owner is not None:
            _tell(spool, owner, f"stagefs {phase}: {sentence}")
        return JOB_ERROR


def _tell(spool: Path, owner: Owner, sentence: str) -> None:
    """For `qstat -j`: its first line is the reason that is shown."""
    line = " ".join(sentence.split())
    flags = os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    with contextlib.suppress(OSError), owner.acting():
        fd = os.open(spool / "error", flags)
        with os.fdopen(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(f"{line}\n")


class _Staging:
    def __init__(
        self, job: SpooledJob, owner: Owner, settings: Settings, config_file: Path | None
    ) -> None:
        self._job = job
        self._owner = owner
        self._settings = settings.batch
        self._paths = PathMap(settings.path_map, socket.gethostname())
        pid = shepherd()
        self._mount = JobMount(
            job.name,
            owner,
            settings,
            config_file=config_file,
            keeper="" if pid is None else keeper_text(pid),
        )
        self._staging = JobStaging(self._mount, owner, settings.batch)

    def prolog(self) -> int:
        with self._owner.acting():
            manifest = declared(self._job.variables, self._job.submission, self._paths)
        streams = self._streams_manifest()
        wanted = {self._mount.sandbox: manifest, self._mount.streams: streams}
        sandboxes = {name: one for name, one in wanted.items() if one is not None}
        if not sandboxes:
            return OK
        try:
            self._staging.finish_earlier()
            self._staging.begin(sandboxes, then=self._link)
        except Exception as exc:
            if not is_transient(exc):
                raise
            attempts = self._mount.count_attempt()
            if attempts < self._settings.attempts:
                return AGAIN
            self._mount.forget_attempts()
            raise RemoteError(f"{exc} (tried {attempts} times)") from exc
        self._mount.forget_attempts()
        return OK

    def _streams_manifest(self) -> Manifest | None:
        """The streams as inputs and outputs of a sandbox; None when none is staged."""
        stdin, outputs = self._job.streams.stdin, self._job.streams.outputs
        if stdin is None and not outputs:
            return None
        inputs = (
            {} if stdin is None else {stdin.name: self._paths.delegated(stdin.host, stdin.path)}
        )
        return Manifest(
            inputs=inputs,
            outputs=[
                Output(
                    _literally(stream.name),
                    self._paths.delegated(stream.host, stream.path),
                    optional=True,
                    overwrite=True,
                )
                for stream in outputs
            ],
        )

    def _link(self) -> None:
        """From the job's scratch directory to what it stages."""
        if self._mount.has_sandbox(self._mount.sandbox):
            place = self._mount.path_of(self._mount.sandbox)
            self._mount.link(self._job.scratch / LINK_NAME, place)
        if (stdin := self._job.streams.stdin) is not None:
            place = self._mount.path_of(self._mount.streams) / stdin.name
            self._mount.link(self._job.scratch / stdin.name, place)

    def epilog(self) -> int:
        if self._mount.is_registered:
            self._staging.finish(first=self._absorb)
        return OK

    def _absorb(self) -> None:
        """Output and error, which the job has written as real files."""
        streams = self._mount.streams
        if self._mount.has_sandbox(streams):
            with self._owner.acting(), contextlib.suppress(FileNotFoundError):
                if self._job.scratch.stat():
                    self._mount.client.sandbox_absorb(streams, str(self._job.scratch))


def _literally(name: str) -> str:
    """As a pattern that means this very name."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
