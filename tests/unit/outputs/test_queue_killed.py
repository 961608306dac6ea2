"""kill -9 at every durable step of every change of the queue: each change is there or not at all,
what was acknowledged is there, and no file is missing or left over."""

import subprocess
import sys
from pathlib import Path

from stagefs.outputs.queued import WITH_FILE
from tests.support.identity import CHECKOUT
from tests.unit.outputs.queue_rig import QueueRig

# What the rows are after each acknowledgement of ``queue_child.scenario``.
C1 = {"c1/a": "queued", "c1/b": "queued", "c1/c": "queued"}
SETTLED = {"c1/a": "done", "c1/b": "failed", "c1/c": "queued"}
ADDED = {"c1/a": "done", "c1/b": "replaced", "c1/c": "queued"}
C3 = {"c3/b": "queued", "c3/e": "queued"}
AFTER: list[tuple[str, dict[str, str]]] = [
    ("", {}),
    ("open", {}),
    ("prepare c1", dict.fromkeys(C1, "prepared")),
    ("activate c1", C1),
    ("prepare c2", {**C1, "c2/a": "prepared", "c2/d": "prepared"}),
    ("discard c2", C1),
    ("settle", SETTLED),
    ("add c3", {**ADDED, **C3}),
    ("cancel", {**ADDED, "c1/c": "cancelled", **C3}),
]
STEPS_MIN = 60


def test_killed_at_every_step(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "tests.unit.outputs.queue_child", tmp_path], cwd=CHECKOUT, check=True
    )
    logs = sorted(tmp_path.glob("*.log"), key=lambda log: int(log.stem))
    assert len(logs) > STEPS_MIN, "the steps are not seen any more"
    names = [name for name, _ in AFTER]
    reached = set()
    for log in logs:
        acknowledged = ["", *log.read_text().splitlines()][-1]
        at = names.index(acknowledged)
        # The change under way took effect as a whole, or not at all.
        allowed = [rows for _, rows in AFTER[at : at + 2]]
        rig = QueueRig(tmp_path / log.stem)
        before_sweep = rig.kept()
        rig.queue.sweep()
        found = rig.states()
        assert found in allowed, f"killed at step {log.stem}, after {acknowledged!r}"
        needed = {
            f"{one.commit}/{one.item.file}"
            for one in rig.all()
            if one.state in WITH_FILE and one.state != "cancelled"
        }
        assert needed <= before_sweep, f"killed at step {log.stem}: files are missing"
        cancelled = {name for name, state in found.items() if state == "cancelled"}
        assert needed <= rig.kept() <= needed | cancelled, f"killed at step {log.stem}: left over"
        reached.add(names[allowed.index(found) + at])
        rig.queue.close()
    assert reached == set(names) - {""} or reached == set(names), "some change was never reached"
