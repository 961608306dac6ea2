"""What the kernel says of mounts and programs, and the rough ways to end them.

Reads /proc and /sys only; needs nothing of StageFS, so that it can judge it.
"""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tests.support.waiting import wait_until


@dataclasses.dataclass(frozen=True)
class Mount:
    point: Path
    kind: str
    connection: int
    """The directory of /sys/fs/fuse/connections that belongs to it (the device's minor)."""


def mounts(*, below: Path | None = None) -> list[Mount]:
    found = []
    for line in Path("/proc/self/mountinfo").read_text("utf-8", "surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        point = Path(re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields[4]))
        if below is None or below in point.parents:
            found.append(Mount(point, after.split(" ")[0], int(fields[2].split(":")[1])))
    return found


def mount_at(point: Path) -> Mount | None:
    return next((mount for mount in mounts() if mount.point == point), None)


def abort(mount: Mount) -> None:
    """Every request on the connection ends with ECONNABORTED: who hung on it runs on."""
    control = Path(f"/sys/fs/fuse/connections/{mount.connection}/abort")
    try:
        control.write_text("1")
    except OSError:  # a minimal machine has no fusectl mounted; root can do without
        subprocess.run(["umount", "-f", str(mount.point)], capture_output=True, check=False)


def detach(mount: Mount) -> None:
    if mount.kind.startswith("fuse"):
        abort(mount)
    with contextlib.suppress(FileNotFoundError):
        done = subprocess.run(
            ["fusermount3", "-uz", str(mount.point)], capture_output=True, check=False
        )
        if done.returncode == 0:
            return
    subprocess.run(["umount", "-l", str(mount.point)], capture_output=True, check=False)


@dataclasses.dataclass(frozen=True)
class Program:
    pid: int
    parent: int
    command: list[str]
    name: str
    """What ``ps`` shows as the program (comm), which a program can change."""

    def __str__(self) -> str:
        return f"{self.pid}: {' '.join(self.command)}"


def programs() -> Iterator[Program]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            # It may end while we look.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                command = (entry / "cmdline").read_bytes()
                status = (entry / "stat").read_text("utf-8", "replace")
                if command:
                    words = os.fsdecode(command).rstrip("\0").split("\0")
                    before, _, after = status.rpartition(")")
                    name = before.partition("(")[2]
                    yield Program(int(entry.name), int(after.split()[1]), words, name)


@dataclasses.dataclass(frozen=True)
class Thread:
    """``switches``: how often it gave the processor away; the same wait has the same number."""

    pid: int
    tid: int
    name: str
    state: str
    switches: int
    waits_in: str


def threads(sessions: Iterable[int]) -> Iterator[Thread]:
    """Of all programs in these sessions."""
    wanted = set(sessions)
    for entry in Path("/proc").glob("[0-9]*/task/[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            head, _, rest = (entry / "stat").read_text("utf-8", "replace").rpartition(")")
            state, _parent, _group, session = rest.split()[:4]
            if int(session) in wanted:
                status = (entry / "status").read_text("utf-8", "replace")
                switches = re.findall(r"ctxt_switches:\s*(\d+)", status)
                yield Thread(
                    pid=int(entry.parts[2]),
                    tid=int(entry.name),
                    name=head.partition("(")[2],
                    state=state,
                    switches=sum(map(int, switches)),
                    waits_in=(entry / "wchan").read_text(),
                )


def programs_naming(directory: Path) -> list[Program]:
    """Programs with this directory, or something below it, in their command line."""
    names = _naming(directory)
    return _sorted(program for program in programs() if any(map(names, program.command)))


def programs_of(directory: Path) -> list[Program]:
    """The same, or in their environment: servers are told of their files that way too."""
    names = _naming(directory)
    return _sorted(
        program
        for program in programs()
        if any(map(names, program.command)) or names(_environment(program.pid))
    )


def _naming(directory: Path) -> Callable[[str], object]:
    return re.compile(re.escape(str(directory)) + r"(?![\w.-])").search


def _environment(pid: int) -> str:
    try:
        return os.fsdecode(Path(f"/proc/{pid}/environ").read_bytes())
    except OSError:  # it ended, or belongs to somebody else
        return ""


def _sorted(found: Iterable[Program]) -> list[Program]:
    own = _own_line()
    others = (program for program in found if program.pid not in own)
    return sorted(others, key=lambda program: program.pid)


def _own_line() -> set[int]:
    """This process, and those it descends from: a `make` that was told the directory, too."""
    line: set[int] = set()
    pid = os.getpid()
    while pid:
        line.add(pid)
        pid = int(
            Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[1]
        )
    return line


def end(program: Program) -> None:
    for number in (signal.SIGKILL, signal.SIGCONT):
        with contextlib.suppress(ProcessLookupError):
            os.kill(program.pid, number)


def end_all_below(directory: Path) -> list[str]:
    """Detach every mount and end every program of a directory.  Returns what there was."""
    found = []
    for mount in reversed(mounts(below=directory)):
        found.append(f"a {mount.kind} mount at {mount.point}")
        detach(mount)
    for program in programs_of(directory):
        found.append(f"program {program}")
        end(program)
    if found:
        wait_until(lambda: not programs_of(directory), f"the end of {found}")
    return found
