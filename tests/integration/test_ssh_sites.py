"""What ssh servers of real sites do to a mount: they are restarted, take few sessions and few
logins at a time, and lie behind firewalls that forget connections."""

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.identity import Identity
from tests.support.mounted import Mounted, sha256
from tests.support.proxied import proxied
from tests.support.served import SharedGateway, SshServed, content
from tests.support.sshd import Sshd, running_sshd
from tests.support.waiting import wait_until

MakeMount = Callable[..., Mounted]
MIB = 1 << 20
ATTEMPTS, HANG_S = 2, 60.0
# So little is read ahead that a reader in mid-file needs the server again.
SETTINGS = (
    f"[remote]\nattempts = {ATTEMPTS}\n[read]\nwindow_bytes_max = '2MiB'\n"
    "[stage_out]\nsettle_s = 0.05\nbackoff_s = 0.1\nbackoff_s_max = 0.5\n"
)
# Reads a part, says so, and reads the rest when it is told to.
READ_IN_TWO = """
import hashlib, sys
digest = hashlib.sha256()
with open(sys.argv[1], "rb", buffering=0) as file:
    digest.update(file.read(1 << 20))
    print("begun", flush=True)
    sys.stdin.readline()
    while piece := file.read(1 << 20):
        digest.update(piece)
print(digest.hexdigest())
"""


class Site:
    """An sshd and its objects."""

    def __init__(self, top: Path, sshd: Sshd) -> None:
        self.sshd = sshd
        self.served = SshServed(top, sshd)

    def failures(self, mount: Mounted) -> tuple[int, str]:
        """How many attempts failed, and why the last one did."""
        for one in mount.json_of("stagefs", "remote", "list"):
            return one.get("errors", 0), one.get("reason", "")
        return 0, ""


@contextlib.contextmanager
def site(top: Path, options: str = "") -> Iterator[Site]:
    (top / "sshd").mkdir()
    with running_sshd(top / "sshd", options=options) as sshd:
        yield Site(top, sshd)


@contextlib.contextmanager
def reader_in_mid_file(mount: Mounted, path: str) -> Iterator[subprocess.Popen[bytes]]:
    reader = mount.start("python", "-c", READ_IN_TWO, f"MNT/{path}", talks=True)
    try:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"begun\n"
        yield reader
    finally:
        reader.kill()
        reader.communicate()


@pytest.mark.parametrize("client", ["openssh", "paramiko"])
def test_sshd_is_restarted_under_a_reader(
    anybody: Identity, new_mount: MakeMount, served_directory: Path, client: str
) -> None:
    data = content(12 * MIB)
    with site(served_directory) as one:
        mount = new_mount(
            anybody,
            "--set",
            f"remote.ssh.client={client}",
            settings=SETTINGS,
            environment=one.served.environment(anybody),
        )
        mount.stage_in(one.served.put("large", data), "large")
        with reader_in_mid_file(mount, "staging/large") as reader:
            one.sshd.freeze()
            assert reader.stdin is not None
            reader.stdin.write(b"go on\n")
            reader.stdin.flush()
            wait_until(
                lambda: b'"waiting_reads": 1' in mount.read(".stagefs/status"), "a waiting read"
            )
            assert one.sshd.die() > 0, "no session was hit"

            # More often than anything else is asked again.
            def is_asked_again() -> bool:
                errors, reason = one.failures(mount)
                return errors > 2 * ATTEMPTS and "refused the connection" in reason

            wait_until(is_asked_again, "refused connections", deadline_s=HANG_S)
            assert reader.poll() is None, "the reader noticed"
            one.sshd.come_back()
            output, said = reader.communicate(timeout=HANG_S)
        assert output.decode().strip() == sha256(data), said.decode()


