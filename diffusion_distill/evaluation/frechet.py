"""Fréchet distance between two sets of features, through their first two moments.

    FD = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1^(1/2) S2 S1^(1/2))^(1/2)

m, S: mean and covariance (divisor n - 1, as in pytorch-fid, EDM and OpenAI's evaluator; StyleGAN3 divides by n). On
Inception features it is the FID of Heusel et al., arXiv:1706.08500, Eq. 6, on spatial Inception features the sFID of
Nash et al., arXiv:2103.03841; on pixels it compares runs on small images.

With factors S = F F^T the last trace is the sum of singular values of F1^T F2. That form squares nothing: a singular
covariance (fewer images than features, dead features) keeps all its digits, where the square root of a product of
covariances loses half of them. F is

- the centred features themselves, divided by sqrt(n - 1), if there are no more images than features;
- else from a symmetric eigen-decomposition, without the eigenvalues that are rounding of 0;
- of wide covariances that are clearly regular, a Cholesky factor, which takes a tenth of the time.

All of it is float64 on the host: in float32 the distance of a set to itself may read 3e-5, and singular
cases are wrong in the third digit.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion_distill.evaluation.pixels import check_same_width, checked_features

# Up to this width nothing is gained by the faster forms for wide covariances.
WIDE = 512


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and covariance of a set of features.

    Attributes:
      count: number of images n; None if it is not known, as of most published files.
      mean: float64 [width].
      cov: float64 [width, width], divisor n - 1; zeros for a single image.
      centred: F [width, n] with F F^T = cov, if it was made from features and n is at most the width.

    Raises:
      ValueError: shapes that do not fit, values that are not finite, or an asymmetric covariance.
    """

    count: int | None
    mean: NDArray[np.float64]
    cov: NDArray[np.float64]
    centred: NDArray[np.float64] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        mean, cov = np.shape(self.mean), np.shape(self.cov)
        if len(mean) != 1 or cov != mean * 2:
            raise ValueError(f"mean has shape {mean} and cov {cov}; need [width] and [width, width].")
        if self.count is not None and self.count < 1:
            raise ValueError(f"count is {self.count}; need at least 1.")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.cov).all()):
            raise ValueError("mean or cov holds NaN or infinity. Compute the moments again from finite features.")
        if np.abs(self.cov - self.cov.T).max() > 1e-6 * np.abs(self.cov).max():
            raise ValueError("cov is not symmetric, so it is no covariance. Check where it was read from.")

    @property
    def width(self) -> int:
        """Number of features per image."""
        return len(self.mean)

    @cached_property
    def factor(self) -> NDArray[np.float64]:
        """F [width, rank] with F F^T = cov; kept, so that a reference is factored once."""
        if self.centred is not None:
            return self.centred
        few = self.count is not None and self.count <= self.width
        regular = _cholesky(self.cov) if self.width > WIDE and not few else None
        return _eigen_factor(self.cov) if regular is None else regular

    def _known_count(self) -> int:
        if self.count is None:
            raise ValueError("The number of images of these moments is not known. Pass it when reading the file.")
        return self.count

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
    centred = (features - mean) / np.sqrt(max(count - 1, 1))
    return Moments(count, mean, centred.T @ centred, centred.T if count <= len(mean) else None)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two sets, by the pairwise update of Chan, Golub and LeVeque (1979).

    Sums of squares are never formed, so an offset common to all features costs no digits.

    Raises:
      ValueError: different widths, or a count that is not known.
    """
    check_same_width(a.width, b.width)
    n, m = a._known_count(), b._known_count()
    count, shift = n + m, b.mean - a.mean
    scatter = (n - 1) * a.cov + (m - 1) * b.cov
    scatter += np.outer(shift, shift) * (n * m / count)
    return Moments(count, a.mean + shift * (m / count), scatter / (count - 1))


class FrechetTerms(NamedTuple):
    """The two parts of a Fréchet distance: of the means and of the covariances."""

    mean: float
    cov: float


def frechet_distance(a: Moments, b: Moments) -> float:
    """Fréchet distance of the Gaussians with these moments, in squared units of the features.

    Symmetric; of a set to itself it is 0 up to rounding (about 1e-13, possibly negative). It is biased upwards
    by a term of order width^2 / n, so compare only distances of equal counts.

    Raises:
      ValueError: different widths, or fewer than 2 images on a side.

    Warns:
        UserWarning: a covariance is singular, since its set is no larger than the width (or may not be: not known).
    """
    return sum(frechet_terms(a, b))


def frechet_terms(a: Moments, b: Moments) -> FrechetTerms:
    """The parts of `frechet_distance`, with its errors and warnings."""
    check_same_width(a.width, b.width)
    for side in (a, b):
        if side.count is not None and side.count < 2:
            raise ValueError(f"A set has {side.count} image; a covariance needs at least 2. Use more images.")
    singular = [_shortage(side) for side in (a, b) if _shortage(side)]
    if singular:
        warnings.warn(f"{singular[0]}: a covariance is singular, the distance mostly bias.", stacklevel=3)
    cross = _nuclear_norm(a.factor.T @ b.factor)
    return FrechetTerms(float(np.square(a.mean - b.mean).sum()), float(np.trace(a.cov) + np.trace(b.cov) - 2 * cross))


def extrapolated(distance: float, halves: Sequence[float], count: int, to: float = 50_000) -> float:
    """Extrapolates the Fréchet distance of `count` images to `to` images: an estimate, not a measurement.

        FD(n) = a + b / n,  from FD(count) and the median of distances of random halves of these images

    TRACT's code reports it with five halves (arXiv:2303.04248); with to=infinity it is the unbiased limit of Chong and
    Forsyth, arXiv:1911.07023.

    Raises:
      ValueError: no halves, or fewer than 2 images.
    """
    if not len(halves) or count < 2:
        raise ValueError(f"There are {len(halves)} distances of halves of {count} images; need one and 2 at least.")
    return distance + (float(np.median(halves)) - distance) * (count / to - 1)


def _shortage(side: Moments) -> str:
    """The reason why a covariance is singular: too few images, or an unknown number of images; "" otherwise."""
    if side.count is not None:
        return f"{side.count} images for {side.width} features" if side.count <= side.width else ""
    rank = side.factor.shape[1]
    return f"Rank {rank} for {side.width} features, of a number of images not known" if rank < side.width else ""


def _nuclear_norm(matrix: NDArray[np.float64]) -> float:
    """The sum of singular values.

    Of a large matrix through the eigenvalues of its Gram matrix, three times as fast, unless their rounding matters:
    an error e of sigma^2 is one of e / (2 sigma) of sigma, but of no more than sqrt(e).
    """
    rows, columns = matrix.shape
    if min(rows, columns) > WIDE:
        squares = np.linalg.eigvalsh(matrix @ matrix.T if rows <= columns else matrix.T @ matrix)
        values = np.sqrt(np.clip(squares, np.finfo(np.float64).tiny, None))
        rounding = 8 * np.finfo(np.float64).eps * squares[-1]
        if np.minimum(rounding / (2 * values), np.sqrt(rounding)).sum() < 1e-10 * values.sum():
            return float(values.sum())
    return float(np.linalg.svd(matrix, compute_uv=False).sum())


def _cholesky(cov: NDArray[np.float64]) -> NDArray[Any] | None:
    """The lower factor L with L L^T = cov, or None if cov is singular or close to it."""
    try:
        lower = np.linalg.cholesky(cov)
    except np.linalg.LinAlgError:
        return None
    return lower if np.square(lower.diagonal()).min() > 1e-10 * cov.diagonal().max() else None


def _eigen_factor(cov: NDArray[np.float64]) -> NDArray[np.float64]:
    """F [width, rank] with F F^T = cov.

    Eigenvalues within rounding of 0, negative ones among them, count as 0, since each would enter as its root.
    """
    alive = np.flatnonzero(cov.diagonal() > 0)  # features that never change, such as an image's margin, cost nothing
    if not len(alive):
        return np.zeros((len(cov), 0))
    values, vectors = np.linalg.eigh(cov[np.ix_(alive, alive)])
    kept = values > values[-1] * len(cov) * np.finfo(np.float64).eps
    factor = np.zeros((len(cov), np.count_nonzero(kept)))
    factor[alive] = vectors[:, kept] * np.sqrt(values[kept])
    return factor
