"""Variance-preserving processes of N discrete betas, with times between them too.

DDPM (arXiv:2006.11239 section 4) has N betas in equal steps; at the time i/N, a knot, alpha² is the product of
(1 - beta_j) over the first i of them. Between two knots -log alpha is linear in t (`LinearBetaDiscrete`, as in
DPM-Solver, arXiv:2206.00927), or alpha² is (`LinearAlphaDiscrete`, as in DEIS, arXiv:2204.13902).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from diffusion_distill.base.arrays import Array, namespace
from diffusion_distill.base.errors import positive_int
from diffusion_distill.process.vp import Decaying


@dataclass(frozen=True)
class LinearBetaDiscrete(Decaying):
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

    def _place(self, t: Array) -> tuple[Array, Array]:
        """(the knot at or before time t, how far t is from it in units of 1/N)."""
        xp = namespace(t)
        at = xp.multiply(t, self.steps)
        k = xp.clip(xp.floor(at), 0, self.steps - 1)
        return k.astype(np.int32), at - k


@dataclass(frozen=True)
class LinearAlphaDiscrete(LinearBetaDiscrete):
    """`LinearBetaDiscrete` with alpha² linear between its knots, as the published iPNDM and DEIS programs assume."""

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
