"""/metrics of a real mount: figures that move with what programs do."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from stagefs.staging.metrics import METRICS
from tests.support.identity import Identity
from tests.support.mounted import Mounted
from tests.support.served import HttpServed, content

MakeMount = Callable[..., Mounted]
MIB = 1 << 20
_SAMPLE = re.compile(r"^(\w+(?:\{.*\})?) (\S+)$", re.MULTILINE)


def figures_of(mount: Mounted) -> dict[str, float]:
    text = mount.stagefs("metrics").stdout.decode()
    return {name: float(value) for name, value in _SAMPLE.findall(text)}


@pytest.fixture
def mount(anybody: Identity, new_mount: MakeMount) -> Mounted:
    return new_mount(anybody, "--capacity", "64MiB", "--set", "remote.attempts=2")


def test_every_documented_metric_is_there(mount: Mounted, web: HttpServed) -> None:
    mount.stage_in(web.put("large", content(5 * MIB)), "large")
    mount.stage_in(web.put("gone", b"x" * MIB), "gone")
    mount.sha256("staging/large")
    web.remove("gone")
    mount.run("cat", "MNT/staging/gone", check=False)
    found = {name.partition("{")[0] for name in figures_of(mount)}
    missing = {name for name in METRICS if not {name, f"{name}_count"} & found}
    assert not missing


def test_figures_move(mount: Mounted, web: HttpServed) -> None:
    data = content(5 * MIB)
    mount.stage_in(web.put("large", data), "large")
    assert figures_of(mount)["stagefs_fetched_bytes_total"] == 0
    assert mount.read("staging/large") == data
    after = figures_of(mount)
    assert after["stagefs_fetched_bytes_total"] == 5 * MIB
    read = [after[f'stagefs_read_bytes_total{{path="{path}"}}'] for path in ("ready", "waited")]
    assert sum(read) >= 5 * MIB
    assert after['stagefs_operation_seconds_count{operation="open"}'] >= 1
    assert after['stagefs_operation_seconds_bucket{operation="open",le="+Inf"}'] >= 1
    assert after["stagefs_cache_used_bytes"] >= 5 * MIB
    assert after["stagefs_cache_capacity_bytes"] == 64 * MIB
    assert after["stagefs_resident_memory_bytes"] > MIB


def test_failures_are_told_by_site_and_errno(mount: Mounted, web: HttpServed) -> None:
    url = web.put("gone", b"x" * MIB)
    mount.stage_in(url, "gone")
    web.remove("gone")
    assert mount.run("cat", "MNT/staging/gone", check=False).returncode != 0
    assert mount.run("cat", "MNT/staging/none", check=False).returncode != 0
    found = figures_of(mount)
    site = "/".join(url.split("/")[:3])
    told = [name for name in found if name.startswith("stagefs_fetch_failures_total")]
    assert any(f'site="{site}"' in name and 'errno="ENOENT"' in name for name in told), told
    read = [name for name in found if 'errors_total{operation="read",errno="E' in name]
    assert read, found


def test_written_to_a_file_for_the_node_exporter(mount: Mounted, work: Path) -> None:
    output = mount.state.with_name("stagefs.prom")
    mount.stagefs("metrics", "--output", output)
    assert 'stagefs_build_info{version="' in output.read_text()
