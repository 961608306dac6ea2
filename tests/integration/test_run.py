"""stagefs run: the sandbox of one command, its signals and exit code, and what is committed."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.conftest import MakeMount
from tests.support.identity import Identity
from tests.support.mounted import Mounted
from tests.support.served import HttpServed, Served, content

SIZE_BYTES = 2 << 20


def _sandboxes(mount: Mounted) -> dict[str, str]:
    return {one["name"]: one["state"] for one in mount.json_of("stagefs", "sandbox", "list")}


def _run(mount: Mounted, *words: str | Path) -> subprocess.CompletedProcess[bytes]:
    return mount.stagefs("run", *words, check=False)


def test_inputs_are_linked_and_outputs_committed(
    identity: Identity, served: Served, new_mount: MakeMount, work: Path
) -> None:
    data = content(SIZE_BYTES)
    url = served.put("input.dat", data)
    out = identity.directory(work / "out")
    mount = new_mount(identity, environment=served.environment(identity))
    done = mount.stagefs(
        *("run", "--in", f"input.dat={url}", "--out", "std*=staging:///runs/7/"),
        *(
            "--out",
            f"copy={out}/",
            "--",
            "sh",
            "-c",
            "wc -c input.dat | tee stdout; cat input* > copy",
        ),
    )
    assert done.stdout == b"%d input.dat\n" % SIZE_BYTES
    assert mount.read("staging/runs/7/stdout") == done.stdout
    mount.stagefs("flush", "--deadline", "60")
    assert (out / "copy").read_bytes() == data
    assert _sandboxes(mount) == {}


def test_failure_keeps_the_sandbox_and_publishes_nothing(
    anybody: Identity, new_mount: MakeMount
) -> None:
    mount = new_mount(anybody)
    program = ("--", "sh", "-c", "echo partial > o; exit 3")
    done = _run(mount, "--name", "t", "--out", "o=staging:///o", *program)
    assert done.returncode == 3
    kept = mount.point / "tasks/t"
    assert done.stderr.decode() == (
        f"stagefs run: sh ended with exit code 3; its sandbox is kept: {kept}\n"
    )
    assert mount.read("tasks/t/o") == b"partial\n"
    assert mount.run("ls", "MNT/staging").stdout == b""
    assert _sandboxes(mount) == {"t": "failed"}
    assert mount.json_of("stagefs", "sandbox", "show", "t")["reason"] == "sh ended with exit code 3"


def test_missing_outputs_are_an_error(anybody: Identity, new_mount: MakeMount) -> None:
    mount = new_mount(anybody)
    done = _run(mount, "--name", "t", "--out", "o=staging:///o", "--", "true")
    assert done.returncode == 1
    assert b"Declared output is missing in the sandbox t: o" in done.stderr
    # Whoever knows better may mend and commit it.
    mount.run("sh", "-c", "echo mended > o", directory=mount.point / "tasks/t")
    mount.stagefs("sandbox", "commit", "t")
    assert mount.read("staging/o") == b"mended\n"


def test_kept_when_asked(anybody: Identity, new_mount: MakeMount) -> None:
    mount = new_mount(anybody)
    mount.stagefs("run", "--name", "t", "--keep", "--", "sh", "-c", "echo x > x")
    assert mount.read("tasks/t/x") == b"x\n"
    assert _sandboxes(mount) == {"t": "committed"}


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (("no-such-program",), 127, "no-such-program was not found"),
        (("/etc/passwd",), 126, "/etc/passwd could not be executed"),
        (("sh", "-c", "kill -KILL $$"), 137, "sh was ended by SIGKILL"),
        (("sh", "-c", "exit 255"), 255, "sh ended with exit code 255"),
    ],
)
def test_exit_codes(
    anybody: Identity, new_mount: MakeMount, command: tuple[str, ...], code: int, words: str
) -> None:
    mount = new_mount(anybody)
    done = _run(mount, "--", *command)
    assert done.returncode == code
    assert words in done.stderr.decode()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_reach_the_whole_task(
    anybody: Identity, new_mount: MakeMount, number: signal.Signals
) -> None:
    """The task's children too: they are one process group."""
    mount = new_mount(anybody)
    # Background commands of a shell would ignore SIGINT; a program of its own does not.
    code = (
        "import os, signal, sys\n"
        "for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):\n"
        "    signal.signal(n, lambda n, _: sys.exit(n))\n"
        "print('child' if not os.fork() else 'parent', flush=True)\n"
        "signal.pause()\n"
    )
    running = mount.start("stagefs", "run", "--name", "t", "--", "python3", "-c", code)
    assert running.stdout is not None
    assert {running.stdout.readline(), running.stdout.readline()} == {b"child\n", b"parent\n"}
    running.send_signal(number)
    # The pipe closes when both have ended.
    _output, errors = running.communicate(timeout=30)
    assert running.returncode == number
    assert f"exit code {int(number)}" in errors.decode()
    assert _sandboxes(mount) == {"t": "failed"}


