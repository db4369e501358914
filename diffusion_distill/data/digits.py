"""Digits: the small set that comes with scikit-learn and needs no file."""

from __future__ import annotations

import numpy as np

from diffusion_distill.base.errors import choose
from diffusion_distill.data.sources import ArraySource


def digits(split: str = "train") -> ArraySource:
    """The 1797 handwritten digits that come with scikit-learn: 8x8 grey images, values 0..16, ten classes.

    The images are permuted once by `Generator(PCG64(100))`: the first 900 are `train`, the other 897
    `heldout`, and `all` is every image in scikit-learn's order.

    Raises:
        ValueError: an unknown split.
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        message = "The digits need scikit-learn. Install it with `pip install scikit-learn` (the extra [demo])."
        raise ImportError(message) from error

    order = np.random.Generator(np.random.PCG64(100)).permutation(1797)
    splits = {"train": order[:900], "heldout": order[900:], "all": np.arange(1797)}
    rows = choose("split of digits", split, splits)
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
    return ArraySource(images[rows], labels[rows], num_classes=10, value_range=(0.0, 16.0))
