"""kill -9 of the daemon again and again while everything is at work at once: readers, a fetch, a
build, changes of names, writers whose files are uploaded (E1).  No task sees an error or a wrong
byte, nothing that was acknowledged is lost, nobody is left hanging.

A few kills in the suite; with ``--every-step`` 50 in a row, and then a daemon that is stopped until
the watchdog, with its default patience, has it replaced.
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support import kernel
from tests.support.identity import Identity
from tests.support.mounted import Mounted
from tests.support.nginx import Nginx, running_nginx
from tests.support.served import Served, content, serving
from tests.support.throttle import running_throttle
from tests.support.waiting import wait_until

MakeMount = Callable[..., Mounted]
MIB = 1 << 20
KILLS, KILLS_LONG = 4, 50
OBJECTS = 400
OBJECT_BYTES = 3 * MIB
# A chunk takes an eighth of a second: each daemon lives long enough to bring some.
FETCH_BYTES_PER_S = 8 * MIB
SETTINGS = (
    "[stage_out]\nsettle_s = 0.05\nbackoff_s = 0.1\nbackoff_s_max = 0.5\n"
    # Each daemon logs in to the ssh server anew, on a machine that is busy on purpose.
    "[read]\nanswer_deadline_s = 60\n"
)
# Bounds that tell a hang from a pause; how long the pauses are is a figure.
SETTLED_S = 300.0

# All tasks go on until the file STOP is there, say "begun" after their first round and how many
# rounds there were at the end.
LOOP = """
import hashlib, os, sys, time
top, stop = sys.argv[1], sys.argv[2]
rounds = 0
def go_on():
    global rounds
    rounds += 1
    if rounds == 2:
        print("begun", flush=True)
    return not os.path.exists(stop)
"""
# What was read once comes from the kernel's pages unless it is read past them: O_DIRECT asks the
# daemon each time.
READER = (
    LOOP
    + """