def test_the_task_knows_where_it_is(anybody: Identity, new_mount: MakeMount) -> None:
    mount = new_mount(anybody)
    program = 'test "$PWD" = "$STAGEFS_SANDBOX" && pwd -P && echo "$STAGEFS_MOUNT"'
    done = mount.stagefs("run", "--name", "t", "--", "sh", "-c", program)
    assert done.stdout.decode().split() == [f"{mount.point}/tasks/t", str(mount.point)]


def test_manifest_file(
    anybody: Identity, web: HttpServed, new_mount: MakeMount, work: Path
) -> None:
    manifest = {
        "inputs": {"in": web.put("in", b"input")},
        "outputs": {"o": {"to": "staging:///o", "overwrite": True}},
    }
    (work / "m.json").write_text(json.dumps(manifest))
    mount = new_mount(anybody)
    for word in ("first", "second"):
        program = ("sh", "-c", f"cat in > o; echo {word} >> o")
        mount.stagefs("run", "--manifest", work / "m.json", "--", *program)
    assert mount.read("staging/o") == b"inputsecond\n"


def test_many_at_a_time_share_one_fetch(
    anybody: Identity, web: HttpServed, new_mount: MakeMount
) -> None:
    data = content(SIZE_BYTES)
    url = web.put("in", data)
    mount = new_mount(anybody)
    words = ("stagefs", "run", "--in", f"in={url}", "--out", "n=staging:///n/")
    program = ("--", "sh", "-c", "wc -c < in > n")
    running = [mount.start(*words, "--name", f"t{n}", "--overwrite", *program) for n in range(8)]
    for one in running:
        output, errors = one.communicate(timeout=60)
        assert one.returncode == 0, os.fsdecode(output + errors)
    assert web.bytes_sent() < 1.1 * SIZE_BYTES


def test_daemon_that_dies_is_a_pause(
    anybody: Identity, web: HttpServed, new_mount: MakeMount
) -> None:
    """Killed while the task runs, and again as it ends, when the commit is about to be asked."""
    mount = new_mount(anybody)
    url = web.put("in", b"input")
    words = ("stagefs", "run", "--in", f"in={url}", "--out", "o=staging:///o", "--")
    program = "echo begun; read x; cat in > o; echo made"
    running = mount.start(*words, "sh", "-c", program, talks=True)
    assert running.stdout is not None
    assert running.stdin is not None
    assert running.stdout.readline() == b"begun\n"
    mount.kill_daemon()
    running.stdin.write(b"go on\n")
    running.stdin.flush()
    assert running.stdout.readline() == b"made\n"
    mount.kill_daemon()
    _output, errors = running.communicate(timeout=60)
    assert running.returncode == 0, errors.decode()
    assert mount.read("staging/o") == b"input"
    assert _sandboxes(mount) == {}
