"""Azurite, Microsoft's own stand-in for Azure's blob store, on a free loopback port.

From npm (``npm install azurite``); found on PATH or through AZURITE_BLOB.
"""

import base64
import email.utils
import hashlib
import hmac
import http.client
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from obstore.store import AzureStore

from stagefs.config import environment
from tests.support.ports import free_ports
from tests.support.waiting import wait_until

# The one account that every Azurite has, with the key that its documentation names.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
_VERSION = "2021-08-06"


def program() -> str | None:
    """None where Azurite is not installed."""
    named = environment().get("AZURITE_BLOB")
    return named if named and Path(named).exists() else shutil.which("azurite-blob")


class Azurite:
    """A running server."""

    def __init__(self, top: Path) -> None:
        found = program()
        assert found is not None, "Azurite is not installed (npm install -g azurite)"
        (self.port,) = free_ports(1)
        self._child = subprocess.Popen(
            [
                found,
                "--inMemoryPersistence",
                "--silent",
                "--skipApiVersionCheck",
                "--disableTelemetry",
                "--blobPort",
                str(self.port),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd=top,
        )
        wait_until(self._answers, "Azurite")

    @property
    def environment(self) -> Mapping[str, str]:
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT": f"http://127.0.0.1:{self.port}/{ACCOUNT}",
        }

    def container(self, name: str) -> AzureStore:
        return AzureStore(
            name,
            account_name=ACCOUNT,
            account_key=KEY,
            endpoint=self.environment["AZURE_STORAGE_ENDPOINT"],
            client_options={"allow_http": True},
        )

    def make_container(self, name: str) -> None:
        """By a request of its own: obstore makes objects only."""
        headers = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": _VERSION}
        canonical = "".join(f"{key}:{value}\n" for key, value in headers.items())
        text = f"PUT{chr(10) * 12}{canonical}/{ACCOUNT}/{ACCOUNT}/{name}\nrestype:container"
        signature = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
        signed = base64.b64encode(signature).decode()
        client = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        client.request(
            "PUT",
            f"/{ACCOUNT}/{name}?restype=container",
            headers={
                **headers,
                "Authorization": f"SharedKey {ACCOUNT}:{signed}",
                "Content-Length": "0",
            },
        )
        response = client.getresponse()
        assert response.status == 201, response.read()
        client.close()

    def stop(self) -> None:
        self._child.terminate()
        self._child.wait(10)

    def _answers(self) -> bool:
        assert self._child.poll() is None, "Azurite ended"
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0


@contextmanager
def running_azurite(top: Path) -> Iterator[Azurite]:
    server = Azurite(top)
    try:
        yield server
    finally:
        server.stop()
