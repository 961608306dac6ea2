"""Ports for servers of the tests, several runs of which may share a machine.

A server is told its port, binds it a while later, and binds it again when it is started anew.  What
the kernel chooses for a port 0 may be given to somebody's outgoing connection meanwhile; so these
ports lie below the range that the kernel chooses from, and each process begins elsewhere.
"""

import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path

FIRST, USUAL_END = 10_000, 32_768
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
# Processes that are started together have numbers next to each other.
APART = 641


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all different."""
    return list(itertools.islice(_free, count))


def _free_ones() -> Iterator[int]:
    # Where the kernel chooses from all ports, there are none that it leaves alone.
    end = int(EPHEMERAL.read_text().split()[0])
    number = (end if end > FIRST else USUAL_END) - FIRST
    for step in itertools.count(os.getpid() * APART):
        port = FIRST + step % number
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield port


_free = _free_ones()
