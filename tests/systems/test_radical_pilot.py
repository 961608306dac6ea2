"""RADICAL-Pilot itself, unmodified, its pilots and tasks on a mount (S1 to S6, S8, S9, D1, D3)."""

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import kernel
from tests.support.identity import Identity
from tests.support.mounted import Mounted, sha256
from tests.support.nginx import Nginx, running_nginx
from tests.support.served import content, serving
from tests.support.waiting import wait_until
from tests.systems.conftest import PROGRAMS, System, installed

MakeMount = Callable[..., Mounted]
pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("all_ended")]

EXAMPLE = "share/radical.pilot/examples/07_shared_task_data.py"
EXAMPLE_TASKS = 128


@pytest.fixture
def mount(identity: Identity, new_mount: MakeMount) -> Mounted:
    # The directories that pilots make for their tasks.
    settings = '[workspace]\nsandbox_roots = "radical.pilot.sandbox/*/*/*"\n'
    return new_mount(identity, settings=settings)


@pytest.fixture
def radical(identity: Identity, work: Path, mount: Mounted) -> Iterator[System]:
    system = installed("radical.pilot", identity, work)
    yield system
    # RADICAL-Pilot keeps what its pilots made, unless it is asked to clean up; agents still write.
    system.wait_for_its_end()
    mount.run("rm", "-rf", "MNT/radical.pilot.sandbox")
    system.check_nothing_is_left(mount)


def work_in(radical: System, place: Path) -> None:
    """RADICAL-Pilot's own setting of where pilots work."""
    configs = radical.identity.home / ".radical/pilot/configs"
    radical.run("mkdir", "-p", configs)
    setting = {"localhost": {"default_remote_workdir": str(place)}}
    (configs / "resource_local.json").write_text(json.dumps(setting))


def answer_of(radical: System, case: str, *arguments: str | Path) -> Any:
    radical.run("python", PROGRAMS / "radical_tasks.py", case, *arguments)
    return json.loads((radical.directory / "answer.json").read_text())


def states(answer: Any) -> set[str]:
    return {task["state"] for task in answer["tasks"]}


def test_its_own_example_runs_in_the_mount(radical: System, mount: Mounted) -> None:
    work_in(radical, mount.point)
    output = radical.run("python", radical.identity.bin.parent / EXAMPLE)
    assert output.count(": DONE, exit:   0") == EXAMPLE_TASKS
    found = mount.run(
        "find", "MNT/radical.pilot.sandbox", "-name", "input.dat", "-path", "*/pilot.0000/input.dat"
    )
    (shared,) = found.stdout.decode().split()
    assert int(mount.run("stat", "-c", "%h", shared).stdout) == 1 + EXAMPLE_TASKS
    data = mount.run("cat", shared).stdout
    for number in range(EXAMPLE_TASKS):
        assert (radical.directory / f"STDOUT.{number:06}").read_bytes() == data
    names = {one["name"] for one in mount.json_of("stagefs", "sandbox", "list")}
    pilot = str(Path(shared).parent).removeprefix(str(mount.point))
    assert {f"{pilot}/task.{number:06}" for number in range(EXAMPLE_TASKS)} <= names


@dataclasses.dataclass(frozen=True)
class OnePilot:
    """What tasks of one pilot found on a mount, which is still there."""

    mount: Mounted
    nginx: Nginx
    answers: Any


COLD = content(700_000)


@pytest.fixture(scope="module", params=("root", "user") if os.geteuid() == 0 else ("user",))
def one_pilot(
    request: pytest.FixtureRequest,
    session_directory: Path,
    all_identities: dict[str, Identity],
) -> Iterator[OnePilot]:
    identity = all_identities[request.param]
    top = identity.directory(session_directory / f"radical-{identity.name}")
    (top / "served").mkdir()
    mount = Mounted(identity, identity.directory(top / "mnt"), top / "state", {}, ())
    radical = installed("radical.pilot", identity, top)
    with running_nginx(top / "served") as nginx:
        for name in ("read", "unread"):
            (nginx.root / name).write_bytes(COLD)
        try:
            mount.mount()
            mount.run("touch", "MNT/staging/a b")
            url = nginx.url("").rstrip("/")
            yield OnePilot(mount, nginx, answer_of(radical, "on_one_pilot", mount.point, url))
            radical.check_nothing_is_left(mount)
        finally:
            mount.at_end()
    assert not kernel.programs_of(top)


