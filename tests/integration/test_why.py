"""`stagefs why` on real mounts: each answer names its cause.  And what outlives a daemon."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.identity import Identity
from tests.support.mounted import Mounted
from tests.support.served import HttpServed, content
from tests.support.waiting import wait_until

MakeMount = Callable[..., Mounted]
MIB = 1 << 20


@pytest.fixture
def mount(anybody: Identity, new_mount: MakeMount) -> Mounted:
    return new_mount(anybody, "--capacity", "64MiB", "--set", "remote.attempts=1")


def why(mount: Mounted, name: str, *more: str) -> tuple[str, str]:
    found: Any = mount.json_of("stagefs", "why", f"staging:///{name}", *more)
    return found["state"], " ".join(found["because"])


def next_answers(mount: Mounted, killed: int) -> None:
    def answers() -> bool:
        return bool(json.loads(mount.read(".stagefs/status"))["pid"] != killed)

    wait_until(answers, "the next daemon")


def test_absent_cached_kept_and_evicted(mount: Mounted, web: HttpServed) -> None:
    mount.stage_in(web.put("large", content(5 * MIB)), "large")
    state, because = why(mount, "large")
    assert state == "remote"
    assert "no program has read it yet" in because
    assert "The remote answers now" in because

    mount.sha256("staging/large")
    state, because = why(mount, "large")
    assert state == "cached"
    assert "Nobody keeps it" in because

    mount.cache("pin", "staging:///large")
    assert "admin keeps it" in why(mount, "large")[1]
    mount.cache("unpin", "staging:///large")
    mount.cache("evict", "staging:///large")
    state, because = why(mount, "large", "--offline")
    assert state == "remote"
    assert "It was evicted" in because
    assert "asked for by an administrator" in because
    assert b"nothing of it is cached" in mount.stagefs("why", "staging:///large").stdout


def test_missing_object_is_named(mount: Mounted, web: HttpServed) -> None:
    mount.stage_in(web.put("gone", b"x" * MIB), "gone")
    web.remove("gone")
    assert "The remote says now" in why(mount, "gone")[1]
    assert mount.run("cat", "MNT/staging/gone", check=False).returncode != 0
    state, because = why(mount, "gone", "--offline")
    assert state == "failing"
    assert "Last failure" in because
    assert web.url("gone") in because


def test_eviction_is_remembered_by_the_next_daemon(mount: Mounted, web: HttpServed) -> None:
    mount.stage_in(web.put("large", content(5 * MIB)), "large")
    mount.sha256("staging/large")
    mount.cache("cleanup", "--to", "0")
    assert mount.xattr("staging/large", "cached") == "0"
    killed = mount.kill_daemon()
    next_answers(mount, killed)
    assert "It was evicted" in why(mount, "large", "--offline")[1]


def test_files_made_here(mount: Mounted) -> None:
    mount.run("sh", "-c", "echo x > $0", "MNT/made")
    found = mount.json_of("stagefs", "why", str(mount.point / "made"))
    assert found["state"] == "local"


def test_capacity_survives_the_daemon_and_gives_way_to_the_configuration(
    mount: Mounted,
) -> None:
    def capacity_bytes() -> int:
        return int(mount.json_of("stagefs-cache", "usage")["capacity_bytes"])

    mount.cache("capacity", "32MiB")
    killed = mount.kill_daemon()
    next_answers(mount, killed)
    assert capacity_bytes() == 32 * MIB
    mount.umount()
    mount.mount()
    assert capacity_bytes() == 32 * MIB
    mount.cache("capacity", "default")
    assert capacity_bytes() == 64 * MIB
    mount.cache("capacity", "32MiB")
    mount.umount()
    mount.mount("--capacity", "48MiB")
    assert capacity_bytes() == 48 * MIB
