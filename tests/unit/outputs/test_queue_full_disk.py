"""The disk of the outputs directory is full: a change is refused as a whole, none is lost."""

import contextlib
import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagefs.errors import NoSpace
from stagefs.outputs.queued import Done
from tests.unit.outputs.queue_rig import QueueRig

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a tmpfs")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "disk"
    directory.mkdir(mode=0o700)
    options = "size=8m,nr_inodes=2000"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], check=True)
    yield directory
    subprocess.run(["umount", directory], check=True)


@pytest.fixture
def rig(disk: Path) -> Iterator[QueueRig]:
    made = QueueRig(disk / "outputs")
    yield made
    made.queue.close()


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


def test_full_disk_refuses_a_commit_and_loses_none(disk: Path, rig: QueueRig) -> None:
    (number,) = rig.add("c0", "a")
    names = [f"{n}" for n in range(400)]
    rig.prepare("c1", *names)
    items = rig.files("c2", names)
    filler = fill(disk)
    before = rig.states()
    with pytest.raises(NoSpace, match="free space there"):
        rig.queue.prepare("c2", items)
    assert rig.states() == before
    rig.daemon()
    assert rig.states() == before, "the next daemon opens the queue on a full disk"
    filler.unlink()
    rig.queue.prepare("c2", items)
    assert rig.queue.activate("c1") == 400
    rig.queue.settle([Done(number, "v")])
    assert rig.states()["c0/a"] == "done"


def test_disk_without_inodes_is_refused_with_a_sentence(disk: Path, rig: QueueRig) -> None:
    with contextlib.suppress(OSError):
        for number in itertools.count():
            (disk / f"{number}").touch()
    with pytest.raises(NoSpace, match=f"disk of the outputs directory {rig.directory} is full"):
        rig.queue.make_directory_of("c1")
