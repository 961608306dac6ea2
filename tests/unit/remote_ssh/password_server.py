"""An ssh server that wants a password: paramiko's, because sshd would check a real account's.

One thread takes connections; each connection has paramiko's own threads.  It serves reading.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import paramiko
from paramiko.common import AUTH_FAILED, AUTH_SUCCESSFUL, OPEN_SUCCEEDED

USER = "someone"
PASSWORD = "pass word:%/@"


class _Login(paramiko.ServerInterface):
    def check_auth_password(self, username: str, password: str) -> int:
        right = (username, password) == (USER, PASSWORD)
        return AUTH_SUCCESSFUL if right else AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:
        return "password"

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return OPEN_SUCCEEDED


class _Files(paramiko.SFTPServerInterface):
    def stat(self, path: str) -> paramiko.SFTPAttributes | int:
        try:
            return paramiko.SFTPAttributes.from_stat(os.stat(path))
        except OSError as exc:
            return paramiko.SFTPServer.convert_errno(exc.errno or 0)


@contextlib.contextmanager
def running(known_hosts: Path) -> Iterator[int]:
    """Its port.  The host key is written to ``known_hosts``."""
    key = paramiko.ECDSAKey.generate()
    transports: list[paramiko.Transport] = []

    def accept(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the listener was shut down
            while True:
                connection, _ = listener.accept()
                transport = paramiko.Transport(connection)
                transports.append(transport)
                transport.add_server_key(key)
                transport.set_subsystem_handler("sftp", paramiko.SFTPServer, _Files)
                transport.start_server(server=_Login(), event=threading.Event())

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        known_hosts.write_text(f"[127.0.0.1]:{port} {key.get_name()} {key.get_base64()}\n")
        thread = threading.Thread(target=accept, args=(listener,))
        thread.start()
        try:
            yield port
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for transport in transports:
                transport.close()
                transport.join(10)
