"""A real OpenSSH server on a free loopback port, with keys and configuration of its own.

Not a library for StageFS itself: it starts ``sshd`` as the calling user (root's serves any
login), hands out an ``ssh_config`` file that points any client at it, and lets a test
look at the server's side: what it logged, how many bytes it read for its clients, which
processes serve them.  One thread per server copies the log into memory.
"""

import contextlib
import dataclasses
import os
import pwd
import re
import resource
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from stagefs.remote.url import quote_path
from tests.support.ports import free_ports

SSHD = "/usr/sbin/sshd"
SFTP_SERVER = "/usr/lib/openssh/sftp-server"
READY_TIMEOUT_S = 10.0


def available() -> bool:
    return Path(SSHD).exists() and shutil.which("ssh") is not None


@dataclasses.dataclass(frozen=True)
class Login:
    """Whom the server serves: only its own user, unless root runs it."""

    name: str
    uid: int
    gid: int
    home: Path

    @classmethod
    def mine(cls) -> "Login":
        return cls.of(pwd.getpwuid(os.geteuid()).pw_name)

    @classmethod
    def of(cls, name: str) -> "Login":
        entry = pwd.getpwnam(name)
        return cls(entry.pw_name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))


class Sshd:
    """A running server, with its files in ``root`` (an existing, empty directory).

    ``counted``: the SFTP server is a logged one, so that ``bytes_read`` and ``requests`` work
    (the login needs a real shell then).  ``options``: lines for sshd_config that come first.
    """

    def __init__(
        self, root: Path, login: Login, *, counted: bool = False, options: str = ""
    ) -> None:
        self.root = root
        self.login = login
        (self.port,) = free_ports(1)
        self.ssh_config = root / "ssh_config"
        self.known_hosts = root / "known_hosts"
        self.identity = root / "id_client"
        self.sftp_log = root / "sftp.log"
        self._lines: list[str] = []
        self._logged = threading.Condition()
        _make_keys(root)
        self._write_server_config(counted=counted, options=options)
        self._write_client_config()
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # privilege separation wants it
            for path in [root, *root.iterdir()]:
                if path != self.identity:  # of the client, who wants a key that is his own
                    os.chown(path, login.uid, login.gid)
        self._child = self._start()

    @property
    def url(self) -> str:
        return f"ssh://127.0.0.1:{self.port}"

    def url_of(self, path: Path | str) -> str:
        return self.url + quote_path(str(path))

    @property
    def pid(self) -> int:
        return self._child.pid

    def trust_port(self, port: int) -> None:
        """Let clients know the server's key at the port of a proxy too."""
        host_key = (self.root / "id_host.pub").read_text("utf-8").rsplit(" ", 1)[0]
        with self.known_hosts.open("a", encoding="utf-8") as file:
            file.write(f"[127.0.0.1]:{port} {host_key}\n")

    def session_pids(self) -> list[int]:
        """Every descendant of the listening process."""
        found: list[int] = []
        frontier = [self._child.pid]
        while frontier:
            pid = frontier.pop()
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    frontier += map(int, (thread / "children").read_text().split())
            found.append(pid)
        return found[1:]

    def freeze(self) -> None:
        """SIGSTOP to the listener and to all that serves a client: nothing answers any more."""
        for pid in [self._child.pid, *self.session_pids()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        for pid in [self._child.pid, *self.session_pids()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def limit_files(self, size: int) -> None:
        """Let no file grow beyond so many bytes from the next session on, as a quota does: what
        the server tells of its disk does not show it.  -1: no limit."""
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def kill_sessions(self) -> int:
        """Cut every connection.  Returns how many processes that hit."""
        pids = self.session_pids()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)

    def die(self) -> int:
        """The listener and all that serves a client are killed, and connections are refused until
        ``come_back``.  Returns how many served clients."""
        # A listener that is gone leaves its sessions to others, where they are not found.
        self._child.send_signal(signal.SIGSTOP)
        hit = self.kill_sessions()
        self._child.kill()
        self._child.wait(READY_TIMEOUT_S)
        self._drain.join(READY_TIMEOUT_S)
        return hit

    def come_back(self) -> None:
        with self._logged:
            self._ended = False
            self._begun = len(self._lines)
        self._child = self._start()

    @contextlib.contextmanager
    def unfinished_login(self) -> Iterator[None]:
        """Somebody has connected, and does not go on to log in."""
        with socket.create_connection(("127.0.0.1", self.port)) as client:
            assert client.recv(256).startswith(b"SSH-2.0-")
            yield

    def log(self) -> str:
        with self._logged:
            return "".join(self._lines)

    def bytes_read(self) -> int:
        """Bytes the (counted) sftp-server read from files, over all handles closed so far."""
        text = self.sftp_log.read_text() if self.sftp_log.exists() else ""
        return sum(int(n) for n in re.findall(r"close .* bytes read (\d+) written", text))

    def bytes_read_of(self, name: str) -> int:
        """As ``bytes_read``, of files whose path ends with ``/name`` (or is it)."""
        text = self.sftp_log.read_text() if self.sftp_log.exists() else ""
        closed = re.findall(r'close "([^"]*)" bytes read (\d+)', text)
        return sum(int(count) for path, count in closed if f"/{path}".endswith(f"/{name}"))

    def requests(self, kind: str) -> int:
        """How many requests of a kind ("open", "read", "fstat", ...) a counted server got."""
        text = self.sftp_log.read_text() if self.sftp_log.exists() else ""
        return len(re.findall(rf"request \d+: {kind}\b", text))

    def stop(self) -> None:
        self.thaw()
        sessions = self.session_pids()
        self._child.terminate()
        for pid in sessions:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._child.wait(READY_TIMEOUT_S)
        self._drain.join(READY_TIMEOUT_S)

    def _write_server_config(self, *, counted: bool, options: str) -> None:
        sftp = "internal-sftp"
        if counted:
            script = self.root / "counted-sftp-server"
            script.write_text(
                f"#!/bin/sh\nexec {SFTP_SERVER} -e -l DEBUG3 2>>{self.sftp_log}\n", "utf-8"
            )
            script.chmod(0o755)
            sftp = str(script)
        # Of this setting sshd takes the last one, not the first.
        startups = "" if "MaxStartups" in options else "MaxStartups 200\n"
        (self.root / "sshd_config").write_text(
            f"{options}\n{startups}"
            f"Port {self.port}\nListenAddress 127.0.0.1\nPidFile none\nUsePAM no\n"
            f"HostKey {self.root}/id_host\nAuthorizedKeysFile {self.root}/id_client.pub\n"
            "StrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            "PermitRootLogin yes\nMaxSessions 200\nLogLevel VERBOSE\n"
            f"Subsystem sftp {sftp}\n",
            "utf-8",
        )

    def _write_client_config(self) -> None:
        host_key = (self.root / "id_host.pub").read_text("utf-8").rsplit(" ", 1)[0]
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {host_key}\n", "utf-8")
        self.ssh_config.write_text(
            f"Host staged\n  HostName 127.0.0.1\n  Port {self.port}\n"
            f"Host *\n  User {self.login.name}\n  IdentityFile {self.identity}\n"
            f"  IdentitiesOnly yes\n  UserKnownHostsFile {self.known_hosts}\n"
            "  GlobalKnownHostsFile /dev/null\n",
            "utf-8",
        )

    def _start(self) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(self.root / "sshd_config")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            # SIGXFSZ stays ignored, as it is in Python: see limit_files.
            restore_signals=False,
        )
        self._drain = threading.Thread(target=self._copy_log, args=(child,), daemon=True)
        self._drain.start()
        with self._logged:
            ready = self._logged.wait_for(self._settled, READY_TIMEOUT_S)
        if not ready or self._ended:
            child.kill()
            child.wait()
            raise RuntimeError(f"sshd did not start: {self.log()}")
        return child

    _ended = False
    _begun = 0
    """The line of the log with which the running server begins."""

    def _settled(self) -> bool:
        said = self._lines[self._begun :]
        return self._ended or any("Server listening" in line for line in said)

    def _copy_log(self, child: subprocess.Popen[str]) -> None:
        assert child.stderr is not None
        with child.stderr:
            for line in child.stderr:
                with self._logged:
                    self._lines.append(line)
                    self._logged.notify_all()
        with self._logged:
            self._ended = True
            self._logged.notify_all()


@contextlib.contextmanager
def running_sshd(
    root: Path, *, login: Login | None = None, counted: bool = False, options: str = ""
) -> Iterator[Sshd]:
    server = Sshd(root, login or Login.mine(), counted=counted, options=options)
    try:
        yield server
    finally:
        server.stop()


def _make_keys(root: Path) -> None:
    for name in ("id_host", "id_client"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(root / name)],
            check=True,
            stdin=subprocess.DEVNULL,
        )
