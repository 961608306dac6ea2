"""Pilots link inputs with os.link (RADICAL-Pilot's LINK is nothing else), and their tasks use what
was linked as any file.  Here the input was never fetched before."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.identity import Identity
from tests.support.mounted import Mounted, sha256
from tests.support.served import Served, ServedFiles, content

MakeMount = Callable[..., Mounted]

# As RADICAL-Pilot's agent does it: make the task's directory, then one hard link for each input.
STAGE = """
import os, sys
shared, task = sys.argv[1:3]
os.makedirs(task, exist_ok=True)
for name in sys.argv[3:]:
    os.link(os.path.join(shared, name), os.path.join(task, name))
"""
SCRIPT = b"#!/bin/sh\necho ran as $(id -u) with $#\n"


@pytest.fixture
def mount(identity: Identity, served: Served, new_mount: MakeMount) -> Mounted:
    made = new_mount(identity, environment=served.environment(identity))
    made.stage_in(served.put("input.dat", content(2_500_000)), "input.dat")
    script = served.put("run.sh", SCRIPT)
    if isinstance(served, ServedFiles):  # SFTP tells modes, and they are kept
        (served.objects / "run.sh").chmod(0o755)
    made.stage_in(script, "run.sh")
    return made


def link(mount: Mounted, task: str, *names: str) -> None:
    mount.python(STAGE, "MNT/staging", f"MNT/{task}", *names)


@pytest.mark.parametrize(
    "task", ["tasks/t1", "radical.pilot.sandbox/rp.session.1/pilot.0000/task.000000"]
)
def test_linked_before_anything_was_fetched(mount: Mounted, served: Served, task: str) -> None:
    data = content(2_500_000)
    link(mount, task, "input.dat", "run.sh")
    before = served.bytes_sent()

    listed = mount.run("ls", "-l", f"MNT/{task}").stdout.decode().splitlines()[1:]
    facts = {line.split()[-1]: line.split() for line in listed}
    assert sorted(facts) == ["input.dat", "run.sh"]
    assert [facts["input.dat"][at] for at in (1, 4)] == ["2", str(len(data))]
    assert facts["run.sh"][0].startswith("-rwx"), "a linked script cannot be run"
    same = mount.run("stat", "-c", "%i %u", f"MNT/{task}/input.dat", "MNT/staging/input.dat")
    inode, owner = set(same.stdout.decode().splitlines()).pop().split()
    assert len(set(same.stdout.splitlines())) == 1, same.stdout
    assert int(inode) > 0
    assert int(owner) == mount.identity.uid
    assert served.bytes_sent() == before, "linking and listing fetched something"

    assert mount.sha256(f"{task}/input.dat") == sha256(data)
    ran = mount.run(f"{mount.point}/{task}/run.sh", "one", "two").stdout
    assert ran == b"ran as %d with 2\n" % mount.identity.uid


def test_many_tasks_link_one_input(mount: Mounted, served: Served) -> None:
    data = content(2_500_000)
    before = served.bytes_sent()
    for number in range(10):
        link(mount, f"tasks/t{number}", "input.dat")
    readers = [mount.start("sha256sum", f"MNT/tasks/t{number}/input.dat") for number in range(9)]
    for reader in readers:
        output, errors = reader.communicate(timeout=90)
        assert output.split()[0].decode() == sha256(data), errors
    assert served.bytes_sent() - before == len(data)
    assert int(mount.run("stat", "-c", "%h", "MNT/staging/input.dat").stdout) == 11


def test_what_linking_refuses(mount: Mounted) -> None:
    code = """
import errno, json, os, sys
shared, task, elsewhere = sys.argv[1:]
os.makedirs(task)
os.mkdir(os.path.join(shared, "dir"))
os.link(os.path.join(shared, "input.dat"), os.path.join(task, "there"))
said = {}
for name, source, target in [
    ("missing", os.path.join(shared, "absent"), os.path.join(task, "x")),
    ("taken", os.path.join(shared, "input.dat"), os.path.join(task, "there")),
    ("directory", os.path.join(shared, "dir"), os.path.join(task, "d")),
    ("other file system", os.path.join(shared, "input.dat"), elsewhere),
]:
    try:
        os.link(source, target)
        said[name] = None
    except OSError as error:
        said[name] = errno.errorcode[error.errno]
print(json.dumps(said))
"""
    outside = Path(mount.state.parent) / "outside"
    said = json.loads(mount.python(code, "MNT/staging", "MNT/tasks/t", outside))
    assert said == {
        "missing": "ENOENT",
        "taken": "EEXIST",
        "directory": "EPERM",
        "other file system": "EXDEV",
    }
