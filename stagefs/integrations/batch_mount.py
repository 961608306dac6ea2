"""The mount that the batch jobs of one user share on a node.  The prolog of the first of them makes
it, the epilog of the last one ends it: what several tasks of an array read is fetched once, because
one daemon owns a cache.

Everything has its name from the job and its owner alone, so that each step can be repeated and an
epilog needs nothing that a prolog left in memory:

    DIRECTORY/.mounts/USER       the mount; its state directory is the one `stagefs mount` chooses
    DIRECTORY/.jobs/USER/JOB     the jobs that use it; this directory is the lock, too
    DIRECTORY/JOB                a symbolic link to the mount: what the job is told
    <mount>/tasks/job-JOB        its sandbox

The mount also ends by itself when no job is there any more (``--lifetime jobs:``), where the batch
system has a process that lives as long as a job (``keeper``).  The cache outlives the last job by
``batch.cache_keep_s``.

Root acts as the jobs' owner wherever a path or an answer is the owner's.  One thread; prologs and
epilogs of one user take turns in making and ending the mount.
"""

import contextlib
import errno
import fcntl
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import msgspec

from stagefs.config import Settings
from stagefs.control.api import SOCKET_NAME
from stagefs.control.client import Client, Refused
from stagefs.control.mounts import staging_mounts
from stagefs.errors import DeadlineExceeded, MountFailed, NoDaemon, NotFound
from stagefs.staging.queue_values import UploadStatus
from stagefs.staging.values import SandboxState
from stagefs.state_directory import acting_as, default_state_directory

SYSTEM_DIRECTORY = Path("/run/stagefs")
OWNERS_DIRECTORY = "jobs"
MOUNTS, JOBS, ATTEMPTS_DIRECTORY = ".mounts", ".jobs", ".attempts"
ATTEMPTS_KEPT_S = 7 * 24 * 3600.0
JOB_PREFIX, STREAMS_SUFFIX = "job-", "-streams"
CACHE_SUFFIX, UNUSED_SINCE = ".cache", "unused-since"
MOUNT_TIMEOUT_S = 120.0
# It is unmounted at once; then a daemon may go on with uploads that wait for a server.
UMOUNT_TIMEOUT_S = 15.0
COMMAND = "from stagefs.cli.main import main; main()"
# Of uploads: what is not where it shall be.
LEFT_STATES = ("prepared", "queued", "uploading", "failed")


class Owner(msgspec.Struct, frozen=True):
    name: str
    uid: int
    gid: int

    def acting(self) -> contextlib.AbstractContextManager[None]:
        return acting_as(self.name, self.uid, self.gid)


def owner_of(name: str) -> Owner:
    """Raises NotFound."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError as exc:
        raise NotFound(f"There is no user {name} on this machine, whose job this is.") from exc
    return Owner(name, entry.pw_uid, entry.pw_gid)


@contextlib.contextmanager
def ending_within(deadline_s: float, what: str) -> Iterator[None]:
    """Raises DeadlineExceeded in the midst of whatever waits: batch systems have no mercy, or no
    timeout."""

    def expire(_number: int, _frame: FrameType | None) -> None:
        raise DeadlineExceeded(f"{what} was not done within {deadline_s:g} s.")

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, deadline_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def mounts_directory(settings: Settings, owner: Owner) -> Path:
    """Where the mounts of jobs are made; there when this returns.  Never below $TMPDIR, which
    batch systems remove recursively, through a mount that was left there.  Nor in a user's
    /run/user: it comes and goes with his logins, and an epilog must find what a prolog made."""
    if settings.batch.directory is not None:
        directory = Path(settings.batch.directory)
    elif os.geteuid() == 0:
        directory = SYSTEM_DIRECTORY
    else:
        state = default_state_directory(Path("/"), settings, uid=owner.uid, variables={})
        directory = state.parent / OWNERS_DIRECTORY
    _make_shown(directory)
    return directory


def _make_shown(directory: Path) -> None:
    """Whatever the umask is: who owns a mount below must get there."""
    if not directory.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o755)


def keeper_text(pid: int) -> str:
    """The process that lives as long as a job, told from a later one with its number as the
    supervisor of the mount does; nothing when it has ended."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return ""
    state, *fields = text.rpartition(")")[2].split()
    return "" if state in "ZX" else f"{pid} {fields[18]}"


