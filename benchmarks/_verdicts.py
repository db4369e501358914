"""What a benchmark found, in one form for all of them: how far ours is ahead of a peer or a bound, and of its goal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from _rounds import Times, ratio


@dataclass(frozen=True)
class Verdict:
    """One line of the summary.

    Attributes:
      question: what was timed, and beside what, for example 'TRACT update of cifar64 beside compiled PyTorch'.
      ours, other: milliseconds of ours, and of the peer or the bound: the median, and the quartiles around it.
      ratio: how many times as fast ours is as the other.
      goal: the smallest ratio that is good enough.
    """

    question: str
    ours: tuple[float, float, float]
    other: tuple[float, float, float]
    ratio: float
    goal: float = 1.0

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.ratio >= self.goal

    def __str__(self) -> str:
        times = [f"{median:.1f} ms [{low:.1f} to {high:.1f}]" for low, median, high in (self.ours, self.other)]
        word = "met" if self.met else "NOT MET"
        return f"{self.question}: {' against '.join(times)}, ratio {self.ratio:.2f}, goal {self.goal:.2f}: {word}"


def compared(question: str, ours: Times, other: Times, goal: float = 1.0) -> Verdict:
    """The verdict on times that were taken in turn."""
    ours_ms, other_ms = (tuple(1000 * s for s in (t.spread[0], t.median, t.spread[1])) for t in (ours, other))
    return Verdict(question, ours_ms, other_ms, ratio(ours, other), goal)  # type: ignore[arg-type]


def report(verdicts: Sequence[Verdict], out: Path | None = None) -> None:
    """Prints the verdicts; writes them to a JSON file too."""
    print(*verdicts, sep="\n", flush=True)
    if out:
        out.write_text(json.dumps([asdict(verdict) for verdict in verdicts], indent=2) + "\n")


def read(path: Path) -> list[Verdict]:
    """The verdicts of a file that `report` wrote."""
    return [
        Verdict(**{**record, "ours": tuple(record["ours"]), "other": tuple(record["other"])})
        for record in json.loads(path.read_text())
    ]
