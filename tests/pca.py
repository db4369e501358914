"""Principal components: a few directions in which the reference varies most, as features of small data.

    y = (x - m) V          V: leading eigenvectors of the reference's covariance S, m its mean
    y_j / sqrt(l_j)        whitened: every direction counts alike, whatever its variance l_j

A Fréchet distance of pixels is dominated by bias where there are thousands of them; in 64 components of the pixels a
few thousand images are enough. It depends neither on the signs of V nor on rotations among equal eigenvalues. As a
linear image of the pixels it sees means and covariances only, not what people see.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from diffusion_distill.base.errors import positive_int
from diffusion_distill.evaluation.frechet import Moments
from diffusion_distill.evaluation.pixels import check_same_width, checked_features

COMPONENTS = 64


@dataclass(frozen=True, eq=False)
class Pca:
    """A projection onto principal components.

    Attributes:
        mean: m, [width].
        axes: V, [width, components].
        variances: l, [components], descending.
        explained: their share of the trace of S.
        whitened: whether the components are divided by sqrt(l).
    """

    mean: NDArray[np.float64]
    axes: NDArray[np.float64]
    variances: NDArray[np.float64]
    explained: float
    whitened: bool = False

    def features(self, features: ArrayLike) -> NDArray[np.float64]:
        """Components [n, components] of features [n, width].

        Raises:
            ValueError: another width, or rows that are not finite.
        """
        features = checked_features("Features", features)
        check_same_width(len(self.mean), features.shape[1])
        return (features - self.mean) @ self._scaled_axes()

    def moments(self, of: Moments) -> Moments:
        """The moments of the components, from the moments of the features; no image is needed again.

        Raises:
            ValueError: another width.
        """
        check_same_width(len(self.mean), of.width)
        axes = self._scaled_axes()
        cov = axes.T @ of.cov @ axes
        return Moments(of.count, (of.mean - self.mean) @ axes, (cov + cov.T) / 2)

    def whiten(self, least: float = 1e-3) -> Pca:
        """Scales components to unit variance in the reference; drops variances below `least` times the largest."""
        kept = self.variances >= least * self.variances[0]
        return replace(self, axes=self.axes[:, kept], variances=self.variances[kept], whitened=True)

    def _scaled_axes(self) -> NDArray[np.float64]:
        return self.axes / np.sqrt(self.variances) if self.whitened else self.axes


def principal_components(reference: Moments, components: int = COMPONENTS) -> Pca:
    """The leading principal components of a reference, or all if it has fewer features.

    Raises:
        ValueError: components below 1, or a reference without any variance.
    """
    variances, axes = np.linalg.eigh(reference.cov)
    leading = slice(None, -min(positive_int("components", components), len(variances)) - 1, -1)
    total = float(np.trace(reference.cov))
    if not total > 0:
        raise ValueError("The reference has no variance, so there are no principal components. Use other images.")
    variances = variances[leading]
    return Pca(reference.mean, axes[:, leading], variances, float(variances.sum() / total))