class JobMount:
    """``name`` is the job's, unique on this machine while it runs.  ``keeper`` (``keeper_text``) is
    empty where the batch system has no such process."""

    def __init__(
        self,
        name: str,
        owner: Owner,
        settings: Settings,
        *,
        config_file: Path | None = None,
        keeper: str = "",
    ) -> None:
        self.name = name
        self._owner = owner
        self._settings = settings
        self._config_file = config_file
        self._keeper = keeper
        self._directory = mounts_directory(settings, owner)
        self._attempts = self._directory / ATTEMPTS_DIRECTORY / name
        self._jobs = self._directory / JOBS / owner.name
        self._made_state = False
        self.point = self._directory / MOUNTS / owner.name
        self.place = self._directory / name
        # With no variables: a state directory in the job's own scratch space would go with it.
        with owner.acting():
            self.state = default_state_directory(self.point, settings, uid=owner.uid, variables={})
        # One that the administrator has named is kept anyway.
        is_kept = settings.batch.cache_keep_s > 0 and settings.cache.directory is None
        self._cache = self.state.with_name(self.state.name + CACHE_SUFFIX) if is_kept else None
        self.client = Client(self.state / SOCKET_NAME)

    @property
    def is_registered(self) -> bool:
        """The job uses the mount: its prolog was here, and its epilog was not."""
        return (self._jobs / self.name).exists()

    @property
    def is_mounted(self) -> bool:
        """Root cannot stat another's mount, so the kernel's table is asked."""
        point = f"{os.path.realpath(self._directory)}/{MOUNTS}/{self.point.name}"
        return any(mount.mountpoint == point for mount in staging_mounts())

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else registers a job of this user, mounts or unmounts meanwhile."""
        fd = self._locked()
        try:
            yield
        finally:
            for directory in (self._jobs, self._jobs.parent):
                with contextlib.suppress(OSError):  # not empty
                    directory.rmdir()
            os.close(fd)

    def _locked(self) -> int:
        """Whoever had it before may have removed the directory: then it is another one now."""
        while True:
            with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as undo:
                _make_shown(self._jobs.parent)
                _make_shown(self._jobs)
                fd = os.open(self._jobs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                undo.callback(os.close, fd)
                fcntl.flock(fd, fcntl.LOCK_EX)
                if os.path.samestat(os.fstat(fd), self._jobs.stat()):
                    undo.pop_all()
                    return fd

    def start(self) -> None:
        """Register the job, and mount when no other one has.  May be repeated.  Raises
        MountFailed; then, too, ``leave`` is to be called."""
        with self._alone():
            (self._jobs / self.name).write_text(self._keeper)
            if not self._answers():
                self._mount()
            if not self.place.is_symlink():
                self.place.symlink_to(self.point)

    def _answers(self) -> bool:
        if not self.is_mounted:
            return False
        try:
            with self._owner.acting():
                self.client.status()
        except NoDaemon:
            return False
        return True

    def _mount(self) -> None:
        if not self.is_mounted:
            _make_shown(self.point.parent)
            self.point.mkdir(mode=0o700, exist_ok=True)
            if os.geteuid() == 0:
                os.chown(self.point, self._owner.uid, self._owner.gid, follow_symlinks=False)
        self._made_state = not os.path.lexists(self.state)
        options = ["--state", str(self.state), "--lifetime", f"jobs:{self._jobs}"]
        if self._cache is not None:
            options += ["--cache", str(self._cache)]
            with self._owner.acting():
                (self._cache / UNUSED_SINCE).unlink(missing_ok=True)
        if os.geteuid() == 0 and self._owner.uid != 0:
            # Batch systems change to a job's directory with the job's effective user alone, which a
            # mount that is not for others does not let in.  Others stay out by the root's mode.
            options += ["--user", self._owner.name, "--allow-other"]
        if self._config_file is not None:
            options += ["--config", str(self._config_file)]
        done = _stagefs(["mount", str(self.point), *options], timeout_s=MOUNT_TIMEOUT_S)
        if done.returncode:
            raise MountFailed(last_sentence(done))
        with self._owner.acting():
            self.point.stat()  # until it has asked once the kernel takes the root for uid 0's
            self.point.chmod(0o700)

    @property
    def sandbox(self) -> str:
        return f"{JOB_PREFIX}{self.name}"

    @property
    def streams(self) -> str:
        return f"{self.sandbox}{STREAMS_SUFFIX}"

    def path_of(self, sandbox: str) -> Path:
        return self.place / "tasks" / sandbox

    def has_sandbox(self, sandbox: str) -> bool:
        with self._owner.acting():
            try:
                self.client.sandbox_show(sandbox)
            except Refused as refused:
                if refused.errno == errno.ENOENT:
                    return False
                raise
            return True

    def remove_sandbox(self, sandbox: str) -> None:
        """Whatever its state; none is none."""
        with self._owner.acting(), contextlib.suppress(NoDaemon, Refused):
            self.client.sandbox_remove(sandbox)

    def uploads_left(self) -> list[UploadStatus]:
        with self._owner.acting():
            return list(self.client.queue_list(LEFT_STATES))

    def link(self, place: Path, target: Path) -> None:
        """A symbolic link in the job's scratch directory, in place of an older one."""
        with self._owner.acting():
            if place.is_symlink():
                place.unlink()
            place.symlink_to(target)

    def leave(self) -> None:
        """The job uses the mount no longer; with the last one it ends, although it may be in use or
        not answer.  What is not uploaded stays in the state directory.  May be repeated."""
        with self._alone():
            registered = self._living_jobs() - {self.name}
            # While the job is registered: without one the mount ends by itself, within a second,
            # and who cannot be asked any more may have outputs to keep.
            has_nothing = self._tidied(registered)
            (self._jobs / self.name).unlink(missing_ok=True)
            self.place.unlink(missing_ok=True)
            if not registered:
                self._end()
                with self._owner.acting():
                    if has_nothing:
                        shutil.rmtree(self.state, ignore_errors=True)
                    if self._cache is not None and self._cache.is_dir():
                        (self._cache / UNUSED_SINCE).touch()
        if self._cache is not None:
            self._remove_old_caches()

    def commit_orphans(self) -> None:
        """Outputs of earlier jobs whose epilogs were not done in time are queued, too."""
        with self._alone():
            registered = self._living_jobs()
        with self._owner.acting(), contextlib.suppress(Refused):
            for sandbox in list(self.client.sandbox_list()):
                job = sandbox.name.removeprefix(JOB_PREFIX).removesuffix(STREAMS_SUFFIX)
                is_active = sandbox.state is SandboxState.ACTIVE
                if sandbox.name.startswith(JOB_PREFIX) and job not in registered and is_active:
                    self.client.sandbox_commit(sandbox.name)

    def _living_jobs(self) -> set[str]:
        """Those registered; jobs that ended without an epilog are not any more."""
        living = set()
        for entry in self._jobs.iterdir():
            keeper = entry.read_text()
            if keeper and keeper_text(int(keeper.split()[0])) != keeper:
                entry.unlink()
                (self._directory / entry.name).unlink(missing_ok=True)
            else:
                living.add(entry.name)
        return living

    def _tidied(self, registered: set[str]) -> bool:
        """Sandboxes of ended jobs go when all of theirs is uploaded.  Whether nothing is left then
        that anybody could miss."""
        is_kept = False
        try:
            left = self.uploads_left()
            waiting = {upload.commit for upload in left}
            with self._owner.acting():
                for sandbox in list(self.client.sandbox_list()):
                    job = sandbox.name.removeprefix(JOB_PREFIX).removesuffix(STREAMS_SUFFIX)
                    if not sandbox.name.startswith(JOB_PREFIX) or job in registered:
                        continue
                    commits = {one.id for one in self.client.sandbox_show(sandbox.name).commits}
                    if sandbox.state is SandboxState.COMMITTED and not commits & waiting:
                        self.client.sandbox_remove(sandbox.name)
                    else:
                        is_kept = True
                due = self.client.status().queue.due
        except (NoDaemon, Refused):
            # When it never answered, what was made just now holds nothing.
            return self._made_state
        return not (left or due or is_kept)

    def _end(self) -> None:
        for options in (["--force"], ["--force", "--lazy"]):
            if self.is_mounted:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    _stagefs(["umount", *options, str(self.point)], timeout_s=UMOUNT_TIMEOUT_S)
        for directory in (self.point, self.point.parent):
            with contextlib.suppress(OSError):
                directory.rmdir()

    def _remove_old_caches(self) -> None:
        """Of all users as far as this one may: on a node without jobs nobody needs the space."""
        for place in self.state.parents[1].glob(f"stagefs-*/*{CACHE_SUFFIX}"):
            with contextlib.suppress(OSError, ValueError, KeyError, NotFound):
                owner = owner_of(pwd.getpwuid(int(place.parent.name.partition("-")[2])).pw_name)
                if os.geteuid() in (0, owner.uid):
                    JobMount("", owner, self._settings)._remove_cache_if_old(place)  # noqa: SLF001

    def _remove_cache_if_old(self, place: Path) -> None:
        """Raises OSError."""
        if place != self._cache:
            return
        stamp = place / UNUSED_SINCE
        with self._alone():
            if self._living_jobs():
                return
            with self._owner.acting():
                if not stamp.exists():  # the machine went down under it
                    stamp.touch()
                if stamp.stat().st_mtime <= time.time() - self._settings.batch.cache_keep_s:
                    shutil.rmtree(place, ignore_errors=True)

    def count_attempt(self) -> int:
        """How many times the job's prolog has failed on this machine for a reason that may pass,
        this time included."""
        self._attempts.parent.mkdir(mode=0o755, exist_ok=True)
        for old in self._attempts.parent.iterdir():
            if old.stat().st_mtime < time.time() - ATTEMPTS_KEPT_S:
                old.unlink(missing_ok=True)
        before = 0
        with contextlib.suppress(OSError, ValueError):
            before = int(self._attempts.read_text())
        self._attempts.write_text(f"{before + 1}\n")
        return before + 1

    def forget_attempts(self) -> None:
        self._attempts.unlink(missing_ok=True)


def _stagefs(words: Sequence[str], *, timeout_s: float) -> subprocess.CompletedProcess[bytes]:
    """The command line of this very installation.  What it prints is not the job's to see."""
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd="/",
        timeout=timeout_s,
        check=False,
    )


def last_sentence(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = os.fsdecode(done.stderr).strip().splitlines() or ["it said nothing"]
    return lines[-1].removeprefix("stagefs: ")
