"""How long a mount lives: until a process ends, until the batch job (or the last of several) ends,
or for ever.

A process is (pid, start time), so that a reused pid is never taken for it.
"""

import os
from dataclasses import dataclass
from pathlib import Path

# The process on a node that lives exactly as long as the job (or the job step) there: of
# Slurm, of the Grid Engines, of HTCondor.  PBS has none: its pbs_mom serves all jobs.
JOB_KEEPERS = ("slurmstepd", "sge_shepherd", "condor_starter")


@dataclass(frozen=True)
class LivingProcess:
    pid: int
    start_time: int  # clock ticks after boot, field 22 of /proc/PID/stat

    def is_alive(self) -> bool:
        return read_process(self.pid) == self


@dataclass(frozen=True)
class LivingJobs:
    """The batch jobs that share a mount: a file for each in a directory, made by the job's prolog
    and removed by its epilog.  It holds "PID START" of the process that lives as long as the job,
    or nothing where the batch system has none."""

    directory: str

    def is_alive(self) -> bool:
        try:
            return any(_is_running(entry) for entry in Path(self.directory).iterdir())
        except FileNotFoundError:
            return False


def _is_running(job: Path) -> bool:
    try:
        words = job.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False
    if len(words) != 2 or not all(word.isdecimal() for word in words):
        return True
    return LivingProcess(int(words[0]), int(words[1])).is_alive()


Lifetime = LivingProcess | LivingJobs


def read_process(pid: int) -> LivingProcess | None:
    """The process as it is now; None when it is gone or a zombie."""
    fields = _stat_fields(pid)
    if fields is None or fields[0] in "ZX":
        return None
    return LivingProcess(pid, int(fields[19]))


def _stat_fields(pid: int) -> list[str] | None:
    """/proc/PID/stat from the third field on: the second may hold blanks and brackets."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(")") + 2 :].split()


def is_stuck_zombie(pid: int) -> bool:
    """Dead, but a thread of it still sits in the kernel, so that it cannot be reaped."""
    fields = _stat_fields(pid)
    return fields is not None and fields[0] == "Z"


def job_keeper() -> LivingProcess | None:
    """The nearest ancestor of this process that belongs to the batch system."""
    pid = os.getppid()
    while pid > 1:
        fields = _stat_fields(pid)
        if fields is None:
            return None
        name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
        if name in JOB_KEEPERS:
            return read_process(pid)
        pid = int(fields[1])
    return None


def parse_lifetime(text: str) -> Lifetime | None:
    """``pid:N``, ``job``, ``jobs:DIRECTORY`` or ``forever`` (None).

    Raises ValueError with a sentence."""
    if text == "forever":
        return None
    if text == "job":
        keeper = job_keeper()
        if keeper is None:
            raise ValueError(
                "The lifetime 'job' needs a batch job around this command, and none of its "
                "parents belongs to one; use --lifetime pid:N or forever."
            )
        return keeper
    kind, _, number = text.partition(":")
    if kind == "jobs" and os.path.isabs(number):
        return LivingJobs(number)
    if kind != "pid" or not number.isdecimal():
        raise ValueError(f"The lifetime {text!r} is none of pid:N, job, forever.")
    found = read_process(int(number))
    if found is None:
        raise ValueError(f"The lifetime names process {number}, and there is none.")
    return found


def open_pidfd(living: Lifetime | None) -> int | None:
    """Wakes a loop at the end of that process; without it the clock does, within a second."""
    if not isinstance(living, LivingProcess):
        return None
    try:
        return os.pidfd_open(living.pid)
    except OSError:
        return None
