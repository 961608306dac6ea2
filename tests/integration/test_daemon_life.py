"""The daemon of a real mount: stopped, replaced by another version, asked what it does, limits."""

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import kernel
from tests.support.identity import Identity
from tests.support.mounted import Mounted, sentence, sha256
from tests.support.served import HttpServed
from tests.support.waiting import wait_until

MakeMount = Callable[..., Mounted]
QUICK = '[mount]\nprobe_period_s = "200ms"\nprobe_timeout_s = "2s"\n'
resend_modes = pytest.mark.parametrize("resend", [True, False], ids=["resend", "no-resend"])
SIZE = 96 << 20

# Reads a file over and over through one descriptor, and prints a line for each round.
READER = """
import hashlib, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
size, rounds = os.fstat(fd).st_size, 0
print("open", flush=True)
for line in sys.stdin:
    digest = hashlib.sha256()
    for offset in range(0, size, 1 << 20):
        try:
            digest.update(os.pread(fd, 1 << 20, offset))
        except OSError as error:
            if sys.argv[2] == "True" or error.errno != 116:
                raise
            digest.update(os.pread(fd, 1 << 20, offset))
    print(digest.hexdigest(), flush=True)
"""
# Makes, renames and removes directories until it is told to stop.
CHANGER = """
import os, sys
top, count = sys.argv[1], 0
while not os.path.exists(sys.argv[2]):
    os.mkdir(f"{top}/a{count}")
    os.rename(f"{top}/a{count}", f"{top}/b{count}")
    os.rmdir(f"{top}/b{count}")
    count += 1
    if count == 1:
        print("begun", flush=True)
print(count)
"""


def supervisor_log(mount: Mounted) -> str:
    return (mount.state / "supervisor.log").read_text()


def wait_for_line(mount: Mounted, line: str) -> None:
    wait_until(lambda: line in supervisor_log(mount), f"the line: {line}")


def wait_for_end(mount: Mounted, *pids: int) -> None:
    wait_until(
        lambda: not {program.pid for program in mount.programs()} & set(pids), f"the end of {pids}"
    )


def staged(mount: Mounted, web: HttpServed) -> bytes:
    data = random.Random(5).randbytes(SIZE)
    mount.stage_in(web.put("input.dat", data), "input.dat")
    return data


@resend_modes
def test_a_stopped_daemon_is_a_pause_for_readers_and_writers(
    identity: Identity, web: HttpServed, new_mount: MakeMount, resend: bool
) -> None:
    variables = web.environment(identity)
    mount = new_mount(identity, environment=variables, settings=QUICK, mounted=False)
    if resend:
        mount.mount()
    else:
        mount.mount_without_resend()
    data = staged(mount, web)
    mount.run("mkdir", "MNT/w")
    stop = mount.state / "stop"
    reader = mount.start("python", "-c", READER, "MNT/staging/input.dat", str(resend), talks=True)
    changer = mount.start("python", "-c", CHANGER, "MNT/w", stop) if resend else None
    assert reader.stdin is not None
    assert reader.stdout is not None
    assert reader.stdout.readline() == b"open\n"
    if changer is not None:
        assert changer.stdout is not None
        assert changer.stdout.readline() == b"begun\n"
    try:
        for _ in range(2):
            stopped = mount.daemon()
            reader.stdin.write(b"again\n")
            reader.stdin.flush()
            os.kill(stopped, signal.SIGSTOP)
            digest = reader.stdout.readline().strip().decode()
            assert digest == sha256(data)
            # What it read may have been in the page cache.
            wait_for_line(mount, f"daemon {stopped} has answered nothing")
            mount.run("ls", "MNT")
    finally:
        stop.touch()
        _, errors = reader.communicate(timeout=60)
        said = changer.communicate(timeout=60)[1] if changer is not None else b""
    assert (errors, said) == (b"", b"")
    assert mount.run("find", "MNT/w", "-mindepth", "1").stdout == b""


@resend_modes
def test_another_version_takes_the_mount_over(
    identity: Identity, web: HttpServed, new_mount: MakeMount, resend: bool
) -> None:
    mount = new_mount(identity, environment=web.environment(identity), mounted=False)
    options = ("--set", "read.read_deadline_s=77s")
    mount.options = (*mount.options, *options)
    if resend:
        mount.mount()
    else:
        mount.mount_without_resend()
    data = staged(mount, web)
    mount.run("mkdir", "MNT/w")
    stop = mount.state / "stop"
    reader = mount.start("python", "-c", READER, "MNT/staging/input.dat", str(resend), talks=True)
    changer = mount.start("python", "-c", CHANGER, "MNT/w", stop) if resend else None
    assert reader.stdin is not None
    assert reader.stdout is not None
    assert reader.stdout.readline() == b"open\n"
    connection = kernel.mount_at(mount.point)
    try:
        for _ in range(2):
            before, old_daemon = mount.supervisor(), mount.daemon()
            reader.stdin.write(b"again\n")
            reader.stdin.flush()
            done = mount.run(
                *("stagefs", "mount", "MNT", "--replace", "--json"),
                *("--set", "read.window_bytes_max=8MiB"),
            )
            ready = json.loads(done.stdout)
            assert ready["supervisor_pid"] != before
            assert reader.stdout.readline().strip().decode() == sha256(data)
            wait_for_end(mount, before, old_daemon)
            assert mount.supervisor() == ready["supervisor_pid"]
            assert kernel.mount_at(mount.point) == connection, "the kernel noticed nothing"
    finally:
        stop.touch()
        _, errors = reader.communicate(timeout=60)
        said = changer.communicate(timeout=60)[1] if changer is not None else b""
    assert (errors, said) == (b"", b"")
    settings = json.loads(mount.read(".stagefs/config"))["read"]
    assert settings["read_deadline_s"] == 77, "a setting of the replaced mount is kept"
    assert settings["window_bytes_max"] == 8 << 20
    killed = mount.kill_daemon()
    assert mount.sha256("staging/input.dat") == sha256(data)
    assert mount.daemon() != killed
    mount.umount()


