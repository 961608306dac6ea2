"""Few handles at the server, a daemon that is slow to take reports: limits that must hold."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from stagefs.config import SshSettings
from stagefs.model import WholeObject
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.settings import RemoteSettings
from stagefs.remote.sftp_messages import (
    PACKET_BYTES_MAX,
    AnyReport,
    Connect,
    FetchWhole,
    Order,
    Whole,
    socket_pair,
)
from stagefs.remote.ssh import SshRemote
from stagefs.remote.url import quote_path
from tests.support.sshd import SFTP_SERVER
from tests.support.waiting import wait_until
from tests.unit.remote_ssh.sinks import Item


def local_server(directory: Path, limit: str) -> Path:
    """The real SFTP server without a network, in place of the ssh program."""
    path = directory / "local-ssh"
    path.write_text(
        f'#!/bin/sh\nfor word in "$@"; do [ "$word" = -G ] && exit 0; done\n'
        f"{limit}\nexec {SFTP_SERVER}\n"
    )
    path.chmod(0o755)
    return path


async def test_a_batch_needs_no_more_handles_than_the_server_has(directory: Path) -> None:
    for number in range(500):
        (directory / f"file{number}").write_bytes(b"%d" % number)
    program = local_server(directory, "ulimit -n 24")
    settings = RemoteSettings(ssh=SshSettings(program=str(program), client="openssh"))
    remote = SshRemote("ssh://local", settings, CredentialStore(None))
    paths = [quote_path(str(directory / f"file{number}")) for number in range(500)]
    results = await remote.fetch_batch([Item(f"ssh://local{path}") for path in paths])
    for number, result in enumerate(results):
        assert isinstance(result, WholeObject), result
        assert result.data == b"%d" % number
    await remote.aclose()


class RawEngine:
    """An engine that is given orders by hand."""

    def __init__(self, program: Path) -> None:
        self.socket, theirs = socket_pair()
        with theirs:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "stagefs.remote.sftp_engine", str(theirs.fileno()), "local"],
                pass_fds=[theirs.fileno()],
            )
        self.order(
            Connect(
                op=0,
                host="local",
                port=None,
                user=None,
                password=None,
                config=None,
                client="openssh",
                program=str(program),
                connections=1,
                ciphers=None,
                connect_timeout_s=60,
                answer_timeout_s=60,
                progress_timeout_s=60,
            )
        )

    def order(self, order: Order) -> None:
        self.socket.send(msgspec.msgpack.encode(order))

    def status(self, name: str) -> str:
        for line in Path(f"/proc/{self.child.pid}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return value.strip()
        raise KeyError(name)

    def bytes_read(self) -> int:
        text = Path(f"/proc/{self.child.pid}/io").read_text()
        return int(text.splitlines()[0].partition(":")[2])


@pytest.fixture
def engine(directory: Path) -> Iterator[RawEngine]:
    made = RawEngine(local_server(directory, ":"))
    yield made
    made.socket.close()
    made.child.wait(20)


def test_a_daemon_that_takes_nothing_makes_the_engine_wait(
    engine: RawEngine, directory: Path
) -> None:
    path = directory / "object"
    path.write_bytes(os.urandom(65536))
    count = 3000
    for op in range(1, count // 100 + 1):
        engine.order(FetchWhole(op, [(os.fsencode(path), None)] * 100, 65536))
    seen = [-1, -2]

    def at_rest() -> bool:
        seen.append(engine.bytes_read())
        return len(set(seen[-20:])) == 1 and seen[-1] > 4 << 20

    wait_until(at_rest, "the engine waits for the daemon")
    assert seen[-1] < 60 << 20
    engine.socket.settimeout(20)
    taken = 0
    while taken < count:
        for report in msgspec.msgpack.decode(
            engine.socket.recv(PACKET_BYTES_MAX), type=list[AnyReport]
        ):
            taken += isinstance(report, Whole)
    assert int(engine.status("VmHWM").split()[0]) < 120_000


def test_the_engine_ends_with_its_socket(engine: RawEngine) -> None:
    engine.order(FetchWhole(1, [(b"/etc/passwd", None)], 65536))
    engine.socket.settimeout(20)
    assert engine.socket.recv(PACKET_BYTES_MAX)
    engine.socket.shutdown(socket.SHUT_RDWR)
    assert engine.child.wait(20) == 0
