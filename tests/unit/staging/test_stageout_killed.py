"""kill -9 at every durable step of a commit and of its uploads (outputs B4, S of the queue).

Whatever was acknowledged is uploaded by the next daemon; a commit that was not made leaves
nothing; under a final name there is the whole new content, or what was there before; neither a
file in the outputs directory nor a temporary one at the remote is left over.
"""

import sys
from pathlib import Path

import trio

from stagefs.outputs.queue import Queue
from tests.support.identity import CHECKOUT
from tests.unit.outputs.queue_rig import OWNER
from tests.unit.staging.out_child import CONTENTS, OLD, new_stage_out

STEPS_MIN = 50


async def test_killed_at_every_step(tmp_path: Path) -> None:
    await trio.run_process(
        [sys.executable, "-m", "tests.unit.staging.out_child", tmp_path], cwd=CHECKOUT
    )
    logs = logs_of(tmp_path)
    assert len(logs) > STEPS_MIN, "the steps are not seen any more"
    ends = set()
    for log in logs:
        directory = tmp_path / log.stem
        told = log.read_text().splitlines()
        committed = (directory / "committed").exists()
        assert committed or not told, "acknowledged before it was committed"
        whole_names_only(directory / "remote", f"killed at step {log.stem}")
        await next_daemon(directory, committed=committed)
        found = objects(directory / "remote")
        expected = CONTENTS if committed else {"old": OLD}
        assert found == expected, f"killed at step {log.stem}, after {told}"
        assert not list((directory / "outputs/files").iterdir()), f"step {log.stem}: left over"
        ends.add((committed, *told))
    assert ends == {(False,), (True,), (True, "acknowledged"), (True, "acknowledged", "uploaded")}


def logs_of(top: Path) -> list[Path]:
    return sorted(top.glob("*.log"), key=lambda log: int(log.stem))


def objects(remote: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(remote)): path.read_bytes()
        for path in remote.rglob("*")
        if path.is_file()
    }


def whole_names_only(remote: Path, when: str) -> None:
    for name, data in objects(remote).items():
        if name in CONTENTS:
            allowed = (CONTENTS[name], OLD) if name == "old" else (CONTENTS[name],)
            assert data in allowed, f"{when}: {name} is half"


async def next_daemon(directory: Path, *, committed: bool) -> None:
    queue = Queue.open(directory / "outputs", owner=OWNER, origin="here")
    out, remotes = new_stage_out(queue)
    with trio.fail_after(20):
        async with out.running():
            for commit in await out.unsettled():
                await (out.activate(commit) if committed else out.discard(commit))
            while out.busy:
                await out.moved()
    await remotes.aclose()
    queue.close()