def test_a_version_that_cannot_start_leaves_the_mount_as_it_was(
    identity: Identity, web: HttpServed, new_mount: MakeMount
) -> None:
    other = new_mount(identity)
    mount = new_mount(identity, environment=web.environment(identity))
    data = staged(mount, web)
    before = mount.supervisor()
    taken = mount.mount("--replace", "--cache", str(other.state / "cache"), check=False)
    assert "another" in sentence(taken) or "in use" in sentence(taken)
    assert mount.sha256("staging/input.dat") == sha256(data)
    assert mount.supervisor() == before
    assert "going on without it" in supervisor_log(mount)
    mount.run("stagefs", "mount", "MNT", "--replace")
    wait_for_end(mount, before)
    assert mount.supervisor() != before
    assert mount.sha256("staging/input.dat") == sha256(data)


def test_the_lifetime_is_kept_by_who_takes_over(identity: Identity, new_mount: MakeMount) -> None:
    pilot = identity.start("sleep", "1000")
    mount = new_mount(identity, "--lifetime", f"pid:{pilot.pid}")
    mount.run("stagefs", "mount", "MNT", "--replace")
    pilot.kill()
    pilot.communicate()
    wait_until(lambda: kernel.mount_at(mount.point) is None, "the end with its process")
    wait_until(lambda: not mount.programs(), "the end of its programs")


def test_what_cannot_be_replaced(identity: Identity, new_mount: MakeMount) -> None:
    mount = new_mount(identity, mounted=False)
    assert "is no StageFS mount" in sentence(mount.mount("--replace", check=False))
    mount.mount()
    state = mount.state.with_name("elsewhere")
    said = identity.run("stagefs", "mount", mount.point, "--replace", "--state", state, check=False)
    assert "leave --state away" in sentence(said)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")
def test_nobody_else_takes_a_mount_over(
    all_identities: dict[str, Identity], new_mount: MakeMount
) -> None:
    root, user = all_identities["root"], all_identities["user"]
    mount = new_mount(user)
    before = mount.supervisor()
    said = root.run("stagefs", "mount", mount.point, "--replace", check=False)
    assert "replace it as that user" in sentence(said)
    code = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
        "s.connect(sys.argv[1]); sys.exit(len(s.recv(100)))"
    )
    root.run("python", "-c", code, mount.state / "supervisor.sock")
    assert mount.supervisor() == before
    assert not (mount.state / "supervisor.sock").stat().st_mode & 0o077


def test_sigusr1_writes_down_tasks_and_threads(identity: Identity, new_mount: MakeMount) -> None:
    mount = new_mount(identity)
    daemon = mount.daemon()
    os.kill(daemon, signal.SIGUSR1)
    log = mount.state / "stagefs.log"
    wait_until(lambda: "SIGUSR1: " in log.read_text(), "the tasks in the log")
    assert "pyfuse3" in log.read_text().partition("SIGUSR1: ")[2]
    assert "Current thread" in supervisor_log(mount)
    os.kill(daemon, signal.SIGSTOP)
    os.kill(daemon, signal.SIGUSR1)
    os.kill(daemon, signal.SIGCONT)
    wait_until(lambda: log.read_text().count("SIGUSR1: ") == 2, "the tasks again")
    assert mount.daemon() == daemon


def test_limits_and_oom_score(identity: Identity, new_mount: MakeMount) -> None:
    mount = new_mount(identity)
    limits = Path(f"/proc/{mount.daemon()}/limits").read_text()
    soft, hard = limits.partition("Max open files")[2].split()[:2]
    assert int(soft) == min(int(hard), 1 << 20)
    scores = [
        int(Path(f"/proc/{pid}/oom_score_adj").read_text())
        for pid in (mount.supervisor(), mount.daemon())
    ]
    mine = int(Path("/proc/self/oom_score_adj").read_text())
    assert scores == ([-900, -500] if may_lower(identity) else [mine, mine])


def may_lower(identity: Identity) -> bool:
    """Root without CAP_SYS_RESOURCE (in a container) may not, either."""
    tried = identity.run("sh", "-c", "echo -900 > /proc/self/oom_score_adj", check=False)
    return tried.returncode == 0


def test_a_full_log_of_the_daemon_is_rotated(identity: Identity, new_mount: MakeMount) -> None:
    mount = new_mount(identity, settings='[state]\nlog_bytes_max = "8KiB"\n')
    first = mount.state / "stagefs.log.1"
    daemon = mount.daemon()

    def turned() -> bool:
        os.kill(daemon, signal.SIGUSR1)
        return first.exists()

    wait_until(turned, "a rotated log")
    assert first.stat().st_uid == identity.uid
