"""Sources: random access to a finite set of images.

A source has a number of images, their shape and number of classes, and returns the images at given indices.
The rest of the package does not need to know where images come from, so a folder, a zip or a prepared data set
becomes a source by having the four members of `Source`. Order, epochs and sharding belong to `pipeline`.

Images leave a source as float32 [batch, height, width, channels] in [-1, 1]; a stored value x of the range
[low, high] becomes

    2 (x - low) / (high - low) - 1,      for 8-bit images x / 127.5 - 1.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

UNIT_RANGE = (-1.0, 1.0)
BYTE_RANGE = (0.0, 255.0)


class Source(Protocol):
    """Random access to images; what `Batches` needs of a data set."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 for a set without labels."""
        ...

    def __len__(self) -> int:
        """Number of images."""
        ...

    def gather(self, indices: NDArray[np.integer]) -> dict[str, np.ndarray]:
        """Images by index [batch].

        Returns:
            `image` float32 [batch, height, width, channels] in [-1, 1] and, with classes, `label` int32 [batch].
        """
        ...


@dataclass(frozen=True, eq=False)
class ArraySource:
    """A source held in memory as NumPy arrays; they are checked once, here, and not copied.

    Attributes:
        images: uint8 or float32 [n, height, width, channels], values within `value_range`.
        labels: integers [n] in 0..num_classes - 1, or None for a set without labels.
        num_classes: number of classes, 0 without labels.
        value_range: (low, high), the stored values that become -1 and 1.

    Raises:
        ValueError: shapes, lengths, values or labels that break the above.
        TypeError: images or labels of another kind.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    num_classes: int = 0
    value_range: tuple[float, float] = UNIT_RANGE

    def __post_init__(self) -> None:
        check_images(self.images, self.value_range)
        check_labels(self.labels, len(self.images), self.num_classes)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        _, height, width, channels = self.images.shape
        return height, width, channels

    def __len__(self) -> int:
        return len(self.images)

    def gather(self, indices: NDArray[np.integer]) -> dict[str, np.ndarray]:
        """The images at `indices` [batch] (and their labels); see `Source.gather`."""
        batch: dict[str, np.ndarray] = {"x": to_unit_range(self.images[indices], self.value_range)}
        if self.labels is not None:
            batch["cond"] = self.labels[indices].astype(np.int32)
        return batch


def from_arrays(images: ArrayLike, labels: ArrayLike | None = None, num_classes: int | None = None) -> ArraySource:
    """A source of the caller's arrays.

    Args:
        images: [n, height, width, channels]; uint8 in 0..255, or floating point in [-1, 1] (kept as float32).
        labels: integers [n], or None.
        num_classes: number of classes; None takes the largest label plus one.

    Raises:
        ValueError, TypeError: as `ArraySource`; each message says what was given and how to put it right.

    Warns:
        UserWarning: floats that look like [0, 1], or bytes that look like 0..1.
    """
    images = np.asarray(images)
    if np.issubdtype(images.dtype, np.floating):
        images = images.astype(np.float32, copy=False)
    ask_about_range(images)
    if labels is not None:
        labels = np.asarray(labels)
        if num_classes is None:
            num_classes = int(labels.max()) + 1 if labels.size and np.issubdtype(labels.dtype, np.integer) else 0
    return ArraySource(images, labels, num_classes or 0, range_of(images.dtype))


def first_batch(source: Source, count: int = 8) -> dict[str, Any]:
    """The first samples of a source, at most `count` if it is finite."""
    return source.gather(np.arange(min(count, len(source))))


def range_of(dtype: np.dtype) -> tuple[float, float]:
    """The stored values that mean -1 and 1: 0 and 255 of bytes, -1 and 1 of floats."""
    return BYTE_RANGE if dtype == np.uint8 else UNIT_RANGE


def to_unit_range(images: np.ndarray, value_range: tuple[float, float]) -> NDArray[np.float32]:
    """Stored images as float32 in [-1, 1]; `images` must be the caller's own, float32 ones are overwritten."""
    # In place: eight times as fast as three new arrays, and twice as fast as looking the 256 values up.
    scaled = images.astype(np.float32, copy=False)
    if value_range == UNIT_RANGE:
        return scaled
    low, high = value_range
    if low:
        scaled -= np.float32(low)
    scaled /= np.float32((high - low) / 2)
    scaled -= np.float32(1)
    return scaled


