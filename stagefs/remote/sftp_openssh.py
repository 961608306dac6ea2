"""The system's OpenSSH client as a transport for SFTP.

It brings the user's whole set-up along: ~/.ssh/config, agent, jump hosts, an open
ControlMaster connection, Kerberos, known_hosts.  What must not be left to a configuration file
is fixed here: no questions, no forwarding, no command of its own, and host keys are always
verified.  Engine process only; the engine has one thread, which the child's set-up relies on.
"""

import ctypes
import fcntl
import os
import re
import shutil
import signal
import subprocess

from stagefs.remote.sftp_messages import Connect, FailureKind
from stagefs.remote.sftp_session import Failure

PIPE_BYTES = 1 << 20
CONFIG_TIMEOUT_S = 5.0
_PR_SET_PDEATHSIG = 1
_F_SETPIPE_SZ = 1031
_libc = ctypes.CDLL(None)
_FIXED_OPTIONS = (
    "BatchMode=yes",
    "ClearAllForwardings=yes",
    "ForwardAgent=no",
    "ForwardX11=no",
    "PermitLocalCommand=no",
    "RemoteCommand=none",
    "RequestTTY=no",
    "LogLevel=ERROR",
    # Use a connection that the user holds open, but never become one that outlives us.
    "ControlMaster=no",
    "ConnectionAttempts=1",
    "ServerAliveInterval=15",
    "ServerAliveCountMax=3",
)
# What ssh says, what that means, and what to do.
_VERDICTS = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|host key .* has changed|key .* revoked",
        FailureKind.DENIED,
        "the host key of {host} is not the one in known_hosts: find out why before removing it",
    ),
    (
        r"Host key verification failed|host key is known for|No matching host key",
        FailureKind.DENIED,
        "the host key of {host} is not known here: check it and add it to known_hosts, "
        "for example by one login with ssh",
    ),
    (
        r"Permission denied \(|Too many authentication failures|No more authentication methods",
        FailureKind.DENIED,
        "{host} refused the login ({said}): check that `ssh -o BatchMode=yes` logs in there",
    ),
    (
        r"Could not resolve hostname",
        FailureKind.UNAVAILABLE,
        "the host name {host} cannot be resolved: check its spelling and the name server",
    ),
    (
        r"timed out|Timeout, server",
        FailureKind.DEADLINE,
        "{host} did not answer in time",
    ),
    (
        r"Connection refused",
        FailureKind.UNAVAILABLE,
        "{host} refused the connection: check that its ssh server runs and the port is right",
    ),
    (
        r"[Ss]ubsystem request failed",
        FailureKind.REFUSED,
        "{host} offers no SFTP: ask its administrator for the sftp subsystem",
    ),
    (
        r"Bad configuration option|Bad owner or permissions|terminating, \d+ bad|Bad SSH2 cipher|"
        r"Can't open user config file|unsupported option|Bad yes/no|keyword \S+ extra arguments",
        FailureKind.REFUSED,
        "the ssh configuration is not usable ({said})",
    ),
    (
        r"kex_exchange_identification: ",
        FailureKind.AWAY,
        "{host} ended the connection before the login ({said}): either it is being restarted, or "
        "too many log in at a time (MaxStartups of its sshd)",
    ),
)


class OpenSshClient:
    """Starts transports to one host.  The user's configuration is read at the first start."""

    def __init__(self, order: Connect) -> None:
        self._order = order
        self._command: list[str] | None = None

    def start(self) -> "OpenSshTransport":
        """Raises Failure."""
        if self._order.password is not None:
            reason = 'a password was given, which the ssh program cannot use: set client = "auto"'
            raise Failure(FailureKind.REFUSED, reason)
        if self._command is None:
            self._command = [*_command(self._order), *_configured_options(self._order)]
        host = self._order.host
        return OpenSshTransport([*self._command, "-s", "--", host, "sftp"], host=host)


