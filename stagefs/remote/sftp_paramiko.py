"""paramiko as a transport for SFTP: where no ssh program is, or a password is needed.

It reads ~/.ssh/config, known_hosts, keys and the agent itself, and knows less than OpenSSH: no
jump hosts, no ControlMaster.  Host keys that are not in known_hosts are always refused.  It
moves some tens of megabytes per second, because ciphers and packets are Python's work.

paramiko has threads of its own; two more per connection carry bytes between its channel and a
socket pair, whose other end the engine's loop uses like ssh's pipe.  Imported in the engine
process only, when it is needed.
"""

import contextlib
import logging
import os
import pwd
import socket
import threading
from pathlib import Path
from typing import cast

import paramiko
from paramiko.ssh_exception import NoValidConnectionsError

from stagefs.remote.sftp_messages import Connect, FailureKind
from stagefs.remote.sftp_session import Failure

SSH_PORT = 22
PIECE_BYTES = 256 << 10
WINDOW_BYTES = 16 << 20
GRACE_S = 1.0
SYSTEM_CONFIG = Path("/etc/ssh/ssh_config")
SYSTEM_KNOWN_HOSTS = "/etc/ssh/ssh_known_hosts"

# What paramiko logs is about its threads; what went wrong comes as exceptions.
logging.getLogger("paramiko").setLevel(logging.CRITICAL + 1)

_CONNECTION_LOST = (OSError, EOFError, paramiko.SSHException)


class ParamikoClient:
    def __init__(self, order: Connect) -> None:
        self._order = order

    def start(self) -> "ParamikoTransport":
        return ParamikoTransport(self._order)


class ParamikoTransport:
    """A connection that is made, and then served, by threads."""

    def __init__(self, order: Connect) -> None:
        self._order = order
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)
        self.read_fd = self._ours.fileno()
        # One descriptor for each direction, as pipes have.
        self.write_fd = os.dup(self.read_fd)
        self.errors_fd, self._errors = os.pipe()
        os.set_blocking(self.errors_fd, False)
        self._failure = Failure(
            FailureKind.UNAVAILABLE, f"the connection to {order.host} was closed"
        )
        self._client = paramiko.SSHClient()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="paramiko", daemon=True)
        self._thread.start()

    def verdict(self, said: str) -> Failure:
        del said  # the failure is more than its text
        return self._failure

    def end(self) -> None:
        if not self._closed:
            self._closed = True
            self._ours.close()
            os.close(self.write_fd)
            os.close(self.errors_fd)
            self._client.close()

    def ended(self) -> bool:
        return not self._thread.is_alive()

    def kill(self) -> None:
        """Threads cannot be; one that is still connecting ends by its own timeout."""

    # In threads

    def _serve(self) -> None:
        """Connect and carry bytes until one side ends."""
        try:
            channel = _connected(self._client, self._order)
        except Failure as failure:
            self._failure = failure
        else:
            upwards = threading.Thread(target=self._send, args=(channel,), daemon=True)
            upwards.start()
            self._receive(channel)
            upwards.join()
        finally:
            self._client.close()
            self._theirs.close()
            os.close(self._errors)

    def _receive(self, channel: paramiko.Channel) -> None:
        try:
            with contextlib.suppress(*_CONNECTION_LOST):
                while data := channel.recv(PIECE_BYTES):
                    self._theirs.sendall(data)
        finally:
            # Closing would not end a recv that is under way in the other thread.
            with contextlib.suppress(OSError):
                self._theirs.shutdown(socket.SHUT_RDWR)

    def _send(self, channel: paramiko.Channel) -> None:
        with contextlib.suppress(*_CONNECTION_LOST):
            while data := self._theirs.recv(PIECE_BYTES):
                channel.sendall(data)
            channel.close()


def _connected(client: paramiko.SSHClient, order: Connect) -> paramiko.Channel:
    """The channel of the SFTP subsystem.  Raises Failure."""
    host = order.host
    try:
        return _open_channel(client, order)
    except paramiko.BadHostKeyException as exc:
        raise Failure(
            FailureKind.DENIED,
            f"the host key of {host} is not the one in known_hosts: "
            "find out why before removing it",
        ) from exc
    except (paramiko.AuthenticationException, paramiko.PasswordRequiredException) as exc:
        raise Failure(FailureKind.DENIED, f"{host} refused the login ({exc})") from exc
    except TimeoutError as exc:
        raise Failure(FailureKind.DEADLINE, f"{host} did not answer in time") from exc
    except socket.gaierror as exc:
        reason = f"the host name {host} cannot be resolved: check its spelling and the name server"
        raise Failure(FailureKind.UNAVAILABLE, reason) from exc
    except (paramiko.ConfigParseError, paramiko.CouldNotCanonicalize, ValueError) as exc:
        reason = f"the ssh configuration is not usable ({exc})"
        raise Failure(FailureKind.REFUSED, reason) from exc
    except (paramiko.SSHException, EOFError) as exc:
        raise _protocol_failure(host, exc) from exc
    except NoValidConnectionsError as exc:
        refused = all(isinstance(cause, ConnectionRefusedError) for cause in exc.errors.values())
        reason = f"the connection to {host} failed ({exc})"
        if refused:
            reason = (
                f"{host} refused the connection: "
                "check that its ssh server runs and the port is right"
            )
        raise Failure(FailureKind.UNAVAILABLE, reason) from exc
    except OSError as exc:
        reason = f"the connection to {host} failed ({exc.strerror or exc})"
        raise Failure(FailureKind.UNAVAILABLE, reason) from exc


