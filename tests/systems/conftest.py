"""Where the real systems are, and how a test runs a program of theirs.

Each system has a virtual environment of its own below ``.venvs``, made by `make test-systems`.
The tests run when they are named (`pytest tests/systems`), and not as a part of all others.
"""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import kernel
from tests.support.identity import CHECKOUT, Identity
from tests.support.mounted import Mounted
from tests.support.nginx import Nginx, running_nginx
from tests.support.waiting import wait_until

HERE = Path(__file__).parent
PROGRAMS = HERE / "programs"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    named = [Path(word.partition("::")[0]).resolve() for word in config.args]
    return None if any(HERE in (path, *path.parents) for path in named) else True


@dataclasses.dataclass(frozen=True)
class System:
    """One system's programs, run by one user in an empty directory with a home of its own."""

    identity: Identity
    environment: dict[str, str]
    directory: Path

    def run(self, *command: str | Path, deadline_s: float = 500.0) -> str:
        """Standard output and error of a program of the system, in ``directory``."""
        done = self.identity.run(
            *command,
            directory=self.directory,
            environment=self.environment,
            deadline_s=deadline_s,
        )
        return os.fsdecode(done.stdout + done.stderr)

    def wait_for_its_end(self) -> None:
        """Agents and workers may outlive the program that started them by seconds, in the mount."""
        home = self.identity.home
        wait_until(
            lambda: not kernel.programs_of(home), "the end of its own programs", deadline_s=90
        )

    def check_nothing_is_left(self, mount: Mounted) -> None:
        """Of the system's tasks, on a mount that is still there, when its programs have ended: no
        sandbox in use, no lease, no temporary file."""
        self.wait_for_its_end()
        used = [one for one in mount.json_of("stagefs", "sandbox", "list") if _in_use(one["state"])]
        assert not used, f"sandboxes that nobody ends: {used}"
        assert mount.json_of("stagefs-cache", "usage")["leases"] == 0
        # The systems leave files of their own there; those of StageFS have its name in theirs.
        left = [*Path(self.environment["TMPDIR"]).rglob("*stagefs*")]
        assert not left, f"temporary files: {left}"


def _in_use(state: str) -> bool:
    return state not in ("committed", "failed")


def installed(name: str, identity: Identity, work: Path) -> System:
    """Fails when `make test-systems` has not installed it."""
    top = CHECKOUT / ".venvs" / name
    if not (top / "bin/python").exists():
        pytest.fail(f"{name} is not in {top}: run the tests with `make test-systems`.")
    home = identity.directory(work / f"home-{name}")
    own = dataclasses.replace(identity, home=home, bin=top / "bin")
    if own.run("python", "-c", "import stagefs.errors", check=False).returncode != 0:
        pytest.skip(f"the user {identity.name} may not enter {top}")
    # RADICAL-Pilot tells a virtual environment by this variable, as bin/activate sets it.
    environment = {"VIRTUAL_ENV": str(top), "TMPDIR": str(identity.directory(work / "tmp"))}
    return System(own, environment, identity.directory(work / f"run-{name}"))


@pytest.fixture
def nginx(served_directory: Path) -> Iterator[Nginx]:
    with running_nginx(served_directory) as server:
        yield server


@pytest.fixture
def all_ended(work: Path) -> Iterator[None]:
    """For tests that use it first: of what they started nothing runs, and nothing is mounted."""
    yield
    wait_until(
        lambda: not kernel.mounts(below=work) and not kernel.programs_of(work),
        f"the end of all programs and mounts below {work}",
    )
