"""PyOpus itself, its tasks mirrored into sandboxes of a mount (O1 to O7)."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.identity import Identity
from tests.support.mounted import Mounted, sha256
from tests.support.nginx import Nginx
from tests.support.served import content
from tests.support.waiting import wait_until
from tests.systems.conftest import PROGRAMS, System, installed

MakeMount = Callable[..., Mounted]
pytestmark = pytest.mark.timeout(400)

MPIRUN = ("mpirun", "--allow-run-as-root", "--oversubscribe")


@pytest.fixture
def identity(anybody: Identity) -> Identity:
    """PyOpus asks the login shell for the environment, and an account without one has none."""
    return anybody


@pytest.fixture
def mount(identity: Identity, new_mount: MakeMount) -> Mounted:
    return new_mount(identity)


@dataclasses.dataclass
class Flow:
    """A program of PyOpus's and the directory that its tasks mirror."""

    system: System
    mount: Mounted
    sources: Path
    local: Path

    def words(self, kind: str, function: str, *more: str, ranks: int) -> list[str | Path]:
        program = PROGRAMS / "pyopus_tasks.py"
        return [*MPIRUN, "-n", str(ranks), "python", program, kind, function, *more]

    def results(
        self,
        kind: str,
        function: str,
        mirror_map: dict[str, str],
        *arguments: str | Path,
        times: str = "1",
        storage: str = "passing",
        ranks: int = 2,
    ) -> list[Any]:
        answer = self.system.directory / "answer.json"
        answer.unlink(missing_ok=True)
        mapped = json.dumps({self.source(name): to for name, to in mirror_map.items()})
        more = [mapped, times, storage, *map(str, arguments)]
        self.system.run(*self.words(kind, function, *more, ranks=ranks), deadline_s=120)
        found: list[Any] = json.loads(answer.read_text())
        return found

    def source(self, name: str) -> str:
        return str(self.sources / name)

    def sandboxes(self) -> list[str]:
        listed = self.mount.json_of("stagefs", "sandbox", "list")
        return sorted(one["path"] for one in listed)


@pytest.fixture
def flow(identity: Identity, work: Path, mount: Mounted) -> Iterator[Flow]:
    system = installed("pyopus", identity, work)
    sources = identity.directory(work / "sources")
    local = identity.directory(work / "local")
    environment = {
        **system.environment,
        "OMPI_MCA_btl": "self,sm",
        "OMP_NUM_THREADS": "1",
        "STAGEFS_MOUNT": str(mount.point),
        "PARALLEL_LOCAL_STORAGE": str(local),
        "PARALLEL_MIRRORED_STORAGE": f"{sources}:{mount.point}/staging",
    }
    yield Flow(dataclasses.replace(system, environment=environment), mount, sources, local)
    system.wait_for_its_end()


@pytest.fixture
def tree(flow: Flow) -> None:
    """What tasks mirror: files, a program, a hidden name, a tree with links in it."""
    top = flow.sources
    (top / "input.txt").write_text("input\n")
    (top / "run.sh").write_text("#!/bin/sh\n")
    (top / "run.sh").chmod(0o755)
    (top / ".hidden").write_text("not mirrored by '*'\n")
    (top / "dummydir/sub").mkdir(parents=True)
    (top / "dummydir/a.txt").write_text("a\n")
    (top / "dummydir/sub/.b").write_text("b\n")
    (top / "dummydir/link").symlink_to("a.txt")
    (top / "dummydir/sub/dangling").symlink_to("nowhere")
    (top / "alias").symlink_to("input.txt")


def test_mirror_demo_lists_what_it_lists_without(flow: Flow) -> None:
    demo = flow.system.identity.bin.parent / "demo/parallel/vm"
    listed = {}
    for kind in ("stock", "stagefs"):
        top = flow.sources / kind
        shutil.copytree(demo, top, ignore=shutil.ignore_patterns("*~", "*.pyc"))
        program = top / "04-mirror.py"
        text = program.read_text()
        if kind == "stagefs":
            assert text.count("from pyopus.parallel.mpi import") == 1
            text = text.replace(
                "from pyopus.parallel.mpi import", "from stagefs.integrations.pyopus import"
            )
            program.write_text(text)
        printed = dataclasses.replace(flow.system, directory=top).run(
            *MPIRUN, "-n", "3", "python", "04-mirror.py", deadline_s=120
        )
        lines = [line for line in printed.splitlines() if line.startswith(("Dirs ", "Files "))]
        listed[kind] = [sorted(line.partition("[")[2].strip("]").split(", ")) for line in lines]
        assert (str(flow.mount.point) in printed) == (kind == "stagefs"), printed
    assert listed["stagefs"] == listed["stock"]
    assert "'funclib.py'" in listed["stock"][1]
    assert flow.sandboxes() == []


