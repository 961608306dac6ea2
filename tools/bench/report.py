"""The table of ratios, the same as JSON, and the machine it was measured on."""

import dataclasses
import json
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

from bench.measuring import Samples, Sense, ratio

CLAIM_ROUNDS_MIN = 5
CHECKOUT = Path(__file__).parents[2]

_VERSIONS = {
    "ssh": ("ssh", "-V"),
    "sshfs": ("sshfs", "--version"),
    "bindfs": ("bindfs", "--version"),
    "s3fs": ("s3fs", "--version"),
    "rclone": ("rclone", "version"),
    "nginx": ("/usr/sbin/nginx", "-v"),
    "radosgw": ("radosgw", "--version"),
    "fusermount3": ("fusermount3", "--version"),
}


@dataclasses.dataclass(frozen=True)
class Goal:
    """What a point of the issue demands.  ``below``: the value must not exceed the bound."""

    bound: float
    below: bool = False

    def __str__(self) -> str:
        return f"{'<=' if self.below else '>='} {self.bound:g}"

    def met(self, value: float) -> bool:
        return value <= self.bound if self.below else value >= self.bound


@dataclasses.dataclass(frozen=True)
class Row:
    point: str
    what: str
    ours: str
    peer: str
    peer_figure: str
    value: float
    """The ratio, or where there is no peer the figure itself."""
    goal: Goal | None = None
    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.goal.met(self.value)


def compare(
    point: str,
    what: str,
    samples: Samples,
    *,
    ours: str,
    peers: list[str],
    sense: Sense = Sense.SPEED,
    bound: float | None = None,
) -> list[Row]:
    """One row, or none when a contender is missing.  Several peers: the fastest counts."""
    if not samples.has(ours, *peers):
        return []
    best = min(peers, key=samples.median)
    return [
        Row(
            point=point,
            what=what,
            ours=samples.text(ours),
            peer=best,
            peer_figure=samples.text(best),
            value=ratio(samples, ours, peers, sense),
            goal=None if bound is None else Goal(bound, below=sense is Sense.TIME),
            seconds={name: samples.seconds[name] for name in (ours, *peers)},
        )
    ]


def table(rows: list[Row], *, verdicts: bool) -> str:
    head = ("point", "what", "StageFS", "peer", "figure", "ratio", "goal", "")
    lines = [head]
    for row in rows:
        verdict = {True: "met", False: "MISSED", None: ""}[row.met] if verdicts else ""
        value = f"{row.value:.2f}" if row.peer else ""
        goal = "" if row.goal is None else str(row.goal)
        lines.append(
            (row.point, row.what, row.ours, row.peer, row.peer_figure, value, goal, verdict)
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def as_json(
    rows: list[Row], missing: list[str], *, settings: dict[str, object], claim: bool
) -> str:
    document = {
        "claim": claim,
        "settings": settings,
        "machine": machine(),
        "versions": versions(),
        "missing": missing,
        "rows": [
            {
                **{field: getattr(row, field) for field in ("point", "what", "ours", "peer")},
                "peer_figure": row.peer_figure,
                "value": row.value,
                "goal": None if row.goal is None else str(row.goal),
                "met": row.met,
                "seconds": row.seconds,
            }
            for row in rows
        ],
    }
    return json.dumps(document, indent=1) + "\n"


def machine() -> dict[str, object]:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    return {
        "kernel": platform.release(),
        "cpu": model[1] if model else platform.machine(),
        "cores": os.cpu_count(),
        "memory_mib": int(memory[1]) // 1024 if memory else None,
        "load_at_end": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("stagefs", "pyfuse3", "trio", "obstore", "xxhash"):
        found[package] = metadata.version(package)
    commit = _first_line(("git", "-C", str(CHECKOUT), "rev-parse", "--short", "HEAD"))
    if commit is not None:
        found["commit"] = commit
    for name, command in _VERSIONS.items():
        line = _first_line(command)
        if line is not None:
            found[name] = line
    return found


def _first_line(command: tuple[str, ...]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except FileNotFoundError:
        return None
    lines = (done.stdout + done.stderr).splitlines()
    return lines[0].strip() if lines and done.returncode == 0 else None
