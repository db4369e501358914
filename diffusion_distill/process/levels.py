"""The one language of the library: noise levels.

A noisy sample is z = alpha·x + sigma·eps with eps ~ N(0, 1). Every formula takes the level (alpha, sigma) and never
a time; only a process knows what "t" means.

    logsnr = 2·log(alpha / sigma)        snr = (alpha / sigma)²
    variance preserving (VP):  alpha² + sigma² = 1, so alpha = cos(angle), sigma = sin(angle)
    variance exploding (VE):   alpha = 1
    rectified flow:            alpha + sigma = 1

Carrying alpha and sigma, both to full relative precision, instead of logsnr keeps every derived
quantity exact in float32: 1 - alpha² loses all digits of sigma² near the clean end, sigma does not.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from diffusion_distill.base.arrays import Array, expand, namespace

#: The least alpha and sigma of `Level.off_ends`. Its square and its inverse are numbers of float32.
LEAST = 1e-15


class Level(NamedTuple):
    """Signal and noise scales, scalars or arrays of one shape (usually [batch] or [steps + 1])."""

    alpha: Array
    sigma: Array

    @property
    def snr(self) -> Array:
        """Signal-to-noise ratio alpha² / sigma²; infinite at zero noise, 0 at pure noise."""
        with np.errstate(divide="ignore"):
            return (self.alpha / self.sigma) ** 2

    @property
    def logsnr(self) -> Array:
        """2·log(alpha / sigma); infinite at zero noise, -infinity at pure noise."""
        xp = namespace(*self)
        with np.errstate(divide="ignore"):
            return 2 * (xp.log(self.alpha) - xp.log(self.sigma))

    @property
    def angle(self) -> Array:
        """The angle whose tangent is sigma / alpha, in [0, pi/2]."""
        return namespace(*self).arctan2(self.sigma, self.alpha)

    def off_ends(self) -> Level:
        """The level with alpha and sigma of at least 1e-15, so that every quotient of them is a finite number.

        Pure noise (alpha = 0, where rectified flows begin) and zero noise (sigma = 0) are then the limits they should
        be. Levels in between stay as they are.
        """
        xp = namespace(*self)
        return Level(xp.maximum(self.alpha, LEAST), xp.maximum(self.sigma, LEAST))

    def expand(self, like: Array) -> Level:
        """Appends axes so that the level broadcasts against samples `like` [batch, *shape]."""
        return Level(expand(self.alpha, like), expand(self.sigma, like))

    def at(self, index: Array | slice) -> Level:
        """The levels at an index or slice of the first axis."""
        return Level(self.alpha[index], self.sigma[index])


def from_logsnr(logsnr: Array) -> Level:
    """The VP level of a log signal-to-noise ratio: alpha² = sigmoid(logsnr), sigma² = sigmoid(-logsnr)."""
    xp = namespace(logsnr)
    # sigmoid(l) = exp(-softplus(-l)), and its root keeps full relative precision at both ends.
    alpha = xp.exp(-0.5 * xp.logaddexp(0 * logsnr, -logsnr))
    sigma = xp.exp(-0.5 * xp.logaddexp(0 * logsnr, logsnr))
    return Level(alpha, sigma)