@pytest.mark.usefixtures("tree")
def test_trees_are_those_that_copying_makes(flow: Flow) -> None:
    wanted = {"*": ".", "dummydir/*": "sub/deep", ".hid*": "hidden", "nothing*": "nothing"}
    (stock,) = flow.results("stock", "tree", wanted)
    (linked,) = flow.results("stagefs", "tree", wanted)
    assert linked == stock
    assert linked["sub/deep/link"] == linked["input.txt"].replace(
        sha256(b"input\n"), sha256(b"a\n")
    ), "a link that is named itself is followed"
    assert linked["dummydir/link"] == "-> a.txt"
    assert ".hidden" not in linked
    assert flow.sandboxes() == []


def test_cold_objects_are_fetched_once_or_never(flow: Flow, nginx: Nginx) -> None:
    data = content(700_000)
    for name in ("read", "unread"):
        (nginx.root / name).write_bytes(data)
        flow.mount.stage_in(nginx.url(name), f"inputs/{name}")
    inputs = str(flow.mount.point / "staging/inputs/*")
    found = flow.results("stagefs", "digest", {inputs: "."}, "read", times="3", ranks=4)
    assert found == [sha256(data)] * 3
    gets = [asked.uri for asked in nginx.asked() if asked.method == "GET"]
    assert gets == ["/plain/read"]


@pytest.mark.usefixtures("tree")
def test_writing_to_an_input_changes_the_tasks_own(flow: Flow) -> None:
    flow.mount.run(
        "sh", "-c", "echo published > MNT/staging/entry".replace("MNT", str(flow.mount.point))
    )
    entry = str(flow.mount.point / "staging/entry")
    wanted = {"input.txt": ".", entry: "."}
    for name, before in (("input.txt", "input\n"), ("entry", "published\n")):
        found = flow.results("stagefs", "append", wanted, name, times="1+1")
        assert found == [f"{before}of this task\n"] * 2
    assert (flow.sources / "input.txt").read_text() == "input\n"
    assert flow.mount.read("staging/entry") == b"published\n"


@pytest.mark.usefixtures("tree")
def test_persistent_storage_is_reused_as_ever(flow: Flow) -> None:
    ran = {}
    for kind in ("stock", "stagefs"):
        found = flow.results(
            kind, "count", {"*": "."}, times="1+1+1", storage="persistent", ranks=2
        )
        ran[kind] = [(one["times"], one["input"]) for one in found]
        (directory,) = {one["directory"] for one in found}
        assert Path(directory).name == f"{found[0]['number']}_vm0"
    assert ran["stagefs"] == ran["stock"] == [(1, 1), (2, 2), (3, 3)]
    assert flow.sandboxes() == [directory.removeprefix(str(flow.mount.point))]
    # The program has ended, so no later one takes over what it left.
    flow.mount.umount()
    flow.mount.mount()
    assert flow.sandboxes() == []


@pytest.mark.usefixtures("tree")
@pytest.mark.parametrize("storage", ["passing", "persistent"])
def test_what_a_killed_worker_left_is_collected(flow: Flow, storage: str) -> None:
    begun = flow.system.directory / "begun"
    more = [json.dumps({flow.source("*"): "."}), "1", storage, str(begun)]
    words = flow.words("stagefs", "die", *more, ranks=2)
    with pytest.raises(AssertionError, match="ended with"):
        flow.system.run(*words, deadline_s=120)
    directory = Path(begun.read_text())
    assert flow.sandboxes() == [str(directory).removeprefix(str(flow.mount.point))]
    assert flow.mount.run("cat", directory / "input.txt").stdout == b"input\n"
    flow.system.wait_for_its_end()
    flow.mount.umount()
    flow.mount.mount()
    assert flow.sandboxes() == []
    assert flow.mount.run("ls", directory.parent).stdout == b""


@pytest.mark.usefixtures("tree")
def test_a_task_that_raises_leaves_nothing(flow: Flow) -> None:
    begun = flow.system.directory / "begun"
    more = [json.dumps({flow.source("*"): "."}), "1", "passing", str(begun)]
    words = flow.words("stagefs", "fall", *more, ranks=2)
    system = flow.system
    program = system.identity.start(
        *words, directory=system.directory, environment=system.environment
    )
    try:
        wait_until(begun.exists, "the beginning of the task", deadline_s=90)
        # Its program goes on: PyOpus waits for a result that will not come.
        wait_until(lambda: flow.sandboxes() == [], "the end of the sandbox", deadline_s=90)
        assert program.poll() is None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(program.pid, signal.SIGTERM)
        printed = program.communicate(timeout=60)
    assert b"ValueError: the task failed" in printed[1]


def test_without_a_mount_a_sentence_says_so(flow: Flow) -> None:
    elsewhere = {**flow.system.environment, "STAGEFS_MOUNT": str(flow.local)}
    system = dataclasses.replace(flow.system, environment=elsewhere)
    with pytest.raises(AssertionError, match=f"{flow.local} is no StageFS mount"):
        system.run("python", "-c", "from stagefs.integrations.pyopus import MPI")
