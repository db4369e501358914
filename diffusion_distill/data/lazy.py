"""Lazy: sources whose samples are made by a function of the index, once if they fit into memory, else on demand.

Whatever reads images one by one (a folder, a prepared data set, the user's object) hands `hold` that function.
Several threads make the images of a batch. They gain where decoding takes long (2 cores: 1.6 times at 512x512,
1.4 at 128x128) and lose where Python itself is the work (0.7 times at 32x32), hence `usual_threads`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from diffusion_distill.base.errors import positive_int
from diffusion_distill.base.typing import Cond
from diffusion_distill.data.sources import (
    UNIT_RANGE,
    Source,
    ask_about_range,
    check_labels,
    from_arrays,
    narrow,
    range_of,
    to_unit_range,
)

#: What decoded images may take before they are made on demand: 2 GiB, all of CIFAR-10 and MNIST.
MEMORY = 2 * 2**30
#: Images with fewer pixels than this are read by one thread.
SMALL = 64 * 64
#: How many images of floats made on demand are looked at to see whether their range is right.
LOOKED_AT = 16

Make = Callable[[int], tuple[np.ndarray, Cond | None]]  # index -> sample [*shape], its condition
Report = Callable[[int, int], None]  # (samples done, of how many)


@dataclass(frozen=True, eq=False)
class LazySource:
    """A source that makes samples when they are asked for. It may be used by several threads if `make` may.

    Attributes:
        make: index -> (sample of `shape` and `dtype`, its condition or None); always the same for the same index.
        count: number of samples.
        shape: of one sample.
        dtype: uint8, or float32.
        num_classes: number of classes, 0 if conditions are no labels.
        threads: number of threads that make the samples of a batch.
        identity: gives a text that changes when a sample does, see `fingerprint`; None if nothing is known.
        value_range: the stored values that become -1 and 1; None for values without bounds.
    """

    make: Make
    count: int
    shape: tuple[int, ...]
    dtype: np.dtype
    num_classes: int = 0
    threads: int = 1
    identity: Callable[[], str] | None = None
    value_range: tuple[float, float] | None = UNIT_RANGE

    def __len__(self) -> int:
        return self.count

    def gather(self, indices: NDArray[np.integer]) -> dict[str, Any]:
        """The samples at `indices` [batch] and their conditions; see `Source.gather`."""
        x, cond = self.read(np.asarray(indices))
        batch: dict[str, Any] = {"x": to_unit_range(x, self.value_range)}
        return batch if cond is None else {**batch, "cond": cond}

    def read(self, indices: np.ndarray, report: Report | None = None) -> tuple[np.ndarray, Cond | None]:
        """Samples [batch, *shape] as they are stored, and their conditions, a tree of arrays [batch, ...]."""
        count = len(indices)
        x, conds = np.empty((count, *self.shape), self.dtype), [None] * count

        def fill(rows: range) -> int:
            for row in rows:
                x[row], conds[row] = self.make(int(indices[row]))
            return rows.stop

        # Short enough pieces for the threads to end together; long enough for the hand-over not to count.
        piece = min(max(-(-count // (4 * self.threads)), 1), 256)
        pieces = [range(start, min(start + piece, count)) for start in range(0, count, piece)]
        for done in map(fill, pieces) if self.threads == 1 else self._pool.map(fill, pieces):
            if report:
                report(done, count)
        if count and isinstance(conds[0], int):  # labels: the usual case, and much faster
            return x, np.array(conds, np.int32)
        return x, jax.tree.map(lambda *each: narrow(np.stack(each)), *conds) if count else None

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.threads, "images")  # its threads end with the source


def hold(
    make: Make,
    count: int,
    like: np.ndarray,
    labelled: bool,
    num_classes: int | None,
    *,
    threads: int,
    memory: int = MEMORY,
    report: Report | None = None,
    identity: Callable[[], str] | None = None,
    value_range: tuple[float, float] | str | None = "auto",
) -> Source:
    """A source of what `make` gives: an `ArraySource` if it fits into `memory` bytes, else a `LazySource`.

    Args:
        like: a sample; all have its shape and dtype.
        labelled: whether the conditions that `make` gives are labels.
        num_classes: None takes the largest label plus one, which only a set in memory knows.
        report: called with (samples done, count) while samples are read into memory.
        identity: of a `LazySource`.
        value_range: as in `from_arrays`.

    Raises:
        ValueError: the number of classes is not known before the labels are read, or is given without labels; or
            what `make` raises.
    """
    positive_int("threads", threads)
    if not labelled:
        check_labels(None, count, num_classes or 0)
    bounds = range_of(like.dtype) if value_range == "auto" else value_range
    lazy = LazySource(make, count, like.shape, like.dtype, num_classes or 0, threads, identity, bounds)  # type: ignore[arg-type]
    if count * like.nbytes > memory:
        if labelled and num_classes is None:
            raise ValueError(
                f"The {count} images take more than memory={memory} bytes and are read on demand, so their labels "
                "are not known now. Pass num_classes, or a set without labels: cond=None."
            )
        if like.dtype != np.uint8 and value_range == "auto":
            ask_about_range(lazy.read(np.arange(min(count, LOOKED_AT)))[0])
        return lazy
    x, cond = lazy.read(np.arange(count), report)
    return from_arrays(x, cond, num_classes if labelled else 0, value_range=value_range)


def usual_threads(threads: int | None, height: int, width: int) -> int:
    """The number of threads asked for, or else all cores for large images and one for small ones."""
    if threads is not None:
        return positive_int("threads", threads)
    return 1 if height * width < SMALL else os.cpu_count() or 1
