"""The work directory of one run: who measures, what he starts, and that all of it ends.

Everything lies below one directory, which is removed at the end.  What is started is ended by
its process id, what is mounted is unmounted, also on Ctrl-C and SIGTERM: whoever starts
something is a context manager, and ``opened`` sweeps up what none of them got hold of.
One thread.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from bench.measuring import MeasureFailed, Say, Unavailable
from tests.support import kernel
from tests.support.identity import Identity, identities

PROGRAMS = Path(__file__).with_name("programs")
MEASURE_TIMEOUT_S = 1200.0
END_TIMEOUT_S = 20.0


@dataclasses.dataclass(frozen=True)
class Amounts:
    """How much of everything is measured."""

    size_bytes: int
    rounds: int
    small_files: int
    small_bytes: int
    catalog_entries: int
    sandboxes: int
    links: int
    tree_directories: int


@dataclasses.dataclass
class Workbench:
    """``identity`` runs StageFS and the peers; servers belong to whoever runs the bench."""

    directory: Path
    identity: Identity
    amounts: Amounts
    say: Say
    _numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def fresh(self, name: str) -> Path:
        """A new, empty directory of the measuring user's."""
        made = self.identity.directory(self.directory / f"{name}-{next(self._numbers)}")
        made.chmod(0o700)
        return made

    def remove(self, directory: Path) -> None:
        """Never reaches into something that is still mounted there."""
        mounted = kernel.mounts(below=directory)
        if mounted:
            raise MeasureFailed(f"{mounted[0].point} is still mounted, so it is not removed")
        shutil.rmtree(directory)

    def program(self, name: str) -> Path:
        """One of the bench's own programs, where the measuring user can read it."""
        return self.directory / "programs" / name

    def start(
        self,
        *command: str | Path,
        environment: Mapping[str, str] | None = None,
        output: IO[bytes] | int = subprocess.DEVNULL,
        errors: IO[bytes] | int = subprocess.DEVNULL,
        pass_fds: tuple[int, ...] = (),
    ) -> subprocess.Popen[bytes]:
        """As the measuring user, out of reach of the terminal's Ctrl-C."""
        return subprocess.Popen(
            self.identity.words(command),
            env={**self.identity.environment(environment), "LC_ALL": "C.UTF-8"},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            pass_fds=pass_fds,
            start_new_session=True,
        )

    def timed(
        self, *command: str | Path, environment: Mapping[str, str] | None = None
    ) -> tuple[float, bytes]:
        """Wall-clock seconds of a command, and its standard output.  Raises MeasureFailed."""
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            begun = time.monotonic()
            child = self.start(*command, environment=environment, output=output, errors=errors)
            try:
                seconds = _ended(child) - begun
                status = child.wait(END_TIMEOUT_S)
            except TimeoutError:
                raise MeasureFailed(f"{command[0]} ran into {MEASURE_TIMEOUT_S:.0f} s") from None
            finally:
                end(child)
            output.seek(0)
            errors.seek(0)
            if status != 0:
                said = os.fsdecode(errors.read()[-600:]).strip()
                raise MeasureFailed(f"{' '.join(map(str, command))} ended with {status}: {said}")
            return seconds, output.read()

    def run(self, *command: str | Path, environment: Mapping[str, str] | None = None) -> bytes:
        return self.timed(*command, environment=environment)[1]

    def copy_time(self, path: Path) -> float:
        """Read a file from one end to the other, as dd does it."""
        return self.timed("dd", f"if={path}", "of=/dev/null", "bs=1M", "status=none")[0]

    def hash_time(self, path: Path) -> float:
        return self.timed("sha256sum", path)[0]

    def forget_pages(self, path: Path) -> None:
        """The kernel's cached pages of this file, as seen through this path, are dropped."""
        self.run("dd", f"if={path}", "iflag=nocache", "count=0", "status=none")


def _ended(child: subprocess.Popen[bytes]) -> float:
    """When it ended, on the monotonic clock: ``Popen.wait`` with a timeout looks every 50 ms only,
    and a cached GiB is read in 64.  Raises TimeoutError."""
    descriptor = os.pidfd_open(child.pid)
    try:
        ready, _, _ = select.select([descriptor], [], [], MEASURE_TIMEOUT_S)
        if not ready:
            raise TimeoutError
        return time.monotonic()
    finally:
        os.close(descriptor)


def end(child: subprocess.Popen[bytes]) -> None:
    """Ends a child by its id, gently first."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def installed(program: str) -> str:
    """Raises Unavailable."""
    found = shutil.which(program, path=f"{os.defpath}:/usr/local/bin:/usr/sbin:/sbin")
    if found is None:
        raise Unavailable(f"{program} is not installed, so its rows are left out.")
    return found


@contextlib.contextmanager
def opened(directory: Path, *, as_user: bool, amounts: Amounts, say: Say) -> Iterator[Workbench]:
    """The work directory, locked against a second run; removed at the end.

    Raises Unavailable when another run has it, or when it cannot be used.
    """
    directory.mkdir(mode=0o755, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unavailable(f"Another bench runs in {directory}: wait for its end.") from None
        _sweep(directory, say)
        try:
            yield Workbench(directory, _identity(directory, as_user), amounts, say)
        finally:
            # A second Ctrl-C must not leave half of it behind.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            _sweep(directory, say)
            shutil.rmtree(directory)
    finally:
        os.close(lock)


def _sweep(directory: Path, say: Say) -> None:
    """What a run that was killed, or a defect, left below the directory."""
    for left in kernel.end_all_below(directory):
        say(f"ended what was left: {left}")
    for entry in directory.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _identity(directory: Path, as_user: bool) -> Identity:
    people = directory / "people"
    people.mkdir()
    found = identities(people)
    identity = found["user" if as_user else next(iter(found))]
    programs = directory / "programs"
    shutil.copytree(PROGRAMS, programs, ignore=shutil.ignore_patterns("__pycache__"))
    done = identity.run("test", "-r", programs / "read_each.py", check=False)
    if done.returncode != 0:
        raise Unavailable(
            f"The user {identity.name} cannot reach {directory}: name another place with --work."
        )
    return identity
