"""Parsl itself, its tasks on a mount through StageFSStaging (P1 to P11, D1, D3)."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.identity import Identity
from tests.support.mounted import Mounted, sha256
from tests.support.nginx import Nginx
from tests.support.served import content
from tests.systems.conftest import PROGRAMS, installed

MakeMount = Callable[..., Mounted]
pytestmark = [pytest.mark.timeout(400), pytest.mark.usefixtures("all_ended")]

DATA = content(700_000)


@pytest.fixture
def mount(identity: Identity, new_mount: MakeMount, nginx: Nginx) -> Mounted:
    made = new_mount(identity)
    (nginx.root / "input.dat").write_bytes(DATA)
    made.stage_in(nginx.url("input.dat"), "input.dat")
    return made


@pytest.fixture(params=["threads", "htex"])
def executor(request: pytest.FixtureRequest) -> str:
    return str(request.param)


Ask = Callable[..., Any]


@pytest.fixture
def ask(identity: Identity, work: Path, mount: Mounted, executor: str) -> Iterator[Ask]:
    """``ask(case, argument...)``: what a workflow found."""
    system = installed("parsl", identity, work)

    def run(case: str, *arguments: str) -> Any:
        program = PROGRAMS / "parsl_tasks.py"
        system.run("python", program, case, executor, mount.point, *arguments, deadline_s=300)
        return json.loads((system.directory / "answer.json").read_text())

    yield run
    system.check_nothing_is_left(mount)


def gets(nginx: Nginx) -> list[str]:
    return [asked.uri for asked in nginx.asked() if asked.method == "GET"]


def test_tasks_read_and_make_what_others_read(ask: Ask, mount: Mounted, nginx: Nginx) -> None:
    found = ask("read_and_chain")
    assert found["direct"] == found["by_keyword"] == sha256(DATA)
    assert found["again"] == sha256(DATA * 4)
    assert int(found["stdout"]) == 4 * len(DATA)
    assert found["path"] == f"{mount.point}/staging/out/other/count.txt"
    assert mount.sha256("staging/out/twice") == sha256(DATA * 2)
    assert mount.sha256("staging/out/deep/again") == sha256(DATA * 4)
    assert mount.sha256("staging/out/other/count.txt") == sha256(DATA * 4)
    assert mount.xattr("staging/out/twice", "state") == "published"
    assert mount.run("ls", "MNT/tasks").stdout == b"", "sandboxes of committed tasks are left"
    assert gets(nginx) == ["/plain/input.dat"]


def test_eight_tasks_fetch_a_cold_object_once(ask: Ask, mount: Mounted, nginx: Nginx) -> None:
    data = content(900_000, "cold")
    (nginx.root / "cold").write_bytes(data)
    found = ask("cold_object", nginx.url("cold"))
    assert found["digests"] == [sha256(data)] * 8
    assert gets(nginx) == ["/plain/cold"]


def test_outputs_are_there_when_their_future_is_done(ask: Ask, mount: Mounted) -> None:
    found = ask("outputs_first")
    assert (found["seen"], found["state"]) == (2 * len(DATA), "published")
    assert found["plain"] == sha256(b"plain")
    # A commit that fails is told by the output, not by the task.
    assert found["taken"]["is_ours"]
    assert "staging:///made exists" in found["taken"]["text"]
    assert found["taken_task"] == 2 * len(DATA)
    assert "the task failed" in found["broken"]["text"]
    assert mount.run("ls", "MNT/staging").stdout.split() == [b"input.dat", b"made"]
    states = [one["state"] for one in mount.json_of("stagefs", "sandbox", "list")]
    assert states == ["failed", "failed"]


def test_wrong_inputs_are_refused(ask: Ask, nginx: Nginx) -> None:
    found = ask("refused_inputs", nginx.url("absent"))
    assert "staging:///a b#c" in found["cut"]
    assert found["missing"]["is_ours"]
    assert "staging:///absent does not exist" in found["missing"]["text"]
    assert found["remote"]["is_ours"]
    assert nginx.url("absent") in found["remote"]["text"]
    assert not found["lazy"]["is_ours"]
    assert "No such file or directory" in found["lazy"]["text"]


def test_eager_inputs_fail_before_the_task(ask: Ask, mount: Mounted, nginx: Nginx) -> None:
    mount.stage_in(nginx.url("input.dat"), "wrong", "--md5", "0" * 32)
    found = ask("eager_inputs")
    assert found["good"] == sha256(DATA)
    assert found["wrong"]["is_ours"]
    assert "does not have the content that was declared" in found["wrong"]["text"]


def test_equal_names_keep_apart(ask: Ask, mount: Mounted, nginx: Nginx) -> None:
    for name in ("one", "two"):
        (nginx.root / name).mkdir()
        (nginx.root / name / "same").write_text(f"{name}\n")
    mount.stage_in(nginx.url("input.dat"), "wrong", "--md5", "0" * 32)
    found = ask("side_by_side", nginx.url("").rstrip("/"))
    assert found["named"] == ["same", "same"]
    assert mount.read("staging/first/same") == b"one\ntwo\n"
    assert mount.read("staging/second/same") == b"2"
    # Two tasks wrote `result` at the same time, each in a sandbox that is gone now.
    words, places = zip(*found["pair"], strict=True)
    assert words == ("one", "two")
    assert len({*places}) == 2
    assert all(place.startswith(f"{mount.point}/tasks/parsl-") for place in places)
    # The third failed, and its sandbox is there to be looked at.
    assert "breaking" in found["broken"]
    (kept,) = mount.json_of("stagefs", "sandbox", "list")
    assert kept["state"] == "failed"
    assert mount.read(f"{kept['path'].lstrip('/')}/result") == b"half\n"
    # A fetch that fails is told with its URL and its reason.
    assert found["unread"]["is_ours"] is False
    assert "staging:///wrong" in found["unread"]["whole"]
    assert "does not have the content that was declared" in found["unread"]["whole"]
    mount.stagefs("sandbox", "remove", kept["name"])


def test_results_are_remembered_by_version(ask: Ask, mount: Mounted, nginx: Nginx) -> None:
    (nginx.root / "other").write_bytes(b"another version")
    found = ask("memoized", nginx.url("other"))
    first, second = len(DATA), len(b"another version")
    assert found["results"] == [first, first, *[second] * 5]
    # It ran once for each version, and once with an output; then the sandboxed app once.
    assert found["runs"] == [1, 1, 2, 2, 3, 3, 3, 4]
    assert found["gone"]["is_ours"]
    assert "staging:///made" in found["gone"]["text"]
    assert mount.json_of("stagefs", "sandbox", "list") == []


def test_other_files_are_left_to_other_providers(ask: Ask, mount: Mounted, nginx: Nginx) -> None:
    (nginx.root / "download").write_bytes(b"by Parsl itself")
    found = ask("other_files", nginx.url("download"))
    assert found["downloaded"] == sha256(b"by Parsl itself")
    assert found["size"] == len(b"plain") + len(DATA)
    assert mount.read("staging/made") == b"2"
    assert mount.run("ls", "MNT/staging").stdout.split() == [b"input.dat", b"made"]
