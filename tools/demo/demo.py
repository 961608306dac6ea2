"""`make demo`: three tasks share one remote input, which the server sends once.

Starts its own nginx on loopback, mounts, makes three task directories in the three ways there
are, runs a task in each, and compares what it claims with what the server, the kernel and /proc
say.  Ends with 1 when a claim does not hold.  Nothing stays behind.
"""

import hashlib
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event

MIB = 1 << 20
INPUT_BYTES = 320 * MIB
ROOM_BYTES = 3 * INPUT_BYTES
BIN = Path(sys.executable).parent

NGINX_CONF = """
daemon off;
master_process off;
pid {top}/nginx.pid;
error_log {top}/error.log;
events {{}}
http {{
    log_format sent '$request_method $uri $status $body_bytes_sent';
    access_log {top}/access.log sent;
    client_body_temp_path {top}/t1;
    proxy_temp_path {top}/t2;
    fastcgi_temp_path {top}/t3;
    uwsgi_temp_path {top}/t4;
    scgi_temp_path {top}/t5;
    server {{
        listen 127.0.0.1:{port};
        root {top}/served;
    }}
}}
"""


class ClaimFailed(Exception):
    """Something the demo says of StageFS did not hold."""


def say(text: str = "") -> None:
    print(text, flush=True)


def claim(what: str, *, holds: bool, seen: str = "") -> None:
    if not holds:
        raise ClaimFailed(f"{what}{f' ({seen})' if seen else ''}")
    say(f"   ✓ {what}{f': {seen}' if seen else ''}")


def wait_for(what: str, holds: Callable[[], bool], *, deadline_s: float = 15.0) -> None:
    """Polls: what is waited for lies in other programs, which send no event."""
    pause, end = Event(), time.monotonic() + deadline_s
    while not holds():
        if time.monotonic() > end:
            raise ClaimFailed(f"{what} did not come within {deadline_s:.0f} s")
        pause.wait(0.02)


def run(*command: str | Path, directory: Path | None = None) -> str:
    """Run and show a command as a user would type it."""
    words = [str(word) for word in command]
    say(f"   $ {shlex.join([Path(words[0]).name, *words[1:]])}")
    done = subprocess.run(words, cwd=directory, capture_output=True, text=True, check=False)
    for line in (done.stdout + done.stderr).rstrip().splitlines():
        say(f"     {line}")
    if done.returncode != 0:
        raise ClaimFailed(f"{Path(words[0]).name} ended with {done.returncode}")
    return done.stdout


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


