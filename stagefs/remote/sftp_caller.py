"""The daemon's end of an SFTP engine: starts it, carries orders and reports, ends it.

Lives in the trio thread; the process is started in a worker thread.  One system task per
engine receives; it ends with the engine, and an engine that died is replaced at the next use.
An exchange that is left early is stopped: when ``stop`` returns, the engine uses its
descriptor no more, or is dead.
"""

import array
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator

import msgspec
import trio

from stagefs.errors import DeadlineExceeded, RemoteUnavailable
from stagefs.remote.sftp_messages import (
    PACKET_BYTES_MAX,
    AnyOrder,
    AnyReport,
    Connect,
    Failed,
    Found,
    Noted,
    Page,
    Removed,
    Stop,
    Stopped,
    TimesSet,
    socket_pair,
)

log = logging.getLogger(__name__)

ENGINE_MODULE = "stagefs.remote.sftp_engine"
STOP_TIMEOUT_S = 2.0
END_TIMEOUT_S = 2.0
# The engine keeps the deadlines; one that does not even say so is dead or stopped itself.
GRACE_S = 5.0
PATIENCE = 4
PACKETS_PER_TURN = 32
STDERR_BYTES_MAX = 4096

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[AnyReport])


class Exchange:
    """One operation: its reports in order, until it is left."""

    def __init__(self, engine: "Engine", op: int, url: str, *, moves: bool) -> None:
        self._engine = engine
        self._moves = moves
        self._op = op
        self._url = url
        self._reports: deque[AnyReport] = deque()
        self._news = trio.Event()
        self._stopped = False
        self.over = False
        """The last report was taken; there is nothing to stop."""

    async def next(self) -> AnyReport:
        """The next report.  Raises RemoteUnavailable when the engine died, DeadlineExceeded
        when it hangs."""
        begun = trio.current_time()
        while not self._reports:
            engine = self._engine
            if engine.dead:
                self.over = True
                raise RemoteUnavailable(
                    f"{self._url} cannot be reached: the process that speaks SFTP ended; "
                    "it is started again at the next use."
                )
            self._news = trio.Event()
            quiet_from = max(begun, engine.last_heard)
            deadline = min(quiet_from + engine.limit_s, begun + PATIENCE * engine.limit_s)
            with trio.move_on_at(deadline):
                await self._news.wait()
            if trio.current_time() >= deadline and not self._reports and not engine.dead:
                engine.kill(f"it was silent about {self._url}")
                raise DeadlineExceeded(
                    f"{self._url} cannot be reached: the process that speaks SFTP hung and was "
                    "ended."
                )
        report = self._reports.popleft()
        match report:
            case Found() | Removed() | TimesSet() | Failed() | Page(last=True):
                self.over = True
        return report

    async def send(self, order: AnyOrder) -> None:
        await self._engine.send(order)

    async def stop(self) -> None:
        """See that nothing more is done for this operation, and wait for that when it uses a
        descriptor.  Not cancellable, bounded."""
        if self.over or self._engine.dead:
            return
        if not self._moves:
            self._engine.post(Stop(self._op))
            return
        with trio.move_on_after(STOP_TIMEOUT_S, shield=True):
            with contextlib.suppress(RemoteUnavailable):
                await self._engine.send(Stop(self._op))
            while not self._stopped and not self._engine.dead:
                self._news = trio.Event()
                await self._news.wait()
        if not self._stopped and not self._engine.dead:
            self._engine.kill(f"it did not stop the transfer of {self._url}")
            await self._engine.reaped()

    def deliver(self, report: AnyReport) -> None:
        self._stopped = self._stopped or isinstance(report, Stopped)
        self._reports.append(report)
        self._news.set()

    def engine_died(self) -> None:
        self._news.set()


