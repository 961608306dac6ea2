"""The daemon's figures in the text format of Prometheus.  Names and labels are a promise: they are
listed in docs/METRICS.md, which a test compares with ``METRICS``.

Pure: what is known goes in, text comes out.  Costs a few milliseconds when it is asked, and
nothing else.
"""

import errno
import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from stagefs.measures import BUCKET_BOUNDS_S, Measures
from stagefs.staging.values import Status


class Metric(NamedTuple):
    kind: str
    text: str
    labels: tuple[str, ...] = ()


METRICS = {
    "stagefs_build_info": Metric("gauge", "Always 1; the version that runs.", ("version",)),
    "stagefs_start_time_seconds": Metric("gauge", "When this daemon began, since 1970."),
    "stagefs_operation_seconds": Metric(
        "histogram", "How long file-system operations took that had to wait.", ("operation",)
    ),
    "stagefs_ready_operations_total": Metric(
        "counter", "Reads and writes answered at once; they are not timed.", ("operation",)
    ),
    "stagefs_operation_errors_total": Metric(
        "counter", "Operations answered with an error.", ("operation", "errno")
    ),
    "stagefs_read_bytes_total": Metric(
        "counter", "Bytes answered to the kernel: at once, or after waiting.", ("path",)
    ),
    "stagefs_written_bytes_total": Metric("counter", "Bytes that programs wrote."),
    "stagefs_disk_read_bytes_total": Metric(
        "counter", "Bytes that the daemon's reads really took from disks."
    ),
    "stagefs_fetched_bytes_total": Metric("counter", "Bytes that came from remotes."),
    "stagefs_fetches_total": Metric("counter", "Transfers begun; small objects come in batches."),
    "stagefs_fetch_batches_total": Metric("counter", "Batches of small objects."),
    "stagefs_ahead_objects_total": Metric(
        "counter", "Objects fetched ahead of a task's use, as earlier tasks used theirs."
    ),
    "stagefs_fetch_failures_total": Metric(
        "counter", "Transfers that failed for good.", ("site", "errno")
    ),
    "stagefs_remote_retries_total": Metric("counter", "Requests to remotes that were repeated."),
    "stagefs_remote_slow_transfers_total": Metric(
        "counter",
        "Transfers that took longer than nearly all before them and were begun anew, at another"
        " replica where there is one.",
        ("site",),
    ),
    "stagefs_checksum_mismatches_total": Metric(
        "counter", "Objects that were not what was declared of them."
    ),
    "stagefs_fetches_in_flight": Metric("gauge", "Transfers under way."),
    "stagefs_in_flight_bytes": Metric("gauge", "Bytes that are being fetched."),
    "stagefs_waiting_reads": Metric("gauge", "Reads that wait for a fetch or a check."),
    "stagefs_open_objects": Metric("gauge", "Objects that are open, or kept for the next reader."),
    "stagefs_names": Metric("gauge", "Names in the namespace."),
    "stagefs_cache_capacity_bytes": Metric("gauge", "How large the cache may grow."),
    "stagefs_cache_used_bytes": Metric("gauge", "What the cache takes on its disk."),
    "stagefs_cache_entries": Metric("gauge", "Objects of which something is cached."),
    "stagefs_cache_disk_free_bytes": Metric("gauge", "Free space on the cache's disk."),
    "stagefs_cache_leases": Metric("gauge", "Pins and leases."),
    "stagefs_cache_evicted_entries_total": Metric("counter", "Entries evicted."),
    "stagefs_cache_evicted_bytes_total": Metric("counter", "Bytes evicted."),
    "stagefs_cache_thrash_total": Metric(
        "counter", "Chunks fetched again within ten minutes of their eviction."
    ),
    "stagefs_cache_damaged_chunks_total": Metric("counter", "Chunks whose hash was wrong."),
    "stagefs_queue_uploads": Metric("gauge", "Outputs in the stage-out queue.", ("state",)),
    "stagefs_queue_bytes": Metric("gauge", "Bytes of them.", ("state",)),
    "stagefs_queue_oldest_age_seconds": Metric(
        "gauge", "How long the oldest output that waits has been in the queue."
    ),
    "stagefs_resident_memory_bytes": Metric("gauge", "Resident memory of the daemon."),
    "stagefs_cpu_seconds_total": Metric("counter", "CPU time of the daemon."),
    "stagefs_unexpected_errors_total": Metric("counter", "Failures that are defects of StageFS."),
}

Sample = tuple[tuple[str, ...], float]


def render(
    status: Status,
    *,
    measures: Measures,
    fetch_errors: Mapping[tuple[str, str], int],
    retries: int,
    slow_transfers: Mapping[str, int],
    queue_age_s: float,
) -> str:
    """All of METRICS, in its order; those of a cache that there is not are left out."""
    samples: dict[str, Sequence[Sample]] = {
        **_plain(status),
        **_of_requests(measures),
        "stagefs_fetch_failures_total": list(fetch_errors.items()),
        "stagefs_remote_retries_total": [((), retries)],
        "stagefs_remote_slow_transfers_total": [
            ((site,), count) for site, count in slow_transfers.items()
        ],
        "stagefs_unexpected_errors_total": [
            ((), status.counters["unexpected"] + measures.unexpected)
        ],
        "stagefs_queue_oldest_age_seconds": [((), queue_age_s)],
    }
    lines: list[str] = []
    for name, metric in METRICS.items():
        if name == "stagefs_operation_seconds":
            found = list(_histograms(name, measures))
        else:
            found = [_line(name, metric, sample) for sample in samples.get(name, ())]
        if found:
            lines += [f"# HELP {name} {metric.text}", f"# TYPE {name} {metric.kind}", *found]
    return "\n".join(lines) + "\n"


