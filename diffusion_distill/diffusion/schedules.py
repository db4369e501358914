"""Noise schedules: the only place that knows what a time t means.

A schedule maps a time to a level (alpha, sigma); t = 1 is noise and t = 0 is clean for VP schedules.

`Cosine`, Eq. 8 and appendix of arXiv:2202.00512 in its published, truncated form:

    angle(t) = a·t + b,  alpha = cos(angle),  sigma = sin(angle),  logsnr = -2·log tan(angle)
    b = atan(exp(-logsnr_max / 2)),  a = atan(exp(-logsnr_min / 2)) - b

so that logsnr runs from logsnr_max at t = 0 to logsnr_min at t = 1. alpha is evaluated as the sine of
the complementary angle a·(1 - t) + atan(exp(logsnr_min / 2)), which keeps its relative precision in
float32 where the cosine loses it (near t = 1 the usual form errs by 1e-3 in logsnr, this one by 1e-6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from diffusion_distill.arrays import Array, namespace
from diffusion_distill.levels import Level


class Schedule(Protocol):
    """A frozen, hashable value that maps times to levels."""

    def level(self, t: Array) -> Level:
        """The level at time t, elementwise; NumPy in, NumPy out (float64), JAX in, JAX out (float32)."""
        ...

    def time(self, level: Level) -> Array:
        """The inverse of `level`."""
        ...

    def cross(self, t: Array, s: Array, steps: int = 1) -> Array:
        """sigma_t·alpha_s - alpha_t·sigma_s at times t/steps and s/steps, without its cancellation as t -> s.

        It is the distance of two levels in which every distillation weight is written:
        alpha_s/sigma_s - alpha_t/sigma_t = cross(t, s) / (sigma_t·sigma_s).
        """
        ...


@dataclass(frozen=True)
class Cosine:
    """The cosine schedule, cut to logsnr in [logsnr_min, logsnr_max].

    Raises:
      ValueError: the range is empty or not finite.
    """

    logsnr_min: float = -20.0
    logsnr_max: float = 20.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.logsnr_min) and math.isfinite(self.logsnr_max)):
            raise ValueError(f"logsnr_min and logsnr_max must be finite, got {self}.")
        if not self.logsnr_min < self.logsnr_max:
            raise ValueError(f"logsnr_min must be below logsnr_max, got {self}.")

    @property
    def _start(self) -> float:
        return math.atan(math.exp(-self.logsnr_max / 2))

    @property
    def _slope(self) -> float:
        return math.atan(math.exp(-self.logsnr_min / 2)) - self._start

    def level(self, t: Array) -> Level:
        """The level at time t in [0, 1]."""
        xp = namespace(t)
        complement = math.atan(math.exp(self.logsnr_min / 2))
        return Level(xp.sin(self._slope * (1 - t) + complement), xp.sin(self._slope * t + self._start))

    def time(self, level: Level) -> Array:
        """The time at which the schedule has this level's logsnr."""
        return (level.angle - self._start) / self._slope

    def cross(self, t: Array, s: Array, steps: int = 1) -> Array:
        """sin(angle_t - angle_s), formed from the difference of the times."""
        return namespace(t, s).sin(self._slope * ((t - s) / steps))


@dataclass(frozen=True)
class VarianceExploding:
    """alpha = 1; time is the noise level sigma itself (Karras et al., arXiv:2206.00364)."""

    def level(self, t: Array) -> Level:
        """The level (1, t) for t >= 0."""
        return Level(namespace(t).ones_like(t), t)

    def time(self, level: Level) -> Array:
        """sigma / alpha."""
        return level.sigma / level.alpha

    def cross(self, t: Array, s: Array, steps: int = 1) -> Array:
        """sigma_t - sigma_s."""
        return (t - s) / steps


SCHEDULES = {"cosine": Cosine, "ve": VarianceExploding}
