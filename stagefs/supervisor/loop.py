"""The life of one mount: start, wait, bring back a daemon that died, end.

One thread waits for five things at once: signals, what the daemon says, the end of the
process that the lifetime names, the end of the connection, and the clock.  Whatever may
block in the kernel is done elsewhere (``children``), so a signal is never missed.
"""

import json
import logging
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from stagefs.supervisor import leftovers, mounts, wire
from stagefs.supervisor.children import reap_late, start_child
from stagefs.supervisor.daemons import Credentials, Daemon, Status, describe_exit
from stagefs.supervisor.lifetime import LivingProcess, read_process
from stagefs.supervisor.memory import SharedMemory
from stagefs.supervisor.repetitions import drop_answered_notes

log = logging.getLogger("stagefs.supervisor")

TICK_S = 1.0
INIT_TIMEOUT_S = 30.0
FAILURES_MAX = 5
# A pause before the next start, doubled from death to death.  It stays short for daemons
# that got some work done, and starts anew after one that lived for a while.
BACKOFF_FIRST_S, BACKOFF_WORKING_MAX_S, BACKOFF_MAX_S = 0.1, 1.0, 10.0
GOOD_LIFE_S = 10.0
# After the mount is gone the daemon should end by itself; then it is asked, then forced.
END_BY_ITSELF_S = 2.0
EXIT_FAILED = 1


@dataclass(frozen=True)
class Options:
    mountpoint: str
    state: Path
    daemon_argv: Sequence[str]
    allow_other: bool
    resend: bool
    lifetime: LivingProcess | None
    owner: mounts.Owner
    credentials: Credentials | None
    read_ahead_kib: int
    start_timeout_s: float
    stop_timeout_s: float


