"""Streams: endless sources that give whole batches, of which the position is the number of the batch.

A run that goes on after a stop asks for the batch of the update where it stopped. A function `at(step)` answers at
once. An iterator with `get_state` and `set_state`, such as Grain's, is set back to its start and read up to there,
which gives the same batches as long as the iterator does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusion_distill.base.errors import positive_int
from diffusion_distill.data.sources import Source


@dataclass(frozen=True, eq=False)
class Stream:
    """A source of whole batches.

    Attributes:
        at: step -> {"x": float32 [batch, *shape], "cond": a tree of arrays [batch, ...] or left out}; the batch of all
            processes together.
        shape: of one sample.
        num_classes: number of classes, if conditions are labels; else 0.
        value_range: (-1, 1), or None for values without bounds.
    """

    at: Callable[[int], Mapping[str, Any]]
    shape: tuple[int, ...]
    num_classes: int = 0
    value_range: tuple[float, float] | None = (-1.0, 1.0)


def from_batches(
    batches: Callable[[int], Mapping[str, Any]] | Iterator[Mapping[str, Any]],
    shape: Sequence[int],
    *,
    num_classes: int = 0,
    value_range: tuple[float, float] | None = (-1.0, 1.0),
) -> Stream:
    """An endless source of the caller's batches, of the size that the run's settings name.

    Args:
        batches: a function of the step, counted from 0, which must give the same batch whenever it is asked; or an
            iterator with `get_state()` and `set_state(state)`, which stands at its first batch.
        shape: of one sample, channels last.
        num_classes: number of classes, if conditions are labels; else 0.
        value_range: (-1, 1): values are in it already, as batches are not scaled; None for values without bounds.

    Raises:
        TypeError: neither a function nor such an iterator.
        ValueError: a shape that is none.
    """
    shape = tuple(positive_int("A side of shape", n) for n in shape)
    if all(hasattr(batches, name) for name in ("__next__", "get_state", "set_state")):
        batches = _Rewound(batches)
    if not callable(batches):
        raise TypeError(
            f"from_batches needs a function of the step, or an iterator with get_state and set_state, got {batches!r}. "
            "A run that goes on after a stop must find its batch again."
        )
    return Stream(batches, shape, num_classes, value_range)


def first_batch(source: Source | Stream, count: int = 8) -> dict[str, Any]:
    """The first samples of a source, at most `count` of a finite one."""
    if isinstance(source, Stream):
        return dict(source.at(0))
    return source.gather(np.arange(min(count, len(source))))


class _Rewound:
    """An iterator as a function of the step."""

    def __init__(self, iterator: Any):
        self._iterator, self._start, self._next = iterator, iterator.get_state(), 0
        self._lock = threading.Lock()

    def __call__(self, step: int) -> Mapping[str, Any]:
        with self._lock:
            if step < self._next:
                self._iterator.set_state(self._start)
                self._next = 0
            while True:
                batch, self._next = next(self._iterator), self._next + 1
                if self._next > step:
                    return batch
