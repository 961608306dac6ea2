"""A program that commits a sandbox and kills itself at one step; run by ``test_commit_killed``.

python -m tests.unit.staging.commit_mortal DIRECTORY STEP
"""

import os
import signal
import sys
from pathlib import Path

import trio

from stagefs.staging.manifest import Manifest, Output
from tests.unit.staging.conftest import open_staging

FILES = {"a": b"a" * 100_000, "b": b"", "deep/c": b"c" * 3_000_000}


async def main(directory: Path, step: str) -> None:
    target = directory / "remote"
    outputs = [Output("a", f"file://{target}/"), Output("*", "staging:///runs/"),
               Output("deep/c", f"file://{target}/c")]  # fmt: skip
    async with open_staging(directory, capacity_bytes=None) as staging:
        await staging.create("t", Manifest(outputs=outputs))
        for name, data in FILES.items():
            await staging.write(f"tasks/t/{name}", data)

        def die(reached: str) -> None:
            if reached == step:
                os.kill(os.getpid(), signal.SIGKILL)

        staging.on_step = die
        sys.stdout.write("begun\n")
        sys.stdout.flush()
        await staging.commit("t")
        sys.stdout.write("acknowledged\n")
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]), sys.argv[2])
