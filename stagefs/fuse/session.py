"""The daemon's side of the handed device: the FUSE loop, and news for the kernel.

For: taking over what the supervisor hands (``Handoff``), running pyfuse3 on it until the
mount ends or the daemon is to stop (``serve``), telling the kernel to forget names and
attributes.  Not for answering requests: that is ``ops``, whose class inherits from
``DeviceOperations``.

How a daemon is started (the supervisor's ``daemons.py`` does it)
------------------------------------------------------------------
* argv: the arguments after ``--`` of the supervisor's command line, and then
  ``--supervised device=D,session=S,memory=M,status=T,supervisor=PID``.  Nothing else: no
  variable is added to the environment; standard input is /dev/null, standard output and
  error are appended to STATE/supervisor.log; the daemon leads a process group of its own
  and, when root mounted for a user, runs with the credentials of that user.
* ``D`` is /dev/fuse of the mounted connection, which is already initialized.
* ``S`` is one end of a SOCK_SEQPACKET pair in which INIT comes when the daemon is needed: at
  once, or when the one before it has died.  Until then (``Handoff.stand_by``) it touches
  neither the device nor the state.  When the pair ends without it, it was never needed.  INIT
  offers only what the kernel was told (``wire.WANTED_FLAGS``); libfuse is pointed at the pair,
  and when it has read that message (``Operations.init``) D is put in its place.  Its reply to
  INIT goes to the device, where nobody waits for it: ENOENT, which libfuse ignores by design.
* ``M`` is the shared memory (``operations_log``).
* ``T`` takes one line of JSON: ``{"ready": {...}}`` once requests are answered (what is in
  it is passed on to whoever waits for the mount), or
  ``{"error": "one sentence", "exit_code": n}``, after which the daemon must exit.
* SIGTERM asks to stop (deadline: the supervisor's --stop-timeout-s, then SIGKILL).
* SIGUSR1 asks for the stacks of its threads, on standard error; it must not end the daemon.
  A daemon that answers nothing for the supervisor's --probe-timeout-s gets it, and SIGKILL.
* When the mount is gone the loop ends by itself; the daemon should exit with status 0.
  Any end while the mount is there, whatever its status, brings the next daemon.
* When the supervisor is gone the daemon is killed (PR_SET_PDEATHSIG), so that the
  connection closes and open files get ENOTCONN instead of hanging.

What the kernel was told, and what follows for ``ops``: ATOMIC_O_TRUNC (OPEN and CREATE carry
O_TRUNC, and must truncate), HANDLE_KILLPRIV_V2 (every write, truncate and chown must clear
set-user-id and set-group-id: nobody else does), READDIRPLUS always, no remote locks, no
automatic invalidation of pages, requests of up to 1 MiB, 1000 in the background.

Concurrency: everything on the event loop, except that the calls which tell the kernel to
forget something run in one worker thread, one at a time, because they may block.  They do
so while a request on the same directory is unanswered; so nothing that answers a request
may wait for them: senders use ``send_nowait`` and drop when the channel is full.
"""

import ctypes
import errno
import json
import logging
import os
import signal
import socket
from dataclasses import dataclass, field
from typing import NamedTuple, Self

import pyfuse3
import trio

from stagefs.errors import MountFailed
from stagefs.fuse.turns import Turns
from stagefs.model import Inode

log = logging.getLogger(__name__)

TASKS_MAX = 5000
DISARM_TIMEOUT_S = 1.0
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15
# What ``ps`` shows as the program (comm), of 15 bytes at most.
STANDBY_NAME, DAEMON_NAME = b"stagefs-standby", b"stagefs-daemon"
# The kernel does not know (any more) what it is told to forget, or the mount is ending.
FORGOTTEN_ALREADY = {errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.EBADF, errno.ENOTCONN}


class ForgetAttributes(NamedTuple):
    """The kernel shall ask again for the attributes of ``inode``.  Safe with open handles."""

    inode: Inode


class ForgetName(NamedTuple):
    """The kernel shall look up ``name`` (as the kernel knows it) in ``parent`` again."""

    parent: Inode
    name: bytes


class Settled(NamedTuple):
    """Not for the kernel: ``event`` is set when all that was sent before has been told."""

    event: trio.Event


Invalidation = ForgetAttributes | ForgetName | Settled