class Supervisor:
    """Invariant: at most one daemon lives, and none while the queue is put in order."""

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
        self._wake, wake = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self._stop_reason: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._note_stop)
        signal.signal(signal.SIGCHLD, _note_nothing)
        self._lifetime_fd = _open_pidfd(options.lifetime)
        self._failures = 0
        self._backoff_s = 0.0

    def _note_stop(self, number: int, _frame: object) -> None:
        self._stop_reason = f"{signal.Signals(number).name} received"

    def _is_stopping(self) -> bool:
        return self._stop_reason is not None

    def run(self) -> int:
        """Mount, serve until the end, and return the exit code.  Raises Refused at the start."""
        options = self._options
        if mounts.clear_stale(options.mountpoint):
            log.warning("cleared a stale mount on %s", options.mountpoint)
        mounts.check_mountpoint(options.mountpoint)
        self._device = mounts.mount(
            options.mountpoint, allow_other=options.allow_other, owner=options.owner
        )
        try:
            self._answer_init()
            return self._serve()
        finally:
            self._detach()

    def _answer_init(self) -> None:
        mounted = mounts.mounted_at(self._options.mountpoint)
        if mounted is None or mounted.fs_type != mounts.FS_TYPE:
            raise mounts.Refused(
                f"Cannot mount on {self._options.mountpoint}: the mount does not show in "
                "/proc/self/mountinfo; is the path inside another mount namespace?"
            )
        self._mounted, self._connection = mounted, mounted.connection
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
        mounts.raise_read_ahead(mounted.device, self._options.read_ahead_kib)
        log.info(
            "mounted %s, connection %d, protocol 7.%d, %s",
            self._options.mountpoint,
            self._connection,
            init.minor,
            "RESEND" if self._resend else "no RESEND",
        )

    # ---- the daemon's life -------------------------------------------------------------

    def _serve(self) -> int:
        self._memory.begin_generation(None, first=True)
        self._start()
        status = self._wait_ready()
        if status.ready is None:
            self._end_daemon(ask=False)
            raise mounts.Refused(status.error, status.exit_code)
        self._write_record()
        self._tell_ready(Status(status.ready | self._facts()))
        try:
            while True:
                reason = self._wait_for_end()
                if reason is not None:
                    log.info("ending: %s", reason)
                    return self._end()
                if not self._bring_back():
                    return self._give_up()
        except leftovers.Disconnected:
            log.info("ending: the mount is gone")
            return self._end()

    def _start(self) -> None:
        self._answered_before = self._memory.answered
        try:
            self._daemon = Daemon(
                self._options.daemon_argv,
                device=self._device,
                memory=self._memory.fd,
                init=self._init,
                output=self._output,
                credentials=self._options.credentials,
            )
        except OSError as exc:
            raise mounts.Refused(f"The daemon cannot be started: {exc}.", EXIT_FAILED) from exc
        log.info("daemon %d started", self._daemon.pid)

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
            if self._lifetime_over():
                return "the process that the lifetime names has ended"
            if leftovers.is_disconnected(self._device):
                return "unmounted from outside"
            if self._daemon.exit_status() is not None or self._daemon.is_stuck():
                return None
            if self._sweep.pending:
                self._sweep.advance()
            watched = [self._device]
            if self._lifetime_fd is not None:
                watched.append(self._lifetime_fd)
            self._wait_once(*watched, timeout_s=0 if self._sweep.pending else TICK_S)

    def _bring_back(self) -> bool:
        """Reap the dead daemon, put the queue in order, start the next.  False: hopeless."""
        self._note_death()
        while self._failures < FAILURES_MAX:
            self._back_off()
            if self._is_stopping():
                return True
            self._put_queue_in_order()
            self._start()
            status = self._wait_ready()
            if status.ready is not None:
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
        self._failures = 0 if answered else self._failures + 1
        if self._daemon.lived_s >= GOOD_LIFE_S:
            self._backoff_s = 0.0
        self._daemon.close()

    def _back_off(self) -> None:
        deadline = time.monotonic() + self._backoff_s
        while not self._stop_reason and (left := deadline - time.monotonic()) > 0:
            self._wait_once(timeout_s=left)
        longest = BACKOFF_MAX_S if self._failures else BACKOFF_WORKING_MAX_S
        self._backoff_s = min(max(self._backoff_s * 2, BACKOFF_FIRST_S), longest)

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

    def _end(self) -> int:
        """Unmount while the daemon can still answer, then let it finish its work."""
        gone = leftovers.is_disconnected(self._device) or self._unmount(lazy=False)
        self._end_daemon(ask=not gone)
        self._remove_record()
        log.info("ended")
        return 0

    def _give_up(self) -> int:
        log.critical(
            "giving up on %s: %d daemons in a row died without answering a request; "
            "unmounting, open files get ENOTCONN",
            self._options.mountpoint,
            self._failures,
        )
        self._remove_record()
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
        """Take the mount away whoever uses it, and end the connection."""
        if not leftovers.is_disconnected(self._device) or self._is_mounted():
            self._unmount(lazy=True)
        os.close(self._device)

    def _is_mounted(self) -> bool:
        mounted = mounts.mounted_at(self._options.mountpoint)
        return mounted is not None and mounted.connection == self._connection

    # ---- waiting, and what others read ------------------------------------------------

    def _wait_once(self, *watched: int, timeout_s: float = TICK_S) -> None:
        """Until a signal, a word, an end, or the clock; the caller looks what it was."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for fd in watched:
            # Requests in the device are the daemon's; only the end of the connection is ours.
            poll.register(fd, 0 if fd == self._device else select.POLLIN)
        ready = dict(poll.poll(timeout_s * 1000))
        if self._wake in ready:
            os.read(self._wake, 4096)
        reap_late()

    def _lifetime_over(self) -> bool:
        named = self._options.lifetime
        return named is not None and not named.is_alive()

    def _facts(self) -> dict[str, object]:
        return {
            "mountpoint": self._options.mountpoint,
            "state": str(self._options.state),
            "connection": self._connection,
            "supervisor_pid": os.getpid(),
            "resend": self._resend,
        }

    @property
    def _record(self) -> Path:
        return self._options.state / "supervisor.json"

    def _write_record(self) -> None:
        """STATE/supervisor.json: who holds this mount, for the commands that look for it."""
        this = read_process(os.getpid())
        record = self._facts() | {
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "start_time": this.start_time if this else 0,
        }

        def write() -> None:
            partial = self._record.with_suffix(".partial")
            partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
            partial.replace(self._record)

        self._as_owner(write)

    def _remove_record(self) -> None:
        self._as_owner(lambda: self._record.unlink(missing_ok=True))


def _note_nothing(_number: int, _frame: object) -> None:
    """SIGCHLD only has to wake the loop."""


def _open_pidfd(living: LivingProcess | None) -> int | None:
    """Wakes the loop at the end of that process; without it the clock does, within a second."""
    if living is None:
        return None
    try:
        return os.pidfd_open(living.pid)
    except OSError:
        return None
