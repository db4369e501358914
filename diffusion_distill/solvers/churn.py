"""Churn, arXiv:2206.00364 Algorithm 2: noise that is added before steps, by which errors made so far are forgotten.

A step from s = sigma/alpha begins at s·(1 + gamma) instead, gamma = min(s_churn/N, sqrt(2) - 1), after
s_noise·sqrt(s_hat² - s²)·eps was added, wherever s is in [s_min, s_max].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffusion_distill.process import edm_grids


class Churn(NamedTuple):
    """The settings of churn.

    Attributes:
      s_churn: the sum of all gammas; 0 for none.
      s_min, s_max: where it acts, in sigma/alpha.
      s_noise: standard deviation of the noise.
      known: the only levels sigma/alpha the network knows; raised levels are rounded to the nearest.
    """

    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0
    known: Sequence[float] | np.ndarray | None = None

    def raised(self, sigma: float, steps: int) -> float:
        """The level to which a level is raised; itself where there is no churn."""
        gamma = min(self.s_churn / steps, math.sqrt(2) - 1)
        if not (gamma and self.s_min <= sigma <= self.s_max):
            return sigma
        if self.known is None:
            return sigma * (1 + gamma)
        known = np.asarray(self.known, np.float64)
        return float(known[edm_grids.nearest(np.asarray(sigma * (1 + gamma)), known)])

    def added(self, sigma: float, raised: float) -> float:
        """The factor of the noise that takes sigma to where it is raised, at alpha = 1."""
        return self.s_noise * math.sqrt(max(raised**2 - sigma**2, 0.0))

    def check(self) -> Churn:
        """Itself; raises ValueError for negative numbers."""
        if not (0 <= self.s_churn < math.inf and 0 <= self.s_min <= self.s_max and 0 <= self.s_noise < math.inf):
            raise ValueError(
                "Churn needs s_churn >= 0, 0 <= s_min <= s_max and s_noise >= 0, got "
                f"s_churn={self.s_churn!r}, s_min={self.s_min!r}, s_max={self.s_max!r}, s_noise={self.s_noise!r}."
            )
        return self
