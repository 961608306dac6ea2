"""kill -9 of the daemon at every durable step, from the first create to the last upload (B4).

A task works through a scenario while the daemon dies before its N-th durable step: N is 1, 2,
3, ... until the scenario runs through.  The suite takes some of these steps, the same ones each
time; ``pytest tests/faults/test_every_step.py --every-step`` takes them all, as root and as an
ordinary user.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from stagefs.namespace.check import problems
from tests.support import stepping_daemon
from tests.support.identity import Identity
from tests.support.mounted import Mounted
from tests.support.served import Served, SharedGateway, content, serving, serving_s3
from tests.support.stepping_daemon import NOTE_NAME, PLAN_NAME

MakeMount = Callable[..., Mounted]
MIB = 1 << 20
INPUT = content(3 * MIB + 5, "input")
LARGE = content(2 * MIB + 77, "large")
SETTINGS = (
    "[stage_out]\nsettle_s = 0.05\nbackoff_s = 0.05\nbackoff_s_max = 0.2\n"
    "[remote]\nattempts = 2\n[namespace]\nlisting_ttl_s = 0.1\n"
)
# So many steps there are at least, and so many of them the suite takes, in each mode.
STEPS_MIN = 80
SAMPLES = 9
STEPS_MAX = 2000

# A task: does what tasks do, and says after each step that it was acknowledged.  Without RESEND
# an operation on an open file may end in ESTALE (docs/SEMANTICS.md): then that file is written
# anew, as a task would be started again.
TASK = r"""
import errno, os, sys, time
from pathlib import Path
from stagefs.control.client import Client, Refused
from stagefs.errors import NoDaemon
mnt, name, resend, large = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True", sys.argv[4]
task, staging, out = mnt / "tasks" / name, mnt / "staging", mnt / "staging/out"
client = Client.of(mnt)
stale = 0

def say(what):
    print(what, flush=True)

def again(work):
    global stale
    for _ in range(5):
        try:
            return work()
        except OSError as error:
            if error.errno != errno.ESTALE or resend:
                raise
            stale += 1
    raise AssertionError("ESTALE five times")

def write(path, data, sync=False, flags=os.O_TRUNC):
    def work():
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o644)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view[:1 << 17]):]
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)
    again(work)

def asked(call, *arguments, **options):
    # A command would be given again, too.
    deadline = time.monotonic() + 60
    while True:
        try:
            return call(*arguments, **options)
        except NoDaemon:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)

def append():
    with open(task / "in", "ab", buffering=0) as file:
        assert file.write(b"!") == 1

write(task / "made", b"made", sync=True)
say("created")
again(lambda: os.rename(task / "made", task / "result"))
say("renamed")
if resend:
    append()
else:
    again(lambda: os.truncate(task / "in", 1000))
