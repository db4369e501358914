"""Times several programs in turn, each in a process of its own.

A shared machine is faster in one minute than in the next. Programs that are timed one after another see different
machines; in short rounds, one after the other again and again, all see the same ones, and the ratio of two medians is
steady where the medians are not. Processes of their own keep one program's threads and memory out of the other's way.
A machine may take memory back from a process that waits, which makes the first calls of its turn slow: those are not
counted.

A worker is a program that calls `serve`; `in_turn` starts the workers and asks each for some calls per round. Pieces of
work that may share a process are timed by `by_turns`.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

READY = "ready"


def serve(work: Callable[[], object]) -> None:
    """Calls `work` twice to warm up, then as each line of the standard input says; prints the seconds.

    A line has two numbers of calls: those that are not counted, and those after them.
    """
    timed(work, 2)
    print(READY, flush=True)
    for line in sys.stdin:
        uncounted, counted = map(int, line.split())
        timed(work, uncounted)
        print(json.dumps(timed(work, counted)), flush=True)


def timed(work: Callable[[], object], calls: int = 1) -> list[float]:
    """Seconds of some calls."""
    found = []
    for _ in range(calls):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return found


def by_turns(works: Mapping[str, Callable[[], object]], rounds: int = 6, calls: int = 3) -> dict[str, Times]:
    """The times of several pieces of work in this process, in turn, after one call of each that is not counted."""
    for work in works.values():
        work()
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            found[name] += timed(work, calls)
    return {name: Times(seconds) for name, seconds in found.items()}


@dataclass(frozen=True)
class Times:
    """Seconds of the calls of one worker."""

    seconds: Sequence[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The quartiles."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return low, high

    def __str__(self) -> str:
        low, high = self.spread
        return f"{1000 * self.median:8.1f} ms [{1000 * low:.1f} to {1000 * high:.1f}]"


def in_turn(
    workers: Mapping[str, Sequence[str]],
    rounds: int = 6,
    calls: int = 3,
    variables: Mapping[str, dict] | None = None,
    seconds: float = math.inf,
    uncounted: int = 1,
) -> dict[str, Times]:
    """The times of workers, by name; those that cannot start are left out, with their last words printed.

    Args:
      workers: the command line of each.
      rounds, calls: how often each is asked, and for how many calls.
      variables: of a worker's environment, beside those of this program.
      seconds: after which no further round is begun, if there were two.
      uncounted: calls at the start of each worker's turn that are not counted.
    """
    started: dict[str, Any] = {}
    for name, command in workers.items():  # all at once: they compile side by side
        environment = {**os.environ, **(variables or {}).get(name, {})}
        started[name] = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    running: dict[str, Any] = {}
    for name, process in started.items():
        if process.stdout.readline().strip() == READY:
            running[name] = process
        else:
            words = process.stderr.read().strip().splitlines()
            errors = [line for line in words if "Error" in line.split(":")[0]]
            print(f"{name} is not timed: {(errors or words or ['it ended'])[-1]}", flush=True)
    found: dict[str, list[float]] = {name: [] for name in running}
    end = time.monotonic() + seconds
    try:
        for round_ in range(rounds):
            if round_ >= 2 and time.monotonic() > end:
                break
            for name, process in running.items():
                process.stdin.write(f"{uncounted} {calls}\n")
                process.stdin.flush()
                found[name] += json.loads(process.stdout.readline())
    finally:
        for process in running.values():
            process.kill()
    return {name: Times(seconds) for name, seconds in found.items()}


def ratio(ours: Times, theirs: Times) -> float:
    """How many times as fast ours is."""
    return theirs.median / ours.median
