"""The text for Prometheus: it is what docs/METRICS.md says, and what Prometheus can read."""

import re
from pathlib import Path

import pytest

from stagefs.measures import BUCKET_BOUNDS_S, BUCKETS, Measures, Timing
from stagefs.staging.metrics import METRICS
from tests.unit.staging.conftest import Staging

DOCUMENTATION = Path(__file__).parents[3] / "docs/METRICS.md"
_ROW = re.compile(r"^\| `(stagefs_\w+)` \| (\w+) \| (.*?) \| (.*) \|$", re.MULTILINE)
_SAMPLE = re.compile(r'([a-z_]+)(\{\w+="[^"\n]*"(?:,\w+="[^"\n]*")*\})? (\S+)')


def test_documentation_lists_every_metric_as_it_is() -> None:
    documented = {
        name: (kind, tuple(re.findall(r"`(\w+)`", labels)), text)
        for name, kind, labels, text in _ROW.findall(DOCUMENTATION.read_text("utf-8"))
    }
    assert documented == {
        name: (metric.kind, metric.labels, metric.text) for name, metric in METRICS.items()
    }


def test_names_follow_the_customs_of_prometheus() -> None:
    for name, metric in METRICS.items():
        assert name.endswith("_total") == (metric.kind == "counter"), name


@pytest.mark.parametrize(
    ("taken_ns", "bucket"),
    [(0, 0), (1000, 0), (1001, 1), (4000, 1), (4001, 2), (16_000, 2), (10**12, BUCKETS)],
)
def test_a_time_falls_into_the_bucket_whose_bound_it_does_not_exceed(
    taken_ns: int, bucket: int
) -> None:
    timing = Timing()
    timing.add(taken_ns)
    assert timing.counts.index(1) == bucket
    if bucket < BUCKETS:
        assert taken_ns / 1e9 <= BUCKET_BOUNDS_S[bucket]
    assert timing.count == 1


def test_every_bound_holds_its_own_value() -> None:
    for bucket, bound_s in enumerate(BUCKET_BOUNDS_S):
        timing = Timing()
        timing.add(round(bound_s * 1e9))
        assert timing.counts.index(1) == bucket, bound_s


async def test_every_sample_can_be_read(staging: Staging) -> None:
    text = await staging.area.metrics()
    families = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    assert set(families) <= {(name, metric.kind) for name, metric in METRICS.items()}
    for line in text.splitlines():
        if not line.startswith("#"):
            sample = _SAMPLE.fullmatch(line)
            assert sample is not None, line
            float(sample[3])


def test_measures_count_errors_by_operation_and_errno() -> None:
    measures = Measures()
    measures.answered("lookup", 0, 2)
    measures.answered("lookup", 0)
    assert measures.errors == {("lookup", 2): 1}
    assert measures.timings["lookup"].count == 2
