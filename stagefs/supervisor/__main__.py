"""``python -m stagefs.supervisor --mountpoint MNT --state DIR ... -- DAEMON ARGUMENTS...``.

Started by ``stagefs mount``, in a session of its own unless in the foreground.  Writes one
line of JSON to ``--ready-fd``: {"ready": {...}}, or {"error": sentence, "exit_code": n}.
Its log is STATE/supervisor.log; the daemon's standard output and error go there too.
"""

import argparse
import json
import logging
import os
import pwd
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stagefs.supervisor import log_file
from stagefs.supervisor.daemons import Credentials, Status
from stagefs.supervisor.lifetime import parse_lifetime
from stagefs.supervisor.loop import Supervisor
from stagefs.supervisor.mounts import Owner, Refused
from stagefs.supervisor.options import Options


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    ready = ReadyPipe(arguments.ready_fd)
    try:
        credentials = _credentials(arguments.user)
        options = _options(arguments, credentials)
        with _acting_as(credentials):
            output = _open_log(options.state)
        supervisor = Supervisor(
            options, output=output, tell_ready=ready.tell, as_owner=_runner(credentials)
        )
        return supervisor.run()
    except Refused as exc:
        logging.getLogger("stagefs.supervisor").critical("%s", exc)
        ready.tell(Status(None, str(exc), exc.exit_code))
        return exc.exit_code


class ReadyPipe:
    """Tells the mount command, once; without a pipe an error goes to standard error."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd
        if fd is not None:
            os.set_inheritable(fd, False)

    def tell(self, status: Status) -> None:
        if self._fd is None:
            if status.ready is None:
                sys.stderr.write(f"{status.error}\n")
            return
        if status.ready is not None:
            said: dict[str, object] = {"ready": status.ready}
        else:
            said = {"error": status.error, "exit_code": status.exit_code}
        fd, self._fd = self._fd, None
        try:
            os.write(fd, json.dumps(said).encode() + b"\n")
        except BrokenPipeError:
            logging.getLogger("stagefs.supervisor").warning("nobody waits for the mount")
        finally:
            os.close(fd)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stagefs.supervisor", allow_abbrev=False)
    parser.add_argument("--mountpoint", required=True)
    parser.add_argument("--state", required=True, type=Path)
    parser.add_argument("--allow-other", action="store_true")
    parser.add_argument("--user", help="as root: mount and run the daemon for this user")
    parser.add_argument("--lifetime", help="pid:N, job or forever (the default)")
    parser.add_argument("--replace", action="store_true", help="take over from the running one")
    parser.add_argument("--ready-fd", type=int)
    parser.add_argument("--no-resend", action="store_true", help="as on kernels before 6.9")
    parser.add_argument("--read-ahead-kib", type=int, default=512)
    parser.add_argument("--start-timeout-s", type=float, default=120.0)
    parser.add_argument("--stop-timeout-s", type=float, default=30.0)
    parser.add_argument("--probe-period-s", type=float, default=5.0)
    parser.add_argument("--probe-timeout-s", type=float, default=15.0, help="0: never look")
    parser.add_argument("--standby-after-s", type=float, default=0.0, help="0: never")
    parser.add_argument("--notify-socket", help="of the service manager: its NOTIFY_SOCKET")
    parser.add_argument("daemon", nargs="+")
    return parser


def _options(arguments: argparse.Namespace, credentials: Credentials | None) -> Options:
    try:
        lifetime = parse_lifetime(arguments.lifetime or "forever")
    except ValueError as exc:
        raise Refused(str(exc)) from exc
    if credentials:
        owner = Owner(credentials.uid, credentials.gid)
    else:
        owner = Owner(os.getuid(), os.getgid())
    return Options(
        # fusermount3 and mountinfo know only the path that is left when no link is.
        mountpoint=os.path.realpath(arguments.mountpoint),
        state=arguments.state.absolute(),
        daemon_argv=arguments.daemon,
        allow_other=arguments.allow_other,
        resend=not arguments.no_resend,
        lifetime=lifetime,
        owner=owner,
        credentials=credentials,
        read_ahead_kib=arguments.read_ahead_kib,
        start_timeout_s=arguments.start_timeout_s,
        stop_timeout_s=arguments.stop_timeout_s,
        probe_period_s=arguments.probe_period_s,
        probe_timeout_s=arguments.probe_timeout_s,
        standby_after_s=arguments.standby_after_s,
        notify_socket=arguments.notify_socket,
        replace=arguments.replace,
        keeps_lifetime=arguments.lifetime is None,
    )


def _credentials(user: str | None) -> Credentials | None:
    if user is None:
        return None
    if os.geteuid() != 0:
        raise Refused(f"Cannot mount for {user}: only root mounts for another user.")
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise Refused(f"Cannot mount for {user}: there is no such user.") from None
    return Credentials(entry.pw_uid, entry.pw_gid, tuple(os.getgrouplist(user, entry.pw_gid)))


@contextmanager
def _acting_as(credentials: Credentials | None) -> Iterator[None]:
    """Files in a user's state directory are opened as that user: root follows no link of his."""
    if credentials is None:
        yield
        return
    os.setegid(credentials.gid)
    os.seteuid(credentials.uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def _runner(credentials: Credentials | None) -> Callable[[Callable[[], None]], None]:
    def run(action: Callable[[], None]) -> None:
        with _acting_as(credentials):
            action()

    return run


def _open_log(state: Path) -> int:
    try:
        output = log_file.open_log(state)
    except OSError as exc:
        raise Refused(f"Cannot write {state / log_file.NAME}: {exc.strerror}.") from exc
    formatter = logging.Formatter("%(asctime)s %(levelname)s supervisor %(process)d: %(message)s")
    formatter.converter = time.gmtime
    stream = logging.StreamHandler(os.fdopen(output, "a", encoding="utf-8", closefd=False))
    stream.setFormatter(formatter)
    logger = logging.getLogger("stagefs.supervisor")
    logger.addHandler(stream)
    logger.setLevel(logging.INFO)
    return output


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