def test_staging_scheme_is_the_namespace_again(one_pilot: OnePilot) -> None:
    mount, answer = one_pilot.mount, one_pilot.answers["shared_input"]
    assert states(answer) == {"DONE"}, answer
    assert {task["stdout"] for task in answer["tasks"]} == {"the shared input\n"}
    assert answer["fetched"] == "the shared input\n"
    assert mount.read("staging/input.dat") == b"the shared input\n"
    # The namespace's name and six links; the seventh task asked for a copy.
    assert int(mount.run("stat", "-c", "%h", "MNT/staging/input.dat").stdout) == 7
    assert mount.run("ls", "MNT/staging/out").stdout.split() == [b"%d" % n for n in range(6)]
    assert mount.xattr("staging/out/3", "state") == "published"
    assert not Path("/input.dat").exists()
    assert not Path("/out").exists()
    names = {one["name"] for one in mount.json_of("stagefs", "sandbox", "list")}
    for task in answer["tasks"]:
        assert f"{mount.point}/tasks/rp.session." in task["sandbox"]
        path = task["sandbox"].partition(str(mount.point))[2].rstrip("/")
        assert path in names, "the task's directory is no sandbox"


def test_ten_tasks_link_one_cold_object(one_pilot: OnePilot) -> None:
    mount, answer = one_pilot.mount, one_pilot.answers["cold_objects"]
    assert states(answer) == {"DONE"}, answer
    told = sorted(task["stdout"].strip() for task in answer["tasks"])
    assert told == ["", *[f"{sha256(COLD)}  read"] * 9]
    gets = [asked.uri for asked in one_pilot.nginx.asked() if asked.method == "GET"]
    assert gets == ["/plain/read"]
    for name in ("read", "unread"):
        assert int(mount.run("stat", "-c", "%h", f"MNT/staging/{name}").stdout) == 11


def test_missing_inputs_are_told(one_pilot: OnePilot) -> None:
    answer = one_pilot.answers["missing_inputs"]
    linking, blank = answer["tasks"]
    assert linking["state"] == "FAILED"
    assert "staging:///absent" in linking["exception"]
    assert blank["state"] == "DONE", blank
    refused = answer["refused"]
    assert "staging:///absent does not exist" in refused["copy"]
    assert "staging:///absent does not exist" in refused["string"]
    assert "staging:///a#b" in refused["cut"]
    assert "client:///absent did not become staging:///y" in refused["stage_in"]
    assert answer["submitted"] == 0


def sandbox_states(mount: Mounted) -> dict[str, str]:
    return {one["name"]: one["state"] for one in mount.json_of("stagefs", "sandbox", "list")}


def test_sandboxes_and_outputs_when_the_session_ends(
    identity: Identity, work: Path, new_mount: MakeMount, served_directory: Path
) -> None:
    with serving("ssh", served_directory) as server:
        mount = new_mount(identity, environment=server.environment(identity))
        url = server.put("input.dat", b"the input\n")
        (server.objects / "results").mkdir()
        (server.objects / "results").chmod(0o777)
        mount.stage_in(url, "input.dat")
        mount.stage_in(url, "wrong", "--md5", "0" * 32)
        mount.stagefs("bind", "--writable", server.url("results"), "staging:///out")
        radical = installed("radical.pilot", identity, work)
        answer = answer_of(radical, "ends", mount.point)
        radical.check_nothing_is_left(mount)
        mount.stagefs("flush")
        # What tasks linked there is in the namespace and at the remote.
        for number in ("0", "1"):
            assert mount.read(f"staging/out/{number}") == b"the input\n"
            assert server.get(f"results/{number}") == b"the input\n"
        first, second, failed = answer["tasks"]
        (cleaned,) = answer["cleaned"]
        assert [one["state"] for one in (first, second, cleaned)] == ["DONE"] * 3, answer
        assert mount.read("staging/cleaned") == b"the input\n"
        # A task whose input cannot be fetched says which and why; one that copies is refused.
        assert failed["state"] == "FAILED"
        for told in (failed["exception"], answer["refused"]):
            assert "does not have the content that was declared" in told, told
            assert "wrong" in told, told
        assert url in failed["exception"]
        # Sandboxes are over, and gone where RADICAL-Pilot was asked to clean up.
        (session,) = mount.run("ls", "MNT/tasks").stdout.decode().split()
        assert {
            name.rpartition("/")[2]: state for name, state in sandbox_states(mount).items()
        } == {
            session: "committed",
            "task.000000": "committed",
            "task.000001": "committed",
            "task.000002": "failed",
        }


