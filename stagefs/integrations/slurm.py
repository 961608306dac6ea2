"""Slurm's Prolog, TaskProlog and Epilog: staging for jobs that ask for it in their comment.

    #SBATCH --comment="stagefs: in:ref.fa=https://host/ref.fa out:*.log=ssh://host/runs/7/"

slurmd starts Prolog and Epilog as root (or as the one user whose cluster it is), without a PATH and
with a few variables of the job; slurmstepd starts TaskProlog as the job's user before each task,
with the job's environment, and reads ``export NAME=VALUE`` and ``print TEXT`` lines from it.  So
the comment brings a mount, with what it declares; STAGEFS_IN, STAGEFS_OUT and STAGEFS_MANIFEST,
which only TaskProlog sees, are declared there.

A Prolog or Epilog that ends with anything but 0 takes the node out of service, so they end with 0
always: what goes wrong is kept for TaskProlog, which ends the task with it, or told in a file in
the job's working directory.
"""

import contextlib
import errno
import os
import pwd
import socket
import sys
import syslog
from collections.abc import Mapping
from pathlib import Path

from stagefs.config import environment, load_settings
from stagefs.control.client import Client, Refused
from stagefs.errors import InvalidConfig, InvalidManifest, InvalidName, MountFailed, StageFSError
from stagefs.integrations.batch_mount import (
    JOB_PREFIX,
    SYSTEM_DIRECTORY,
    JobMount,
    Owner,
    ending_within,
    owner_of,
)
from stagefs.integrations.batch_requests import (
    INPUTS,
    MANIFEST,
    OUTPUTS,
    PathMap,
    Submission,
    declared,
    input_names,
)
from stagefs.integrations.batch_staging import JobStaging
from stagefs.staging.manifest import Manifest

TESTED_WITH = ("Slurm 22.05 (Debian 12)",)

COMMENT = "stagefs:"
FAILED_DIRECTORY = ".failed"
OK, FAILED = 0, 1
_WORDS = {"in": INPUTS, "out": OUTPUTS, "manifest": MANIFEST}


def request_of(comment: str) -> dict[str, str] | None:
    """A job's comment as the variables that say the same; None when it does not ask for a mount.

    Raises InvalidManifest."""
    if not comment.startswith(COMMENT):
        return None
    found: dict[str, list[str]] = {}
    for word in comment.removeprefix(COMMENT).split():
        kind, colon, rest = word.partition(":")
        if kind not in _WORDS or not colon or not rest:
            raise InvalidManifest(
                f"The job's comment holds {word!r}, which declares nothing: write in:NAME=URL,"
                " out:PATTERN=URL or manifest:FILE behind stagefs:, separated by blanks."
            )
        found.setdefault(_WORDS[kind], []).append(rest)
    if len(found.get(MANIFEST, [])) > 1:
        raise InvalidManifest("The job's comment names more than one manifest: name one.")
    return {name: " ".join(words) for name, words in found.items()}


class _NodeJob:
    """A job as Prolog and Epilog see it.  Raises InvalidName when no slurmd has started this."""

    def __init__(self, variables: Mapping[str, str], config_file: Path | None) -> None:
        job, uid = variables.get("SLURM_JOB_ID", ""), variables.get("SLURM_JOB_UID", "")
        if not (job.isascii() and job.isdigit() and uid.isascii() and uid.isdigit()):
            raise InvalidName(
                "SLURM_JOB_ID and SLURM_JOB_UID name no job: `stagefs prolog --scheduler slurm` and"
                " `stagefs epilog` are for Slurm's configuration."
            )
        self.name = job
        self.owner = _owner(int(uid))
        self.directory = variables.get("SLURM_JOB_WORK_DIR") or "/"
        self.comment = variables.get("SLURM_JOB_COMMENT", "")
        self.settings = load_settings(config_file=config_file)
        self.mount = JobMount(job, self.owner, self.settings, config_file=config_file)
        self.staging = JobStaging(self.mount, self.owner, self.settings.batch)
        self._failed = self.mount.place.with_name(FAILED_DIRECTORY) / job

    def prolog(self) -> None:
        self.forget_failure()
        request = request_of(self.comment)
        if request is None:
            return
        if os.geteuid() != 0 and self.settings.batch.directory is None:
            raise InvalidConfig(
                "The job's tasks would not find its mount, because slurmd is not root's: name a"
                f" directory of {self.owner.name}'s in batch.directory and in the lines mounts= of"
                " Slurm's scripts (mount/slurm/README.md)."
            )
        paths = PathMap(self.settings.path_map, socket.gethostname())
        with self.owner.acting():
            manifest = declared(request, Submission("", self.directory), paths)
        if self.mount.is_registered and self.mount.has_sandbox(self.mount.sandbox):
            return  # it is running: slurmd has asked again
        self.staging.finish_earlier()
        self.staging.begin({} if manifest is None else {self.mount.sandbox: manifest})

    def epilog(self) -> None:
        self.forget_failure()
        if self.mount.is_registered:
            self.staging.finish()

    def fail(self, sentence: str) -> None:
        """For the job's TaskProlog; only its user can read it."""
        self._failed.parent.mkdir(exist_ok=True)
        self._failed.parent.chmod(0o755)
        self._failed.write_text(f"{sentence}\n", "utf-8", "surrogateescape")
        self._failed.chmod(0o400)
        os.chown(self._failed, self.owner.uid, self.owner.gid)

    def forget_failure(self) -> None:
        self._failed.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._failed.parent.rmdir()

    def tell(self, sentence: str) -> None:
        """A job that has ended: beside its output, as its user."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with contextlib.suppress(OSError), self.owner.acting():
            fd = os.open(Path(self.directory) / f"stagefs-{self.name}.err", flags, 0o644)
            with os.fdopen(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
                file.write(f"{sentence}\n")


def _owner(uid: int) -> Owner:
    """Raises InvalidName, NotFound."""
    try:
        return owner_of(pwd.getpwuid(uid).pw_name)
    except KeyError as exc:
        raise InvalidName(f"There is no user {uid} on this machine, whose job this is.") from exc


def prolog(config_file: Path | None = None) -> int:
    """Always 0: a job whose staging failed is ended by its TaskProlog."""
    job: _NodeJob | None = None
    try:
        job = _NodeJob(environment(), config_file)
        job.prolog()
    except Exception as exc:  # noqa: BLE001 - any other exit code takes the node out of service
        sentence = _log("prolog", exc)
        if job is not None:
            with contextlib.suppress(OSError):
                job.fail(sentence)
    return OK


def epilog(config_file: Path | None = None) -> int:
    """Always 0: outputs that are not where they shall be are kept, and the job's user is told."""
    job: _NodeJob | None = None
    try:
        job = _NodeJob(environment(), config_file)
        job.epilog()
    except Exception as exc:  # noqa: BLE001 - any other exit code takes the node out of service
        sentence = _log("epilog", exc)
        if job is not None:
            job.tell(sentence)
    return OK


