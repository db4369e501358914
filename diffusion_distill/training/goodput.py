"""Where the time of a run goes, and a word when nothing moves.

    restarting    from the start of the program to the end of its first update: reading, restoring, compiling
    data          waiting for a batch
    saving        handing a checkpoint or an artefact over; most of a save happens in the background, and is not here
    evaluating    pictures and figures of samples
    training      the rest

Each record of `metrics.jsonl` has these seconds of the program that wrote it, as `seconds`. The share of training is
known as goodput.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

#: Activities, and what a run says that is stuck in one.
IN_WORDS = {
    "training": "the devices compute",
    "data": "it waits for the next batch: look at the data source and its disk",
    "saving": "it saves: look at the disk of the workdir",
    "evaluating": "it evaluates",
    "restarting": "it reads, restores and compiles",
}
#: Seconds without an update after which a run says so, and again after twice the time, and so on.
PATIENCE = 300.0

Item = TypeVar("Item")


class Goodput:
    """The seconds of each activity since it was made; as a context, it also watches that updates are made."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = dict.fromkeys(IN_WORDS, 0.0)
        self._activity = "restarting"
        self._since = self._moved = time.monotonic()
        self._update, self._told, self._ended = 0, 0, threading.Event()

    @contextmanager
    def spent(self, activity: str) -> Iterator[None]:
        """The time of the block belongs to an activity."""
        before = self._switch(activity)
        try:
            yield
        finally:
            self._switch(before)

    def waiting(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; the time until each is there was spent waiting for data."""
        source = iter(items)
        while True:
            with self.spent("data"):
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item

    def moved(self, update: int) -> None:
        """An update was made; after the first one the program is no longer restarting."""
        if self._activity == "restarting":
            self._switch("training")
        self._update, self._moved, self._told = update, time.monotonic(), 0

    def seconds(self) -> dict[str, float]:
        """By activity, to the millisecond."""
        self._switch(self._activity)
        return {name: round(seconds, 3) for name, seconds in self._seconds.items()}

    def _switch(self, activity: str) -> str:
        now, before = time.monotonic(), self._activity
        self._seconds[before] += now - self._since
        self._activity, self._since = activity, now
        return before

    # ------------------------------------------------------------ watching

    def __enter__(self) -> Goodput:
        threading.Thread(target=self._watch, name="goodput", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(PATIENCE / 4):
            idle = time.monotonic() - self._moved
            if idle > PATIENCE * 2**self._told:
                self._told += 1
                print(
                    f"No update for {idle:.0f} s, after update {self._update}: {IN_WORDS[self._activity]}.",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