def test_pilots_that_span_nodes_are_refused(one_pilot: OnePilot) -> None:
    mount, answer = one_pilot.mount, one_pilot.answers["many_nodes"]
    for told in (answer["nodes"], answer["cores"]):
        assert f"{mount.point} is there on one only" in told, answer
    assert "2 nodes" in answer["nodes"]
    assert answer["pilots"] == 0


def _leases_one(mount: Mounted, path: str) -> bool:
    return bool(mount.json_of("stagefs", "sandbox", "show", f"MNT{path}")["leases"] == 1)


def test_directories_of_an_unchanged_program_are_sandboxes(radical: System, mount: Mounted) -> None:
    work_in(radical, mount.point)
    (radical.directory / "source").write_bytes(b"the input\n")
    mount.stage_in(f"file://{radical.directory}/source", "input.dat")
    mount.run("mkdir", "MNT/staging/out")
    answer = answer_of(radical, "zero_code", mount.point)
    radical.wait_for_its_end()
    assert states(answer) == {"DONE"}, answer
    for number in range(2):
        assert mount.read(f"staging/out/{number}") == b"the input\n"
    for task in answer["tasks"]:
        path = task["sandbox"].partition(str(mount.point))[2].rstrip("/")
        assert sandbox_states(mount)[path] == "active"
        # RADICAL-Pilot's agent made the link, with link(2).
        wait_until(functools.partial(_leases_one, mount, path), f"the lease of {path}/input.dat")
        mount.run("sh", "-c", f"echo more >>{mount.point}{path}/input.dat")
        shown = mount.json_of("stagefs", "sandbox", "show", f"MNT{path}")
        assert "input.dat" in shown["modified"], shown
        mount.stagefs("sandbox", "commit", f"MNT{path}", "--out", f"STDOUT=staging:///again{path}")
        assert mount.read(f"staging/again{path}") == b"the input\n"
        assert sandbox_states(mount)[path] == "committed"
    assert mount.json_of("stagefs-cache", "usage")["leases"] == 0, "they end with a commit"
    # RADICAL-Pilot's sandboxes end with its directory.
    mount.run("rm", "-r", "MNT/radical.pilot.sandbox")
    assert sandbox_states(mount) == {}
    assert mount.read("staging/input.dat") == b"the input\n"


def test_a_pilot_that_mounts_itself(
    identity: Identity, work: Path, new_mount: MakeMount, nginx: Nginx
) -> None:
    (nginx.root / "input.dat").write_bytes(b"the input\n")
    mount = new_mount(identity, mounted=False)
    radical = installed("radical.pilot", identity, work)
    configs = radical.identity.home / ".radical/pilot/configs"
    radical.run("mkdir", "-p", configs)
    # The bootstrapper has a PATH of its own, and ends with the pilot.
    program = radical.identity.bin / "stagefs"
    command = f"{program} mount {mount.point} --state {mount.state} --lifetime pid:$$"
    setting = {"localhost": {"pre_bootstrap_0": [command]}}
    (configs / "resource_local.json").write_text(json.dumps(setting))
    answer = answer_of(radical, "own_mount", mount.point, nginx.url("input.dat"))
    assert states(answer) == {"DONE"}, answer
    assert answer["made"] == "the input\n"
    wait_until(
        lambda: kernel.mount_at(mount.point) is None and not mount.programs(),
        "the end of the mount with its pilot",
        deadline_s=90,
    )
    radical.wait_for_its_end()
