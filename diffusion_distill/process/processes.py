"""Noise processes: the only place that knows what a time t means.

A process maps a time to a level (alpha, sigma); t = 1 is noise and t = 0 is clean for VP processes.

`Cosine`, Eq. 8 and appendix of arXiv:2202.00512 in its published, truncated form:

    angle(t) = a·t + b,  alpha = cos(angle),  sigma = sin(angle),  logsnr = -2·log tan(angle)
    b = atan(exp(-logsnr_max / 2)),  a = atan(exp(-logsnr_min / 2)) - b

so that logsnr runs from logsnr_max at t = 0 to logsnr_min at t = 1. alpha is evaluated as the sine of
the complementary angle a·(1 - t) + atan(exp(logsnr_min / 2)), which keeps its relative precision in
float32 where the cosine loses it (near t = 1 the usual form errs by 1e-3 in logsnr, this one by 1e-6).

The linear-beta processes are given by their decay B(t) = -log alpha(t), which grows with t:

    sigma = sqrt(-expm1(-2B))
    cross(t, s) = (alpha_s² - alpha_t²) / (sigma_t·alpha_s + alpha_t·sigma_s),
    alpha_s² - alpha_t² = -alpha_s²·expm1(-2(B_t - B_s)),     B_t - B_s formed from the difference of the times

`LinearBeta`, arXiv:2011.13456 appendix C (the VP SDE): beta grows linearly in tau,

    B = tau²·(beta_max - beta_min)/4 + tau·beta_min/2,    tau = t_min + (1 - t_min)·t

`LinearBetaDiscrete`, arXiv:2006.11239 section 4: N betas in equal steps, alpha² = prod (1 - beta_j) over the
first i of them at t = i/N. Between two such knots B is linear in t (as in DPM-Solver, arXiv:2206.00927), or alpha² is
(`LinearAlphaDiscrete`, as in DEIS, arXiv:2204.13902).

`IDDPMCosine`, arXiv:2102.09672 Eq. 17: alpha = cos(angle(tau)) / cos(angle(0)), angle = (pi/2)·(tau + s)/(1 + s).

At zero noise the SNR is infinite, and so are the weightings and network inputs made of it. So time 0 of a VP
process is a little above zero noise: at logsnr_max for `Cosine` and `LinearBetaDiscrete` (its knot 0, whose
alpha is 1 in float32), at t_min for `LinearBeta` and `IDDPMCosine`. `grids.clean_end` takes a sampler's last step to
zero noise itself.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from diffusion_distill.base.arrays import Array, namespace
from diffusion_distill.base.errors import positive_int
from diffusion_distill.process.levels import Level


@runtime_checkable
class Process(Protocol):
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
        """The time at which the process has this level's logsnr."""
        return (level.angle - self._start) / self._slope

    def cross(self, t: Array, s: Array, steps: int = 1) -> Array:
        """sin(angle_t - angle_s), formed from the difference of the times."""
        return namespace(t, s).sin(self._slope * ((t - s) / steps))


class _Decaying:
    """A VP process given by its decay -log alpha."""

    def _decay(self, t: Array) -> Array:
        raise NotImplementedError

    def _time(self, decay: Array) -> Array:
        """The inverse of `_decay`."""
        raise NotImplementedError

    def _growth(self, t: Array, s: Array, steps: int) -> Array:
        """The decay at t/steps less that at s/steps, without its cancellation as t -> s."""
        raise NotImplementedError

    def level(self, t: Array) -> Level:
        """The level at time t in [0, 1]."""
        xp, decay = namespace(t), self._decay(t)
        return Level(xp.exp(-decay), xp.sqrt(-xp.expm1(-2 * decay)))

    def time(self, level: Level) -> Array:
        """The time at which the process has this level's logsnr."""
        return self._time(0.5 * namespace(*level).log1p((level.sigma / level.alpha) ** 2))

    def cross(self, t: Array, s: Array, steps: int = 1) -> Array:
        """(alpha_s² - alpha_t²) / (sigma_t·alpha_s + alpha_t·sigma_s); zero for equal times."""
        xp, growth = namespace(t, s), self._growth(t, s, steps)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.level(t / steps), self.level(s / steps)
        whole = xp.where(growth == 0, 1.0, sigma_t * alpha_s + alpha_t * sigma_s)  # 0 where both have no noise
        return -(alpha_s**2) * xp.expm1(-2 * growth) / whole


@dataclass(frozen=True)
class LinearBeta(_Decaying):
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

    def _growth(self, t: Array, s: Array, steps: int) -> Array:
        mean_rate = self._slope * (self._tau(t / steps) + self._tau(s / steps)) + self.beta_min / 2
        return (1 - self.t_min) * ((t - s) / steps) * mean_rate


