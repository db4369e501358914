"""What a benchmark found, in one form for all of them: how far ours is ahead of a peer or a bound, and of its goal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from _rounds import Times, ratio

#: A figure with its quartiles: (lower quartile, median, upper quartile).
Spread = tuple[float, float, float]


@dataclass(frozen=True)
class Verdict:
    """One line of the summary.

    Attributes:
      question: what was timed, and beside what, for example 'TRACT update of cifar64 beside compiled PyTorch'.
      ours, other: ours, and the peer's or the bound, in `unit`, less being better: the median, and the quartiles around
        it. `other` is None where the peer could not be measured.
      ratio: the other over ours, how many times as fast ours is; None without the other.
      goal: the smallest ratio that is good enough.
      unit: of ours and the other.
      left_out: why the other was not measured.
    """

    question: str
    ours: Spread
    other: Spread | None
    ratio: float | None
    goal: float = 1.0
    unit: str = "ms"
    left_out: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None if that was not measured."""
        return None if self.ratio is None else self.ratio >= self.goal

    @property
    def doubt(self) -> float:
        """By how much the ratio is uncertain: half the distance of the quartiles, the wider of the two."""
        if self.ratio is None or self.other is None:
            return 0.0
        return self.ratio * max((high - low) / 2 / median for low, median, high in (self.ours, self.other))

    @property
    def ratio_shown(self) -> str:
        """The ratio as text, empty if there is none."""
        return "" if self.ratio is None else f"{self.ratio:.2f}" if self.ratio < 100 else f"{self.ratio:.0f}"

    @property
    def word(self) -> str:
        """The verdict in words."""
        if self.ratio is None:
            return f"left out: {self.left_out}"
        close = abs(self.ratio - self.goal) <= self.doubt
        return ("met" if self.met else "NOT MET") + (", within the spread" if close else "")

    def __str__(self) -> str:
        if self.other is None:
            return f"{self.question}: {shown(self.ours)} {self.unit}; {self.word}"
        times = f"{shown(self.ours)} {self.unit} against {shown(self.other)} {self.unit}"
        return f"{self.question}: {times}, ratio {self.ratio_shown}, goal {self.goal:.2f}: {self.word}"


def shown(figures: Spread) -> str:
    """The median with its quartiles, which are left out if there are none."""
    low, median, high = (f"{figure:.1f}" if abs(figure) >= 10 else f"{figure:.3g}" for figure in figures)
    return median if low == high else f"{median} [{low} to {high}]"


def compared(question: str, ours: Times, other: Times, goal: float = 1.0) -> Verdict:
    """The verdict on times that were taken in turn."""
    return Verdict(question, milliseconds(ours), milliseconds(other), ratio(ours, other), goal)


def bounded(question: str, ours: Spread, bound: Spread | float, goal: float = 1.0, unit: str = "ms") -> Verdict:
    """The verdict on a figure beside a bound, which was computed: from something measured, or exactly."""
    low, median, high = bound if isinstance(bound, tuple) else (bound, bound, bound)
    return Verdict(question, ours, (low, median, high), median / ours[1], goal, unit)


def alone(question: str, ours: Times, left_out: str, goal: float = 1.0) -> Verdict:
    """What remains of a verdict if the peer could not be measured."""
    return Verdict(question, milliseconds(ours), None, None, goal, left_out=left_out)


def milliseconds(times: Times, scale: float = 1.0) -> Spread:
    """The median of times and its quartiles, for so many times the work."""
    low, high = times.spread
    return 1000 * scale * low, 1000 * scale * times.median, 1000 * scale * high


def report(verdicts: Sequence[Verdict], out: Path | None = None) -> None:
    """Prints the verdicts; writes them to a JSON file too."""
    print(*verdicts, sep="\n", flush=True)
    if out:
        out.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=2) + "\n")


def read(path: Path) -> list[Verdict]:
    """The verdicts of a file that `report` wrote."""
    return [from_record(record) for record in json.loads(path.read_text())]


def from_record(record: dict) -> Verdict:
    """A verdict from its fields."""
    spreads = {name: tuple(record[name]) if record[name] else None for name in ("ours", "other")}
    return Verdict(**{**record, **spreads})
