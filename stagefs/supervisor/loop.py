"""The life of one mount: start, wait, bring back a daemon that died, end.

One thread waits for six things at once: signals, what the daemon says, the end of the process
that the lifetime names, the end of the connection, another supervisor, and the clock.  Whatever may
block in the kernel is done elsewhere (``children``), so a signal is never missed.
"""

import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence

from stagefs.supervisor import handover, leftovers, log_file, mounts, oom, wire
from stagefs.supervisor.backoff import Backoff
from stagefs.supervisor.children import reap_late, start_child
from stagefs.supervisor.daemons import Daemon, Status, describe_exit
from stagefs.supervisor.lifetime import open_pidfd
from stagefs.supervisor.memory import SharedMemory
from stagefs.supervisor.notify import ServiceManager
from stagefs.supervisor.options import Options
from stagefs.supervisor.record import Record
from stagefs.supervisor.repetitions import drop_answered_notes
from stagefs.supervisor.standby import Standby
from stagefs.supervisor.waiting import Waiting
from stagefs.supervisor.watchdog import Watchdog

log = logging.getLogger("stagefs.supervisor")

TICK_S = 1.0
INIT_TIMEOUT_S = 30.0
FAILURES_MAX = 5
# After the mount is gone the daemon should end by itself; then it is asked, then forced.
END_BY_ITSELF_S = 2.0
# A daemon that does not answer is first asked to write down what it is doing.
LAST_WORDS_S = 0.5
# Where the kernel does not send requests again, those in work get so long to be answered before
# another supervisor takes over.
FINISH_S = 2.0
TAKE_OVER = "another supervisor takes the mount over"
EXIT_FAILED = 1


