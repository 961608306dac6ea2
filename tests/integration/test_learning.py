"""Read-ahead that learns from earlier tasks of a kind, on real servers and mounts."""

import json
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.identity import Identity
from tests.support.mounted import Mounted, sha256
from tests.support.nginx import Nginx, running_nginx
from tests.support.served import HttpServed, content
from tests.support.throttle import Throttle, running_throttle

MakeMount = Callable[..., Mounted]
Figures = Callable[[str], None]
SIZE_BYTES = 256 << 10
COUNT = 20
AHEAD = 4
LINK_BYTES_PER_S = 5_000_000
NAMES = [f"in{number}.dat" for number in range(COUNT)]
# Neither that of the names nor that of the manifest.
ORDER = random.Random(7).sample(NAMES, COUNT)

# Opens each input in the given order, and says what was cached of it and of the fifth input
# behind it just before.  "computes": until the next input is cached, however long that takes.
TASK = """
import hashlib, json, os, sys, threading, time
computes, ahead, names = sys.argv[1] == "computes", int(sys.argv[2]), sys.argv[3:]
def cached(name):
    return int(os.getxattr(name, "user.stagefs.cached"))
pause, said = threading.Event(), []
for number, name in enumerate(names):
    end = time.monotonic() + 60
    while computes and number and cached(name) < os.stat(name).st_size:
        if time.monotonic() > end:
            sys.exit(f"{name} was not fetched ahead within 60 s")
        pause.wait(0.005)
    beyond = names[number + ahead:][:1]
    said.append([cached(name), *map(cached, beyond)])
    with open(name, "rb") as file:
        said[-1].insert(0, hashlib.sha256(file.read()).hexdigest())
print(json.dumps(said))
"""
LINK = """
import json, os, sys
os.mkdir(sys.argv[1])
for name, url in json.loads(sys.argv[2]).items():
    os.symlink(url, os.path.join(sys.argv[1], name))
"""


class Far:
    """A web server behind a slow link."""

    def __init__(self, nginx: Nginx, link: Throttle) -> None:
        self._web = HttpServed(nginx)
        self._ports = f":{nginx.port}/", f":{link.port}/"

    def inputs(self, task: str) -> dict[str, str]:
        """Each task has inputs of its own, under the same names."""
        urls = {name: self._web.put(f"{task}/{name}", of(task, name)) for name in NAMES}
        return {name: url.replace(*self._ports) for name, url in urls.items()}


@pytest.fixture
def far(served_directory: Path) -> Iterator[Far]:
    with (
        running_nginx(served_directory) as nginx,
        running_throttle(nginx.port, bytes_per_s=LINK_BYTES_PER_S) as link,
    ):
        yield Far(nginx, link)


def of(task: str, name: str) -> bytes:
    return content(SIZE_BYTES, f"{task}/{name}")


def perform(mount: Mounted, task: str, *, computes: bool) -> list[list[int]]:
    """Bytes cached of each input, and of the one AHEAD behind it, when it was opened."""
    words = ["computes" if computes else "hurries", str(AHEAD), *ORDER]
    done: subprocess.CompletedProcess[bytes] = mount.run(
        "python", "-c", TASK, *words, directory=mount.point / "tasks" / task
    )
    said = json.loads(done.stdout)
    assert [one[0] for one in said] == [sha256(of(task, name)) for name in ORDER], "wrong bytes"
    return [one[1:] for one in said]


def blocked_s(mount: Mounted, task: str) -> float:
    return float(mount.json_of("stagefs", "sandbox", "show", task)["reads"]["blocked_s"])


def test_the_second_task_of_a_kind_waits_less(
    anybody: Identity, new_mount: MakeMount, far: Far, figures: Figures
) -> None:
    """C7: 20 inputs in a fixed order, with computation in between; the first task belonged to an
    earlier mount."""
    ahead = f"read.learned_ahead_bytes_max={AHEAD * SIZE_BYTES}"
    mount = new_mount(anybody, "--set", ahead)
    for task in ("first", "second"):
        words = [f"{name}={url}" for name, url in far.inputs(task).items()]
        declared = [word for each in words for word in ("--in", each)]
        mount.stagefs("sandbox", "create", task, "--record", *declared)
    before = perform(mount, "first", computes=False)
    assert not any(count for counts in before for count in counts), "cached before its first use"
    waited_s = blocked_s(mount, "first")
    mount.stagefs("sandbox", "commit", "first")
    mount.umount()
    mount.mount()
    first, *others = perform(mount, "second", computes=True)
    assert first == [0, 0], "something was fetched before the task began"
    assert [one[0] for one in others] == [SIZE_BYTES] * (COUNT - 1), "not cached when it was opened"
    beyond = [one[1] for one in others if len(one) > 1]
    assert beyond == [0] * (COUNT - AHEAD - 1), "fetched further ahead than was allowed"
    second_s = blocked_s(mount, "second")
    figures(f"C7: the first task waited {waited_s:.2f} s, the second {second_s:.2f} s")
    assert second_s <= waited_s / 2
    counted = mount.stagefs("metrics").stdout.decode()
    assert f"stagefs_ahead_objects_total {COUNT - 1}" in counted.replace(".0\n", "\n")


def test_sandboxes_without_a_manifest_learn_too(
    anybody: Identity, new_mount: MakeMount, far: Far
) -> None:
    mount = new_mount(anybody)

    def make(task: str) -> None:
        links = json.dumps(far.inputs(task))
        mount.python(LINK, f"MNT/tasks/{task}", links)

    make("first")
    perform(mount, "first", computes=False)
    mount.run("rm", "-r", "MNT/tasks/first")
    make("second")
    _, *others = perform(mount, "second", computes=True)
    assert [one[0] for one in others] == [SIZE_BYTES] * (COUNT - 1)