def check_images(images: np.ndarray, value_range: tuple[float, float]) -> None:
    """Raises ValueError or TypeError unless images are [n, height, width, channels] with values in the range."""
    if images.dtype not in (np.uint8, np.float32):
        raise TypeError(
            f"Images have dtype {images.dtype}; allowed are uint8 (0..255) and float32 in [-1, 1]. "
            "Convert them with `images.astype(np.uint8)` or by scaling."
        )
    if images.ndim != 4:
        advice = "Add the channel axis with `images[..., None]`." if images.ndim == 3 else "Reshape them."
        raise ValueError(f"Images have shape {images.shape}; need [n, height, width, channels]. {advice}")
    if 0 in images.shape:
        raise ValueError(f"Images have shape {images.shape}; need at least one image of at least one pixel.")
    low, high = value_range
    if not low < high:
        raise ValueError(f"value_range is {value_range}; need (low, high) with low < high.")
    least, most = float(images.min()), float(images.max())
    if np.isnan(least):
        bad = int(np.isnan(images).any(axis=(1, 2, 3)).sum())
        raise ValueError(f"{bad} of {len(images)} images hold NaN. Remove or repair them.")
    if least < low or most > high:
        raise ValueError(
            f"Image values run from {least:g} to {most:g}; need [{low:g}, {high:g}]. "
            + _scaling_advice(least, most, value_range)
        )


def ask_about_range(images: np.ndarray) -> None:
    """Warns of values that are allowed but look like those of another range: floats in [0, 1], bytes in 0..1."""
    if not images.size or images.dtype not in (np.uint8, np.float32):
        return
    least, most = float(images.min()), float(images.max())
    if not (0 <= least < most <= 1):
        return
    if images.dtype == np.uint8:
        said = "bytes mean 0 (black) to 255, so these are nearly black. If 1 is white, pass `images * 255`"
    else:
        said = (
            "floats mean -1 (black) to 1, so nothing here is darker than grey. If they are in [0, 1], as torchvision's "
            "ToTensor gives them, pass `images * 2 - 1`"
        )
    warnings.warn(f"Image values run from {least:g} to {most:g}: {said}.", stacklevel=3)


def check_labels(labels: np.ndarray | None, count: int, num_classes: int) -> None:
    """Raises ValueError or TypeError unless labels are `count` integers below num_classes, or None without classes."""
    if labels is None:
        if num_classes:
            raise ValueError(f"num_classes is {num_classes}, but there are no labels. Pass labels, or num_classes=0.")
        return
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(
            f"Labels have dtype {labels.dtype}; need integers. Convert them with `labels.astype(np.int32)`."
        )
    if labels.ndim != 1:
        raise ValueError(f"Labels have shape {labels.shape}; need [n]. One-hot labels: pass `labels.argmax(-1)`.")
    if len(labels) != count:
        raise ValueError(f"There are {len(labels)} labels for {count} images. Pass one label per image.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"Labels run from {labels.min()} to {labels.max()}; need 0..{num_classes - 1} for "
            f"num_classes={num_classes}. Renumber the labels or raise num_classes."
        )


def _scaling_advice(least: float, most: float, value_range: tuple[float, float]) -> str:
    """Advice for an error message: how to bring float images of the observed range into [-1, 1]."""
    if value_range != UNIT_RANGE or not np.isfinite(least) or not np.isfinite(most):
        return "Clip or rescale them."
    if least >= 0 and most <= 255:
        return "Images in [0, 255]: pass `images.astype(np.uint8)` or `images / 127.5 - 1`."
    return "Scale them with `2 * (images - low) / (high - low) - 1`."
