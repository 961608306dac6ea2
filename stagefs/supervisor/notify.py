"""What a service manager is told (sd_notify(3)): ready, alive, stopping.

Nothing is told without the socket that the unit's Type=notify brings.  A message that cannot be
delivered is dropped: the mount must not depend on who watches it.
"""

import contextlib
import os
import socket
import time

ALIVE_EVERY_S = 5.0


class ServiceManager:
    """``address``: the value of NOTIFY_SOCKET, or None."""

    def __init__(self, address: str | None) -> None:
        self.address = address
        self._alive_at_s = 0.0

    def ready(self, status: str) -> None:
        """This process is the one to watch: whoever started it may have ended."""
        self._tell("READY=1", f"MAINPID={os.getpid()}", f"STATUS={status}")

    def alive(self) -> None:
        """To be called often; the unit's WatchdogSec should be a minute or more."""
        now = time.monotonic()
        if now - self._alive_at_s >= ALIVE_EVERY_S:
            self._alive_at_s = now
            self._tell("WATCHDOG=1")

    def status(self, sentence: str) -> None:
        self._tell(f"STATUS={sentence}")

    def handed_over_to(self, pid: int) -> None:
        self._tell(f"MAINPID={pid}", "STATUS=handed over to another supervisor")

    def stopping(self, reason: str) -> None:
        self._tell("STOPPING=1", f"STATUS={reason}")

    def _tell(self, *lines: str) -> None:
        if self.address is None:
            return
        address = f"\0{self.address[1:]}" if self.address.startswith("@") else self.address
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock,
        ):
            sock.sendto("\n".join(lines).encode(), address)
