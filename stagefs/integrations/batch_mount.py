"""The mount of one batch job: made by the prolog, ended by the epilog, for the job's owner.

Everything has its name from the job alone, so that each step can be repeated and an epilog needs
nothing that a prolog left in memory: the mountpoint DIRECTORY/<job>, the state directory that
`stagefs mount` would choose for it, and the sandboxes ``job`` and ``streams``.  The mount also
ends by itself with the batch system's process for the job (``--lifetime job``).

Root acts as the job's owner wherever a path or an answer is the owner's.  One thread.
"""

import contextlib
import errno
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

from stagefs.config import Settings, environment
from stagefs.control.api import SOCKET_NAME
from stagefs.control.client import Client, Refused
from stagefs.errors import DeadlineExceeded, MountFailed, NotFound
from stagefs.state_directory import acting_as, default_state_directory, unescape

SYSTEM_DIRECTORY = Path("/run/stagefs")
ATTEMPTS_DIRECTORY = ".attempts"
ATTEMPTS_KEPT_S = 7 * 24 * 3600.0
FILE_SYSTEM_TYPE = "fuse.stagefs"
MOUNT_TIMEOUT_S = 120.0
# It is unmounted at once; then a daemon may go on with uploads that wait for a server.
UMOUNT_TIMEOUT_S = 15.0
COMMAND = "from stagefs.cli.main import main; main()"


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
    batch systems remove recursively, through a mount that was left there."""
    if settings.batch.directory is not None:
        directory = Path(settings.batch.directory)
    elif os.geteuid() == 0:
        directory = SYSTEM_DIRECTORY
    else:
        runtime = Path(environment().get("XDG_RUNTIME_DIR") or f"/run/user/{owner.uid}")
        state = default_state_directory(runtime, settings, uid=owner.uid, variables={})
        directory = runtime / "stagefs" if os.access(runtime, os.W_OK) else state.parent / "jobs"
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    return directory


class JobMount:
    """``name`` is the job's, unique on this machine while it runs."""

    def __init__(
        self, name: str, owner: Owner, settings: Settings, *, config_file: Path | None = None
    ) -> None:
        self._owner = owner
        self._config_file = config_file
        self._directory = mounts_directory(settings, owner)
        self._attempts = self._directory / ATTEMPTS_DIRECTORY / name
        self.point = self._directory / name
        # With no variables: a state directory in the job's own scratch space would go with it.
        with owner.acting():
            self.state = default_state_directory(self.point, settings, uid=owner.uid, variables={})
        self.client = Client(self.state / SOCKET_NAME)

    @property
    def is_mounted(self) -> bool:
        """Root cannot stat another's mount, so the kernel's table is asked."""
        text = Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape")
        point = os.path.realpath(self._directory) + f"/{self.point.name}"
        for line in text.splitlines():
            before, _, after = line.partition(" - ")
            if unescape(before.split(" ")[4]) == point and after.startswith(FILE_SYSTEM_TYPE):
                return True
        return False

    @property
    def has_state(self) -> bool:
        return os.path.lexists(self.state)

    def start(self) -> None:
        """Raises MountFailed."""
        if not self.is_mounted:
            self.point.mkdir(mode=0o700, exist_ok=True)
            if os.geteuid() == 0:
                os.chown(self.point, self._owner.uid, self._owner.gid, follow_symlinks=False)
        options = ["--state", str(self.state), "--lifetime", "job"]
        if os.geteuid() == 0 and self._owner.uid != 0:
            options += ["--user", self._owner.name]
        if self._config_file is not None:
            options += ["--config", str(self._config_file)]
        done = _stagefs(["mount", str(self.point), *options], timeout_s=MOUNT_TIMEOUT_S)
        if done.returncode:
            raise MountFailed(_sentence(done))

    def sandbox_path(self, sandbox: str) -> Path:
        return self.point / "tasks" / sandbox

    def has_sandbox(self, sandbox: str) -> bool:
        with self._owner.acting():
            try:
                self.client.sandbox_show(sandbox)
            except Refused as refused:
                if refused.errno == errno.ENOENT:
                    return False
                raise
            return True

    def link(self, place: Path, target: Path) -> None:
        """A symbolic link in the job's scratch directory, in place of an older one."""
        with self._owner.acting():
            if place.is_symlink():
                place.unlink()
            place.symlink_to(target)

    def end(self) -> None:
        """Unmount, although it may be in use or not answer; outputs must be safe before."""
        for options in (["--force"], ["--force", "--lazy"]):
            if self.is_mounted:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    _stagefs(["umount", *options, str(self.point)], timeout_s=UMOUNT_TIMEOUT_S)
        with contextlib.suppress(OSError):
            self.point.rmdir()

    def forget(self) -> None:
        """Remove the state directory of a mount that ended and has nothing left to upload."""
        with self._owner.acting():
            shutil.rmtree(self.state, ignore_errors=True)

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


def _sentence(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = os.fsdecode(done.stderr).strip().splitlines() or ["it said nothing"]
    return lines[-1].removeprefix("stagefs: ")