say("copied up")
write(task / "published", b"published" * 1000)
again(lambda: os.rename(task / "published", staging / f"{name}.p"))
say("published")
again(lambda: os.mkdir(out / name))
write(out / name / "closed", b"closed" * 1000)
say("closed")
write(out / name / "large", Path(large).read_bytes())
say("large closed")
asked(client.sandbox_commit, name)
say("committed")
left = asked(client.flush, 60.0).left
assert (left.waiting, left.failed, left.prepared) == (0, 0, 0), left
say(f"uploaded {stale}")
"""


@pytest.fixture(params=["file", "ssh", "s3"])
def served(request: pytest.FixtureRequest, served_directory: Path) -> Iterator[Served]:
    """Where outputs go; ``file`` is the directory of the ssh server, reached directly."""
    if request.param == "s3":
        gateway: SharedGateway = request.getfixturevalue("gateway")
        with serving_s3(served_directory, gateway) as bucket:
            yield bucket
    else:
        with serving("ssh", served_directory) as one:
            yield one


class Walk:
    """A mount whose daemons die, one scenario after another."""

    def __init__(self, mount: Mounted, served: Served, *, resend: bool, base: str) -> None:
        self.mount = mount
        self.served = served
        self.resend = resend
        self.base = base
        self.plan = mount.state / PLAN_NAME
        self.note = mount.state / NOTE_NAME
        self.large = mount.state.parent / "large"
        self.large.write_bytes(LARGE)
        self.large.chmod(0o644)
        self.runs = 0
        self.kills: dict[str, int] = {}
        self.stale = 0
        self.expected: dict[str, bytes] = {}

    def run(self, step: int) -> bool:
        """One scenario with a death at ``step``; whether there was that step."""
        name = f"t{self.runs}"
        self.runs += 1
        self.mount.stagefs(
            *("sandbox", "create", name, "--in", "in=staging:///input"),
            *("--out", f"result={self.base}/runs/{name}/"),
            *("--out", f"in={self.base}/runs/{name}/"),
            *("--out", "result=staging:///committed/" + name),
        )
        self.note.unlink(missing_ok=True)
        fresh = self.plan.with_name("step.new")
        fresh.write_text(f"{step} {name}\n")
        fresh.chmod(0o666)
        fresh.rename(self.plan)
        changed = INPUT + b"!" if self.resend else INPUT[:1000]
        new = {
            f"runs/{name}/result": b"made",
            f"runs/{name}/in": changed,
            f"out/{name}/closed": b"closed" * 1000,
            f"out/{name}/large": LARGE,
        }
        self.expected |= new
        task = self.mount.start(*("python", "-c", TASK, "MNT", name, str(self.resend), self.large))
        assert task.stdout is not None
        said = []
        for line in task.stdout:
            said.append(line.decode().strip())
            self.look_for_half_objects(new)
        errors = task.communicate(timeout=90)[1].decode()
        died = not self.plan.exists()  # the plan goes with the daemon
        self.plan.unlink(missing_ok=True)
        where = f"died at step {step} ({self.note.read_text() if died else 'not'}), after {said}"
        assert task.returncode == 0, f"{where}: {errors}"
        self.stale += int(said[-1].split()[1])
        if died:
            what = self.note.read_text()
            self.kills[what] = self.kills.get(what, 0) + 1
        self.check(name, changed, where)
        return died

    def look_for_half_objects(self, new: Mapping[str, bytes]) -> None:
        for name, data in new.items():
            with contextlib.suppress(FileNotFoundError):
                assert self.served.get(name) == data, f"half an object: {name}"

    def check(self, name: str, changed: bytes, where: str) -> None:
        """Everything is there, once, here and at the remote."""
        read = self.mount.read
        assert read(f"tasks/{name}/result") == b"made", where
        assert read(f"tasks/{name}/in") == changed, where
        assert read(f"staging/{name}.p") == b"published" * 1000, where
        assert read(f"staging/committed/{name}") == b"made", where
        assert read(f"staging/out/{name}/closed") == b"closed" * 1000, where
        names = self.mount.run("ls", "-A", f"MNT/tasks/{name}", f"MNT/staging/out/{name}")
        assert names.stdout.split()[1::1].count(b"result") == 1, where
        for one, data in self.expected.items():
            if f"/{name}/" in one:
                assert self.served.get(one) == data, f"{where}: {one}"

    def check_whole(self) -> None:
        names = {name for name in self.served.names() if name != "input"}
        assert names == set(self.expected), "something else is left at the remote"
        shown = json.loads(self.mount.stagefs("queue", "list", "--json").stdout)
        assert shown == [], "the queue is not empty"
        assert self.mount.sha256("staging/input") == self.mount.sha256("staging/same")


@pytest.fixture
def script(work: Path) -> Path:
    """The checkout may be closed to ordinary users."""
    copied = work / "stepping_daemon.py"
    copied.write_text(Path(stepping_daemon.__file__).read_text())
    copied.chmod(0o644)
    return copied


@pytest.mark.timeout(6000)
@pytest.mark.parametrize("resend", [True, False], ids=["resend", "no-resend"])
def test_killed_at_every_step(
    request: pytest.FixtureRequest,
    anybody: Identity,
    new_mount: MakeMount,
    served: Served,
    script: Path,
    work: Path,
    resend: bool,
    figures: Callable[[str], None],
) -> None:
    is_file = request.node.callspec.params["served"] == "file"
    mount = new_mount(
        anybody, environment=served.environment(anybody), settings=SETTINGS, mounted=False
    )
    mount.mount_otherwise(resend=resend, daemon=script)
    base = f"file://{work}/served/objects" if is_file else served.url("x")[:-2]
    served.put("input", INPUT)
    if is_file:
        os.chown(work / "served/objects", anybody.uid, anybody.gid)
    for name in ("input", "same"):
        mount.stage_in(served.url("input"), name)
    mount.stagefs("bind", f"{base}/out", "staging:///out", "--writable")
    walk = Walk(mount, served, resend=resend, base=base)
    assert not walk.run(0)
    total = int(walk.note.read_text())
    assert total >= STEPS_MIN, "the steps are not seen any more"
    taken = 0
    offset = len(base) + resend
    every = request.config.getoption("--every-step")
    for step in steps(total, every=every, offset=offset):
        if not walk.run(step):
            break
        taken = step
    walk.check_whole()
    kills = sum(walk.kills.values())
    assert kills >= (STEPS_MIN if every else SAMPLES - 2), f"only {kills} kills"
    assert len(walk.kills) >= 3, f"the same step again and again: {walk.kills}"
    assert resend or walk.stale <= 2 * kills
    assert not resend or walk.stale == 0
    mount.umount()
    assert problems(mount.state / "namespace.sqlite") == []
    deaths = (mount.state / "supervisor.log").read_text().count(" died ")
    assert deaths == kills, "daemons died of something else"
    figures(f"{kills} kills, the last at step {taken} of about {total}: {walk.kills}")


def steps(total: int, *, every: bool, offset: int) -> Iterator[int]:
    """All, or some that lie apart, other ones for each mode."""
    if every:
        yield from range(1, STEPS_MAX)
        return
    stride = total // SAMPLES
    yield from range(1 + offset % stride, stride * SAMPLES, stride)
