"""Fixtures that several test folders share, the watchdog, and the check that nothing is left.

Whatever a test starts lies below one directory of the session, so that a mount or a program
that outlives it can be told from anybody else's.
"""

import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.support import kernel
from tests.support.identity import Identity, identities
from tests.support.mounted import Mounted
from tests.support.nginx import running_nginx
from tests.support.served import (
    HttpServed,
    Served,
    ServedFiles,
    SharedGateway,
    serving,
    serving_s3,
)

SESSION_DIRECTORY = pytest.StashKey[Path]()
FIGURE = "figure"
IDENTITY_NAMES = ("root", "user") if os.geteuid() == 0 else ("user",)
# The watchdog ends what hangs a test shortly before pytest-timeout interrupts the test itself,
# which a test that waits inside a system call on a dead mount would not notice.
WATCHDOG_SHARE = 0.9


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-step",
        action="store_true",
        help="kill daemons at every durable step, not at some, more often, and each as root and "
        "as an ordinary user (tests/faults)",
    )


def pytest_configure(config: pytest.Config) -> None:
    directory = Path(tempfile.mkdtemp(prefix="sft."))
    directory.chmod(0o755)
    config.stash[SESSION_DIRECTORY] = directory


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "call":
                for name, text in report.user_properties:
                    if name == FIGURE:
                        terminalreporter.write_line(f"figure: {text}")


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config.stash[SESSION_DIRECTORY], ignore_errors=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "anybody" in metafunc.fixturenames and metafunc.config.getoption("--every-step"):
        metafunc.parametrize("anybody", IDENTITY_NAMES, indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    bound_s = float(item.config.getini("timeout"))
    if (marker := item.get_closest_marker("timeout")) is not None and marker.args:
        bound_s = float(marker.args[0])
    directory = item.config.stash[SESSION_DIRECTORY]
    watchdog = threading.Timer(bound_s * WATCHDOG_SHARE, _abort_mounts, [directory])
    watchdog.daemon = True
    watchdog.start()
    try:
        return (yield)
    finally:
        watchdog.cancel()


def _abort_mounts(directory: Path) -> None:
    """A request that a stopped daemon has read can be ended in two ways only: by aborting the
    connection, and by ending everybody who has the device open.
    """
    for mount in kernel.mounts(below=directory):
        if mount.kind.startswith("fuse"):
            kernel.abort(mount)
    for program in kernel.programs_naming(directory):
        kernel.end(program)


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    yield
    left = [
        *kernel.end_all_below(pytestconfig.stash[SESSION_DIRECTORY]),
        *kernel.end_all_below(tmp_path_factory.getbasetemp()),
    ]
    assert not left, f"the tests left behind: {'; '.join(left)}"


@pytest.fixture(scope="session")
def session_directory(pytestconfig: pytest.Config, nothing_left_behind: None) -> Path:
    """Open to every user, unlike pytest's own temporary directories."""
    return pytestconfig.stash[SESSION_DIRECTORY]


@pytest.fixture(scope="session")
def all_identities(session_directory: Path) -> dict[str, Identity]:
    for parent in session_directory.parents:
        if not parent.stat().st_mode & 0o001:
            pytest.fail(f"Ordinary users cannot enter {parent}; set TMPDIR to another directory.")
    return identities(session_directory)


@pytest.fixture(params=IDENTITY_NAMES)
def identity(request: pytest.FixtureRequest, all_identities: dict[str, Identity]) -> Identity:
    """Who mounts: each test that uses it runs as root and as an ordinary user."""
    return all_identities[request.param]


@pytest.fixture
def anybody(request: pytest.FixtureRequest, all_identities: dict[str, Identity]) -> Identity:
    """Who mounts, for tests that have nothing to say about users: whoever runs the suite.

    With ``--every-step`` they run as root and as an ordinary user, as with ``identity``.
    """
    name = getattr(request, "param", None)
    return next(iter(all_identities.values())) if name is None else all_identities[name]


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Notes a measured figure; all are printed at the end, for docs/VERIFIED.md.

    They go with the test's report, which is what comes back from a worker of several.
    """

    def note(text: str) -> None:
        request.node.user_properties.append((FIGURE, f"{request.node.name}: {text}"))

    return note


@pytest.fixture(scope="session")
def numbers() -> Iterator[int]:
    return itertools.count()


@pytest.fixture
def work(session_directory: Path, numbers: Iterator[int]) -> Iterator[Path]:
    """An empty directory of this test, with a short name, open to every user."""
    directory = session_directory / f"w{next(numbers)}"
    directory.mkdir(mode=0o755)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


MakeMount = Callable[..., Mounted]
# A login or a listing takes longer than the usual 2 s now and then on a machine that is busy with
# tests.  Those that are about this deadline set it.
PATIENT = "answer_deadline_s = 10\n"


def _patient(settings: str) -> str:
    if "answer_deadline_s" in settings:
        return settings
    before, _, after = settings.partition("[read]\n")
    return f"{before}\n[read]\n{PATIENT}{after}"


@pytest.fixture
def new_mount(work: Path) -> Iterator[MakeMount]:
    """``new_mount(identity, "--capacity", "1GiB", settings="[read]\\n...")``: a running mount.

    ``settings`` is a TOML configuration file.  ``mounted=False`` only prepares the directories.
    """
    made: list[Mounted] = []

    def new(
        identity: Identity,
        *options: str,
        settings: str = "",
        environment: Mapping[str, str] | None = None,
        mounted: bool = True,
    ) -> Mounted:
        top = identity.directory(work / f"m{len(made)}")
        point = identity.directory(top / "mnt")
        (top / "stagefs.conf").write_text(_patient(settings))
        options = ("--config", str(top / "stagefs.conf"), *options)
        mount = Mounted(identity, point, top / "state", dict(environment or {}), options)
        made.append(mount)
        if mounted:
            mount.mount()
        return mount

    yield new
    for mount in made:
        mount.at_end()


@pytest.fixture
def served_directory(work: Path) -> Path:
    directory = work / "served"
    directory.mkdir(mode=0o755)
    return directory


@pytest.fixture(scope="session")
def gateway(session_directory: Path) -> Iterator[SharedGateway]:
    shared = SharedGateway(session_directory / "s3")
    yield shared
    shared.stop()


@pytest.fixture(params=["http", "ssh", "s3"])
def served(request: pytest.FixtureRequest, served_directory: Path) -> Iterator[Served]:
    """A real server: each test that uses it runs over every protocol."""
    if request.param == "s3":
        with serving_s3(served_directory, request.getfixturevalue("gateway")) as bucket:
            yield bucket
    else:
        with serving(request.param, served_directory) as server:
            yield server


@pytest.fixture(params=["http", "ssh"])
def served_files(request: pytest.FixtureRequest, served_directory: Path) -> Iterator[ServedFiles]:
    """A real server whose objects are files, with all the names that files can have."""
    with serving(request.param, served_directory) as server:
        yield server


@pytest.fixture
def web(served_directory: Path) -> Iterator[HttpServed]:
    """A real web server, for tests that have nothing to say about protocols."""
    with running_nginx(served_directory) as server:
        yield HttpServed(server)
