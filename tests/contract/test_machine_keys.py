"""A machine of a cloud, whose own keys read and write S3."""

import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec
import pytest

from stagefs.errors import AccessDenied
from stagefs.remote.credentials import CredentialStore
from stagefs.remote.settings import Environment
from stagefs.remote.store import StoreRemote
from tests.contract.subjects import BUCKET, SETTINGS, S3Subject, new_place
from tests.contract.test_put import put_bytes
from tests.support.rgw import REGION, Rgw

pytestmark = pytest.mark.timeout(60)

ROLE = "/latest/meta-data/iam/security-credentials/"


class Machine:
    """The metadata service of one machine, with temporary keys as clouds give them."""

    def __init__(self, own: Mapping[str, str]) -> None:
        self._own = own
        self.requests: list[str] = []
        self.fresh = True
        self.role = True
        machine = self

        class Answer(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                self.say(200, b"the-token")

            def do_GET(self) -> None:
                machine.requests.append(self.path)
                if self.headers.get("X-aws-ec2-metadata-token") != "the-token":
                    self.say(401, b"")
                elif not machine.role:
                    self.say(404, b"")
                else:
                    self.say(200, b"worker" if self.path == ROLE else machine.keys())

            def say(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def keys(self) -> bytes:
        return msgspec.json.encode(
            {
                "Code": "Success",
                "AccessKeyId": self._own["aws_access_key_id"],
                "SecretAccessKey": self._own["aws_secret_access_key"],
                "Token": self._own["aws_session_token"],
                "LastUpdated": "2026-01-01T00:00:00Z",
                "Expiration": "2999-01-01T00:00:00Z" if self.fresh else "2001-01-01T00:00:00Z",
            }
        )

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


@pytest.fixture
def machine(rgw: Rgw) -> Iterator[Machine]:
    made = Machine(rgw.session_keys(3600))
    yield made
    made.stop()


def remote_on(machine: Machine, rgw: Rgw) -> StoreRemote:
    environment = {
        "AWS_ENDPOINT_URL": rgw.endpoint,
        "AWS_REGION": REGION,
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": machine.endpoint,
    }
    settings = msgspec.structs.replace(SETTINGS, environment=Environment(environment))
    return StoreRemote(f"s3://{BUCKET}", settings, CredentialStore(None))


async def test_keys_are_asked_for_once(machine: Machine, rgw: Rgw, tmp_path: Path) -> None:
    subject = S3Subject(rgw, BUCKET, new_place())
    remote = remote_on(machine, rgw)
    for name in ("one", "two"):
        url = f"{subject.directory}/{name}"
        await put_bytes(remote, url, b"content", tmp_path / "source", overwrite=True)
        assert subject.get(name) == b"content"
        assert (await remote.stat(url)).size_bytes == 7
    # Once for writing, once for reading.
    assert machine.requests.count(f"{ROLE}worker") == 2
    await remote.aclose()


async def test_a_machine_without_a_role(machine: Machine, rgw: Rgw, tmp_path: Path) -> None:
    machine.role = False
    remote = remote_on(machine, rgw)
    with pytest.raises(AccessDenied, match="keys"):
        await put_bytes(remote, f"s3://{BUCKET}/x", b"x", tmp_path / "source", overwrite=True)
    await remote.aclose()


async def test_keys_that_have_ended_are_asked_for_again(
    machine: Machine, rgw: Rgw, tmp_path: Path
) -> None:
    machine.fresh = False
    remote = remote_on(machine, rgw)
    url = f"s3://{BUCKET}/{new_place()}"
    for _ in range(2):
        await put_bytes(remote, url, b"content", tmp_path / "source", overwrite=True)
    assert machine.requests.count(f"{ROLE}worker") > 2
    await remote.aclose()
