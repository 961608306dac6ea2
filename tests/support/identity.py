"""Who runs a command of a test: root, or an ordinary user.

The suite mounts as both when it runs as root, and as itself otherwise.  The ordinary user must
be able to run the installation under test: when the checkout lies below a directory that is
closed to others (a clone in ``mktemp -d``), he gets a copy of it.
"""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
NOBODY = 65534
SYSTEM_PATH = "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class CommandFailed(AssertionError):
    pass


@dataclasses.dataclass(frozen=True)
class Identity:
    """A user, his home directory, and the directory of the commands he runs."""

    name: str
    uid: int
    gid: int
    home: Path
    bin: Path

    def words(self, command: Sequence[str | Path], directory: Path | None = None) -> list[str]:
        """The command as this user, in a directory that only he may be able to enter."""
        words = [str(word) for word in command]
        if words[0] in ("stagefs", "stagefs-cache", "python"):
            words[0] = str(self.bin / words[0])
        if directory is not None:
            words = ["env", "-C", str(directory), *words]
        if self.uid != os.geteuid():
            ids = [f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups"]
            words = ["setpriv", *ids, *words]
        return words

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """Little is inherited, so that a test means the same on every machine."""
        return {
            "PATH": f"{self.bin}:{SYSTEM_PATH}",
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            **(extra or {}),
        }

    def start(
        self,
        *command: str | Path,
        directory: Path | None = None,
        environment: Mapping[str, str] | None = None,
        talks: bool = False,
    ) -> subprocess.Popen[bytes]:
        """``talks``: its standard input is a pipe of the caller's."""
        return subprocess.Popen(
            self.words(command, directory),
            env=self.environment(environment),
            stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def run(
        self,
        *command: str | Path,
        directory: Path | None = None,
        environment: Mapping[str, str] | None = None,
        check: bool = True,
        deadline_s: float = 90.0,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run to the end.  Raises CommandFailed with all output, unless ``check`` is False."""
        child = self.start(*command, directory=directory, environment=environment)
        try:
            output, errors = child.communicate(timeout=deadline_s)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            output, errors = child.communicate()
            raise CommandFailed(
                f"{command} was still running after {deadline_s} s; {output!r} {errors!r}"
            ) from None
        if check and child.returncode != 0:
            raise CommandFailed(
                f"{command} ended with {child.returncode}\n"
                f"{os.fsdecode(output[-4000:])}\n{os.fsdecode(errors[-4000:])}"
            )
        return subprocess.CompletedProcess(command, child.returncode, output, errors)

    def directory(self, path: Path) -> Path:
        """Make a directory of this user's."""
        path.mkdir(mode=0o755)
        os.chown(path, self.uid, self.gid)
        return path


def identities(session_directory: Path) -> dict[str, Identity]:
    """By name: "root" and "user" for root, "user" alone for anybody else."""
    found = {}
    own_bin = Path(sys.executable).parent
    if os.geteuid() != 0:
        home = session_directory / "home"
        home.mkdir()
        return {"user": Identity("user", os.geteuid(), os.getegid(), home, own_bin)}
    for name, number in (("root", 0), ("user", NOBODY)):
        home = session_directory / f"home-{name}"
        home.mkdir(mode=0o700)
        os.chown(home, number, number)
        found[name] = Identity(name, number, number, home, own_bin)
    if not _runs(found["user"]):
        copied = _copy_installation(session_directory / "installation")
        # Root too: it mounts for that user, whose daemon then runs the same program.
        found = {name: dataclasses.replace(one, bin=copied) for name, one in found.items()}
        if not _runs(found["user"]):
            raise RuntimeError(
                f"An ordinary user cannot run {own_bin}/python3, nor a copy of it, because "
                f"{Path(sys.executable).resolve()} is closed to him: run `make clean setup`, "
                "which prefers /usr/bin/python3."
            )
    return found


def _runs(identity: Identity) -> bool:
    code = "import stagefs.errors, pyfuse3"
    return identity.run("python", "-c", code, check=False, directory=Path("/")).returncode == 0


def _copy_installation(target: Path) -> Path:
    for name in ("stagefs", "tools", "mount", ".venv"):
        if (CHECKOUT / name).exists():
            shutil.copytree(CHECKOUT / name, target / name, symlinks=True)
    for path in (target / ".venv/lib").glob("python3*/site-packages/*stagefs*.pth"):
        path.write_text(path.read_text().replace(str(CHECKOUT), str(target)))
    bin_directory = target / ".venv/bin"
    for path in bin_directory.glob("stagefs*"):
        first, _, rest = path.read_text().partition("\n")
        assert first.startswith("#!"), path
        path.write_text(f"#!{bin_directory}/python\n{rest}")
    return bin_directory
