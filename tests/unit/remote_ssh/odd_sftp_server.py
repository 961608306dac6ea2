"""An SFTP server that is right and unusual, to be run in place of ``ssh``.

``program`` writes a script for ``[remote.ssh] program``.  The oddities: none of OpenSSH's
extensions, at most ``READ_BYTES`` per READ, answers in reverse order as far as
the protocol allows, status answers without message, listings without permissions.
"""

import os
import select
import stat
import struct
import sys
from pathlib import Path

READ_BYTES = 1000
# All that version 3 promises.
WRITE_BYTES_MAX = 32 << 10


def program(directory: Path) -> Path:
    path = directory / "odd-ssh"
    root = Path(__file__).parents[3]
    path.write_text(
        "#!/bin/sh\n"
        'for word in "$@"; do [ "$word" = -G ] && exit 0; done\n'
        f"cd {root} && exec {sys.executable} -m tests.unit.remote_ssh.odd_sftp_server\n"
    )
    path.chmod(0o755)
    return path


def text(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


class Server:
    def __init__(self) -> None:
        self.handles: dict[bytes, int | list[bytes]] = {}
        self.next_handle = 0

    def serve(self) -> None:
        """Answer whatever has come in, the last request first."""
        pending: list[bytes] = []
        waiting = b""
        while True:
            ready, _, _ = select.select([0], [], [], 0 if pending else None)
            if not ready:
                os.write(1, b"".join(text(answer) for answer in self.reordered(pending)))
                pending = []
                continue
            received = os.read(0, 1 << 16)
            if not received:
                return
            waiting += received
            while len(waiting) >= 4 and len(waiting) >= 4 + int.from_bytes(waiting[:4], "big"):
                length = int.from_bytes(waiting[:4], "big")
                pending.append(waiting[4 : 4 + length])
                waiting = waiting[4 + length :]

    def reordered(self, requests: list[bytes]) -> list[bytes]:
        """Executed in the order of sending, answered in the opposite one."""
        return [self.answer(request) for request in requests][::-1]

    def answer(self, request: bytes) -> bytes:
        kind, body = request[0], request[5:]
        if kind == 1:
            return bytes([2]) + struct.pack(">I", 3) + text(b"odd@example.org") + text(b"1")
        try:
            answer_kind, answer = self.execute(kind, body)
        except FileNotFoundError:
            answer_kind, answer = 101, struct.pack(">I", 2)
        except OSError:
            answer_kind, answer = 101, struct.pack(">I", 4)
        return bytes([answer_kind]) + request[1:5] + answer

    def execute(self, kind: int, body: bytes) -> tuple[int, bytes]:
        length = int.from_bytes(body[:4], "big")
        name, rest = body[4 : 4 + length], body[4 + length :]
        if kind == 17:
            return 105, attributes(os.stat(name))
        if kind in (3, 11):
            self.next_handle += 1
            handle = b"handle-%d" % self.next_handle
            self.handles[handle] = opened(name, rest) if kind == 3 else os.listdir(name)
            return 102, text(handle)
        if kind in (13, 14, 18):
            change_name(kind, name, rest)
            return 101, struct.pack(">I", 0)
        if kind == 4:
            self.close(self.handles.pop(name))
            return 101, struct.pack(">I", 0)
        return self.execute_on(self.handles[name], kind, rest)

    def close(self, held: int | list[bytes]) -> None:
        if isinstance(held, int):
            os.close(held)

    def execute_on(self, held: int | list[bytes], kind: int, rest: bytes) -> tuple[int, bytes]:
        if isinstance(held, list):
            if not held:
                return 101, struct.pack(">I", 1)
            return 104, struct.pack(">I", 1) + text(held.pop()) + text(b"") + struct.pack(">I", 0)
        if kind == 8:
            return 105, attributes(os.fstat(held))
        if kind == 10:
            os.fchmod(held, struct.unpack(">II", rest)[1])
            return 101, struct.pack(">I", 0)
        if kind == 6:
            offset, length = struct.unpack(">QI", rest[:12])
            if length > WRITE_BYTES_MAX:
                raise OSError
            os.pwrite(held, rest[12 : 12 + length], offset)
            return 101, struct.pack(">I", 0)
        offset, wanted = struct.unpack(">QI", rest)
        data = os.pread(held, min(wanted, READ_BYTES), offset)
        return (103, text(data)) if data else (101, struct.pack(">I", 1))


def opened(name: bytes, rest: bytes) -> int:
    wanted = int.from_bytes(rest[:4], "big")
    flags = os.O_RDWR if wanted & 2 else os.O_RDONLY
    flags |= os.O_CREAT if wanted & 8 else 0
    return os.open(name, flags | (os.O_EXCL if wanted & 0x20 else 0), 0o644)


def change_name(kind: int, name: bytes, rest: bytes) -> None:
    """REMOVE, MKDIR, or RENAME, which replaces nothing."""
    if kind == 13:
        os.unlink(name)
    elif kind == 14:
        os.mkdir(name)
    else:
        os.link(name, rest[4:])
        os.unlink(name)


def attributes(found: os.stat_result) -> bytes:
    """Without owner, with an extension that nobody knows."""
    times = struct.pack(">II", int(found.st_atime), int(found.st_mtime))
    mode = stat.S_IFMT(found.st_mode) | 0o600
    extension = struct.pack(">I", 1) + text(b"odd@example.org") + text(b"value")
    return struct.pack(">IQI", 0x8000000D, found.st_size, mode) + times + extension


if __name__ == "__main__":
    Server().serve()
