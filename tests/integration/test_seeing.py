"""What the administrator sees: attributes, status, stagefs-cache on a live and on a bare cache."""

import json
from collections.abc import Callable

import pytest

from tests.support.cache_files import flip, object_file
from tests.support.identity import Identity
from tests.support.mounted import Mounted
from tests.support.served import HttpServed, content

MakeMount = Callable[..., Mounted]
MIB = 1 << 20


@pytest.fixture
def data() -> bytes:
    return content(5 * MIB)


@pytest.fixture
def mount(identity: Identity, web: HttpServed, new_mount: MakeMount, data: bytes) -> Mounted:
    made = new_mount(identity, "--capacity", "64MiB")
    made.stage_in(web.put("large", data), "large")
    made.stage_in(web.put("small", b"small"), "small")
    made.sha256("staging/large")
    made.read("staging/small")
    return made


def test_attributes(mount: Mounted, web: HttpServed) -> None:
    listed = mount.run("getfattr", "-d", "-m", "user.stagefs", "MNT/staging/large").stdout.decode()
    for name, value in (
        ("source", web.url("large")),
        ("cached", str(5 * MIB)),
        ("state", "cached"),
    ):
        assert f'user.stagefs.{name}="{value}"' in listed
    assert "user.stagefs.version=" in listed


def test_status(mount: Mounted) -> None:
    by_file = json.loads(mount.read(".stagefs/status"))
    by_command = mount.json_of("stagefs", "status")
    for status in (by_file, by_command):
        assert status["mountpoint"] == str(mount.point)
        assert status["pid"] == mount.daemon()
        assert status["cache"]["used_bytes"] >= 5 * MIB
        assert status["cache"]["capacity_bytes"] == 64 * MIB
    assert str(mount.state) in mount.stagefs("status").stdout.decode()


def map_of(mount: Mounted, name: str) -> str:
    """The bar that `stagefs-cache show` draws."""
    lines = mount.cache("show", f"staging:///{name}").stdout.decode().splitlines()
    (drawn,) = [line.split()[1] for line in lines if line.startswith("map ")]
    return drawn


def test_the_map_of_an_entry_that_is_partly_here(
    anybody: Identity, web: HttpServed, new_mount: MakeMount
) -> None:
    mount = new_mount(anybody, settings='[read]\nwindow_bytes_max = "0"\n')
    mount.stage_in(web.put("x", content(8 * MIB)), "x")
    code = "import os, sys; os.pread(os.open(sys.argv[1], os.O_RDONLY), 1, 5 << 20)"
    mount.python(code, "MNT/staging/x")
    drawn = map_of(mount, "x")
    assert len(drawn) == 8
    assert drawn[5] == "#"
    assert drawn[0] == "."


def test_live_cache(mount: Mounted, web: HttpServed) -> None:
    entries = {entry["url"]: entry for entry in mount.json_of("stagefs-cache", "list")}
    assert entries[web.url("large")]["cached_bytes"] == 5 * MIB
    assert entries[web.url("small")]["cached_bytes"] == 5
    shown = mount.cache("show", "staging:///large").stdout.decode()
    assert web.url("large") in shown
    assert map_of(mount, "large") == "#####"
    assert mount.json_of("stagefs-cache", "usage")["entries"] == 2
    assert mount.cache("verify").returncode == 0

    mount.cache("pin", "staging:///large")
    assert mount.json_of("stagefs-cache", "show", "staging:///large")["pinned"] is True
    assert (
        "pins" in mount.run("getfattr", "-m", "user.stagefs", "MNT/staging/large").stdout.decode()
    )
    mount.cache("unpin", "staging:///large")
    mount.cache("evict", "staging:///large")
    assert mount.xattr("staging/large", "cached") == "0"
    mount.cache("warm", "staging:///large")
    assert mount.xattr("staging/large", "state") == "cached"
    mount.cache("capacity", "32MiB")
    assert mount.json_of("stagefs-cache", "usage")["capacity_bytes"] == 32 * MIB


def test_bare_cache_needs_no_daemon(mount: Mounted, web: HttpServed) -> None:
    mount.umount()
    cache = mount.state / "cache"
    assert (
        (cache / "CACHEDIR.TAG")
        .read_bytes()
        .startswith(b"Signature: 8a477f597d28d172789f06886806bc55")
    )
    listed = json.loads(mount.identity.run("stagefs-cache", "list", cache, "--json").stdout)
    assert {entry["url"] for entry in listed} == {web.url("large"), web.url("small")}
    assert mount.identity.run("stagefs-cache", "usage", cache).stdout
    shown = mount.identity.run("stagefs-cache", "show", "--dir", cache, web.url("large")).stdout
    assert web.url("large").encode() in shown
    mount.identity.run("stagefs-cache", "verify", cache)

    flip(object_file(cache, 5 * MIB), 3 * MIB + 17)
    done = mount.identity.run("stagefs-cache", "verify", cache, check=False)
    assert done.returncode == 1, done
    assert web.url("large").encode() in done.stdout + done.stderr


def test_verify_on_a_live_daemon_finds_damage(mount: Mounted, data: bytes) -> None:
    flip(object_file(mount.state / "cache", 5 * MIB), 1 * MIB + 3)
    done = mount.cache("verify", check=False)
    assert done.returncode == 1, done
    assert mount.read("staging/large") == data
