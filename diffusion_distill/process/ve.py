"""The variance-exploding process: the sample keeps its size and noise is added, z = x + sigma·eps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffusion_distill.base.arrays import Array, namespace
from diffusion_distill.process.levels import Level


@dataclass(frozen=True)
class VE:
    """alpha = 1, sigma = sigma_max·t; time 0 is zero noise (Karras et al., arXiv:2206.00364).

    Attributes:
      sigma_max: the noise at time 1.
      sigma_min: the least noise above zero of its usual grid, `grids.karras`; the process itself goes on to zero.

    Raises:
      ValueError: not 0 < sigma_min < sigma_max < inf.
    """

    sigma_max: float = 80.0
    sigma_min: float = 0.002

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"Need 0 < sigma_min < sigma_max, both finite; got {self}.")

    def level(self, t: Array) -> Level:
        """The level (1, sigma_max·t) at time t in [0, 1]."""
        sigma = self.sigma_max * t
        return Level(namespace(t).ones_like(sigma), sigma)

    def time(self, level: Level) -> Array:
        """The time at which the process has this level's ratio of alpha and sigma."""
        return level.sigma / level.alpha / self.sigma_max
