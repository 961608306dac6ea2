"""Drills on a live mount: what `stagefs-cache chaos` damages, no reader ever sees."""

from collections.abc import Callable

import pytest

from tests.support.identity import Identity
from tests.support.mounted import Mounted, sha256
from tests.support.served import HttpServed, content

MakeMount = Callable[..., Mounted]
MIB = 1 << 20


@pytest.mark.parametrize("drill", ["corrupt", "truncate", "drop-map"])
def test_readers_see_right_bytes(
    anybody: Identity, new_mount: MakeMount, web: HttpServed, drill: str
) -> None:
    data = content(5 * MIB)
    mount = new_mount(anybody, "--capacity", "64MiB")
    mount.stage_in(web.put("large", data), "large")
    assert mount.sha256("staging/large") == sha256(data)
    mount.umount()  # the kernel's page cache goes, the damage is read from disk
    mount.mount()
    mount.cache("chaos", drill, "staging:///large", "--yes")
    before = web.bytes_sent()
    assert mount.sha256("staging/large") == sha256(data)
    assert web.bytes_sent() > before, "nothing was fetched again: the damage was not met"


def test_tending_a_live_cache(anybody: Identity, new_mount: MakeMount, web: HttpServed) -> None:
    mount = new_mount(anybody, "--capacity", "64MiB")
    mount.stage_in(web.put("large", content(5 * MIB)), "large")
    mount.sha256("staging/large")
    mount.cache("pin", "staging:///large")
    (lease,) = mount.json_of("stagefs-cache", "leases")
    assert lease["url"] == web.url("large")
    assert mount.json_of("stagefs-cache", "usage", "--by", "task")[0]["group"] == "admin"
    mount.cache("unpin", "staging:///large")
    assert mount.json_of("stagefs-cache", "consistency")["differences"] == []
    mount.cache("cleanup", "--to", "0")
    assert mount.json_of("stagefs-cache", "list") == []
    assert mount.json_of("stagefs-cache", "history")[-1]["url"] == web.url("large")
    assert mount.json_of("stagefs-cache", "cleanup-rate")["entries"] == 1
