"""A server that speaks just enough S3 to be dangerous: it answers every range with the whole
object, ignores If-Match and If-None-Match, as some small S3 servers do, and may know no signed
URLs."""

import contextlib
import hashlib
import re
import threading
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class SloppyS3:
    """Objects by path (``/bucket/key``).

    ``conditions`` False: it refuses If-None-Match as not implemented.  The next ``busy``
    requests that change something are answered with 503; of the next ``damages`` bodies one
    bit is flipped, which only their tags tell.  ``signed_urls`` False: it answers those with 404.
    """

    def __init__(self, *, signed_urls: bool = True) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.conditions = True
        self.busy = 0
        self.damages = 0
        self._parts: dict[int, bytes] = {}
        server, objects, requests = self, self.objects, self.requests

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                requests.append((self.command, self.path))
                path = self.path.partition("?")[0]
                data = objects.get(path if signed_urls else self.path)
                self.send_response(404 if data is None else 200)
                self.send_header("Content-Length", str(len(data or b"")))
                if data is not None:
                    self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
                    self.send_header("Last-Modified", formatdate(1_700_000_000, usegmt=True))
                self.end_headers()
                # The client closes when it sees that this is not what it asked for.
                with contextlib.suppress(ConnectionError):
                    if self.command == "GET" and data is not None:
                        self.wfile.write(data)

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_PUT(self) -> None:
                requests.append((self.command, self.path))
                data = self.rfile.read(int(self.headers.get("Content-Length", "0")))
                self.answer(*server.change(self.command, self.path, data, dict(self.headers)))

            def do_POST(self) -> None:
                self.do_PUT()

            def do_DELETE(self) -> None:
                self.do_PUT()

            def answer(self, status: int, etag: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("ETag", f'"{etag}"')
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def change(
        self, method: str, path: str, data: bytes, headers: dict[str, str]
    ) -> tuple[int, str, bytes]:
        """Status, tag and body of the answer."""
        if self.busy:
            self.busy -= 1
            return 503, "", b"<Error><Code>SlowDown</Code></Error>"
        if not self.conditions and "If-None-Match" in headers:
            return 501, "", b"<Error><Code>NotImplemented</Code></Error>"
        place, _, query = path.partition("?")
        if method == "POST" and query == "uploads=":
            name = b"<UploadId>one</UploadId>"
            return (
                200,
                "",
                b"<InitiateMultipartUploadResult>%s</InitiateMultipartUploadResult>" % name,
            )
        if method == "POST":
            self.objects[place] = b"".join(self._parts[number] for number in sorted(self._parts))
            return 200, "", b"<CompleteMultipartUploadResult/>"
        if method == "DELETE":
            return 204, "", b""
        if self.damages:
            self.damages -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        if number := re.search(r"partNumber=(\d+)", query):
            self._parts[int(number[1])] = data
        else:
            self.objects[place] = data
        return 200, hashlib.md5(data).hexdigest(), b""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@contextlib.contextmanager
def sloppy_s3(*, signed_urls: bool = True) -> Iterator[SloppyS3]:
    server = SloppyS3(signed_urls=signed_urls)
    try:
        yield server
    finally:
        server.stop()
