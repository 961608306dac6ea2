"""A mount made by the real command line, and what a test does with it.

Everything goes through ``stagefs``, ``stagefs-cache`` and ordinary programs that run as the
mount's own user: the mount of an ordinary user is closed to root too.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support import kernel
from tests.support.identity import Identity
from tests.support.waiting import wait_until


@dataclasses.dataclass
class Mounted:
    """One mountpoint with its state directory.  ``at_end`` ends it whatever a test did to it."""

    identity: Identity
    point: Path
    state: Path
    environment: Mapping[str, str]
    options: tuple[str, ...]
    child: subprocess.Popen[bytes] | None = None
    """The supervisor, where a test started it itself."""
    rough_end: bool = False
    """Set by tests that break the mount on purpose: a failing umount is no failure then."""

    def mount(self, *more: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        return self.identity.run(
            "stagefs",
            "mount",
            self.point,
            "--state",
            self.state,
            *self.options,
            *more,
            environment=self.environment,
            check=check,
        )

    def mount_without_resend(self) -> None:
        """As on a kernel before 6.9: the supervisor of `stagefs mount` with one more option."""
        self.mount_otherwise(resend=False)

    def mount_otherwise(self, *, resend: bool = True, daemon: Path | None = None) -> None:
        """The supervisor of `stagefs mount`, without RESEND or with a program in place of the
        daemon, which takes the daemon's arguments."""
        self.mount()
        top = next(p for p in self.programs() if p.pid == self.supervisor())
        self.umount()
        reader, writer = os.pipe()
        words = top.command.copy()
        words[words.index("--ready-fd") + 1] = str(writer)
        if not resend:
            words.insert(words.index("--"), "--no-resend")
        if daemon is not None:
            at = words.index("stagefs.daemon")
            words[at - 1 : at + 1] = [str(daemon)]
            # What it reads at its start must be of the moment it is needed.
            words[words.index("--standby-after-s") + 1] = "0"
        log = self.state / "otherwise.log"
        with os.fdopen(reader, "rb") as said, log.open("wb") as output:
            self.child = subprocess.Popen(
                self.identity.words(words),
                cwd="/",
                env=self.identity.environment(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[writer],
                start_new_session=True,
            )
            os.close(writer)
            line = said.readline()
        assert json.loads(line)["ready"], log.read_text()

    def umount(self, *, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        done = self.stagefs("umount", self.point, check=check)
        if done.returncode == 0:
            wait_until(lambda: not self.programs(), f"the end of {self.programs()}")
        return done

    def stagefs(
        self, *arguments: str | Path, check: bool = True, deadline_s: float = 90.0
    ) -> subprocess.CompletedProcess[bytes]:
        return self.run("stagefs", *arguments, check=check, deadline_s=deadline_s)

    def cache(
        self, *arguments: str | Path, check: bool = True
    ) -> subprocess.CompletedProcess[bytes]:
        return self.run("stagefs-cache", *arguments, check=check)

    def json_of(self, *command: str | Path) -> Any:
        return json.loads(self.run(*command, "--json").stdout)

    def run(
        self,
        *command: str | Path,
        directory: Path | None = None,
        check: bool = True,
        deadline_s: float = 90.0,
    ) -> subprocess.CompletedProcess[bytes]:
        """A program of the mount's user.  Words that begin with MNT/ mean the mountpoint."""
        return self.identity.run(
            *self._placed(command),
            directory=directory,
            environment={**self.environment, "STAGEFS_MOUNT": str(self.point)},
            check=check,
            deadline_s=deadline_s,
        )

    def start(
        self, *command: str | Path, directory: Path | None = None, talks: bool = False
    ) -> subprocess.Popen[bytes]:
        return self.identity.start(
            *self._placed(command),
            directory=directory,
            environment={**self.environment, "STAGEFS_MOUNT": str(self.point)},
            talks=talks,
        )

    def python(self, code: str, *arguments: str | Path, deadline_s: float = 90.0) -> bytes:
        """Standard output of a Python program; ``arguments`` as in ``run``."""
        return self.run("python", "-c", code, *arguments, deadline_s=deadline_s).stdout

    def stage_in(self, url: str, name: str, *options: str) -> None:
        self.stagefs("stage-in", *options, url, f"staging:///{name}")

    def read(self, path: str) -> bytes:
        return self.run("cat", f"MNT/{path}").stdout

    def sha256(self, path: str, *, deadline_s: float = 90.0) -> str:
        out = self.run("sha256sum", f"MNT/{path}", deadline_s=deadline_s).stdout
        return out.decode("utf-8", "surrogateescape").lstrip("\\").split(" ")[0]

    def xattr(self, path: str, name: str) -> str:
        code = "import os, sys; sys.stdout.buffer.write(os.getxattr(sys.argv[1], sys.argv[2]))"
        return self.python(code, f"MNT/{path}", f"user.stagefs.{name}").decode()

    def programs(self) -> list[kernel.Program]:
        """The supervisor and daemon; they show their state directory in ``ps``."""
        return [
            program
            for program in kernel.programs_naming(self.state)
            if str(self.point) in program.command and "umount" not in program.command
        ]

    def supervisor(self) -> int:
        ours = self.programs()
        pids = {program.pid for program in ours}
        tops = [program.pid for program in ours if program.parent not in pids]
        assert len(tops) == 1, f"one supervisor expected among {ours}"
        return tops[0]

    def daemon(self) -> int:
        top = self.supervisor()
        names = {program.pid: program.name for program in self.programs() if program.parent == top}
        # One that has not said yet what it is will stand by, if another one serves.
        serving = [pid for pid, name in names.items() if name == "stagefs-daemon"]
        serving = serving or [pid for pid, name in names.items() if name != "stagefs-standby"]
        assert len(serving) == 1, f"one daemon expected among {names}"
        return serving[0]

    def standbys(self) -> list[int]:
        """Daemons that wait until they are needed."""
        return [program.pid for program in self.programs() if program.name == "stagefs-standby"]

    def kill_daemon(self) -> int:
        """kill -9 of the daemon; returns its pid."""
        pid = self.daemon()
        os.kill(pid, signal.SIGKILL)
        return pid

    def kill_all(self) -> None:
        """kill -9 of the supervisor, then of what it had started."""
        ours = self.programs()
        top = self.supervisor()
        for pid in [top, *(program.pid for program in ours if program.pid != top)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.programs(), "the end of the killed programs")

    def at_end(self) -> None:
        try:
            if kernel.mount_at(self.point) is not None and not self.rough_end:
                self.umount()
        finally:
            mount = kernel.mount_at(self.point)
            while mount is not None:
                kernel.detach(mount)
                mount = kernel.mount_at(self.point)
            for program in kernel.programs_naming(self.state):
                kernel.end(program)
            if self.child is not None:
                self.child.wait(20)

    def _placed(self, command: tuple[str | Path, ...]) -> list[str | Path]:
        return [
            str(self.point) + word[3:]
            if isinstance(word, str) and (word == "MNT" or word.startswith("MNT/"))
            else word
            for word in command
        ]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sentence(done: subprocess.CompletedProcess[bytes]) -> str:
    """The one sentence of a command that refused."""
    text = os.fsdecode(done.stderr).strip()
    assert done.returncode != 0, f"{done.args} went well"
    assert text, f"{done.args} ended with {done.returncode} and said nothing"
    assert "\n" not in text, f"more than one line: {text}"
    assert "Traceback" not in text
    return text