def _log(phase: str, error: Exception) -> str:
    """What went wrong, as one line, which the system's log gets, too."""
    line = f"stagefs {phase}: {' '.join(_sentence(error).split())}"
    sys.stderr.write(f"{line}\n")
    syslog.syslog(syslog.LOG_ERR, line)
    return line


def _sentence(error: Exception) -> str:
    return str(error) if isinstance(error, StageFSError | OSError) else repr(error)


def task_prolog(config_file: Path | None = None) -> int:
    """0, or 1, which ends the task with the reason that was printed."""
    try:
        lines = _for_task(environment(), config_file)
    except Exception as exc:  # noqa: BLE001 - the task's user is to know why it does not run
        sentence = _sentence(exc)
        _print(f"print stagefs: {' '.join(sentence.split())}")
        return FAILED
    for line in lines:
        _print(line)
    return OK


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _for_task(variables: Mapping[str, str], config_file: Path | None) -> list[str]:
    """The lines that slurmstepd is to read."""
    settings = load_settings(config_file=config_file)
    directory = Path(settings.batch.directory or SYSTEM_DIRECTORY)
    job = variables.get("SLURM_JOB_ID", "")
    with contextlib.suppress(FileNotFoundError):
        reason = (directory / FAILED_DIRECTORY / job).read_text("utf-8", "surrogateescape")
        raise MountFailed(reason.strip().removeprefix("stagefs prolog: "))
    place = directory / job
    asked = [name for name in (MANIFEST, INPUTS, OUTPUTS) if variables.get(name)]
    if not job or not place.is_symlink():
        if asked:
            raise InvalidManifest(
                f"{asked[0]} is set, but the job has no mount: submit it with --comment=stagefs:,"
                f" or unset {asked[0]}."
            )
        return []
    sandbox = f"{JOB_PREFIX}{job}"
    with ending_within(settings.batch.prolog_deadline_s, "The task's prolog"):
        paths = PathMap(settings.path_map, socket.gethostname())
        _ensure_sandbox(Client.of(place), sandbox, variables, paths)
    return [
        f"export STAGEFS_MOUNT={place}",
        f"export STAGEFS_SANDBOX={place}/tasks/{sandbox}",
    ]


def _ensure_sandbox(
    client: Client, name: str, variables: Mapping[str, str], paths: PathMap
) -> None:
    """The first task on a node makes it, where the comment has declared nothing.  Later ones may
    be in other directories, to which the words of the job are not relative."""
    there = _manifest_of(client, name)
    if there is None:
        submission = Submission(variables.get("SLURM_SUBMIT_HOST", ""), str(Path.cwd()))
        there = declared(variables, submission, paths) or Manifest()
        try:
            client.sandbox_create(name, there)
        except Refused as refused:
            if refused.errno != errno.EEXIST:  # another task was quicker, with the same words
                raise
    missing = input_names(variables) - there.inputs.keys()
    if missing:
        raise InvalidManifest(
            f"The input {min(missing)} is declared after the job's directory was made: declare"
            f" all in the comment, or all in {INPUTS} and {MANIFEST} before the first task."
        )


def _manifest_of(client: Client, sandbox: str) -> Manifest | None:
    """None: there is no such sandbox."""
    try:
        return client.sandbox_show(sandbox).manifest
    except Refused as refused:
        if refused.errno != errno.ENOENT:
            raise
        return None