class OpenSshTransport:
    """A running ``ssh -s HOST sftp``."""

    def __init__(self, command: list[str], *, host: str) -> None:
        self._host = host
        self._child: subprocess.Popen[bytes] = _start(command)
        stdin, stdout, stderr = self._child.stdin, self._child.stdout, self._child.stderr
        assert stdin is not None
        assert stdout is not None
        assert stderr is not None
        self.write_fd, self.read_fd, self.errors_fd = (
            stdin.fileno(),
            stdout.fileno(),
            stderr.fileno(),
        )
        for fd in (self.write_fd, self.read_fd, self.errors_fd):
            os.set_blocking(fd, False)
        _widen(self.read_fd)
        _widen(self.write_fd)

    def verdict(self, said: str) -> Failure:
        return verdict(said, host=self._host)

    def end(self) -> None:
        for file in (self._child.stdin, self._child.stdout, self._child.stderr):
            if file is not None and not file.closed:
                file.close()
        if self._child.poll() is None:
            self._child.terminate()

    def ended(self) -> bool:
        return self._child.poll() is not None

    def kill(self) -> None:
        """For one that ``end`` did not end.  Its helpers (ProxyJump) are in its group."""
        if self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()


def available(program: str) -> bool:
    return shutil.which(program) is not None


def verdict(said: str, *, host: str) -> Failure:
    """What a client that ended with this on stderr means for what was asked of it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = lines[-1] if lines else "the connection was closed"
    for pattern, kind, sentence in _VERDICTS:
        if re.search(pattern, said):
            return Failure(kind, sentence.format(host=host, said=last))
    return Failure(FailureKind.UNAVAILABLE, f"the connection to {host} broke ({last})")


def _command(order: Connect) -> list[str]:
    command = [order.program]
    if order.config is not None:
        command += ["-F", order.config]
    for option in (*_FIXED_OPTIONS, f"ConnectTimeout={max(1, round(order.connect_timeout_s))}"):
        command += ["-o", option]
    if order.ciphers is not None:
        command += ["-o", f"Ciphers={order.ciphers}"]
    if order.user is not None:
        command += ["-l", order.user]
    if order.port is not None:
        command += ["-p", str(order.port)]
    if order.key_file is not None:
        # The file's name is no secret.  Keys of the configuration come after it, the agent's never.
        command += ["-o", "IdentitiesOnly=yes", "-i", order.key_file]
    return command


def _configured_options(order: Connect) -> list[str]:
    """What depends on the user's own settings: those that would switch host keys off are
    overruled, others (``accept-new``) are respected."""
    try:
        answer = subprocess.run(
            [*_command(order), "-G", "--", order.host],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=CONFIG_TIMEOUT_S,
            check=True,
        )
    except subprocess.CalledProcessError as exc:
        raise verdict(exc.stderr.decode("utf-8", "replace"), host=order.host) from exc
    except subprocess.TimeoutExpired as exc:
        raise Failure(FailureKind.DEADLINE, "the ssh configuration took too long to read") from exc
    except OSError as exc:
        reason = f"the program {order.program} cannot be started ({exc.strerror})"
        raise Failure(FailureKind.REFUSED, reason) from exc
    configured = answer.stdout.decode("utf-8", "replace")
    if re.search(r"^stricthostkeychecking (no|off|false)$", configured, re.MULTILINE):
        return ["-o", "StrictHostKeyChecking=yes"]
    return []


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        # A group of its own, so that a proxy command can be ended with it.
        start_new_session=True,
        preexec_fn=_end_with_engine,  # noqa: PLW1509 - the engine has one thread
    )


def _end_with_engine() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _widen(fd: int) -> None:
    """A larger pipe means fewer wake-ups.  The kernel limits what all pipes of a user take."""
    try:
        fcntl.fcntl(fd, _F_SETPIPE_SZ, PIPE_BYTES)
    except PermissionError:
        return