class Supervisor:
    """Invariant: at most one daemon serves, and none while the queue is put in order."""

    def __init__(
        self,
        options: Options,
        *,
        output: int,
        tell_ready: Callable[[Status], None],
        as_owner: Callable[[Callable[[], None]], None],
    ) -> None:
        self._options = options
        self._output = output
        self._tell_ready = tell_ready
        self._as_owner = as_owner
        self._waiting = Waiting()
        self._lifetime = options.lifetime
        self._failures = 0
        self._backoff = Backoff()
        self._record = Record(options.state, as_owner)
        self._service = ServiceManager(options.notify_socket)
        self._handed_over = False
        self._standby = Standby(self._new_daemon, after_s=options.standby_after_s)

    @property
    def _stop_reason(self) -> str | None:
        return self._waiting.stop_reason

    def _is_stopping(self) -> bool:
        return self._stop_reason is not None

    def run(self) -> int:
        """Mount, serve until the end, and return the exit code.  Raises Refused at the start."""
        options = self._options
        oom.adjust(os.getpid(), oom.SUPERVISOR_SCORE)
        if options.replace:
            return self._run_taken(handover.take(options.state, timeout_s=options.start_timeout_s))
        if mounts.clear_stale(options.mountpoint):
            log.warning("cleared a stale mount on %s", options.mountpoint)
        mounts.check_mountpoint(options.mountpoint)
        self._device = mounts.mount(
            options.mountpoint, allow_other=options.allow_other, owner=options.owner
        )
        try:
            self._answer_init()
            return self._serve(taken=None)
        finally:
            self._detach()

    def _run_taken(self, taken: handover.Taken) -> int:
        """Go on with the mount of another supervisor.  If that fails it is still the other's."""
        self._device, facts = taken.device, taken.facts
        self._handed_over = True  # until this process is the one that must unmount
        try:
            self._find_mount()
            self._memory = SharedMemory.adopted(taken.memory)
        except ValueError as exc:
            raise mounts.Refused(
                f"Cannot take {self._options.mountpoint} over: {exc}; unmount it and mount again."
            ) from exc
        self._init, self._resend = bytes.fromhex(facts.init), facts.resend
        if self._options.keeps_lifetime:
            self._lifetime = facts.lifetime
        if self._service.address is None:
            self._service = ServiceManager(facts.notify_socket)
        self._sweep = leftovers.StaleSweep(self._device, self._connection)
        log.info("taking over %s, connection %d", self._options.mountpoint, self._connection)
        try:
            return self._serve(taken=taken)
        finally:
            self._detach()

    def _find_mount(self) -> None:
        mounted = mounts.mounted_at(self._options.mountpoint)
        if mounted is None or mounted.fs_type != mounts.FS_TYPE:
            raise mounts.Refused(
                f"Cannot mount on {self._options.mountpoint}: the mount does not show in "
                "/proc/self/mountinfo; is the path inside another mount namespace?"
            )
        self._mounted, self._connection = mounted, mounted.connection

    def _answer_init(self) -> None:
        self._find_mount()
        poll = select.poll()
        poll.register(self._device, select.POLLIN)
        if not poll.poll(INIT_TIMEOUT_S * 1000):
            raise mounts.Refused("Cannot mount: the kernel sent no INIT.")
        try:
            init = wire.parse_init(os.read(self._device, wire.REQUEST_BYTES_MAX))
        except ValueError as exc:
            raise mounts.Refused(f"Cannot mount: {exc}.") from exc
        os.write(self._device, wire.init_reply(init))
        self._init = wire.replayed_init(init)
        self._resend = self._options.resend and init.can_resend
        self._memory = SharedMemory(can_resend=self._resend)
        self._sweep = leftovers.StaleSweep(self._device, self._connection)
        mounts.raise_read_ahead(self._mounted.device, self._options.read_ahead_kib)
        log.info(
            "mounted %s, connection %d, protocol 7.%d, %s",
            self._options.mountpoint,
            self._connection,
            init.minor,
            "RESEND" if self._resend else "no RESEND",
        )

    # ---- the daemon's life -------------------------------------------------------------

    def _serve(self, *, taken: handover.Taken | None) -> int:
        if taken is None:
            self._memory.begin_generation(None, first=True)
        else:
            self._put_queue_in_order()
        self._start(kept_open=[taken.connection.fileno()] if taken else [])
        status = self._wait_ready()
        if status.ready is None:
            self._end_daemon(ask=False)
            raise mounts.Refused(status.error, status.exit_code)
        self._lifetime_fd = open_pidfd(self._lifetime)
        self._watchdog = Watchdog(
            lambda: mounts.ask(self._mounted),
            answered=lambda: self._memory.answered,
            connection=self._connection,
            period_s=self._options.probe_period_s,
            patience_s=self._options.probe_timeout_s,
        )
        self._record.write(self._facts())
        self._offer = handover.Offer(self._options.state, self._as_owner)
        if taken is not None:
            taken.done()
            self._handed_over = False
        self._service.ready(f"{self._options.mountpoint} is mounted")
        self._tell_ready(Status(status.ready | self._facts()))
        try:
            return self._go_on()
        except leftovers.Disconnected:
            return self._end("the mount is gone")
        finally:
            self._standby.end()

    def _go_on(self) -> int:
        while True:
            reason = self._wait_for_end()
            if reason is not None and reason is not TAKE_OVER:
                return self._end(reason)
            if reason is TAKE_OVER and self._hand_over():
                return 0
            if not self._bring_back():
                return self._give_up()
            self._watchdog.begin()

    def _start(self, kept_open: Sequence[int] = ()) -> None:
        self._answered_before = self._memory.answered
        try:
            self._daemon = self._standby.take() or self._new_daemon(kept_open)
        except OSError as exc:
            raise mounts.Refused(f"The daemon cannot be started: {exc}.", EXIT_FAILED) from exc
        self._daemon.go(self._init)
        oom.adjust(self._daemon.pid, oom.DAEMON_SCORE)
        log.info("daemon %d started", self._daemon.pid)

    def _new_daemon(self, kept_open: Sequence[int] = ()) -> Daemon:
        return Daemon(
            self._options.daemon_argv,
            device=self._device,
            memory=self._memory.fd,
            output=self._output,
            credentials=self._options.credentials,
            kept_open=kept_open,
        )

    def _wait_ready(self) -> Status:
        """The daemon's word; a made-up one when it ends, is too slow, or is to be stopped."""
        deadline = time.monotonic() + self._options.start_timeout_s
        while time.monotonic() < deadline:
            self._wait_once(self._daemon.status_fd)
            if self._stop_reason:
                return Status(None, f"Stopped before the mount was ready: {self._stop_reason}.")
            if leftovers.is_disconnected(self._device):
                raise leftovers.Disconnected
            try:
                status = self._daemon.read_status()
            except EOFError:
                return Status(None, self._silent_end())
            if status is not None:
                return status
        self._daemon.send(signal.SIGKILL)
        return Status(
            None, f"The daemon was not ready within {self._options.start_timeout_s:.0f} s."
        )

    def _silent_end(self) -> str:
        deadline = time.monotonic() + END_BY_ITSELF_S
        while self._daemon.exit_status() is None and time.monotonic() < deadline:
            self._wait_once()
        status = self._daemon.exit_status()
        how = "closed its status pipe" if status is None else f"ended ({describe_exit(status)})"
        return (
            f"The daemon {how} before it was ready; its last words are in "
            f"{self._options.state / 'supervisor.log'}."
        )

    def _wait_for_end(self) -> str | None:
        """Until the daemon has died (None), or a reason to end the mount has come."""
        while True:
            if self._stop_reason:
                return self._stop_reason
            if self._lifetime is not None and not self._lifetime.is_alive():
                return "what the lifetime names has ended"
            if leftovers.is_disconnected(self._device):
                return "unmounted from outside"
            if self._daemon.exit_status() is not None or self._daemon.is_stuck():
                return None
            if self._sweep.pending:
                self._sweep.advance()
            elif self._watchdog.is_wedged():
                self._end_wedged()
            self._standby.tend(self._daemon)
            if log_file.is_full(self._output):
                self._rotate_log()
            # Not the device: each request that comes in would wake us, whatever we poll for.  The
            # daemon ends with the connection, and that wakes us; the clock does if it is stuck.
            watched = [] if self._lifetime_fd is None else [self._lifetime_fd]
            watched.append(self._offer.fd)
            ready = self._wait_once(*watched, timeout_s=0 if self._sweep.pending else TICK_S)
            if self._offer.fd in ready and self._taker_came():
                return TAKE_OVER

    def _end_wedged(self) -> None:
        """Kill a daemon that answers nobody.  Its end is noted as any other."""
        log.error(
            "daemon %d has answered nothing for %.0f s and is replaced",
            self._daemon.pid,
            self._options.probe_timeout_s,
        )
        self._watchdog.end()
        self._daemon.send(signal.SIGUSR1)
        self._daemon.wait(LAST_WORDS_S)
        self._daemon.send(signal.SIGKILL)

    # ---- handing the mount over ----------------------------------------------------------

    def _taker_came(self) -> bool:
        accepted = self._offer.accept()
        if accepted is None:
            return False
        self._taker, self._taker_pid = accepted
        return True

    def _hand_over(self) -> bool:
        """Let another supervisor go on.  False: it did not come to that; the daemon is gone."""
        log.info("%s, process %d", TAKE_OVER, self._taker_pid)
        self._watchdog.end()
        self._standby.end()
        if not self._resend:
            self._daemon.send(signal.SIGTERM)
            self._daemon.wait(FINISH_S)
        self._daemon.send(signal.SIGKILL)
        self._end_daemon(ask=False)
        facts = handover.Facts(
            init=self._init.hex(),
            resend=self._resend,
            lifetime=self._lifetime,
            notify_socket=self._service.address,
        )
        with self._taker as connection:
            try:
                handover.hand(connection, device=self._device, memory=self._memory.fd, facts=facts)
            except OSError as exc:
                log.warning("it has gone away again: %s", exc)
                return False
            self._handed_over = self._wait_for_taker(connection)
        if self._handed_over:
            self._service.handed_over_to(self._taker_pid)
            self._offer.end(remove=False)
            log.info("handed over to supervisor %d", self._taker_pid)
        else:
            log.error("supervisor %d gave up; going on without it", self._taker_pid)
            self._record.write(self._facts())
            self._offer.renew()
        return self._handed_over

    def _wait_for_taker(self, connection: socket.socket) -> bool:
        """Whether it goes on with the mount.  If not, it has ended, and so has its daemon."""
        deadline = time.monotonic() + self._options.start_timeout_s + self._options.stop_timeout_s
        while connection.fileno() not in self._wait_once(connection.fileno()):
            if time.monotonic() > deadline:
                log.error("supervisor %d does not get on and is killed", self._taker_pid)
                os.kill(self._taker_pid, signal.SIGKILL)
                deadline += self._options.stop_timeout_s
        return handover.is_done(connection)

    def _bring_back(self) -> bool:
        """Reap the dead daemon, put the queue in order, start the next.  False: hopeless."""
        self._note_death()
        self._service.status("bringing the daemon back")
        while self._failures < FAILURES_MAX:
            self._back_off()
            if self._is_stopping():
                return True
            self._put_queue_in_order()
            self._start()
            status = self._wait_ready()
            if status.ready is not None:
                self._service.status(f"{self._options.mountpoint} is mounted")
                return True
            if self._is_stopping():
                return True
            log.error("daemon %d did not become ready: %s", self._daemon.pid, status.error)
            self._end_daemon(ask=False)
            self._failures += 1
        return False

    def _note_death(self) -> None:
        status = self._daemon.exit_status()
        how = "stuck in the kernel after its end" if status is None else describe_exit(status)
        answered = self._memory.answered - self._answered_before
        log.error(
            "daemon %d died (%s) after %.1f s and %d answers",
            self._daemon.pid,
            how,
            self._daemon.lived_s,
            answered,
        )
        self._failures = 0 if answered or self._watchdog.heard else self._failures + 1
        self._backoff.note_life(self._daemon.lived_s, worked=not self._failures)
        self._daemon.close()

    def _back_off(self) -> None:
        deadline = time.monotonic() + self._backoff.next_pause_s(worked=not self._failures)
        while not self._stop_reason and (left := deadline - time.monotonic()) > 0:
            self._wait_once(timeout_s=left)

    def _put_queue_in_order(self) -> None:
        if self._resend:
            requests = leftovers.resend(self._device)
            log.info("%d requests were in flight and are sent again", len(requests))
            self._memory.begin_generation(requests, first=False)
        else:
            dropped = drop_answered_notes(self._memory.words)
            log.info("requests in flight get ESTALE; %d notes were of answered ones", dropped)
            self._sweep.begin(lambda: start_child(lambda: mounts.ask(self._mounted)))
            self._memory.begin_generation(None, first=False)

    # ---- the end -----------------------------------------------------------------------

    def _end(self, reason: str) -> int:
        """Unmount while the daemon can still answer, then let it finish its work."""
        log.info("ending: %s", reason)
        self._service.stopping(reason)
        self._watchdog.end()
        gone = leftovers.is_disconnected(self._device) or self._unmount(lazy=False)
        self._end_daemon(ask=not gone)
        self._offer.end(remove=True)
        self._record.remove()
        log.info("ended")
        return 0

    def _give_up(self) -> int:
        sentence = (
            f"Gave up on {self._options.mountpoint}: {self._failures} daemons in a row died "
            f"without answering a request; see {self._options.state}."
        )
        log.critical("giving up: %s Unmounting, open files get ENOTCONN.", sentence)
        self._service.stopping(sentence)
        self._offer.end(remove=True)
        self._record.fail(sentence)
        return EXIT_FAILED

    def _end_daemon(self, *, ask: bool) -> None:
        """Wait for the daemon's end; ask for it (at once, or after a while), then force it."""
        now = time.monotonic()
        ask_at = now if ask else now + END_BY_ITSELF_S
        force_at = now + self._options.stop_timeout_s
        asked = forced = False
        while self._daemon.exit_status() is None and not self._daemon.is_stuck():
            now = time.monotonic()
            if now >= force_at and not forced:
                log.error("daemon %d did not end in time and is killed", self._daemon.pid)
                self._daemon.send(signal.SIGKILL)
                forced = True
            elif now >= ask_at and not asked:
                self._daemon.send(signal.SIGTERM)
                asked = True
            self._wait_once()
        if self._daemon.exit_status() is None:
            self._release_stuck()
        self._daemon.close()

    def _release_stuck(self) -> None:
        """A dead daemon sits in the kernel and waits for an answer of its own.

        At the end of a mount nobody else gives it, and the connection, which the dead one
        still holds, would never close: every request is refused until it is gone.
        """
        log.error("daemon %d is dead and stuck in the kernel", self._daemon.pid)
        deadline = time.monotonic() + self._options.stop_timeout_s
        while self._daemon.exit_status() is None and time.monotonic() < deadline:
            if leftovers.is_disconnected(self._device):
                return
            if not leftovers.abort(self._connection):
                leftovers.refuse_all(self._device, resend_first=self._resend)
            self._wait_once()

    def _unmount(self, *, lazy: bool) -> bool:
        try:
            mounts.unmount(self._options.mountpoint, lazy=lazy)
        except mounts.Refused as exc:
            log.warning("%s", exc)
            return False
        return True

    def _detach(self) -> None:
        """Take the mount away whoever uses it, and end the connection; not if it is another's."""
        if self._handed_over:
            os.close(self._device)
            return
        mounted = mounts.mounted_at(self._options.mountpoint)
        is_ours = mounted is not None and mounted.connection == self._connection
        if is_ours or not leftovers.is_disconnected(self._device):
            self._unmount(lazy=True)
        os.close(self._device)

    # ---- waiting, and what others read ------------------------------------------------

    def _wait_once(self, *watched: int, timeout_s: float = TICK_S) -> set[int]:
        """Until a signal, a word, an end, or the clock; the caller looks what it was.

        Returns which of the watched have something to say.
        """
        self._service.alive()
        ready = self._waiting.once(*watched, timeout_s=timeout_s)
        reap_late()
        return ready

    def _facts(self) -> dict[str, object]:
        return {
            "mountpoint": self._options.mountpoint,
            "state": str(self._options.state),
            "connection": self._connection,
            "supervisor_pid": os.getpid(),
            "resend": self._resend,
        }

    def _rotate_log(self) -> None:
        try:
            self._as_owner(lambda: log_file.rotate(self._options.state, self._output))
        except OSError as exc:
            os.ftruncate(self._output, 0)
            log.warning("what this log held before could not be kept: %s", exc.strerror)
