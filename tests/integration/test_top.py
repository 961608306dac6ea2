"""`stagefs top`: what it makes of two answers, and one picture of a real mount."""

import json
from collections.abc import Callable

from stagefs.cli.top import figures_of, rates_between
from tests.support.identity import Identity
from tests.support.mounted import Mounted
from tests.support.served import HttpServed, content

MakeMount = Callable[..., Mounted]
MIB = 1 << 20
BEFORE = """# HELP x
stagefs_start_time_seconds 5.000
stagefs_read_bytes_total{path="ready"} 100
stagefs_read_bytes_total{path="waited"} 100
stagefs_fetched_bytes_total 100
"""
AFTER = BEFORE.replace('{path="ready"} 100', '{path="ready"} 900').replace(
    "fetched_bytes_total 100", "fetched_bytes_total 300"
)


def test_rates_between_two_answers() -> None:
    rates = rates_between(figures_of(BEFORE), figures_of(AFTER), 2.0)
    assert (rates.read_bytes, rates.fetched_bytes) == (400, 100)
    assert rates.hit_share == 0.75


def test_another_daemon_begins_at_nothing() -> None:
    restarted = AFTER.replace("seconds 5.000", "seconds 9.000")
    rates = rates_between(figures_of(BEFORE), figures_of(restarted), 1.0)
    assert rates.read_bytes == 1000


def test_nothing_read_is_no_hit_rate() -> None:
    assert rates_between(figures_of(AFTER), figures_of(AFTER), 1.0).hit_share is None


def test_picture_of_a_mount(anybody: Identity, new_mount: MakeMount, web: HttpServed) -> None:
    mount = new_mount(anybody, "--capacity", "64MiB")
    mount.stage_in(web.put("large", content(5 * MIB)), "large")
    mount.sha256("staging/large")
    mount.cache("pin", "staging:///large")
    view = json.loads(mount.stagefs("top", "--count", "1", "--json").stdout)
    assert view["rates"]["fetched_bytes"] > 0
    assert view["tasks"] == [{"owner": "admin", "objects": 1}]
    text = mount.stagefs("top", "--count", "2", "--interval", "0.2").stdout.decode()
    assert text.count(str(mount.point)) == 2
    assert "hits" in text
    assert "outputs 0 waiting" in text
