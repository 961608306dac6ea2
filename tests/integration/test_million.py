"""A catalog of a million entries (A6).  The bounds are the promise's own."""

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.identity import Identity
from tests.support.mounted import Mounted

MakeMount = Callable[..., Mounted]
ENTRIES = 1_000_000
IN_ONE_DIRECTORY = 100_000
MEMORY_BYTES_MAX = 150 << 20


def write_catalog(path: Path) -> None:
    with path.open("w") as file:
        for number in range(ENTRIES):
            directory, name = divmod(number, IN_ONE_DIRECTORY)
            file.write(
                f'{{"name": "d{directory}/sample-{name:06d}.bam", '
                f'"url": "https://data.example.org/d{directory}/sample-{name:06d}.bam", '
                f'"size": {number * 7919}, "mtime": 1700000000}}\n'
            )


def memory_bytes(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def seconds_of(step: Callable[[], object]) -> float:
    started = time.monotonic()
    step()
    return time.monotonic() - started


@pytest.mark.timeout(600)
def test_a_million_entries(
    anybody: Identity, new_mount: MakeMount, figures: Callable[[str], None]
) -> None:
    mount = new_mount(anybody)
    catalog = mount.state.with_name("catalog.jsonl")
    write_catalog(catalog)

    def figure(name: str, value: float, bound: float) -> None:
        figures(f"{name} {value:.2f} (bound {bound:g})")
        assert value < bound, f"{name} is {value:.2f}, more than {bound:g}"

    figure("import_s", seconds_of(lambda: mount.stagefs("import", catalog, deadline_s=300)), 60)
    figure("memory_after_import_mib", memory_bytes(mount.daemon()) / (1 << 20), 150)
    mount.umount()
    figure("mount_s", seconds_of(mount.mount), 1.0)
    big = "MNT/staging/d7"
    listed: list[bytes] = []
    figure("ls_s", seconds_of(lambda: listed.append(mount.run("ls", "-f", big).stdout)), 1.0)
    assert listed[0].count(b"\n") == IN_ONE_DIRECTORY + 2
    counted: list[bytes] = []
    script = f"find {mount.point}/staging -type f -size +0 | wc -l"

    def find() -> None:
        counted.append(mount.run("sh", "-c", script, deadline_s=400).stdout)

    figure("find_us_per_entry", seconds_of(find) / ENTRIES * 1e6, 60)
    assert int(counted[0]) == ENTRIES - 1
    figure("memory_after_find_mib", memory_bytes(mount.daemon()) / (1 << 20), 150)
