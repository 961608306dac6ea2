"""An FTP server (pyftpdlib) that serves a directory to anybody; run as a program by ``Ftp``.

``secret...`` may not be read.
"""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.ports import free_ports
from tests.support.waiting import wait_until

_SERVE = """
import sys
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import ThreadedFTPServer
class Authorizer(DummyAuthorizer):
    def has_perm(self, username, perm, path=None):
        secret = perm == "r" and path is not None and path.rpartition("/")[2].startswith("secret")
        return not secret and super().has_perm(username, perm, path)
authorizer = Authorizer()
authorizer.add_anonymous(sys.argv[1])
FTPHandler.authorizer = authorizer
ThreadedFTPServer(("127.0.0.1", int(sys.argv[2])), FTPHandler).serve_forever()
"""


class Ftp:
    """A running server.  ``root`` is the directory that it serves."""

    def __init__(self, top: Path) -> None:
        self.root = top / "objects"
        self.root.mkdir(parents=True)
        (self.port,) = free_ports(1)
        with (top / "log").open("wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", _SERVE, str(self.root), str(self.port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(self._answers, "the FTP server")

    def stop(self) -> None:
        self._child.terminate()
        self._child.wait(10)

    def _answers(self) -> bool:
        assert self._child.poll() is None, "the FTP server ended"
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0


@contextmanager
def running_ftp(top: Path) -> Iterator[Ftp]:
    server = Ftp(top)
    try:
        yield server
    finally:
        server.stop()
