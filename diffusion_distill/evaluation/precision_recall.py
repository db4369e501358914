"""Precision and recall of samples, by k-nearest-neighbour manifolds (Kynkäänniemi et al., arXiv:1904.06991).

The manifold of a set is the union of balls around its points; the radius of a point is the distance to its
k-th nearest neighbour in the set, itself not counted.

    precision = share of samples in the reference's manifold      (are samples real?)
    recall    = share of reference points in the samples' manifold (is everything covered?)

"In" is distance <= radius. Distances enter squared. Everything is float64: half precision, which some
published programs use, moves single points across a border.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion_distill.evaluation.pixels import check_same_width, checked_features

# Numbers of float64 held by one block of distances, 64 MiB.
BLOCK = 2**23
# |u|^2 - 2uv + |v|^2 has lost more than 6 of its 16 digits where it falls below this share of |u|^2 + |v|^2.
CANCELLED = 1e-6


class PrecisionRecall(NamedTuple):
    """Two shares in [0, 1]."""

    precision: float
    recall: float


def precision_recall(reference: ArrayLike, samples: ArrayLike, k: int = 3) -> PrecisionRecall:
    """Precision and recall of samples against a reference.

    Both depend on the sizes of the two sets: state them beside the numbers.

    Args:
      reference: features [n, width], n > k.
      samples: features [m, width], m > k.
      k: which neighbour sets the radius.

    Raises:
      ValueError: k below 1, a set of k points or fewer, different widths, entries that are not finite.
    """
    sample_is_in, reference_is_in = memberships(reference, samples, k)
    return PrecisionRecall(float(sample_is_in.mean()), float(reference_is_in.mean()))


def memberships(reference: ArrayLike, samples: ArrayLike, k: int = 3) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which samples lie in the reference's manifold, [m], and which reference points in the samples', [n].

    Arguments and errors as `precision_recall`.
    """
    reference = checked_features("Reference features", reference)
    samples = checked_features("Sample features", samples)
    check_same_width(reference.shape[1], samples.shape[1])
    reference_radius2, sample_radius2 = squared_radii(reference, k), squared_radii(samples, k)

    sample_is_in = np.zeros(len(samples), bool)
    reference_is_in = np.zeros(len(reference), bool)
    for rows, distance2 in _blocks(reference, samples):
        sample_is_in |= (distance2 <= reference_radius2[rows, None]).any(axis=0)
        reference_is_in[rows] = (distance2 <= sample_radius2).any(axis=1)
    return sample_is_in, reference_is_in


def squared_radii(points: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Squared distance [n] of each of the points [n, width] to its k-th nearest among the others."""
    if k < 1:
        raise ValueError(f"k is {k}; need at least 1.")
    if len(points) <= k:
        raise ValueError(f"A set has {len(points)} points, too few for neighbour {k}. Use more points or a smaller k.")
    # A point is at distance 0 from itself, so that in sorted order its k-th neighbour stands at index k.
    return np.concatenate([np.partition(distance2, k, axis=1)[:, k] for _, distance2 in _blocks(points, points)])


def _blocks(a: NDArray[np.float64], b: NDArray[np.float64]) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Squared distances [rows, m] of successive slices of a [n, width] to all of b [m, width]."""
    size = max(1, BLOCK // len(b))
    for start in range(0, len(a), size):
        rows = slice(start, start + size)
        yield rows, squared_distances(a[rows], b)


def squared_distances(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """|u - v|^2 for each u of a [n, width] and v of b [m, width]: [n, m], exactly 0 for equal points.

    They come from a matrix product; distances that lose digits to cancellation are computed again by subtraction.
    """
    scale = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1)
    distance2 = scale - 2 * (a @ b.T)
    left, right = np.nonzero(distance2 <= CANCELLED * scale)
    at_once = max(1, BLOCK // a.shape[1])
    for start in range(0, len(left), at_once):
        u, v = left[start : start + at_once], right[start : start + at_once]
        distance2[u, v] = np.square(a[u] - b[v]).sum(axis=1)
    return distance2
