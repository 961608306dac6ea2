"""What a user of RADICAL-Pilot writes: one session, its task states printed as JSON.

python radical_tasks.py CASE MOUNTPOINT [ARGUMENT...]
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import radical.pilot as rp

from stagefs.errors import StageFSError
from stagefs.integrations import radical_pilot

TASKS_TIMEOUT_S = 240


@contextlib.contextmanager
def running_pilot(
    *, cleanup: bool = False
) -> "Iterator[tuple[rp.PilotManager, rp.Pilot, rp.TaskManager]]":
    session = rp.Session()
    try:
        pilots = rp.PilotManager(session=session)
        description = rp.PilotDescription(
            {"resource": "local.localhost", "runtime": 15, "cores": 4, "exit_on_error": False}
        )
        description.cleanup = cleanup
        pilot = pilots.submit_pilots(description)
        tasks = rp.TaskManager(session=session)
        tasks.add_pilots(pilot)
        yield pilots, pilot, tasks
    finally:
        session.close()


def told(tasks: "list[rp.Task]") -> list[dict[str, object]]:
    return [
        {
            "state": task.state,
            "stdout": task.stdout,
            "exception": task.exception,
            "sandbox": str(task.sandbox),
        }
        for task in tasks
    ]


def finished(manager: "rp.TaskManager", tasks: "list[rp.Task]") -> list[dict[str, object]]:
    manager.wait_tasks(uids=[task.uid for task in tasks], timeout=TASKS_TIMEOUT_S)
    return told(tasks)


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except StageFSError as error:
        return str(error)
    return ""


def on_one_pilot(mountpoint: str, url: str) -> dict[str, object]:
    """What needs no pilot of its own: one takes longer to begin than all of this takes."""
    radical_pilot.install(mountpoint)
    with running_pilot() as (pilots, pilot, manager):
        return {
            "shared_input": shared_input(pilot, manager),
            "cold_objects": cold_objects(pilot, manager, url),
            "missing_inputs": missing_inputs(pilot, manager),
            "many_nodes": many_nodes(pilots),
        }


def shared_input(pilot: "rp.Pilot", manager: "rp.TaskManager") -> dict[str, object]:
    """The example of the first papers: shared input in staging:///, linked into each task."""
    Path("input.dat").write_text("the shared input\n")
    pilot.stage_in(
        {
            "source": "client:///input.dat",
            "target": "staging:///input.dat",
            "action": rp.TRANSFER,
        }
    )
    descriptions = []
    for number in range(6):
        description = rp.TaskDescription()
        description.executable = "/bin/cat"
        description.arguments = ["input.dat"]
        description.input_staging = {
            "source": "staging:///input.dat",
            "target": "task:///input.dat",
            "action": rp.LINK,
        }
        description.output_staging = {
            "source": "task:///STDOUT",
            "target": f"staging:///out/{number}",
            "action": rp.LINK,
        }
        description.stdout = "STDOUT"
        descriptions.append(description)
    # The string form is always a TRANSFER.
    copying = rp.TaskDescription()
    copying.executable = "/bin/cat"
    copying.arguments = ["copied.dat"]
    copying.input_staging = ["staging:///input.dat > copied.dat"]
    answer = finished(manager, manager.submit_tasks([*descriptions, copying]))
    pilot.stage_out(
        {
            "source": "staging:///out/0",
            "target": "client:///fetched",
            "action": rp.TRANSFER,
        }
    )
    return {"tasks": answer, "fetched": Path("fetched").read_text()}


def cold_objects(pilot: "rp.Pilot", manager: "rp.TaskManager", url: str) -> dict[str, object]:
    """``url``: a directory with the objects read and unread."""
    for name in ("read", "unread"):
        pilot.stage_in(
            {"source": f"{url}/{name}", "target": f"staging:///{name}", "action": rp.TRANSFER}
        )
    descriptions = []
    for number in range(10):
        description = rp.TaskDescription()
        description.executable = "/bin/true" if number == 9 else "/usr/bin/sha256sum"
        description.arguments = ["read"]
        description.input_staging = [
            {"source": f"staging:///{name}", "target": f"task:///{name}", "action": rp.LINK}
            for name in ("read", "unread")
        ]
        descriptions.append(description)
    return {"tasks": finished(manager, manager.submit_tasks(descriptions))}


