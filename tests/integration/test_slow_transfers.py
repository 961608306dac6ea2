"""Transfers that take longer than nearly all before them, on real servers and mounts."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stagefs.remote.health import RATES_MIN
from tests.support.identity import Identity
from tests.support.mounted import Mounted, sha256
from tests.support.proxied import Proxied, proxied
from tests.support.served import SharedGateway, content, serving

MakeMount = Callable[..., Mounted]
Figures = Callable[[str], None]
MIB = 1 << 20
# The deadline of a transfer without progress: a reader that waits for it fails the test.
PROGRESS_S, WAIT_S_MAX = 200.0, 60.0
SETTINGS = f"[remote]\nprogress_timeout_s = {PROGRESS_S}\n[read]\nread_deadline_s = {PROGRESS_S}\n"


@pytest.fixture(params=["http", "ssh", "s3"])
def server(
    request: pytest.FixtureRequest, served_directory: Path, gateway: SharedGateway
) -> Iterator[Proxied]:
    with proxied(request.param, served_directory, gateway) as server:
        yield server


def known_rate(mount: Mounted, server: Proxied) -> None:
    """Enough transfers that the mount knows how fast the server usually is."""
    urls = [server.put(f"d/{number}", bytes(300 << 10)) for number in range(RATES_MIN)]
    mount.run("mkdir", "MNT/staging/d")
    mount.stagefs("stage-in", *urls, "staging:///d/")
    mount.run("sh", "-c", "cat * > /dev/null", directory=mount.point / "staging/d")
    assert server.status(mount).get("slow_transfers", 0) == 0


def stalled_read_s(mount: Mounted, server: Proxied, data: bytes) -> float:
    """How long a whole read takes whose transfer stalls once."""
    server.proxy.stall(after_bytes=3 * MIB)
    begun_s = time.monotonic()
    assert mount.sha256("staging/large", deadline_s=PROGRESS_S) == sha256(data)
    took_s = time.monotonic() - begun_s
    assert server.proxy.hits == 1, "the fault did not strike"
    assert took_s < WAIT_S_MAX, "it waited for the deadline"
    return took_s


def test_a_stalled_transfer_is_begun_anew(
    anybody: Identity, new_mount: MakeMount, server: Proxied, figures: Figures
) -> None:
    data = content(12 * MIB)
    mount = new_mount(anybody, settings=SETTINGS, environment=server.environment(anybody))
    known_rate(mount, server)
    mount.stage_in(server.put("large", data), "large")
    figures(f"the read took {stalled_read_s(mount, server, data):.1f} s, one transfer stalled")
    said = server.status(mount)
    # Over ssh the transfers beside it have the same connection.
    slow = said["slow_transfers"]
    assert isinstance(slow, int)
    assert slow >= 1 if server.scheme == "ssh" else slow == 1
    assert said.get("errors", 0) == 0
    assert f"{slow} too slow" in mount.stagefs("remote", "list").stdout.decode()
    assert b"stagefs_remote_slow_transfers_total{site=" in mount.stagefs("metrics").stdout


@pytest.mark.parametrize("server", ["http"], indirect=True)
def test_a_stalled_transfer_goes_on_at_another_replica(
    anybody: Identity, new_mount: MakeMount, server: Proxied, work: Path, figures: Figures
) -> None:
    data = content(12 * MIB)
    top = work / "other"
    top.mkdir(mode=0o755)
    with serving("http", top) as other:
        mount = new_mount(anybody, "--set", "read.affinity=here", settings=SETTINGS)
        known_rate(mount, server)
        url = server.put("large", data)
        mount.stage_in(url, "large")
        mount.stagefs("replica", "add", "staging:///large", url, "--affinity", "here")
        mount.stagefs("replica", "add", "staging:///large", other.put("large", data))
        sent = other.bytes_sent()
        figures(f"the read took {stalled_read_s(mount, server, data):.1f} s with another replica")
        remotes = mount.json_of("stagefs", "remote", "list")
        slow = [one for one in remotes if one.get("slow_transfers")]
        assert [(one["url"], one["slow_transfers"]) for one in slow] == [
            (server.url("").split("/plain")[0], 1)
        ]
        assert other.bytes_sent() > sent, "the other replica was not asked"
