"""kill -9 at every durable step of a commit: afterwards all of it is there, or nothing."""

import signal
import sys
from pathlib import Path

import pytest
import trio

from stagefs.staging import values
from stagefs.staging.values import SandboxState
from tests.unit.staging.commit_mortal import FILES
from tests.unit.staging.conftest import open_staging

STEPS = ["match", "complete", "keep", "prepare", "commit", "activate", "acknowledged"]
DONE_FROM = STEPS.index("commit")


@pytest.mark.parametrize("step", STEPS)
async def test_all_or_nothing(tmp_path: Path, step: str) -> None:
    (tmp_path / "remote").mkdir()
    words = [sys.executable, "-m", "tests.unit.staging.commit_mortal", str(tmp_path), step]
    died = await trio.run_process(words, capture_stdout=True, capture_stderr=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert (b"acknowledged" in died.stdout) == (step == "acknowledged")

    async with open_staging(tmp_path, capacity_bytes=None) as staging:
        await staging.area.begin(is_new_mount=False)
        await staging.flush()
        is_done = STEPS.index(step) >= DONE_FROM
        shown = await staging.show("t")
        assert shown.sandbox.state is (SandboxState.COMMITTED if is_done else SandboxState.ACTIVE)
        assert len(shown.commits) == is_done
        there = [one.name for one in (await staging.area.list_names(
            values.ListNames("staging:///"))).entries]  # fmt: skip
        uploaded = {path.name: path.read_bytes() for path in (tmp_path / "remote").iterdir()}
        if is_done:
            assert there == ["runs"]
            assert {name: await staging.read(f"staging/runs/{name}") for name in FILES} == FILES
            assert uploaded == {"a": FILES["a"], "c": FILES["deep/c"]}
        else:
            assert there == []
            assert uploaded == {}
        assert {name: await staging.read(f"tasks/t/{name}") for name in FILES} == FILES
        assert list((tmp_path / "outputs/files").iterdir()) == []

        # The caller, who may not have got the answer, asks again.
        again = await staging.commit("t")
        await staging.flush()
        assert len((await staging.show("t")).commits) == 1
        assert (await staging.show("t")).commits == [again]
        assert {path.name for path in (tmp_path / "remote").iterdir()} == {"a", "c"}
