"""One Parsl workflow on this machine; prints how long its tasks took, in seconds.

python systems_parsl.py stagefs|rsync COUNT FILE MOUNTPOINT|HOST

Each task reads all of FILE: through StageFSStaging, or brought by Parsl's own RSyncStaging.
"""

import os
import sys
import time

import parsl
from parsl.app.app import python_app
from parsl.data_provider.data_manager import default_staging
from parsl.data_provider.files import File
from parsl.data_provider.rsync import RSyncStaging
from parsl.data_provider.staging import Staging
from parsl.executors import HighThroughputExecutor
from parsl.providers import LocalProvider

from stagefs.integrations.parsl import StageFSStaging


@python_app  # type: ignore[untyped-decorator]
def size_read(file: "File") -> int:
    count = 0
    with open(file, "rb", buffering=0) as opened:
        while piece := opened.read(1 << 20):
            count += len(piece)
    return count


@python_app  # type: ignore[untyped-decorator]
def nothing() -> None:
    pass


def main(kind: str, count: int, file: str, place: str) -> float:
    staging: Staging = StageFSStaging(place) if kind == "stagefs" else RSyncStaging(place)
    executor = HighThroughputExecutor(
        address="127.0.0.1",
        max_workers_per_node=count,
        working_dir=os.path.abspath("copies"),
        storage_access=[staging, *default_staging],
        provider=LocalProvider(init_blocks=1, min_blocks=1, max_blocks=1),
    )
    with parsl.load(parsl.Config(executors=[executor], run_dir=os.path.abspath("runinfo"))):
        for each in [nothing() for _ in range(count)]:
            each.result()
        begun = time.monotonic()
        sizes = {future.result() for future in [size_read(File(file)) for _ in range(count)]}
        seconds = time.monotonic() - begun
    if len(sizes) != 1:
        raise SystemExit(f"the tasks read different amounts: {sizes}")
    return seconds


if __name__ == "__main__":
    took = main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
    print(f"\nseconds {took}")
