"""A server that speaks just enough S3 to be dangerous: it answers every range with the whole
object, and ignores If-Match, as some small S3 servers do."""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class SloppyS3:
    """Objects by path (``/bucket/key``)."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        objects, requests = self.objects, self.requests

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                requests.append((self.command, self.path))
                data = objects.get(self.path)
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

            def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@contextlib.contextmanager
def sloppy_s3() -> Iterator[SloppyS3]:
    server = SloppyS3()
    try:
        yield server
    finally:
        server.stop()
