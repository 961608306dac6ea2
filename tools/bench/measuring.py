"""Measuring contenders in turn, so that a machine that gets slower does so for all of them.

A round measures every contender once, in an order that is reversed from round to round.  A
ratio is taken within each round, and the median of the ratios is what counts.  One thread;
nothing here starts or ends anything by itself.
"""

import dataclasses
import enum
import statistics
from collections.abc import Callable, Sequence

Say = Callable[[str], None]


class Unavailable(Exception):
    """A peer or server is not there: one sentence; the rows that need it are left out."""


class MeasureFailed(Exception):
    """A contender did not do what was measured."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """``measure`` brings about the state before, returns seconds, and clears up."""

    name: str
    measure: Callable[[], float]
    ours: bool = False


@dataclasses.dataclass(frozen=True)
class Work:
    """What one measurement does: so many bytes read, or so many of something."""

    amount: int
    unit: str = "bytes"

    def rate(self, seconds: float) -> str:
        if self.unit == "bytes":
            return f"{self.amount / seconds / 1e6:.0f} MB/s"
        if self.amount > 1:
            return f"{seconds:.2f} s, {seconds / self.amount * 1e6:.0f} us each"
        return f"{seconds:.2f} s"


class Samples:
    """Seconds of each contender, one for each round; what dropped out is in ``missing``."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.seconds: dict[str, list[float]] = {}
        self.missing: list[str] = []

    def has(self, *names: str) -> bool:
        return all(name in self.seconds for name in names)

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def text(self, name: str) -> str:
        return self.work.rate(self.median(name))


class Sense(enum.Enum):
    """How two contenders are compared, and which way is better."""

    SPEED = "at least"
    """peer's time / our time: how many times as fast we are."""
    TIME = "at most"
    """our time / peer's time."""


def ratio(samples: Samples, ours: str, peers: Sequence[str], sense: Sense) -> float:
    """The median over the rounds, each against the fastest of ``peers`` in that round."""
    ratios = []
    for position, mine in enumerate(samples.seconds[ours]):
        best = min(samples.seconds[peer][position] for peer in peers)
        ratios.append(best / mine if sense is Sense.SPEED else mine / best)
    return statistics.median(ratios)


def interleave(
    contenders: Sequence[Contender], *, rounds: int, work: Work, say: Say, what: str
) -> Samples:
    """Raises MeasureFailed when StageFS fails; a peer that fails is left out with a sentence."""
    samples = Samples(work)
    racing = list(contenders)
    for number in range(rounds):
        for contender in racing if number % 2 == 0 else racing[::-1]:
            try:
                seconds = contender.measure()
            except Unavailable as reason:
                samples.missing.append(str(reason))
            except MeasureFailed as reason:
                if contender.ours:
                    raise MeasureFailed(f"{what}: {contender.name}: {reason}") from reason
                samples.missing.append(f"{what}: {contender.name} left out: {reason}")
            else:
                samples.seconds.setdefault(contender.name, []).append(seconds)
                say(f"{what} {number + 1}/{rounds}: {contender.name} {work.rate(seconds)}")
                continue
            samples.seconds.pop(contender.name, None)
            racing = [other for other in racing if other is not contender]
            say(samples.missing[-1])
    return samples