def missing_inputs(pilot: "rp.Pilot", manager: "rp.TaskManager") -> dict[str, object]:
    before = len(manager.list_tasks())

    def described(**directive: object) -> "rp.TaskDescription":
        description = rp.TaskDescription()
        description.executable = "/bin/true"
        description.input_staging = directive
        return description

    linking = described(source="staging:///absent", target="task:///x", action=rp.LINK)
    copying = described(source="staging:///absent", target="task:///x", action=rp.COPY)
    by_string = rp.TaskDescription()
    by_string.executable = "/bin/true"
    by_string.input_staging = ["x < staging:///absent"]
    cut = described(source="staging:///a#b", target="task:///x", action=rp.LINK)
    blank = described(source="staging:///a b", target="task:///x", action=rp.LINK)
    shared = {"source": "client:///absent", "target": "staging:///y", "action": rp.TRANSFER}
    refused = {
        "copy": refusal(lambda: manager.submit_tasks(copying)),
        "string": refusal(lambda: manager.submit_tasks([by_string])),
        "cut": refusal(lambda: manager.submit_tasks(cut)),
        "stage_in": refusal(lambda: pilot.stage_in(shared)),
    }
    submitted = len(manager.list_tasks()) - before
    tasks = manager.submit_tasks([linking, blank])
    return {"refused": refused, "submitted": submitted, "tasks": finished(manager, tasks)}


def printing(staged: str, *, target: str, action: str) -> "rp.TaskDescription":
    """Reads its input, writes STDOUT, and may link that somewhere."""
    description = rp.TaskDescription()
    description.executable = "/bin/cat"
    description.arguments = ["input.dat"]
    description.stdout = "STDOUT"
    description.input_staging = [
        {"source": staged, "target": "task:///input.dat", "action": action}
    ]
    if target:
        description.output_staging = [
            {"source": "task:///STDOUT", "target": target, "action": rp.LINK}
        ]
    return description


def ends(mountpoint: str) -> dict[str, object]:
    """``out`` in the namespace is bound to a remote; ``wrong`` cannot be fetched."""
    radical_pilot.install(mountpoint)
    with running_pilot() as (_, _, manager):
        descriptions = [
            printing("staging:///input.dat", target=f"staging:///out/{number}", action=rp.LINK)
            for number in range(2)
        ]
        descriptions.append(printing("staging:///wrong", target="", action=rp.LINK))
        refused = refusal(
            lambda: manager.submit_tasks(printing("staging:///wrong", target="", action=rp.COPY))
        )
        answer = finished(manager, manager.submit_tasks(descriptions))
    with running_pilot(cleanup=True) as (_, _, manager):
        cleaned = printing("staging:///input.dat", target="staging:///cleaned", action=rp.LINK)
        cleaned_answer = finished(manager, [manager.submit_tasks(cleaned)])
    return {"tasks": answer, "cleaned": cleaned_answer, "refused": refused}


def many_nodes(pilots: "rp.PilotManager") -> dict[str, object]:
    before = len(pilots.list_pilots())

    def told_of(**words: object) -> str:
        description = rp.PilotDescription({"runtime": 15, **words})
        return refusal(lambda: pilots.submit_pilots(description))

    return {
        "nodes": told_of(resource="local.localhost", nodes=2),
        "cores": told_of(resource="nersc.perlmutter", cores=100_000, project="p", queue="q"),
        "pilots": len(pilots.list_pilots()) - before,
    }


def zero_code(mountpoint: str) -> dict[str, object]:
    """Nothing of StageFS but paths."""
    with running_pilot() as (_, _, manager):
        staged = f"file://localhost{mountpoint}/staging"
        descriptions = [
            printing(f"{staged}/input.dat", target=f"{staged}/out/{number}", action=rp.LINK)
            for number in range(2)
        ]
        return {"tasks": finished(manager, manager.submit_tasks(descriptions))}


def own_mount(mountpoint: str, url: str) -> dict[str, object]:
    """The pilot mounts, so it is installed when the pilot is there."""
    with running_pilot() as (_, pilot, manager):
        pilot.wait(state=[rp.PMGR_ACTIVE, rp.FAILED], timeout=120)
        radical_pilot.install(mountpoint)
        pilot.stage_in({"source": url, "target": "staging:///input.dat", "action": rp.TRANSFER})
        description = printing("staging:///input.dat", target="staging:///out", action=rp.LINK)
        answer = finished(manager, [manager.submit_tasks(description)])
        made = Path(mountpoint, "staging/out").read_text()
    return {"tasks": answer, "made": made}


if __name__ == "__main__":
    cases: dict[str, Callable[..., dict[str, object]]] = {
        "on_one_pilot": on_one_pilot,
        "ends": ends,
        "zero_code": zero_code,
        "own_mount": own_mount,
    }
    answer = cases[sys.argv[1]](*sys.argv[2:])
    Path("answer.json").write_text(json.dumps(answer))
