"""Variance-preserving processes in continuous time: alpha² + sigma² = 1.

`Cosine`, Eq. 8 and appendix of arXiv:2202.00512 in its published, truncated form:

    angle(t) = a·t + b,  alpha = cos(angle),  sigma = sin(angle),  logsnr = -2·log tan(angle)
    b = atan(exp(-logsnr_max / 2)),  a = atan(exp(-logsnr_min / 2)) - b

so that logsnr runs from logsnr_max at t = 0 to logsnr_min at t = 1. alpha is evaluated as the sine of the complementary
angle a·(1 - t) + atan(exp(logsnr_min / 2)), which keeps its relative precision in float32 where the cosine loses it
(near t = 1 the usual form errs by 1e-3 in logsnr, this one by 1e-6).

`LinearBeta`, arXiv:2011.13456 appendix C (the VP SDE): beta grows linearly in tau, and the decay B = -log alpha is

    B = tau²·(beta_max - beta_min)/4 + tau·beta_min/2,    tau = t_min + (1 - t_min)·t,    sigma = sqrt(-expm1(-2B))

`IDDPMCosine`, arXiv:2102.09672 Eq. 17: alpha = cos(angle(tau)) / cos(angle(0)), angle = (pi/2)·(tau + s)/(1 + s).

At zero noise the signal-to-noise ratio is infinite, and so are weightings and network inputs made of it. So time 0 is a
little above zero noise: at logsnr_max for `Cosine`, at t_min for the others. `grids.clean_end` takes a sampler's last
step to zero noise itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from diffusion_distill.base.arrays import Array, namespace
from diffusion_distill.process.levels import Level


@dataclass(frozen=True)
class Cosine:
    """The cosine process, cut to logsnr in [logsnr_min, logsnr_max].

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
        """The time at which the process has this level's ratio of alpha and sigma."""
        return (level.angle - self._start) / self._slope


class Decaying:
    """A VP process given by its decay -log alpha."""

    def _decay(self, t: Array) -> Array:
        raise NotImplementedError

    def _time(self, decay: Array) -> Array:
        """The inverse of `_decay`."""
        raise NotImplementedError

    def level(self, t: Array) -> Level:
        """The level at time t in [0, 1]."""
        xp, decay = namespace(t), self._decay(t)
        return Level(xp.exp(-decay), xp.sqrt(-xp.expm1(-2 * decay)))

    def time(self, level: Level) -> Array:
        """The time at which the process has this level's ratio of alpha and sigma."""
        return self._time(0.5 * namespace(*level).log1p((level.sigma / level.alpha) ** 2))


@dataclass(frozen=True)
class LinearBeta(Decaying):
    """The VP SDE of Song et al. with linear beta, cut to the SDE's times [t_min, 1].

    Attributes:
      t_min: the SDE's time at t = 0; the paper trains with 1e-5 and samples with 1e-3. With 0, time 0 is zero noise,
        where weightings that contain the SNR are infinite: for comparisons and for sampling only.

    Raises:
      ValueError: not 0 < beta_min <= beta_max < inf, or t_min outside [0, 1).
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-5

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise ValueError(f"A linear beta needs 0 < beta_min <= beta_max, both finite, got {self}.")
        if not 0 <= self.t_min < 1:
            raise ValueError(f"t_min must be in [0, 1), got {self}.")

    @property
    def _slope(self) -> float:
        return (self.beta_max - self.beta_min) / 4

    def _tau(self, t: Array) -> Array:
        return self.t_min + (1 - self.t_min) * t

    def _decay(self, t: Array) -> Array:
        tau = self._tau(t)
        return tau * (self._slope * tau + self.beta_min / 2)

    def _time(self, decay: Array) -> Array:
        half = self.beta_min / 2
        tau = 2 * decay / (half + namespace(decay).sqrt(half**2 + 4 * self._slope * decay))
        return (tau - self.t_min) / (1 - self.t_min)

    def rate(self, t: Array) -> Array:
        """The derivative of -log alpha at time t."""
        return (1 - self.t_min) * (2 * self._slope * self._tau(t) + self.beta_min / 2)


@dataclass(frozen=True)
class IDDPMCosine:
    """The cosine process of improved DDPM, cut to tau in [t_min, t_max].

    With angles a and a_0 = angle(0), sigma² = sin(a - a_0)·sin(a + a_0) / cos²(a_0), which has all its digits near a_0.

    Attributes:
      s: offset of the angle.
      t_max: DPM-Solver's (arXiv:2206.00927): alpha is 0 at 1.

    Raises:
      ValueError: not 0 <= t_min < t_max <= 1, or s below 0.
    """

    s: float = 0.008
    t_min: float = 1e-5
    t_max: float = 0.9946

    def __post_init__(self) -> None:
        if not (0 <= self.t_min < self.t_max <= 1 and self.s >= 0):
            raise ValueError(f"Need 0 <= t_min < t_max <= 1 and s >= 0, got {self}.")

    @property
    def _first(self) -> float:
        """a_0."""
        return self.s * self._rate

    @property
    def _rate(self) -> float:
        """The growth of the angle with tau."""
        return math.pi / 2 / (1 + self.s)

    @property
    def _span(self) -> float:
        return self.t_max - self.t_min

    def level(self, t: Array) -> Level:
        """The level at time t in [0, 1]."""
        xp = namespace(t)
        since = self._rate * (self.t_min + self._span * t)  # a - a_0
        left = self._rate * ((1 - self.t_max) + self._span * (1 - t))  # pi/2 - a
        sigma = xp.sqrt(xp.sin(since) * xp.sin(since + 2 * self._first))
        return Level(xp.sin(left) / math.cos(self._first), sigma / math.cos(self._first))

    def time(self, level: Level) -> Array:
        """The time at which the process has this level's ratio of alpha and sigma."""
        xp, ratio = namespace(*level), level.sigma / level.alpha
        angle = xp.arctan2(xp.sqrt(ratio**2 + math.sin(self._first) ** 2), math.cos(self._first) + 0 * ratio)
        return ((angle - self._first) / self._rate - self.t_min) / self._span
