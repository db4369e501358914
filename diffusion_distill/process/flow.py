"""Rectified flows: straight lines from the sample to the noise (arXiv:2209.03003, arXiv:2210.02747).

    z = (1 - t')·x + t'·eps            t' = shift·t / (1 + (shift - 1)·t)

The timestep shift of Stable Diffusion 3 (arXiv:2403.03206 section 5.3.2) and Flux moves times towards the noise, as
larger images need. A network that predicts the velocity dz/dt' = eps - x has prediction 'velocity'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffusion_distill.base.arrays import Array
from diffusion_distill.process.levels import Level


@dataclass(frozen=True)
class RectifiedFlow:
    """alpha = 1 - t', sigma = t'; time 1 is pure noise, alpha = 0, and time 0 is zero noise, both exactly.

    Attributes:
      shift: 1 for none; 3 is usual for images of 1024 pixels a side.

    Raises:
      ValueError: a shift that is not positive and finite.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise ValueError(f"The shift of a rectified flow must be positive and finite, got {self.shift!r}.")

    def level(self, t: Array) -> Level:
        """The level at time t in [0, 1]."""
        whole = (1 - t) + self.shift * t
        return Level((1 - t) / whole, self.shift * t / whole)

    def time(self, level: Level) -> Array:
        """The time at which the process has this level's ratio of alpha and sigma."""
        return level.sigma / (level.sigma + self.shift * level.alpha)
