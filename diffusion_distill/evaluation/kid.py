"""Kernel distance (KID): squared maximum mean discrepancy of features (Binkowski et al., arXiv:1801.01401, Sec. 4).

    k(x, y) = (x.y / width + 1)^3
    MMD^2   = mean k(x, x') + mean k(y, y') - 2 mean k(x, y)

| estimator   | means over                                        | of a set to itself  | sets           |
|-------------|---------------------------------------------------|---------------------|----------------|
| unbiased    | pairs x != x', y != y', all x and y               | below 0             | of any size    |
| biased      | all pairs, a point with itself too                | 0                   | of any size    |
| u-statistic | pairs i != j in all three, (x_i, y_i) left out    | 0                   | of equal size  |

Unlike the Fréchet distance the unbiased estimate has no bias that depends on the number of images. It is averaged
over subsets of rows: `random_subsets` draws them as torch-fidelity does (clean-fid and NVIDIA draw alike, but with a
random state of their own). KID is often printed times 1000.

Everything is float64; the kernel matrix is never held as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion_distill.base.errors import choose, positive_int
from diffusion_distill.evaluation.pixels import as_features, check_same_width

# Numbers of float64 held by one block of the kernel matrix, 64 MiB.
BLOCK = 2**23
ESTIMATORS = ("unbiased", "biased", "u-statistic")

#: Rows of the reference and rows of the samples that are compared.
Subset = tuple[NDArray[np.integer], NDArray[np.integer]]


class Kid(NamedTuple):
    """MMD^2 over subsets.

    Attributes:
      mean: the KID.
      std: standard deviation over subsets, divisor their number (torch-fidelity).
      std_error: standard error of the mean, from the divisor less one (TF-GAN); NaN for one subset.
      values: one per subset.
    """

    mean: float
    std: float
    std_error: float
    values: NDArray[np.float64]


def kid(
    reference: ArrayLike, samples: ArrayLike, subsets: Iterable[Subset] | None = None, estimator: str = "unbiased"
) -> Kid:
    """Kernel distance of samples to a reference.

    Args:
      reference: features [n, width].
      samples: features [m, width].
      subsets: pairs of row indices, as `random_subsets` gives; None compares all rows.
      estimator: one of `ESTIMATORS`.

    Raises:
      ValueError: an unknown estimator, no subsets, too few rows in one (below 2 unless biased), unequal sizes for the
        u-statistic, different widths, entries that are not finite.
    """
    reference, samples = as_features("Reference features", reference), as_features("Sample features", samples)
    check_same_width(reference.shape[1], samples.shape[1])
    pairs = [(np.arange(len(reference)), np.arange(len(samples)))] if subsets is None else list(subsets)
    if not pairs:
        raise ValueError("There are no subsets. Pass at least one pair of row indices, or None for all rows.")
    values = np.array([_mmd2(reference[rows], samples[columns], estimator) for rows, columns in pairs])
    count = len(values)
    error = float(values.std(ddof=1) / np.sqrt(count)) if count > 1 else float("nan")
    return Kid(float(values.mean()), float(values.std()), error, values)


def random_subsets(n: int, m: int, count: int = 100, size: int = 1000, seed: int = 2020) -> list[Subset]:
    """Subsets of `size` rows of n and of m, in the order in which torch-fidelity draws them.

    From one RandomState(seed), in turn of the first set and of the second, each without repetition.

    Raises:
      ValueError: a set smaller than `size`, or arguments below 1.
    """
    count, size = positive_int("count", count), positive_int("size", size)
    if min(n, m) < size:
        raise ValueError(f"A set has {min(n, m)} images, too few for subsets of {size}. Use more, or a smaller size.")
    state = np.random.RandomState(seed)
    # A list, since the order of the draws is the convention.
    return [(state.choice(n, size, replace=False), state.choice(m, size, replace=False)) for _ in range(count)]


def _mmd2(x: NDArray[np.floating], y: NDArray[np.floating], estimator: str) -> float:
    """MMD^2 of x [n, width] and y [m, width]."""
    choose("estimator", estimator, dict.fromkeys(ESTIMATORS))
    x, y = x.astype(np.float64, copy=False), y.astype(np.float64, copy=False)
    n, m = len(x), len(y)
    if min(n, m) < (1 if estimator == "biased" else 2):
        raise ValueError(f"A set has {min(n, m)} rows; the {estimator} estimator needs at least 2. Use more images.")
    within_x, within_y, across = _sum(x, x), _sum(y, y), _sum(x, y)
    if estimator == "biased":
        return within_x / n**2 + within_y / m**2 - 2 * across / (n * m)
    within = (within_x - _sum_paired(x, x)) / (n * (n - 1)) + (within_y - _sum_paired(y, y)) / (m * (m - 1))
    if estimator == "unbiased":
        return within - 2 * across / (n * m)
    if n != m:
        raise ValueError(f"The u-statistic pairs the sets row by row, but they have {n} and {m} rows. Use 'unbiased'.")
    return within - 2 * (across - _sum_paired(x, y)) / (n * (n - 1))


def _sum(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The sum of k over all pairs."""
    return float(sum(_kernel(rows @ y.T, x.shape[1]).sum() for rows in _blocks(x, len(y))))


def _sum_paired(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """The sum of k over the pairs (x_i, y_i)."""
    return float(_kernel(np.einsum("ij,ij->i", x, y), x.shape[1]).sum())


def _kernel(product: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """k for inner products x.y."""
    base = product / width + 1
    return base * base * base  # a power of arrays is twenty times as slow


def _blocks(x: NDArray[np.float64], columns: int) -> Iterator[NDArray[np.float64]]:
    """Rows of x, so many at a time that a block of the kernel matrix stays small."""
    size = max(1, BLOCK // columns)
    return (x[start : start + size] for start in range(0, len(x), size))