def _protocol_failure(host: str, exc: Exception) -> Failure:
    said = str(exc)
    if "not found in known_hosts" in said:
        return Failure(
            FailureKind.DENIED,
            f"the host key of {host} is not known here: check it and add it to known_hosts, "
            "for example by one login with ssh",
        )
    if "authentication methods available" in said:
        return Failure(FailureKind.DENIED, f"there is no key or password for the login at {host}")
    if "Channel closed" in said or "subsystem" in said:
        return Failure(FailureKind.REFUSED, f"{host} offers no SFTP")
    if "SSH protocol banner" in said:
        return Failure(
            FailureKind.AWAY,
            f"{host} ended the connection before the login: either it is being restarted, or too "
            "many log in at a time (MaxStartups of its sshd)",
        )
    if "timeout" in said.lower():
        return Failure(FailureKind.DEADLINE, f"{host} did not answer in time")
    return Failure(FailureKind.UNAVAILABLE, f"the connection to {host} failed ({said})")


def _open_channel(client: paramiko.SSHClient, order: Connect) -> paramiko.Channel:
    account = pwd.getpwuid(os.geteuid())
    home = Path(account.pw_dir)
    found = _configured(order, home)
    host = str(found.get("hostname", order.host))
    port = order.port or int(found.get("port", SSH_PORT))
    # The engine keeps the deadline: paramiko would not tell it from other failures.
    timeout_s = order.connect_timeout_s + GRACE_S
    user_files = [home / ".ssh/known_hosts", home / ".ssh/known_hosts2"]
    _load_host_keys(client, str(found.get("userknownhostsfile", "")).split() or user_files)
    _load_host_keys(client, str(found.get("globalknownhostsfile", SYSTEM_KNOWN_HOSTS)).split())
    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    only_given = str(found.get("identitiesonly", "no")) == "yes"
    keys = [str(name) for name in found.get("identityfile", []) if Path(name).is_file()]
    if order.key_file is not None:
        only_given, keys = True, [order.key_file]
    client.connect(
        host,
        port=port,
        username=order.user or str(found.get("user", account.pw_name)),
        password=order.password,
        # A list is as good as one name; the types know only that.
        key_filename=cast("str | None", keys or None),
        sock=_proxy(found),
        timeout=timeout_s,
        banner_timeout=timeout_s,
        auth_timeout=timeout_s,
        channel_timeout=timeout_s,
        allow_agent=not only_given,
        look_for_keys=not only_given and not keys,
    )
    transport = client.get_transport()
    assert transport is not None
    transport.set_keepalive(15)
    channel = transport.open_session(window_size=WINDOW_BYTES, timeout=timeout_s)
    channel.settimeout(timeout_s)
    channel.invoke_subsystem("sftp")
    channel.settimeout(None)
    return channel


def _configured(order: Connect, home: Path) -> paramiko.SSHConfigDict:
    """What the configuration files say of the host."""
    files = [home / ".ssh/config", SYSTEM_CONFIG] if order.config is None else [Path(order.config)]
    config = paramiko.SSHConfig()
    for path in files:
        try:
            with path.open(encoding="utf-8", errors="surrogateescape") as stream:
                config.parse(stream)
        except FileNotFoundError:
            if order.config is not None:
                reason = f"the ssh configuration {path} does not exist"
                raise Failure(FailureKind.REFUSED, reason) from None
    found = config.lookup(order.host)
    if str(found.get("proxyjump", "none")) != "none":
        reason = "its ssh configuration asks for ProxyJump, which needs the ssh program"
        raise Failure(FailureKind.REFUSED, reason)
    return found


def _proxy(found: paramiko.SSHConfigDict) -> paramiko.ProxyCommand | None:
    command = str(found.get("proxycommand", "none"))
    return None if command == "none" else paramiko.ProxyCommand(command)


def _load_host_keys(client: paramiko.SSHClient, files: "list[str] | list[Path]") -> None:
    for name in files:
        path = Path(name).expanduser()
        if path.is_file():
            client.load_system_host_keys(str(path))