class Engine:
    """One running process.  ``dead`` from the moment on that nothing can be asked of it."""

    def __init__(
        self, child: subprocess.Popen[bytes], sock: socket.socket, stderr_fd: int, connect: Connect
    ) -> None:
        self._child = child
        self._socket = sock
        self._stderr_fd = stderr_fd
        self._host = connect.host
        self._sending = trio.Lock()
        self._exchanges: dict[int, Exchange] = {}
        self._gone = trio.Event()
        self.dead = False
        self.last_heard = trio.current_time()
        self.limit_s = (
            GRACE_S
            + connect.connect_timeout_s
            + max(connect.answer_timeout_s, connect.progress_timeout_s)
        )

    async def send(self, order: AnyOrder, fd: int | None = None) -> None:
        """Raises RemoteUnavailable when the engine is dead."""
        packet = _encoder.encode(order)
        ancillary = []
        if fd is not None:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
        async with self._sending:
            while not self.dead:
                try:
                    self._socket.sendmsg([packet], ancillary)
                except BlockingIOError:
                    with contextlib.suppress(trio.ClosedResourceError):
                        await trio.lowlevel.wait_writable(self._socket)
                except OSError as exc:
                    raise RemoteUnavailable(
                        f"The process that speaks SFTP with {self._host} takes no orders "
                        f"({exc.strerror})."
                    ) from exc
                else:
                    return
        raise RemoteUnavailable(f"The process that speaks SFTP with {self._host} has ended.")

    def post(self, order: AnyOrder) -> None:
        """As ``send`` without waiting; may be lost."""
        if not self.dead:
            with contextlib.suppress(OSError):
                self._socket.send(_encoder.encode(order))

    @contextlib.asynccontextmanager
    async def exchange(
        self, op: int, url: str, order: AnyOrder, fd: int | None = None
    ) -> AsyncIterator[Exchange]:
        """Give an order and take its reports.  At the end it is stopped if it is not over."""
        exchange = Exchange(self, op, url, moves=fd is not None)
        self._exchanges[op] = exchange
        try:
            with trio.move_on_after(self.limit_s) as limit:
                await self.send(order, fd)
            if limit.cancelled_caught:
                self.kill(f"it took no order for {url}")
                raise DeadlineExceeded(
                    f"{url} cannot be reached: the process that speaks SFTP hung."
                )
            yield exchange
        finally:
            await exchange.stop()
            del self._exchanges[op]

    async def receive(self) -> None:
        """Until the engine ends.  The system task."""
        try:
            while await self._receive_ready():
                pass
        except (OSError, trio.ClosedResourceError, msgspec.MsgspecError) as exc:
            log.warning("the SFTP engine for %s is given up: %s", self._host, exc)
        finally:
            self._mark_dead()
            with trio.CancelScope(shield=True):
                await self._bury()

    async def _receive_ready(self) -> bool:
        await trio.lowlevel.wait_readable(self._socket)
        self.last_heard = trio.current_time()
        for _ in range(PACKETS_PER_TURN):
            try:
                packet = self._socket.recv(PACKET_BYTES_MAX)
            except BlockingIOError:
                break
            if not packet:
                return False
            for report in _decoder.decode(packet):
                if isinstance(report, Noted):
                    log.info("ssh: %s", report.text)
                elif (exchange := self._exchanges.get(report.op)) is not None:
                    exchange.deliver(report)
        return True

    def kill(self, reason: str) -> None:
        log.error("the SFTP engine for %s is ended: %s", self._host, reason)
        self._child.kill()
        self._mark_dead()

    async def end(self) -> None:
        """Ask it to end, and see that it does."""
        if not self.dead:
            self._mark_dead()
            self._socket.shutdown(socket.SHUT_RDWR)
        await self.reaped()

    async def reaped(self) -> None:
        with trio.CancelScope(shield=True):
            await self._gone.wait()

    def _mark_dead(self) -> None:
        self.dead = True
        for exchange in self._exchanges.values():
            exchange.engine_died()

    async def _bury(self) -> None:
        trio.lowlevel.notify_closing(self._socket)
        self._socket.close()
        pidfd = os.pidfd_open(self._child.pid)
        for timeout_s in (END_TIMEOUT_S, END_TIMEOUT_S):
            with trio.move_on_after(timeout_s):
                await trio.lowlevel.wait_readable(pidfd)
                break
            self._child.kill()
        os.close(pidfd)
        if self._child.poll() is None:
            log.error(
                "the SFTP engine for %s cannot be ended (pid %d)", self._host, self._child.pid
            )
        said = os.pread(self._stderr_fd, STDERR_BYTES_MAX, 0).decode("utf-8", "replace")
        os.close(self._stderr_fd)
        if said:
            log.error("the SFTP engine for %s failed: %s", self._host, said)
        self._gone.set()


async def start(connect: Connect) -> Engine:
    """A running engine.  Raises RemoteUnavailable when no process can be started."""
    with contextlib.ExitStack() as undo:
        ours, theirs = socket_pair()
        undo.callback(ours.close)
        ours.setblocking(False)
        stderr_fd = os.memfd_create("sftp-engine-stderr")
        undo.callback(os.close, stderr_fd)
        with theirs:
            try:
                child = await trio.to_thread.run_sync(_spawn, theirs, stderr_fd, connect.host)
            except OSError as exc:
                raise RemoteUnavailable(
                    f"The process that speaks SFTP with {connect.host} cannot be started "
                    f"({exc.strerror})."
                ) from exc
        engine = Engine(child, ours, stderr_fd, connect)
        undo.pop_all()
    engine.post(connect)
    trio.lowlevel.spawn_system_task(engine.receive, name=f"SFTP engine for {connect.host}")
    return engine


def _spawn(theirs: socket.socket, stderr_fd: int, host: str) -> subprocess.Popen[bytes]:
    # -P: nothing is imported from the daemon's working directory.  What is written to stderr
    # is taken for the cause of an end: no warnings there.
    return subprocess.Popen(
        [sys.executable, "-P", "-W", "ignore", "-m", ENGINE_MODULE, str(theirs.fileno()), host],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr_fd,
        pass_fds=[theirs.fileno()],
        start_new_session=True,
    )