@dataclass(frozen=True)
class LinearBetaDiscrete(_Decaying):
    """The process of Ho et al.: N = `steps` betas from beta_start to beta_end, knots at the times i/N.

    Networks made for it know the times 1/N, 2/N, ... 1 only: train with `Denoising(steps=N)`.

    Attributes:
      logsnr_max: of the knot at time 0. With inf, time 0 is zero noise, where weightings that contain the SNR are
        infinite: for comparisons and for sampling only.

    Raises:
      ValueError: steps below 1, not 0 < beta_start <= beta_end < 1, or more noise at time 0 than at 1/N.
    """

    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    logsnr_max: float = 20.0

    def __post_init__(self) -> None:
        positive_int("The number of betas", self.steps)
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"A linear beta needs 0 < beta_start <= beta_end < 1, got {self}.")
        first = math.log((1 - self.beta_start) / self.beta_start)
        if not self.logsnr_max > first:
            raise ValueError(f"logsnr_max must be above the logsnr {first:.6g} of the first step, got {self}.")

    @property
    def knots(self) -> np.ndarray:
        """The times between which the process is smooth, [steps + 1], rising."""
        return _knots(self).time

    def _decay(self, t: Array) -> Array:
        knots, (k, since) = _knots(self), self._place(t)
        return _take(knots.decay, k, since) + since * _take(knots.rate, k, since)

    def _time(self, decay: Array) -> Array:
        knots, dtype = _knots(self), decay.dtype
        return namespace(decay).interp(decay, knots.decay.astype(dtype), knots.time.astype(dtype))

    def _growth(self, t: Array, s: Array, steps: int) -> Array:
        """The gap times the rate at s, and what the higher rates after the knots in between add."""
        xp, knots = namespace(t, s), _knots(self)
        (k_t, since_t), (k_s, since_s) = self._place(t / steps), self._place(s / steps)
        rate_t, rate_s = _take(knots.rate, k_t, since_t), _take(knots.rate, k_s, since_s)
        apart = k_t - k_s
        between = _difference(knots.decay, k_t, k_s, since_t) - apart * rate_s
        between = xp.where((apart == 0) | (apart == 1), 0.0, between)  # exactly
        return (t - s) * self.steps / steps * rate_s + between + since_t * (rate_t - rate_s)

    def _place(self, t: Array) -> tuple[Array, Array]:
        """(the knot at or before time t, how far t is from it in units of 1/N)."""
        xp = namespace(t)
        at = xp.multiply(t, self.steps)
        k = xp.clip(xp.floor(at), 0, self.steps - 1)
        return k.astype(np.int32), at - k


@dataclass(frozen=True)
class LinearAlphaDiscrete(LinearBetaDiscrete):
    """`LinearBetaDiscrete` with alpha² linear between its knots, as the published iPNDM and DEIS programs assume.

    For samplers on the host: distillation weights of nearby times lose digits here.
    """

    def _decay(self, t: Array) -> Array:
        return -0.5 * namespace(t).log(self._alpha2(t))

    def _alpha2(self, t: Array) -> Array:
        return namespace(t).interp(t, _knots(self).time, np.exp(-2 * _knots(self).decay))

    def rate(self, t: Array) -> Array:
        """The derivative of -log alpha at time t; at a knot (to rounding), that of the later times."""
        alpha2, time = np.exp(-2 * _knots(self).decay), _knots(self).time
        k = np.clip(np.floor(np.multiply(t, self.steps) + 1e-9).astype(int), 0, self.steps - 1)
        return -0.5 * (np.diff(alpha2) / np.diff(time))[k] / self._alpha2(t)

    def _time(self, decay: Array) -> Array:
        xp, knots = namespace(decay), _knots(self)
        return xp.interp(-xp.exp(-2 * decay), -np.exp(-2 * knots.decay), knots.time)

    def _growth(self, t: Array, s: Array, steps: int) -> Array:
        return self._decay(t / steps) - self._decay(s / steps)


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
        """The time at which the process has this level's logsnr."""
        xp, ratio = namespace(*level), level.sigma / level.alpha
        angle = xp.arctan2(xp.sqrt(ratio**2 + math.sin(self._first) ** 2), math.cos(self._first) + 0 * ratio)
        return ((angle - self._first) / self._rate - self.t_min) / self._span

    def cross(self, t: Array, s: Array, steps: int = 1) -> Array:
        """(alpha_s² - alpha_t²) / (sigma_t·alpha_s + alpha_t·sigma_s); zero for equal times.

        alpha_s² - alpha_t² = sin(a_t - a_s)·sin(a_t + a_s) / cos²(a_0), the second sine of a sum, for all its digits.
        """
        xp, cos = namespace(t, s), math.cos(self._first)
        apart = self._rate * self._span * ((t - s) / steps)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.level(t / steps), self.level(s / steps)
        sine_t, sine_s = (xp.sin(self._rate * (self.t_min + self._span * (u / steps)) + self._first) for u in (t, s))
        whole = xp.where(apart == 0, 1.0, sigma_t * alpha_s + alpha_t * sigma_s)  # 0 where both have no noise
        return xp.sin(apart) / cos * (sine_t * alpha_s + alpha_t * sine_s) / whole