import mmap
expected = sys.argv[3]
buffer = mmap.mmap(-1, 1 << 20)
fd = os.open(top + "/staging/warm", os.O_RDONLY | os.O_DIRECT)
while go_on():
    digest, offset = hashlib.sha256(), 0
    while count := os.preadv(fd, [buffer], offset):
        digest.update(buffer[:count])
        offset += count
    assert digest.hexdigest() == expected, "a wrong byte"
    with open(top + "/staging/warm", "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == expected, "a wrong byte"
print(rounds)
"""
)
FETCHER = (
    LOOP
    + """
expected, count = sys.argv[3], int(sys.argv[4])
for number in range(count):
    with open(f"{top}/staging/cold/{number}", "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == expected, "a wrong byte"
    if not go_on():
        break
print(rounds)
"""
)
# A build as people do it: a tree of sources, objects, an archive, a program that runs.
BUILDER = (
    LOOP
    + """
import shutil, subprocess
MAKEFILE = '''
OBJECTS = $(patsubst %.c,%.o,$(wildcard part*.c))
program: main.o libparts.a
\\tgcc -o $@ main.o -L. -lparts
libparts.a: $(OBJECTS)
\\tar rcs $@ $(OBJECTS)
%.o: %.c
\\tgcc -O0 -c -o $@ $<
'''
PARTS = 6
while go_on():
    place = f"{top}/tasks/build{rounds}"
    os.mkdir(place)
    for n in range(PARTS):
        with open(f"{place}/part{n}.c", "w") as file:
            file.write(f"int part{n}(void) {{ return {n} + {rounds}; }}\\n")
    calls = " + ".join(f"part{n}()" for n in range(PARTS))
    heads = "".join(f"int part{n}(void);" for n in range(PARTS))
    with open(f"{place}/main.c", "w") as file:
        file.write(f'#include <stdio.h>\\n{heads}\\n'
                   f'int main(void) {{ printf("%d\\\\n", {calls}); return 0; }}\\n')
    with open(f"{place}/Makefile", "w") as file:
        file.write(MAKEFILE)
    subprocess.run(["make", "-s", "-j2", "-C", place], check=True, stdin=subprocess.DEVNULL)
    said = subprocess.run([f"{place}/program"], check=True, capture_output=True).stdout
    assert int(said) == sum(range(PARTS)) + PARTS * rounds, said
    shutil.rmtree(place)
print(rounds)
"""
)
CHANGER = (
    LOOP
    + """
while go_on():
    first, second = f"{top}/names/a{rounds}", f"{top}/names/b{rounds}"
    os.mkdir(first)
    os.rename(first, second)
    os.symlink("x", second + "/s")
    os.unlink(second + "/s")
    os.rmdir(second)
print(rounds)
"""
)
# Appends a line to a log and syncs it; and closes files that are uploaded.  After each it writes
# down, outside of the mount, what was acknowledged.
WRITER = (
    LOOP
    + """
ledger = open(sys.argv[3], "a")
log = os.open(top + "/tasks/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
while go_on():
    name, data = f"out{rounds}", hashlib.sha256(str(rounds).encode()).digest() * (64 << 10)
    with open(f"{top}/staging/out/{name}", "wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    os.write(log, b"%d\\n" % rounds)
    os.fsync(log)
    ledger.write(f"{name} {hashlib.sha256(data).hexdigest()}\\n")
    ledger.flush()
    time.sleep(0.1)
print(rounds)
"""
)
# Asks the daemon for something that needs no remote, over and over, and says how long it waited at
# most, and in between.
WAITER = (
    LOOP
    + """
waits, last = [], time.monotonic()
while go_on():
    os.statvfs(top)
    now = time.monotonic()
    waits.append(now - last)
    last = now
    time.sleep(0.002)
    last = time.monotonic()
print(" ".join(f"{wait:.2f}" for wait in sorted(waits)[-60:]))
"""
)


class Load:
    """The tasks, started.  ``end`` tells them to end and returns what each said last."""

    def __init__(self, mount: Mounted, work: Path) -> None:
        self.stop = work / "stop"
        self._mount = mount
        self._tasks: dict[str, subprocess.Popen[bytes]] = {}

    def add(self, name: str, code: str, *arguments: str | Path) -> None:
        task = self._mount.start("python", "-c", code, "MNT", self.stop, *arguments)
        self._tasks[name] = task

    def wait_until_begun(self) -> None:
        for name, task in self._tasks.items():
            assert task.stdout is not None
            said = task.stdout.readline()
            assert said == b"begun\n", f"{name}: {task.communicate()[1].decode()}"

    def check_all_at_work(self) -> None:
        ended = {name: task for name, task in self._tasks.items() if task.poll() is not None}
        told = {name: task.communicate()[1].decode() for name, task in ended.items()}
        assert not told, f"tasks that ended under it: {told}; {self._words_of_the_daemon()}"

    def _words_of_the_daemon(self) -> str:
        log = (self._mount.state / "stagefs.log").read_text()
        errors = [line for line in log.splitlines() if " INFO " not in line]
        return "\n".join(errors[-30:])

    def check_nobody_hangs(self) -> None:
        """Who waits and cannot be interrupted (state D) goes on: a wait for a request that a dead
        daemon took with it would not end."""
        waits = self._waits()

        def over() -> bool:
            waits.intersection_update(self._waits())
            return not waits

        wait_until(over, "the end of waits in state D", deadline_s=SETTLED_S, told=lambda: waits)

    def _waits(self) -> set[kernel.Thread]:
        found = kernel.threads(task.pid for task in self._tasks.values())
        return {thread for thread in found if thread.state == "D"}

    def end(self) -> dict[str, str]:
        self.stop.touch()
        said = {}
        for name, task in self._tasks.items():
            output, errors = task.communicate(timeout=SETTLED_S)
            assert task.returncode == 0, f"{name}: {errors.decode()}"
            said[name] = output.decode().strip()
        left = [*kernel.threads(task.pid for task in self._tasks.values())]
        assert not left, f"programs that outlived their tasks: {left}"
        return said

    def kill(self) -> None:
        for task in self._tasks.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(task.pid, signal.SIGKILL)
            task.communicate()


def status(mount: Mounted) -> dict[str, Any]:
    found = json.loads(mount.run("cat", "MNT/.stagefs/status").stdout)
    assert isinstance(found, dict)
    return found


def supervisor_log(mount: Mounted) -> str:
    return (mount.state / "supervisor.log").read_text()


def hit_at_work(mount: Mounted, load: Load, number: signal.Signals) -> dict[str, Any]:
    """Send the daemon a signal when a reader waits for a fetch that is under way and an output is
    being uploaded; what it had in work."""
    at_work: dict[str, Any] = {}

    def begun() -> bool:
        load.check_all_at_work()
        at_work.clear()
        at_work.update(status(mount))
        fetching = at_work["waiting_reads"] > 0 and at_work["transfers"]
        return bool(fetching and at_work["queue"]["uploading"])

    wait_until(begun, "a fetch and an upload under way", deadline_s=60, told=lambda: at_work)
    os.kill(at_work["pid"], number)
    return at_work


def in_flight(mount: Mounted) -> list[int]:
    """How many requests each death caught, as the supervisor says."""
    words = r"(\d+) requests (?:that )?were in flight"
    return [int(n) for n in re.findall(words, supervisor_log(mount))]


def _more_than(before: int, mount: Mounted) -> bool:
    return len(in_flight(mount)) > before


def kill_at_work(mount: Mounted, load: Load, count: int) -> list[dict[str, Any]]:
    """So many kills, each of which hit a request in flight; now and then one comes between two."""
    found: list[dict[str, Any]] = []
    for _kill in range(count + count // 4 + 1):
        before = len(in_flight(mount))
        one = hit_at_work(mount, load, signal.SIGKILL)
        wait_until(partial(_more_than, before, mount), "the supervisor's word of it")
        if in_flight(mount)[-1]:
            found.append(one)
        if len(found) == count:
            return found
    raise AssertionError(f"kills that hit no request: {in_flight(mount)}")


@pytest.fixture
def front(served_directory: Path) -> Iterator[Nginx]:
    with running_nginx(served_directory) as server:
        yield server


@pytest.fixture
def sink(work: Path) -> Iterator[Served]:
    place = work / "sink"
    place.mkdir(mode=0o755)
    with serving("ssh", place) as server:
        yield server


def prepare(mount: Mounted, front: Nginx, *, port: int, sink: Served, work: Path) -> str:
    """Names for what the tasks read and write; the SHA-256 of what is read."""
    data = content(OBJECT_BYTES)
    (front.root / "input").write_bytes(data)
    catalog = work / "catalog.jsonl"
    catalog.write_text(
        "".join(
            # One file that is another object for each of its names.
            json.dumps(
                {
                    "name": f"cold/{number}",
                    "url": f"http://127.0.0.1:{port}/plain/input?{number}",
                    "size": OBJECT_BYTES,
                }
            )
            + "\n"
            for number in range(OBJECTS)
        )
    )
    mount.stagefs("import", catalog)
    mount.stage_in(front.url("input"), "warm")
    mount.stagefs("bind", sink.url("out"), "staging:///out", "--writable")
    mount.run("mkdir", "MNT/names")
    return hashlib.sha256(data).hexdigest()


def check_nothing_is_lost(mount: Mounted, sink: Served, ledger: Path) -> int:
    """Each acknowledged output is at the remote, whole; each acknowledged line in the log."""
    acknowledged = dict(line.split(" ") for line in ledger.read_text().splitlines())
    mount.stagefs("flush", "--deadline", "240s", deadline_s=300)
    for name, digest in acknowledged.items():
        assert hashlib.sha256(sink.get(f"out/{name}")).hexdigest() == digest, name
    numbers = mount.run("cat", "MNT/tasks/log").stdout.split()
    assert numbers[: len(acknowledged)] == [b"%d" % (n + 1) for n in range(len(acknowledged))]
    partial = [name for name in sink.names() if not name.startswith("out/out")]
    assert not partial, f"left at the remote: {partial}"
    return len(acknowledged)


@pytest.mark.timeout(1500)
def test_killed_again_and_again_under_load(
    anybody: Identity,
    front: Nginx,
    sink: Served,
    new_mount: MakeMount,
    work: Path,
    figures: Callable[[str], None],
    request: pytest.FixtureRequest,
) -> None:
    long = request.config.getoption("--every-step")
    mount = new_mount(anybody, environment=sink.environment(anybody), settings=SETTINGS)
    ledger = anybody.directory(work / "ledger") / "acknowledged"
    load = Load(mount, anybody.directory(work / "load"))
    with running_throttle(front.port, bytes_per_s=FETCH_BYTES_PER_S) as slow:
        digest = prepare(mount, front, port=slow.port, sink=sink, work=work)
        try:
            load.add("reader", READER, digest)
            load.add("fetcher", FETCHER, digest, str(OBJECTS))
            load.add("builder", BUILDER)
            load.add("changer", CHANGER)
            load.add("writer", WRITER, ledger)
            load.add("waiter", WAITER)
            load.wait_until_begun()
            found = kill_at_work(mount, load, KILLS_LONG if long else KILLS)
            if long:
                stopped = hit_at_work(mount, load, signal.SIGSTOP)["pid"]
                line = f"daemon {stopped} has answered nothing"
                wait_until(
                    lambda: line in supervisor_log(mount),
                    line,
                    deadline_s=120,
                    told=lambda: supervisor_log(mount)[-2000:],
                )
            load.check_nobody_hangs()
            said = load.end()
        finally:
            load.kill()
    assert mount.run("find", "MNT/names", "MNT/tasks", "-mindepth", "1", "-type", "d").stdout == b""
    written = check_nothing_is_lost(mount, sink, ledger)
    mount.umount()

    hit = [number for number in in_flight(mount) if number]
    assert len({one["pid"] for one in found}) == len(found), "a daemon was counted twice"
    stuck = [one for one in kernel.programs_of(work) if "python" in one.command[0]]
    assert not stuck, f"left: {stuck}"
    waits = sorted(map(float, said["waiter"].split()), reverse=True)
    stopped_s = f", of the stopped daemon {waits.pop(0):.1f} s" if long else ""
    figures(
        f"{len(found)} kills, {min(hit, default=0)} to {max(hit, default=0)} requests in flight at"
        f" each; longest pause {waits[0]:.2f} s, median"
        f" {waits[len(found) // 2]:.2f} s{stopped_s}; {said['builder']} builds, {said['fetcher']}"
        f" objects fetched, {said['changer']} rounds of changes, {written} outputs, none lost"
    )
