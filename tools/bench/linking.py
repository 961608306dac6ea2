"""B6: links by the million: sandboxes made from one template, beside `ln -s`."""

import itertools
import json
from pathlib import Path

from bench.catalogs import write_catalog
from bench.measuring import Contender, MeasureFailed, Work
from bench.ours import Memory, StageFS, stagefs
from bench.points import OURS, Lab, Measured
from bench.report import Goal, Row, compare

LN = "ln -s"
SPEEDUP = 20.0
# Of so many sandboxes one is made with ln -s, and the time multiplied.
LN_SHARE = 10
# What a sandbox holds in memory is measured over sets of ten times as many of them, after a
# first such set: making so many at once takes memory that stays with the process and is used again.
MEMORY_TIMES = 10
MEMORY_SETS = 2
SANDBOX_BYTES = 500.0


class _Sandboxes:
    """Makes them by the set, and knows how many links each input must have by now."""

    def __init__(self, lab: Lab, ours: StageFS, template: Path, inputs: list[str]) -> None:
        self._lab = lab
        self._ours = ours
        self._template = template
        self._inputs = inputs
        self._numbers = itertools.count()
        self._made = 0

    def make(self, count: int) -> float:
        name = f"set{next(self._numbers)}"
        seconds = self._ours.create_sandboxes(name, self._template, count)
        self._made += count
        self._check(self._ours.point / "tasks" / f"{name}.{count - 1:06d}")
        return seconds

    def _check(self, last: Path) -> None:
        """The last sandbox shows all inputs, each with a link in staging and one in each."""
        found = self._lab.bench.run("find", last, "-type", "f", "-printf", "%n\\n").split()
        if len(found) != len(self._inputs) or set(found) != {b"%d" % (self._made + 1)}:
            raise MeasureFailed(
                f"{last.name} has {len(found)} links of {len(self._inputs)}, with st_nlink "
                f"{sorted(map(int, set(found)))}, not {self._made + 1}"
            )


def links(lab: Lab) -> Measured:
    measured, bench = Measured(), lab.bench
    sandboxes, each = bench.amounts.sandboxes, bench.amounts.links
    what = f"{sandboxes} sandboxes of {each} links"
    with stagefs(bench) as ours:
        top = bench.fresh("links")
        inputs, template = _template(ours, top, each)
        made = _Sandboxes(lab, ours, template, inputs)
        contenders = [
            Contender(OURS, lambda: made.make(sandboxes), ours=True),
            Contender(LN, lambda: _ln(lab, [str(ours.point / name) for name in inputs])),
        ]
        samples = lab.race(what, contenders, Work(sandboxes * each, "links"), measured)
        measured.rows += compare(lab.point, what, samples, ours=OURS, peers=[LN], bound=SPEEDUP)
        measured.rows.append(_memory(lab, ours, made))
        bench.remove(top)
    measured.missing.append(
        f"{lab.point}: ln -s made one sandbox of {LN_SHARE}; its time is multiplied."
    )
    return measured


def _template(ours: StageFS, top: Path, count: int) -> tuple[list[str], Path]:
    """Inputs in ``staging/``, as paths in the mount, and a manifest that links all of them."""
    catalog = write_catalog(top, count)
    ours.import_catalog(catalog, "inputs")
    with catalog.open() as lines:
        inputs = [f"staging/inputs/{json.loads(line)['name']}" for line in lines]
    manifest = {Path(name).name: f"staging:///{name.removeprefix('staging/')}" for name in inputs}
    template = top / "template.json"
    template.write_text(json.dumps({"inputs": manifest}))
    template.chmod(0o644)
    return inputs, template


def _ln(lab: Lab, targets: list[str]) -> float:
    """A directory for each sandbox, all links of it by one `ln -s`, on the plain disk."""
    bench = lab.bench
    top = bench.fresh("symlinks")
    directories = max(bench.amounts.sandboxes // LN_SHARE, 1)
    script = (
        f"cd '{top}' && for number in $(seq {directories}); do "
        'mkdir "$number" && ln -s -t "$number" -- "$@" || exit 1; done'
    )
    seconds = bench.timed("sh", "-c", script, "sh", *targets)[0]
    found = bench.run("find", top, "-type", "l", "-printf", ".")
    bench.remove(top)
    if len(found) != directories * len(targets):
        raise MeasureFailed(f"{len(found)} links came of {directories * len(targets)}")
    return seconds * bench.amounts.sandboxes / directories


def _memory(lab: Lab, ours: StageFS, made: _Sandboxes) -> Row:
    """What the daemon holds more after many more sandboxes that nobody looked into."""
    count = lab.bench.amounts.sandboxes * MEMORY_TIMES
    pid = ours.daemon()
    made.make(count)
    before = Memory(pid).resident_bytes
    for _ in range(MEMORY_SETS):
        made.make(count)
    each = (Memory(pid).resident_bytes - before) / (count * MEMORY_SETS)
    return Row(
        point=lab.point,
        what=f"daemon's memory, each of {count * MEMORY_SETS} more",
        ours=f"{each:.0f} bytes",
        peer="",
        peer_figure="",
        value=each,
        goal=Goal(SANDBOX_BYTES, below=True),
    )
