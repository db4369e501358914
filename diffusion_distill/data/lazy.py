"""Lazy: sources whose images are made by a function of the index, once if they fit into memory, else on demand.

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

import numpy as np
from numpy.typing import NDArray

from diffusion_distill.base.errors import positive_int
from diffusion_distill.data.sources import Source, ask_about_range, check_labels, from_arrays, range_of, to_unit_range

#: What decoded images may take before they are made on demand: 2 GiB, all of CIFAR-10 and MNIST.
MEMORY = 2 * 2**30
#: Images with fewer pixels than this are read by one thread.
SMALL = 64 * 64
#: How many images of floats made on demand are looked at to see whether their range is right.
LOOKED_AT = 16

Make = Callable[[int], tuple[np.ndarray, int | None]]  # index -> image [height, width, channels], label
Report = Callable[[int, int], None]  # (images done, of how many)


@dataclass(frozen=True, eq=False)
class LazySource:
    """A source that makes images when they are asked for. It may be used by several threads if `make` may.

    Attributes:
        make: index -> (image of `shape` and `dtype`, label or None); always the same for the same index.
        count: number of images.
        shape: (height, width, channels).
        dtype: uint8, or float32 for images in [-1, 1].
        num_classes: number of classes, 0 without labels.
        threads: number of threads that make the images of a batch.
        identity: gives a text that changes when an image does, see `fingerprint`; None if nothing is known.
    """

    make: Make
    count: int
    shape: tuple[int, int, int]
    dtype: np.dtype
    num_classes: int = 0
    threads: int = 1
    identity: Callable[[], str] | None = None

    def __len__(self) -> int:
        return self.count

    def gather(self, indices: NDArray[np.integer]) -> dict[str, np.ndarray]:
        """The images at `indices` [batch] (and their labels); see `Source.gather`."""
        images, labels = self.read(np.asarray(indices))
        batch: dict[str, np.ndarray] = {"x": to_unit_range(images, range_of(self.dtype))}
        if self.num_classes:
            batch["cond"] = labels
        return batch

    def read(self, indices: np.ndarray, report: Report | None = None) -> tuple[np.ndarray, NDArray[np.int32]]:
        """Images [batch, height, width, channels] as they are stored, and labels [batch] (0 without classes)."""
        count = len(indices)
        images, labels = np.empty((count, *self.shape), self.dtype), np.zeros(count, np.int32)

        def fill(rows: range) -> int:
            for row in rows:
                images[row], label = self.make(int(indices[row]))
                labels[row] = label or 0
            return rows.stop

        # Short enough pieces for the threads to end together; long enough for the hand-over not to count.
        piece = min(max(-(-count // (4 * self.threads)), 1), 256)
        pieces = [range(start, min(start + piece, count)) for start in range(0, count, piece)]
        for done in map(fill, pieces) if self.threads == 1 else self._pool.map(fill, pieces):
            if report:
                report(done, count)
        return images, labels

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
) -> Source:
    """A source of the images that `make` gives: an `ArraySource` if they fit into `memory` bytes, else a `LazySource`.

    Args:
        like: an image; all have its shape and dtype.
        labelled: whether `make` gives labels.
        num_classes: None takes the largest label plus one, which only a set in memory knows.
        report: called with (images done, count) while images are read into memory.
        identity: of a `LazySource`.

    Raises:
        ValueError: the number of classes is not known before the labels are read, or is given without labels; or
            what `make` raises.
    """
    positive_int("threads", threads)
    if not labelled:
        check_labels(None, count, num_classes or 0)
    height, width, channels = like.shape
    lazy = LazySource(make, count, (height, width, channels), like.dtype, num_classes or 0, threads, identity)
    if count * like.nbytes > memory:
        if labelled and num_classes is None:
            raise ValueError(
                f"The {count} images take more than memory={memory} bytes and are read on demand, so their labels "
                "are not known now. Pass num_classes, or label=None for a set without labels."
            )
        if like.dtype != np.uint8:
            ask_about_range(lazy.read(np.arange(min(count, LOOKED_AT)))[0])
        return lazy
    images, labels = lazy.read(np.arange(count), report)
    return from_arrays(images, labels if labelled else None, num_classes)


def usual_threads(threads: int | None, height: int, width: int) -> int:
    """The number of threads asked for, or else all cores for large images and one for small ones."""
    if threads is not None:
        return positive_int("threads", threads)
    return 1 if height * width < SMALL else os.cpu_count() or 1
