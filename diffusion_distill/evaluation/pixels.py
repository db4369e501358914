"""Features: arrays [n, width], one row per image, on which every metric is computed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pixel_features(images: ArrayLike) -> NDArray[np.float32]:
    """Floating point pixels as features, not rounded; evaluations measure those of `features.Pixels`, which are.

    Distances of pixels see no more than grey levels; they suit small images and the comparison of runs, not
    comparison with published FIDs.

    Args:
      images: floating point [n, height, width, channels] in [-1, 1]; values outside are clipped.

    Returns:
      float32 [n, height * width * channels], flattened in the order height, width, channels.

    Raises:
      TypeError: integer images, whose range is not known here.
      ValueError: another rank.
    """
    images = np.asarray(images)
    if not np.issubdtype(images.dtype, np.floating):
        raise TypeError(f"Images have dtype {images.dtype}; need floats in [-1, 1]. 8-bit images: x / 127.5 - 1.")
    if images.ndim != 4:
        raise ValueError(f"Images have shape {images.shape}; need [n, height, width, channels].")
    return np.clip(images, -1.0, 1.0).astype(np.float32).reshape(len(images), -1)


def checked_features(name: str, features: ArrayLike) -> NDArray[np.float64]:
    """Features as float64 [n, width], every entry finite; `name` stands in the error messages.

    Raises:
      ValueError: not [n, width], or rows with NaN or infinity.
    """
    return as_features(name, features).astype(np.float64, copy=False)


def as_features(name: str, features: ArrayLike) -> NDArray[Any]:
    """As `checked_features`, in the features' own precision: for metrics that work on a block at a time."""
    features = np.asarray(features)
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{name} have shape {features.shape}; need [n, width] with n and width at least 1.")
    bad = int((~np.isfinite(features).all(axis=1)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {len(features)} rows of {name} hold NaN or infinity. A metric over the other rows "
            "would be of other images: find out why they are not finite."
        )
    return features


def check_same_width(reference_width: int, sample_width: int) -> None:
    """Raises ValueError if two sets of features cannot be compared."""
    if reference_width != sample_width:
        raise ValueError(
            f"The reference has {reference_width} features per image, the samples {sample_width}. "
            "Compute both with the same feature function on images of the same shape."
        )
