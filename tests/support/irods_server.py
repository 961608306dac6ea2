"""The read path of an iRODS server, out of a recorded exchange with a real one (5.0.90).

Answers of login and catalogue are those that the real server gave to the very same
requests, whatever their order; a query that was not recorded finds no rows, a login that was not
recorded is refused as the real one refused a wrong password.  Seeking and reading are done
here, on the object's content.  It shows that the client's calls and the driver's reading of its
answers fit each other; of a server's behaviour it shows only what was recorded.
"""

import contextlib
import json
import re
import socket
import struct
import threading
from pathlib import Path

RECORDING = Path(__file__).parents[1] / "contract/data/irods-5.0.90-prc-3.3.0.jsonl"
USER, PASSWORD, ZONE = "rods", "rods", "tempZone"
OBJECT = "/tempZone/home/rods/rec"
CONTENT = bytes(range(256)) * 64
_CLOSE, _SEEK, _READ, _QUERY, _LOGIN = 673, 674, 675, 702, 110000


class Irods:
    """A running server.  ``unknown`` are requests that the recording has no answer for; ``asked``
    has all of them as they came."""

    def __init__(self) -> None:
        self._known, self._no_rows, self._refused = _recorded()
        self.unknown: list[int] = []
        self.asked: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, name="irods", daemon=True).start()

    @property
    def url(self) -> str:
        return f"irods://127.0.0.1:{self.port}"

    def stop(self) -> None:
        # Wakes the thread that accepts.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client: socket.socket) -> None:
        position = 0
        with client, contextlib.suppress(EOFError, OSError):
            while message := _received(client):
                self.asked.append(message)
                operation = _field(message, "intInfo")
                if b"<type>RODS_DISCONNECT</type>" in message:
                    return
                if operation == _SEEK:
                    position = _field(message, "offset") + (
                        position if _field(message, "whence") == 1 else 0
                    )
                    body = f"<fileLseekOut_PI>\n<offset>{position}</offset>\n</fileLseekOut_PI>\n"
                    client.sendall(_message(body.encode(), b"", 0))
                elif operation == _READ:
                    data = CONTENT[position : position + _field(message, "len")]
                    position += len(data)
                    client.sendall(_message(b"", data, len(data)))
                elif (name := _name(message)) in self._known:
                    client.sendall(self._known[name])
                elif operation == _QUERY:
                    client.sendall(self._no_rows)
                elif operation == _LOGIN:
                    client.sendall(self._refused)
                else:
                    self.unknown.append(operation)
                    return


def _recorded() -> tuple[dict[bytes, bytes], bytes, bytes]:
    streams: dict[tuple[int, str], bytearray] = {}
    for line in RECORDING.read_text().splitlines():
        row = json.loads(line)
        streams.setdefault((row["c"], row["d"]), bytearray()).extend(bytes.fromhex(row["hex"]))
    known: dict[bytes, bytes] = {}
    no_rows = refused = b""
    for connection in (1, 2):
        requests = _split(bytes(streams[connection, ">"]))
        answers = _split(bytes(streams[connection, "<"]))
        for request, answer in zip(requests, answers, strict=False):
            status = _field(answer, "intInfo")
            if status == -808000:
                no_rows = answer
            elif status < 0:
                refused = answer
            known.setdefault(_name(request), answer)
    return known, no_rows, refused


def _name(request: bytes) -> bytes:
    """What the answer hangs on.  The client sends an address of its memory when it closes."""
    return b"close" if _field(request, "intInfo") == _CLOSE else request


def _split(stream: bytes) -> list[bytes]:
    messages = []
    while stream:
        length = struct.unpack(">I", stream[:4])[0]
        header = stream[: 4 + length]
        end = 4 + length + sum(_field(header, name) for name in ("msgLen", "errorLen", "bsLen"))
        messages.append(stream[:end])
        stream = stream[end:]
    return messages


def _message(body: bytes, data: bytes, status: int) -> bytes:
    header = (
        f"<MsgHeader_PI>\n<type>RODS_API_REPLY</type>\n<msgLen>{len(body)}</msgLen>\n"
        f"<errorLen>0</errorLen>\n<bsLen>{len(data)}</bsLen>\n<intInfo>{status}</intInfo>\n"
        "</MsgHeader_PI>\n"
    ).encode()
    return struct.pack(">I", len(header)) + header + body + data


def _field(message: bytes, name: str) -> int:
    match = re.search(rf"<{name}>(-?\d+)</{name}>".encode(), message)
    return 0 if match is None else int(match[1])


def _received(client: socket.socket) -> bytes:
    size = _exactly(client, 4)
    header = _exactly(client, struct.unpack(">I", size)[0])
    rest = sum(_field(header, name) for name in ("msgLen", "errorLen", "bsLen"))
    return size + header + _exactly(client, rest)


def _exactly(client: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = client.recv(length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data