@dataclass
class Handoff:
    """The descriptors that the supervisor handed to this daemon.

    Only the first word to it counts, and a later one goes nowhere.
    """

    device: int
    session: int
    memory: int
    status: int
    supervisor: int
    _told: bool = field(default=False, init=False)

    @classmethod
    def accept(cls, text: str) -> Self:
        """Parse the value of ``--supervised``, and bind this process's life to the supervisor's.

        Raises MountFailed when the text is not one, or the supervisor is gone already.
        """
        try:
            numbers = {key: int(value) for key, value in (p.split("=") for p in text.split(","))}
            handoff = cls(**numbers)
        except (ValueError, TypeError) as exc:
            raise MountFailed(
                f"A daemon cannot be started with --supervised {text!r}: it is the supervisor "
                "that starts it; use 'stagefs mount'."
            ) from exc
        for fd in (handoff.device, handoff.session, handoff.memory, handoff.status):
            os.set_inheritable(fd, False)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # It may have died before it was asked to take this one along.
        if os.getppid() != handoff.supervisor:
            raise MountFailed("The supervisor of this mount is gone; mount again.")
        return handoff

    def stand_by(self) -> bool:
        """Wait until this daemon is to serve.  False: it never was."""
        _name_this_process(STANDBY_NAME)
        with socket.socket(fileno=os.dup(self.session)) as session:
            needed = bool(session.recv(1, socket.MSG_PEEK))
        _name_this_process(DAEMON_NAME)
        return needed

    def tell_ready(self, values: dict[str, object]) -> None:
        """Requests are answered from now on.  ``values`` are for whoever waits for the mount."""
        self._tell({"ready": values})

    def tell_error(self, sentence: str, *, exit_code: int) -> None:
        """This daemon cannot serve, and will exit."""
        self._tell({"error": sentence, "exit_code": exit_code})

    def _tell(self, said: dict[str, object]) -> None:
        if self._told:
            return
        self._told = True
        os.write(self.status, json.dumps(said).encode() + b"\n")
        os.close(self.status)


def _name_this_process(name: bytes) -> None:
    ctypes.CDLL(None).prctl(PR_SET_NAME, name, 0, 0, 0)


class DeviceOperations(pyfuse3.Operations):
    """pyfuse3's operations, plus the step from the replayed INIT to the device."""

    supports_dot_lookup = False
    enable_writeback_cache = False
    enable_acl = False

    def __init__(self, handoff: Handoff) -> None:
        super().__init__()
        self._handoff = handoff
        self.entered = trio.Event()

    def init(self) -> None:
        """INIT was read (by libfuse): what it reads next comes from the device."""
        os.dup2(self._handoff.device, self._handoff.session, inheritable=False)
        os.close(self._handoff.device)
        self.entered.set()


async def serve(
    operations: DeviceOperations,
    *,
    handoff: Handoff,
    invalidations: trio.MemoryReceiveChannel[Invalidation],
    stop: trio.Event,
    stop_grace_s: float = 5.0,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer requests until the mount is gone or ``stop`` is set.

    Reports started when requests are read from the device.  After ``stop`` no request is
    read any more, and those in work have ``stop_grace_s`` to end; the rest stays with the
    kernel, for the next daemon or for the unmount.
    """
    news = _NewsForKernel()
    pyfuse3.trio = Turns()  # type: ignore[attr-defined]  # see turns
    pyfuse3.init(operations, f"/dev/fd/{handoff.session}", set())
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_stop_on, stop, news, nursery.cancel_scope, stop_grace_s)
            nursery.start_soon(_tell_started, operations, task_status)
            nursery.start_soon(news.carry_out, invalidations)
            await pyfuse3.main(max_tasks=TASKS_MAX)
            nursery.cancel_scope.cancel()
    finally:
        if not news.in_kernel:
            pyfuse3.close(unmount=False)


async def _tell_started(operations: DeviceOperations, task_status: trio.TaskStatus[None]) -> None:
    await operations.entered.wait()
    task_status.started()


async def _stop_on(
    stop: trio.Event, news: "_NewsForKernel", scope: trio.CancelScope, grace_s: float
) -> None:
    await stop.wait()
    await news.disarm()
    pyfuse3.terminate()
    await trio.sleep(grace_s)
    log.warning("requests were still in work %.0f s after the stop and are left", grace_s)
    scope.cancel()


class _NewsForKernel:
    """Tells the kernel what to forget, one thing at a time, in a thread.

    Such a call waits while the kernel waits for this daemon's answer to a request on the
    same directory.  So none is begun once the daemon is about to stop reading requests, and
    the one under way gets a moment to end while answers still flow.  One that blocks
    nevertheless is abandoned with its session, which must then not be freed under it:
    ``in_kernel`` says so.
    """

    def __init__(self) -> None:
        self.in_kernel = False
        self._armed = True
        self._turn = trio.Lock()

    async def carry_out(self, invalidations: trio.MemoryReceiveChannel[Invalidation]) -> None:
        async for value in invalidations:
            if isinstance(value, Settled):
                value.event.set()
                continue
            async with self._turn:
                if not self._armed:
                    return
                self.in_kernel = True
                await trio.to_thread.run_sync(self._tell, value, abandon_on_cancel=True)

    async def disarm(self) -> None:
        self._armed = False
        with trio.move_on_after(DISARM_TIMEOUT_S):
            async with self._turn:
                pass

    def _tell(self, value: ForgetAttributes | ForgetName) -> None:
        try:
            if isinstance(value, ForgetName):
                pyfuse3.invalidate_entry(value.parent, value.name)
            else:
                pyfuse3.invalidate_inode(value.inode, attr_only=True)
        except OSError as exc:
            if exc.errno not in FORGOTTEN_ALREADY:
                log.warning("the kernel did not forget %s: %s", value, exc)
        finally:
            self.in_kernel = False