def _plain(status: Status) -> dict[str, list[Sample]]:
    counted = status.counters
    queue = status.queue
    plain: dict[str, float] = {
        "stagefs_start_time_seconds": status.started_ns / 1e9,
        "stagefs_fetched_bytes_total": counted["fetched_bytes"],
        "stagefs_fetches_total": counted["fetches"],
        "stagefs_fetch_batches_total": counted["batches"],
        "stagefs_ahead_objects_total": counted["ahead_objects"],
        "stagefs_checksum_mismatches_total": counted["checksum_mismatches"],
        "stagefs_fetches_in_flight": len(status.transfers),
        "stagefs_in_flight_bytes": counted["in_flight_bytes"],
        "stagefs_waiting_reads": status.waiting_reads,
        "stagefs_open_objects": status.open_objects,
        "stagefs_names": status.names,
        **_of_this_program(),
    }
    if status.cache is not None:
        plain |= {
            "stagefs_cache_capacity_bytes": status.cache.capacity_bytes,
            "stagefs_cache_used_bytes": status.cache.used_bytes,
            "stagefs_cache_entries": status.cache.entries,
            "stagefs_cache_disk_free_bytes": status.cache.free_bytes,
            "stagefs_cache_leases": status.cache.leases,
        }
    for name in ("evicted_entries", "evicted_bytes", "thrash", "damaged_chunks"):
        if name in counted:
            plain[f"stagefs_cache_{name}_total"] = counted[name]
    samples: dict[str, list[Sample]] = {name: [((), value)] for name, value in plain.items()}
    samples["stagefs_build_info"] = [((status.version,), 1)]
    samples["stagefs_queue_uploads"] = [
        (("waiting",), queue.waiting),
        (("uploading",), queue.uploading),
        (("failed",), queue.failed),
        (("prepared",), queue.prepared),
    ]
    samples["stagefs_queue_bytes"] = [
        (("waiting",), queue.waiting_bytes),
        (("failed",), queue.failed_bytes),
    ]
    return samples


def _of_requests(measures: Measures) -> dict[str, list[Sample]]:
    return {
        "stagefs_ready_operations_total": [
            (("read",), measures.ready_reads),
            (("write",), measures.ready_writes),
        ],
        "stagefs_operation_errors_total": [
            ((operation, errno.errorcode.get(number, str(number))), count)
            for (operation, number), count in measures.errors.items()
        ],
        "stagefs_read_bytes_total": [
            (("ready",), measures.ready_bytes),
            (("waited",), measures.waited_bytes),
        ],
        "stagefs_written_bytes_total": [((), measures.written_bytes)],
    }


def _of_this_program() -> dict[str, float]:
    """What the kernel says of this process; without what it does not tell."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    found: dict[str, float] = {"stagefs_cpu_seconds_total": used.ru_utime + used.ru_stime}
    facts = {**_numbers("/proc/self/status"), **_numbers("/proc/self/io")}
    if "VmRSS" in facts:
        found["stagefs_resident_memory_bytes"] = facts["VmRSS"] << 10
    if "read_bytes" in facts:
        found["stagefs_disk_read_bytes_total"] = facts["read_bytes"]
    return found


def _numbers(path: str) -> dict[str, int]:
    try:
        lines = Path(path).read_text("utf-8", "replace").splitlines()
    except OSError:
        return {}
    split = (line.partition(":") for line in lines)
    words = ((name, rest.split()) for name, _, rest in split)
    return {name: int(rest[0]) for name, rest in words if rest and rest[0].isdigit()}


def _histograms(name: str, measures: Measures) -> Iterator[str]:
    for operation, timing in sorted(measures.timings.items()):
        below = 0
        for bound_s, count in zip(BUCKET_BOUNDS_S, timing.counts, strict=False):
            below += count
            yield f'{name}_bucket{{operation="{operation}",le="{bound_s:.7g}"}} {below}'
        yield f'{name}_bucket{{operation="{operation}",le="+Inf"}} {timing.count}'
        yield f'{name}_sum{{operation="{operation}"}} {timing.sum_ns / 1e9:.9g}'
        yield f'{name}_count{{operation="{operation}"}} {timing.count}'


def _line(name: str, metric: Metric, sample: Sample) -> str:
    labels, value = sample
    number = f"{value:.3f}" if isinstance(value, float) else str(value)
    return f"{name}{_labels(zip(metric.labels, labels, strict=True))} {number}"


def _labels(pairs: Iterable[tuple[str, str]]) -> str:
    said = ",".join(f'{label}="{_escaped(value)}"' for label, value in pairs)
    return f"{{{said}}}" if said else ""


def _escaped(value: str) -> str:
    text = value.encode("utf-8", "replace").decode()
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
