"""Fréchet distance between two sets of features, through their first two moments.

    FD = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^(1/2) S2 S1^(1/2))^(1/2)

m, S: mean and covariance (divisor n - 1). On Inception features it is the FID of Heusel et al.,
arXiv:1706.08500, Eq. 6; on pixels it compares runs on small images.

With factors S = F F^T the last trace is the sum of singular values of F1^T F2, and F comes from a symmetric
eigen-decomposition. That form squares nothing: a singular covariance (fewer images than features, dead
features) keeps all its digits, where the square root of a product of covariances loses half of them.

All of it is float64 on the host: in float32 the distance of a set to itself may read 3e-5, and singular
cases are wrong in the third digit.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion_distill.metrics.features import check_same_width, checked_features


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and covariance of a set of features.

    Attributes:
        count: number of images n.
        mean: float64 [width].
        cov: float64 [width, width], divisor n - 1; zeros for a single image.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, or an asymmetric covariance.
    """

    count: int
    mean: NDArray[np.float64]
    cov: NDArray[np.float64]

    def __post_init__(self) -> None:
        mean, cov = np.shape(self.mean), np.shape(self.cov)
        if len(mean) != 1 or cov != mean * 2:
            raise ValueError(f"mean has shape {mean} and cov {cov}; need [width] and [width, width].")
        if self.count < 1:
            raise ValueError(f"count is {self.count}; need at least 1.")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.cov).all()):
            raise ValueError("mean or cov holds NaN or infinity. Compute the moments again from finite features.")
        if np.abs(self.cov - self.cov.T).max() > 1e-6 * np.abs(self.cov).max():
            raise ValueError("cov is not symmetric, so it is no covariance. Check where it was read from.")

    @property
    def width(self) -> int:
        """Number of features per image."""
        return len(self.mean)

    def update(self, features: ArrayLike) -> Moments:
        """The moments of this set and further features [n, width]; for features that arrive in batches."""
        return merge(self, moments(features))


def moments(features: ArrayLike) -> Moments:
    """Moments of features [n, width].

    Raises:
        ValueError: no rows, another rank, or entries that are not finite.
    """
    features = checked_features("Features", features)
    count, mean = len(features), features.mean(axis=0)
    centred = features - mean
    return Moments(count, mean, centred.T @ centred / max(count - 1, 1))


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two sets, by the pairwise update of Chan, Golub and LeVeque (1979).

    Sums of squares are never formed, so an offset common to all features costs no digits.
    """
    check_same_width(a.width, b.width)
    count, shift = a.count + b.count, b.mean - a.mean
    scatter = (a.count - 1) * a.cov + (b.count - 1) * b.cov
    scatter += np.outer(shift, shift) * (a.count * b.count / count)
    return Moments(count, a.mean + shift * (b.count / count), scatter / (count - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Fréchet distance of the Gaussians with these moments, in squared units of the features.

    Symmetric; of a set to itself it is 0 up to rounding (about 1e-13, possibly negative). It is biased upwards
    by a term of order width^2 / n, so compare only distances of equal counts.

    Raises:
        ValueError: different widths, or fewer than 2 images on a side.

    Warns:
        UserWarning: a set is no larger than its width, so that its covariance is singular.
    """
    check_same_width(a.width, b.width)
    fewest = min(a.count, b.count)
    if fewest < 2:
        raise ValueError(f"A set has {fewest} image; a covariance needs at least 2. Use more images.")
    if fewest <= a.width:
        warnings.warn(
            f"{fewest} images for {a.width} features: a covariance is singular, the distance mostly bias.",
            stacklevel=2,
        )
    cross = np.linalg.svd(_factor(a.cov).T @ _factor(b.cov), compute_uv=False).sum()
    return float(np.square(a.mean - b.mean).sum() + np.trace(a.cov) + np.trace(b.cov) - 2 * cross)


def _factor(cov: NDArray[np.float64]) -> NDArray[np.float64]:
    """F [width, rank] with F F^T = cov.

    Eigenvalues within rounding of 0, negative ones among them, count as 0, since each would enter as its root.
    """
    values, vectors = np.linalg.eigh(cov)
    rounding = np.abs(values).max() * len(values) * np.finfo(np.float64).eps
    kept = values > rounding
    return vectors[:, kept] * np.sqrt(values[kept])
