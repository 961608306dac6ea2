"""A mount made by the supervisor with the tiny daemon: no StageFS file system is involved."""

import contextlib
import dataclasses
import json
import os
import select
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

from tests.support import kernel
from tests.support.identity import Identity
from tests.support.waiting import wait_until

TINY_DAEMON = Path(__file__).with_name("tiny_daemon.py")
READY_TIMEOUT_S = 60.0


@dataclasses.dataclass
class SupervisedMount:
    """``start`` mounts; ``at_end`` takes everything away whatever a test did to it."""

    identity: Identity
    top: Path
    content: bytes
    child: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.point = self.identity.directory(self.top / "mnt")
        self.state = self.identity.directory(self.top / "state")
        self.big = self.top / "big.bin"
        self.big.write_bytes(self.content)
        # The checkout may be closed to ordinary users.
        self.script = Path(shutil.copy(TINY_DAEMON, self.top / "tiny_daemon.py"))
        self.script.chmod(0o644)

    def start(
        self,
        *options: str,
        daemon: tuple[str, ...] = (),
        wrapper: tuple[str, ...] = (),
        path: str | None = None,
        point: Path | None = None,
    ) -> dict[str, Any]:
        """What the supervisor says: {"ready": {...}} or {"error": ..., "exit_code": ...}."""
        point = point or self.point
        places = ["--mountpoint", str(point), "--state", str(self.state)]
        reader, writer = os.pipe()
        python = str(self.identity.bin / "python")
        search = ["env", f"PATH={path}"] if path else []
        words = [
            *wrapper,
            *self.identity.words([*search, python, "-m", "stagefs.supervisor"]),
            *places,
            *("--ready-fd", str(writer)),
            *options,
            *("--", python, str(self.script), *places, "--big", str(self.big)),
            *daemon,
        ]
        self.child = subprocess.Popen(
            words,
            cwd="/",
            env=self.identity.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[writer],
            start_new_session=True,
        )
        os.close(writer)
        with os.fdopen(reader, "rb") as said:
            assert select.select([said], [], [], READY_TIMEOUT_S)[0], f"no word: {self.log()}"
            line = said.readline()
        assert line, f"the supervisor ended without a word: {self._errors()!r} {self.log()}"
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    def ready(self, *options: str, daemon: tuple[str, ...] = ()) -> dict[str, Any]:
        """Start, and insist that it became ready."""
        answer = self.start(*options, daemon=daemon)
        assert "ready" in answer, f"{answer} {self.log()}"
        facts = answer["ready"]
        assert isinstance(facts, dict)
        return facts

    def _errors(self) -> bytes:
        assert self.child is not None
        return self.child.communicate(timeout=10)[1]

    @property
    def supervisor(self) -> subprocess.Popen[bytes]:
        assert self.child is not None, "not started"
        return self.child

    def daemon(self) -> int:
        """The pid of the living daemon."""
        found: list[int] = []

        def look() -> bool:
            found[:] = [
                program.pid
                for program in kernel.programs()
                if program.parent == self.supervisor.pid and str(self.script) in program.command
            ]
            return len(found) == 1

        wait_until(look, f"one daemon of supervisor {self.supervisor.pid}")
        return found[0]

    def kill_daemon(self) -> None:
        """kill -9, and wait until the supervisor has noted it."""
        deaths = self.log().count(" died ")
        os.kill(self.daemon(), signal.SIGKILL)
        wait_until(lambda: self.log().count(" died ") > deaths, "the note of the death")

    def log(self) -> str:
        path = self.state / "supervisor.log"
        return path.read_text() if path.exists() else ""

    def end(self) -> int:
        """SIGTERM; returns the exit status."""
        self.supervisor.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self, *, deadline_s: float = 60.0) -> int:
        status = self.supervisor.wait(timeout=deadline_s)
        self._close()
        return status

    def _close(self) -> None:
        if self.supervisor.stderr:
            self.supervisor.stderr.close()

    def is_mounted(self) -> bool:
        return kernel.mount_at(self.point) is not None

    def at_end(self) -> None:
        if self.child is None:
            return
        try:
            if self.child.poll() is None:
                self.end()
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        finally:
            self._close()
            with contextlib.suppress(AssertionError):
                kernel.end_all_below(self.top)