class Server:
    """An nginx of the demo's own, and what its access log says."""

    def __init__(self, top: Path) -> None:
        self.served = top / "served"
        self.served.mkdir()
        self.port = free_port()
        self._log = top / "access.log"
        self._conf = top / "nginx.conf"
        self._conf.write_text(NGINX_CONF.format(top=top, port=self.port))

    @contextmanager
    def running(self) -> Iterator["Server"]:
        nginx = shutil.which("nginx") or "/usr/sbin/nginx"
        errors = self._conf.with_name("error.log")
        command = [nginx, "-e", str(errors), "-c", str(self._conf)]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as program:
            try:
                wait_for("nginx", lambda: answers(self.port))
                yield self
            finally:
                program.terminate()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"

    def bytes_sent(self) -> int:
        """Body bytes of all answers so far, by the server's own count."""
        lines = self._log.read_text().splitlines()
        return sum(int(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("GET "))


def write_input(path: Path) -> str:
    """A file without any repetition; its SHA-256."""
    digest, source = hashlib.sha256(), random.Random(path.name)
    with path.open("wb") as file:
        for _ in range(INPUT_BYTES // (16 * MIB)):
            piece = source.randbytes(16 * MIB)
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def mount_type(mountpoint: Path) -> str | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[4] == str(mountpoint):
            return after.split()[0]
    return None


def programs_of(directory: Path) -> list[str]:
    """Command lines of the programs that were told of this directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
            except OSError:  # it ended while we looked
                continue
            if os.fsencode(directory) in command:
                found.append(command.decode(errors="replace"))
    return found


def make_tasks(mountpoint: Path, url: str) -> list[Path]:
    say("3. Three task directories that share the input, made in the three ways there are")
    tasks = [mountpoint / "tasks" / name for name in ("t1", "t2", "t3")]
    wanted = "input.dat=staging:///input.dat"
    run(BIN / "stagefs", "sandbox", "create", "t1", "--in", wanted, "--mount", mountpoint)
    run("mkdir", tasks[1])
    run("ln", "-s", url, tasks[1] / "input.dat")
    run("mkdir", tasks[2])
    run("ln", mountpoint / "staging" / "input.dat", tasks[2] / "input.dat")
    run("ls", "-l", *(task / "input.dat" for task in tasks))
    return tasks


def run_tasks(tasks: list[Path], digest: str) -> None:
    say("4. Three tasks at the same time, each reading all of its input")
    say("   $ for t in t1 t2 t3; do (cd tasks/$t && sha256sum input.dat) & done; wait")
    started = time.monotonic()
    running = [
        subprocess.Popen(["sha256sum", "input.dat"], cwd=task, stdout=subprocess.PIPE, text=True)
        for task in tasks
    ]
    outputs = [task.communicate()[0] for task in running]
    seconds = time.monotonic() - started
    for task, output in zip(tasks, outputs, strict=True):
        say(f"     {task.name}: {output.rstrip()}")
    claim(
        "each task read the right bytes",
        holds=all(output.split()[:1] == [digest] for output in outputs),
        seen=f"{seconds:.1f} s for all three",
    )


def story(top: Path, server: Server) -> None:
    say(f"1. A web server with one input of {INPUT_BYTES // MIB} MiB")
    digest = write_input(server.served / "input.dat")
    url = server.url("input.dat")
    say(f"     {url}")

    say("2. Mount, and register the input under a name: nothing is transferred yet")
    mountpoint, state = top / "mnt", top / "state"
    mountpoint.mkdir()
    with ExitStack() as stack:
        stack.callback(
            subprocess.run,
            ["fusermount3", "-uzq", str(mountpoint)],
            stderr=subprocess.DEVNULL,
            check=False,
        )
        run(BIN / "stagefs", "mount", mountpoint, "--state", state, "--capacity", "1GiB")
        claim("it is a fuse.stagefs mount", holds=mount_type(mountpoint) == "fuse.stagefs")
        run(BIN / "stagefs", "stage-in", url, "staging:///input.dat", "--mount", mountpoint)

        tasks = make_tasks(mountpoint, url)
        claim("the server has sent nothing so far", holds=server.bytes_sent() == 0)

        run_tasks(tasks, digest)
        wait_for("the server's log of one copy", lambda: server.bytes_sent() >= INPUT_BYTES)
        claim(
            "the server sent exactly one copy for three tasks",
            holds=server.bytes_sent() == INPUT_BYTES,
            seen=f"{server.bytes_sent():,} bytes by its own count",
        )

        say("5. What the administrator sees")
        listing = run(BIN / "stagefs-cache", "list", "--mount", mountpoint)
        claim("the cache lists the input", holds=re.search(r"input\.dat", listing) is not None)

        say("6. Unmount")
        run(BIN / "stagefs", "umount", mountpoint)
    claim("nothing is mounted any more", holds=mount_type(mountpoint) is None)
    wait_for("the end of the daemon", lambda: not programs_of(state))
    claim("no program of the mount is left", holds=not programs_of(state))


def main() -> int:
    places = [Path(tempfile.gettempdir()), Path("/var/tmp")]
    place = next((p for p in places if shutil.disk_usage(p).free > ROOM_BYTES), None)
    if place is None:
        say(f"demo: neither {places[0]} nor {places[1]} has {ROOM_BYTES // MIB} MiB free.")
        return 1
    with tempfile.TemporaryDirectory(prefix="stagefs-demo-", dir=place) as name:
        top = Path(name)
        try:
            with Server(top).running() as server:
                story(top, server)
        except ClaimFailed as failure:
            say(f"   ✗ {failure}")
            for log in top.glob("state/**/*.log"):
                say(f"--- {log.name}\n{log.read_text()[-4000:]}")
            return 1
    say("Done: one input, three tasks, one transfer, nothing left behind.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
