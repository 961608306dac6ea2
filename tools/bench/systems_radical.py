"""One RADICAL-Pilot session on this machine; prints how long its tasks took, in seconds.

python systems_radical.py link|pull|share COUNT SOURCE

``link``: each task links SOURCE and reads it from one end to the other.  ``pull``: each fetches
SOURCE (HOST:PATH) itself with scp, whose configuration is the file SCP_CONFIG, and reads it.
``share``: SOURCE is copied to the pilot; each task links it, copies it, and links its copy back.
"""

import sys
import time

import radical.pilot as rp

TASKS_TIMEOUT_S = 1200
PILOT_TIMEOUT_S = 180


def described(kind: str, number: int, source: str) -> "rp.TaskDescription":
    description = rp.TaskDescription()
    if kind == "share":
        description.executable = "/bin/cp"
        description.arguments = ["input.dat", "output.dat"]
        description.output_staging = [
            {
                "source": "task:///output.dat",
                "target": f"pilot:///output.{number}",
                "action": rp.LINK,
            }
        ]
        source = "pilot:///input.dat"
    else:
        description.executable = "/bin/dd"
        description.arguments = ["if=input.dat", "of=/dev/null", "bs=1M"]
    if kind == "pull":
        description.pre_exec = [f'scp -q -F "$SCP_CONFIG" {source} input.dat']
    else:
        description.input_staging = [
            {"source": source, "target": "task:///input.dat", "action": rp.LINK}
        ]
    return description


def main(kind: str, count: int, source: str) -> float:
    session = rp.Session()
    try:
        pilot = rp.PilotManager(session=session).submit_pilots(
            rp.PilotDescription({"resource": "local.localhost", "cores": 8, "runtime": 30})
        )
        manager = rp.TaskManager(session=session)
        manager.add_pilots(pilot)
        pilot.wait(state=[rp.PMGR_ACTIVE, rp.FAILED], timeout=PILOT_TIMEOUT_S)
        if kind == "share":
            pilot.stage_in(
                {"source": source, "target": "pilot:///input.dat", "action": rp.TRANSFER}
            )
        begun = time.monotonic()
        tasks = manager.submit_tasks([described(kind, number, source) for number in range(count)])
        states = manager.wait_tasks(uids=[task.uid for task in tasks], timeout=TASKS_TIMEOUT_S)
        seconds = time.monotonic() - begun
        if {*states} != {rp.DONE}:
            raise SystemExit(f"{states} {[task.stderr for task in tasks]}")
        return seconds
    finally:
        session.close()


if __name__ == "__main__":
    took = main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    print(f"\nseconds {took}")
