"""A WebDAV server: WsgiDAV on cheroot, in a process of its own, on a free loopback port.

Everything below its directory may be read and written by anybody; ``/private`` wants a user.
"""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.ports import free_ports
from tests.support.waiting import wait_until

_RUN = "from wsgidav.server.server_cli import run; run()"


class WebDav:
    """A running server.  ``root`` is the directory that it serves."""

    def __init__(self, top: Path) -> None:
        self.root = top / "objects"
        self.root.mkdir(parents=True)
        self._private = top / "private"
        self._private.mkdir()
        (self.port,) = free_ports(1)
        config = {
            "host": "127.0.0.1",
            "port": self.port,
            "provider_mapping": {"/": str(self.root), "/private": str(self._private)},
            "simple_dc": {"user_mapping": {"*": True, "/private": {"ada": {"password": "x"}}}},
            "http_authenticator": {"domain_controller": None},
            "hotfixes": {"re_encode_path_info": True},
            "property_manager": None,
            "lock_storage": False,
            "verbose": 1,
        }
        path = top / "wsgidav.json"
        path.write_text(json.dumps(config))
        with (top / "log").open("wb") as log:
            self._child = subprocess.Popen(
                [sys.executable, "-c", _RUN, "--config", str(path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=top,
            )
        wait_until(self._answers, "WsgiDAV")

    @property
    def url(self) -> str:
        return f"webdav://127.0.0.1:{self.port}"

    def forbid(self, name: str, data: bytes) -> str:
        """The URL of an object that only a user may read."""
        (self._private / name).write_bytes(data)
        return f"{self.url}/private/{name}"

    def stop(self) -> None:
        self._child.terminate()
        self._child.wait(10)

    def _answers(self) -> bool:
        assert self._child.poll() is None, "WsgiDAV ended"
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0


@contextmanager
def running_webdav(top: Path) -> Iterator[WebDav]:
    server = WebDav(top)
    try:
        yield server
    finally:
        server.stop()