def test_a_server_that_takes_no_login_for_the_moment(
    anybody: Identity, new_mount: MakeMount, served_directory: Path
) -> None:
    """Its one place for logins is taken by somebody else."""
    data = content(MIB)
    with site(served_directory, "MaxStartups 1:100:2\n") as one:
        environment = one.served.environment(anybody)
        mount = new_mount(anybody, settings=SETTINGS, environment=environment)
        url = one.served.put("x", data)
        with one.sshd.unfinished_login():
            command = mount.start("stagefs", "stage-in", url, "staging:///x")
            wait_until(
                lambda: one.failures(mount)[0] > ATTEMPTS or command.poll() is not None,
                "refused logins",
                deadline_s=HANG_S,
            )
            assert "too many log in at a time (MaxStartups" in one.failures(mount)[1]
            assert command.poll() is None, "the command gave up"
        _, said = command.communicate(timeout=HANG_S)
        assert command.returncode == 0, said.decode()
        assert mount.read("staging/x") == data


def test_one_session_for_each_connection(
    anybody: Identity, new_mount: MakeMount, served_directory: Path
) -> None:
    """The user has a connection open for all his logins, whose one session is in use."""
    options = "MaxSessions 1\nMaxStartups 2:100:4\n"
    with site(served_directory, options) as one:
        environment = dict(one.served.environment(anybody))
        config = Path(environment["STAGEFS_SSH_CONFIG"])
        control = config.with_name("control")
        config.write_text(f"ControlPath {control}\n{config.read_text()}")
        master = anybody.start(
            *("ssh", "-F", config, "-M", "127.0.0.1", "-p", str(one.sshd.port)), "cat", talks=True
        )
        try:
            wait_until(lambda: "Starting session: command" in one.sshd.log(), "the user's session")
            mount = new_mount(anybody, settings=SETTINGS, environment=environment)
            mount.stagefs("bind", one.served.url("out"), "staging:///out", "--writable")
            files = {f"f{number}": content(4 * MIB, str(number)) for number in range(4)}
            for name, data in files.items():
                mount.stage_in(one.served.put(name, data), name)
            readers = [mount.start("sha256sum", f"MNT/staging/{name}") for name in files]
            source = mount.point.parent / "source"
            source.write_bytes(files["f0"])
            for name in files:
                mount.run("cp", source, f"MNT/staging/out/{name}")
            for reader, data in zip(readers, files.values(), strict=True):
                output, said = reader.communicate(timeout=HANG_S)
                assert output.decode().startswith(sha256(data)), said.decode()
            mount.stagefs("flush", "--deadline", "60")
            assert all(one.served.get(f"out/{name}") == files["f0"] for name in files)
            assert one.failures(mount)[0] == 0
            log = one.sshd.log()
            assert "refused by" in log or "no more sessions" in log, "the limit was not met"
            # The user's own, and ours: no more than the mount may have, and each once.
            assert log.count("Accepted publickey") <= 1 + 2
            assert master.poll() is None
        finally:
            master.kill()
            master.communicate()


def test_a_connection_that_is_dropped_silently_is_noticed_before_it_is_needed(
    anybody: Identity, new_mount: MakeMount, served_directory: Path, gateway: SharedGateway
) -> None:
    settings = "[remote.ssh]\nkeepalive_s = 0.5\nprogress_timeout_s = 3\n"
    with proxied("ssh", served_directory, gateway) as server:
        mount = new_mount(anybody, settings=settings, environment=server.environment(anybody))
        for name in ("a", "b"):
            mount.stage_in(server.put(name, name.encode() * 100_000), name)
        assert mount.read("staging/a") == b"a" * 100_000
        connections = server.proxy.connections
        # Nobody asks anything: what it swallows is the answer to a question of the mount's own.
        server.proxy.stall(after_bytes=0)
        server.proxy.wait_for_hit()
        log = mount.state / "stagefs.log"
        wait_until(lambda: "lost: 127.0.0.1 did not answer" in log.read_text(), "it is given up")
        assert server.proxy.connections == connections, "one is made before it is needed"
        assert mount.read("staging/b") == b"b" * 100_000
        assert server.proxy.connections == connections + 1
        assert server.status(mount).get("errors", 0) == 0, "a reader met the dead connection"
