"""The mount that the batch jobs of one user share, without a batch system: who is the last, and
what is left then."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import kernel
from tests.support.identity import Identity

# Two jobs, one after the other gone.  A mount without jobs ends by itself, so that nobody could be
# asked any more what is left in it: the last job is there until that was asked.
JOBS = """
import os, pwd, sys
from pathlib import Path
from stagefs.config import load_settings
from stagefs.integrations.batch_mount import JobMount, owner_of

class Watched(JobMount):
    def uploads_left(self):
        print("asked while registered:", self.is_registered)
        return super().uploads_left()

config = Path(sys.argv[1])
owner = owner_of(pwd.getpwuid(os.geteuid()).pw_name)
first, second = (
    Watched(name, owner, load_settings(config_file=config), config_file=config) for name in "12"
)
first.start()
second.start()
assert first.is_mounted and first.state == second.state
first.leave()
print("mounted for the second:", second.is_mounted)
second.leave()
print("mounted at the end:", second.is_mounted)
print("left:", os.path.lexists(second.state), second.is_registered, os.path.lexists(second.place))
"""


@pytest.fixture
def configuration(identity: Identity, work: Path) -> Iterator[Path]:
    top = identity.directory(work / "batch")
    path = top / "stagefs.conf"
    path.write_text(
        f'[state]\nbase = "{identity.directory(top / "state")}"\n'
        f'[batch]\ndirectory = "{top / "run"}"\ncache_keep_s = 0\n'
    )
    yield path
    for mount in kernel.mounts(below=top):
        with contextlib.suppress(subprocess.CalledProcessError):
            subprocess.run(["umount", "-l", mount.point], check=True)
    kernel.end_all_below(top)


def test_the_last_job_ends_the_mount_and_leaves_nothing(
    identity: Identity, configuration: Path
) -> None:
    said = identity.run("python", "-c", JOBS, configuration).stdout.decode().splitlines()
    assert said == [
        "asked while registered: True",
        "mounted for the second: True",
        "asked while registered: True",
        "mounted at the end: False",
        "left: False False False",
    ]