class _Knots(NamedTuple):
    """Tables on the host, float64."""

    time: np.ndarray  # i/N for i = 0 .. N
    decay: np.ndarray
    rate: np.ndarray  # growth of the decay from knot i to i + 1


@lru_cache(maxsize=16)
def _knots(process: LinearBetaDiscrete) -> _Knots:
    betas = np.linspace(process.beta_start, process.beta_end, process.steps)
    at_zero = 0.5 * math.log1p(math.exp(-process.logsnr_max))
    rate = -0.5 * np.log1p(-betas)
    rate[0] -= at_zero
    decay = np.cumsum([at_zero, *rate])
    return _Knots(np.arange(len(decay)) / process.steps, decay, rate)


def _take(table: np.ndarray, index: Array, like: Array) -> Array:
    """The table's entries in the precision of `like`, as a NumPy or JAX array like it."""
    return namespace(like).asarray(table, like.dtype)[index]


def _difference(table: np.ndarray, i: Array, j: Array, like: Array) -> Array:
    """table[i] - table[j]; entries rounded to float32 would cancel, so a second table holds their rounding errors."""
    rounded = table.astype(np.float32)
    return sum(_take(part, i, like) - _take(part, j, like) for part in (rounded, table - rounded))


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


@dataclass(frozen=True)
class Karras:
    """alpha = 1 at the levels of EDM's grid of `steps` steps (arXiv:2206.00364 Eq. 5), which are at times i / steps.

        sigma_0 = 0
        sigma_i = (sigma_min^(1/rho) + (i - 1)/(steps - 1)·(sigma_max^(1/rho) - sigma_min^(1/rho)))^rho

    Between the grid's times i is not whole; below the first it is sigma_1·i. A grid of one step goes from sigma_max.

    Raises:
      ValueError: fewer than 1 step, or levels that do not rise from above 0.
    """

    steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.sigma_min < self.sigma_max < math.inf or self.rho <= 0:
            raise ValueError(f"Need at least 1 step, 0 < sigma_min < sigma_max and rho > 0; got {self}.")

    @property
    def _roots(self) -> tuple[float, float]:
        """The rho-th roots of the first level above zero and what each further one adds."""
        first = self.sigma_max if self.steps == 1 else self.sigma_min
        low, high = first ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return low, (high - low) / max(self.steps - 1, 1)

    def with_steps(self, steps: int) -> Karras:
        """The grid of another number of steps."""
        return dataclasses.replace(self, steps=steps)

    def level(self, t: Array) -> Level:
        """The level (1, sigma) at time t in [0, 1]."""
        xp, i = namespace(t), t * self.steps
        low, each = self._roots
        grown = (low + xp.maximum(i - 1, 0) * each) ** self.rho
        sigma = xp.where(i < 1, low**self.rho * i, grown)
        return Level(xp.ones_like(sigma), sigma)

    def time(self, level: Level) -> Array:
        """The time at which the process has this level's sigma / alpha."""
        s = level.sigma / level.alpha
        low, each = self._roots
        grown = 1 + (s ** (1 / self.rho) - low) / (each or 1.0)
        return namespace(s).where(s < low**self.rho, s / low**self.rho, grown) / self.steps

    def cross(self, t: Array, s: Array, steps: int = 1) -> Array:
        """sigma_t - sigma_s."""
        return self.level(t / steps).sigma - self.level(s / steps).sigma


PROCESSES = {
    "cosine": Cosine,
    "linear": LinearBeta,
    "linear_discrete": LinearBetaDiscrete,
    "iddpm_cosine": IDDPMCosine,
    "ve": VarianceExploding,
    "edm": Karras,
}


def on_grid(process: Process, steps: int) -> Process:
    """The process whose grid of `steps` uniform times is meant: EDM's levels depend on their number."""
    return process.with_steps(steps) if isinstance(process, Karras) else process
