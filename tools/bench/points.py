"""What every point of the bench is made of: a name, and a function that measures it."""

import dataclasses
from collections.abc import Callable, Sequence

from bench.measuring import Contender, Samples, Work, interleave
from bench.report import Row
from bench.servers import Servers
from bench.workbench import Workbench

OURS = "StageFS"


@dataclasses.dataclass
class Measured:
    """What a point found; ``missing`` are sentences on what was left out."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    missing: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Lab:
    """One point's view of the run."""

    point: str
    bench: Workbench
    servers: Servers

    def race(
        self, what: str, contenders: Sequence[Contender], work: Work, measured: Measured
    ) -> Samples:
        samples = interleave(
            contenders,
            rounds=self.bench.amounts.rounds,
            work=work,
            say=self.bench.say,
            what=f"{self.point} {what}",
        )
        measured.missing += samples.missing
        return samples


@dataclasses.dataclass(frozen=True)
class Point:
    name: str
    summary: str
    measure: Callable[[Lab], Measured]
