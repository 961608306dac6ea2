"""One supervisor takes a mount over from another, on STATE/supervisor.sock.

For: an upgrade in place.  The new supervisor (``take``) connects; the old one (``Offer``) ends
its daemon, hands over the device, the shared memory and what it knows, and waits.  The new one
starts its daemon; when that is ready it says so, and the old one ends without touching the mount.
If the new one ends before, the old one goes on as after any death of its daemon.

So at every moment exactly one of the two may start a daemon.  The new one's first daemon has the
connection open too: where the new supervisor was killed, the old one does not see its end before
that daemon's.
"""

import array
import contextlib
import json
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stagefs.supervisor.lifetime import Lifetime, LivingJobs, LivingProcess
from stagefs.supervisor.mounts import Refused

NAME = "supervisor.sock"
PROTOCOL = 1
WORDS_BYTES_MAX = 65536
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
DONE = b"done"


@dataclass(frozen=True)
class Facts:
    """What the new supervisor cannot find out by itself."""

    init: str  # the INIT that each daemon gets, hexadecimal
    resend: bool
    lifetime: Lifetime | None
    notify_socket: str | None


@dataclass(frozen=True)
class Taken:
    """A mount on its way to this process, which must say ``done``, or end."""

    connection: socket.socket
    device: int
    memory: int
    facts: Facts

    def done(self) -> None:
        self.connection.send(DONE)
        self.connection.close()


class Offer:
    """The old side.  ``as_owner`` runs a call as the user who owns the state directory."""

    def __init__(self, state: Path, as_owner: Callable[[Callable[[], None]], None]) -> None:
        self._state = state
        self._as_owner = as_owner
        self._listening: socket.socket | None = None
        self.renew()

    def renew(self) -> None:
        """Listen under the name, whoever has listened there meanwhile."""
        self.end(remove=False)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)

        def bind() -> None:
            (self._state / NAME).unlink(missing_ok=True)
            with _short_path(self._state) as path:
                listening.bind(path)
            (self._state / NAME).chmod(0o600)

        self._as_owner(bind)
        listening.listen(1)
        self._listening = listening

    @property
    def fd(self) -> int:
        assert self._listening is not None
        return self._listening.fileno()

    def accept(self) -> tuple[socket.socket, int] | None:
        """(connection, pid) of one who may take over; None when nobody is there who may."""
        assert self._listening is not None
        try:
            connection, _ = self._listening.accept()
        except BlockingIOError:
            return None
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(raw)
        if uid != os.geteuid():
            connection.close()
            return None
        return connection, pid

    def end(self, *, remove: bool) -> None:
        if self._listening is None:
            return
        self._listening.close()
        self._listening = None
        if remove:
            self._as_owner(lambda: (self._state / NAME).unlink(missing_ok=True))


def hand(connection: socket.socket, *, device: int, memory: int, facts: Facts) -> None:
    words = json.dumps({"protocol": PROTOCOL, **asdict(facts)}).encode()
    fds = array.array("i", [device, memory])
    connection.sendmsg([words], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])


def is_done(connection: socket.socket) -> bool:
    """To be asked when the connection is readable; at its end the answer is False."""
    try:
        return connection.recv(len(DONE)) == DONE
    except OSError:
        return False


def take(state: Path, *, timeout_s: float) -> Taken:
    """Raises Refused: nobody listens there, or what is handed over is not understood."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        with _short_path(state) as path:
            connection.connect(path)
    except OSError as exc:
        raise Refused(
            f"Cannot take the mount over: its supervisor does not listen on {state / NAME} "
            f"({exc.strerror}); unmount it and mount again.",
            exit_code=1,
        ) from exc
    words, fds = _received(connection, timeout_s)
    if words.pop("protocol", None) != PROTOCOL or len(fds) != 2:
        raise Refused(
            "Cannot take the mount over: its supervisor is of a version that hands over "
            "otherwise; unmount it and mount again.",
            exit_code=1,
        )
    named = words.pop("lifetime")
    facts = Facts(lifetime=_lifetime(named) if named else None, **words)
    return Taken(connection, fds[0], fds[1], facts)


def _lifetime(named: dict[str, Any]) -> Lifetime:
    return LivingJobs(**named) if "directory" in named else LivingProcess(**named)


def _received(connection: socket.socket, timeout_s: float) -> tuple[dict[str, Any], list[int]]:
    if not select.select([connection], [], [], timeout_s)[0]:
        raise Refused(
            f"Cannot take the mount over: its supervisor gave no answer within {timeout_s:.0f} s.",
            exit_code=1,
        )
    room = socket.CMSG_SPACE(2 * array.array("i").itemsize)
    said, ancillary, _, _ = connection.recvmsg(WORDS_BYTES_MAX, room)
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data)
    for fd in fds:
        os.set_inheritable(fd, False)
    if not said:
        raise Refused(
            "Cannot take the mount over: its supervisor hung up, because this is another user "
            "than the one who runs it, or because the mount ends.",
            exit_code=1,
        )
    words = json.loads(said)
    return words, list(fds)


@contextlib.contextmanager
def _short_path(state: Path) -> Iterator[str]:
    """The socket's path, short enough for the kernel whatever the directory is called."""
    directory = os.open(state, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{NAME}"
    finally:
        os.close(directory)
