"""A server that stops answering, and 200 readers that wait for it (A9)."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.test_killed import frozen, status
from tests.support.identity import Identity
from tests.support.mounted import Mounted, sha256
from tests.support.served import HttpServed, Served, content, serving
from tests.support.waiting import wait_until

MakeMount = Callable[..., Mounted]
MIB = 1 << 20
READERS = 200
FILES = 50
DEADLINE_S = 6.0

# So many threads, each reading the first bytes of a file; prints the errno and the seconds of each.
MANY_READERS = """
import errno, json, os, sys, threading, time
directory, readers, files = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
results = []
def read(number):
    fd = os.open(f"{directory}/f{number % files}", os.O_RDONLY)
    start = time.monotonic()
    try:
        os.pread(fd, 4096, (number // files) << 20)
        said = "read"
    except OSError as error:
        said = errno.errorcode[error.errno]
    results.append((said, time.monotonic() - start))
threads = [threading.Thread(target=read, args=(n,)) for n in range(readers)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(results))
"""


@pytest.fixture
def healthy(work: Path) -> Path:
    directory = work / "healthy"
    directory.mkdir()
    return directory


def test_silent_server_harms_nobody_else(
    identity: Identity,
    served: Served,
    new_mount: MakeMount,
    healthy: Path,
    figures: Callable[[str], None],
) -> None:
    with serving("http", healthy) as other:
        assert isinstance(other, HttpServed)
        slowest_s = silence(identity, served, other, new_mount)
        figures(f"{READERS} readers ended within {slowest_s / DEADLINE_S:.2f} of their deadline")


def silence(identity: Identity, served: Served, other: HttpServed, new_mount: MakeMount) -> float:
    """Seconds that the slowest reader waited."""
    mount = new_mount(
        identity,
        settings=f'[read]\nread_deadline_s = "{DEADLINE_S}s"\n',
        environment=served.environment(identity),
    )
    pieces = [content(5 * MIB, str(number)) for number in range(3)]
    urls = [served.put(f"f{number}", content(5 * MIB, str(number % 3))) for number in range(FILES)]
    mount.stagefs("stage-in", *urls, "staging:///silent/")
    mount.stage_in(other.put("cached", pieces[0]), "cached")
    assert mount.sha256("staging/cached") == sha256(pieces[0])
    mount.stage_in(other.put("uncached", pieces[1]), "uncached")

    with frozen(served):
        readers = mount.start(
            "python", "-c", MANY_READERS, "MNT/staging/silent", str(READERS), str(FILES)
        )
        wait_until(lambda: status(mount)["waiting_reads"] >= READERS, "two hundred waiting readers")
        quick(mount, "ls", "-l", "MNT/staging", "MNT/staging/silent", "MNT/tasks")
        quick(mount, "cat", "MNT/staging/cached")
        quick(mount, "cat", "MNT/staging/uncached")
        quick(mount, "mkdir", "MNT/tasks/t")
        quick(mount, "ln", "MNT/staging/silent/f0", "MNT/tasks/t/f0")
        assert status(mount)["waiting_reads"] >= READERS, "they waited no longer than that"

        victim = mount.start("cat", "MNT/staging/silent/f1")
        started = time.monotonic()
        os.kill(victim.pid, signal.SIGTERM)
        victim.communicate(timeout=5)
        assert victim.returncode == -signal.SIGTERM
        assert time.monotonic() - started < DEADLINE_S / 2

        output, errors = readers.communicate(timeout=60)
        assert readers.returncode == 0, errors.decode()
        results = json.loads(output)
        assert len(results) == READERS
        assert {said for said, _ in results} == {"ETIMEDOUT"}
        slowest = max(seconds for _, seconds in results)
        assert slowest <= 1.2 * DEADLINE_S, f"the last one waited {slowest:.1f} s"
        assert served.url("f0") in mount.xattr("staging/silent/f0", "error")
        logged = b"".join(path.read_bytes() for path in mount.state.glob("*.log"))
        assert served.url("f0").encode() in logged

    wait_until(
        lambda: (
            mount.run("sha256sum", "MNT/staging/silent/f0", check=False).stdout[:64].decode()
            == sha256(pieces[0])
        ),
        "reading after the server answers again",
        deadline_s=30,
    )
    return float(slowest)


def quick(mount: Mounted, *command: str) -> None:
    """As quick as without the silence, that is far from any deadline."""
    started = time.monotonic()
    mount.run(*command)
    seconds = time.monotonic() - started
    assert seconds < 2.0, f"{command} took {seconds:.1f} s beside a silent server"


def test_silent_server_and_names(identity: Identity, served: Served, new_mount: MakeMount) -> None:
    """What cannot be killed while it waits answers within two seconds."""
    settings = "[read]\nanswer_deadline_s = 2\n"
    mount = new_mount(identity, environment=served.environment(identity), settings=settings)
    url = served.put("dir/x", b"x")
    mount.stagefs("bind", served.url("dir/"), "staging:///dir")
    mount.run("mkdir", "MNT/tasks/t")
    with frozen(served):
        for command in (
            ("ls", "MNT/staging/dir"),
            ("cat", "MNT/staging/dir/x"),
            ("ln", "-s", url, "MNT/tasks/t/x"),
        ):
            started = time.monotonic()
            done = mount.run(*command, check=False)
            assert done.returncode != 0
            assert b"timed out" in done.stderr, done.stderr
            assert time.monotonic() - started < 6
    wait_until(
        lambda: mount.run("cat", "MNT/staging/dir/x", check=False).stdout == b"x",
        "the listing after the server answers again",
        deadline_s=40,
    )
