"""Progress reports: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any, TextIO


class Progress:
    """Reports on a task of known length.

    On a terminal a tqdm bar; otherwise one line at most every `every` seconds with the same figures.
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit_size: int = 1,
        unit: str = "images",
        every: float = 10.0,
        stream: TextIO | None = None,
    ):
        """`unit_size` items, called `unit`, are handled per update; rates are given in items."""
        self._stream = stream or sys.stderr
        self._name, self._total, self._size, self._unit = name, total, unit_size, unit
        self._every, self._begun, self._last = every, time.monotonic(), time.monotonic()
        self._first = self._done = 0
        self._bar = None
        if self._stream.isatty():
            with suppress(ImportError):  # where tqdm is missing, lines do
                from tqdm import tqdm

                self._bar = tqdm(total=total, desc=name, file=self._stream, dynamic_ncols=True, leave=True)

    def start_at(self, done: int) -> None:
        """Resumed work does not count towards the rate."""
        self._first = self._done = done
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def expect(self, total: int) -> None:
        """Sets the number of updates, if it becomes known only after the start."""
        self._total = total
        if self._bar is not None:
            self._bar.total = total

    def rate(self) -> float:
        """Items per second so far."""
        return (self._done - self._first) * self._size / max(time.monotonic() - self._begun, 1e-9)

    def update(self, done: int, **figures: Any) -> None:
        """Sets how many updates are done and the figures shown beside it."""
        self._done = done
        shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in figures.items()}
        if self._bar is not None:
            self._bar.set_postfix({**shown, f"{self._unit}/s": f"{self.rate():.0f}"}, refresh=False)
            self._bar.update(done - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last >= self._every or done >= self._total:
            self._last = now
            left = (self._total - done) * self._size / max(self.rate(), 1e-9)
            text = " ".join(f"{k} {v}" for k, v in shown.items())
            print(
                f"{self._name}: {done}/{self._total} {text} {self.rate():.0f} {self._unit}/s, {in_hours(left)} left",
                file=self._stream,
                flush=True,
            )

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()


def in_hours(seconds: float) -> str:
    """Seconds as 1:02:03, or 2:03 below an hour."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
