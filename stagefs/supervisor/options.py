"""What the command line of one supervisor says."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stagefs.supervisor.daemons import Credentials
from stagefs.supervisor.lifetime import Lifetime
from stagefs.supervisor.mounts import Owner


@dataclass(frozen=True)
class Options:
    mountpoint: str
    state: Path
    daemon_argv: Sequence[str]
    allow_other: bool
    resend: bool
    lifetime: Lifetime | None
    owner: Owner
    credentials: Credentials | None
    read_ahead_kib: int
    start_timeout_s: float
    stop_timeout_s: float
    probe_period_s: float
    probe_timeout_s: float
    standby_after_s: float
    notify_socket: str | None
    replace: bool
    keeps_lifetime: bool  # with ``replace``: the lifetime is the one of the mount so far
