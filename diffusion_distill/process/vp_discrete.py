"""Variance-preserving processes of N discrete betas, with times between them too.

DDPM (arXiv:2006.11239 section 4) has N betas in equal steps; at the time i/N, a knot, alpha² is the product of
(1 - beta_j) over the first i of them. Between two knots -log alpha is linear in t, as in DPM-Solver
(arXiv:2206.00927), or alpha² is, as in DEIS (arXiv:2204.13902). The betas come from a rule of `BETAS`:

    linear          equal steps from beta_start to beta_end           DDPM
    scaled_linear   equal steps of their roots, also called quad      latent diffusion, DDIM
    sigmoid         a sigmoid from -6 to 6 between the two            DDPM's later programs
    const           beta_end
    jsd             1/N, 1/(N - 1), ... 1                             arXiv:1503.03585
    cosine          alpha² = cos²((t + 0.008)/1.008 · pi/2) / cos²(0.008/1.008 · pi/2), with betas of at most 0.999
                                                                      improved DDPM, arXiv:2102.09672 Eq. 17

A new rule is one line there. `LinearBetaDiscrete` is the first of them under its own name. With `zero_snr` a rule's
betas are rescaled so that the last knot has no signal (arXiv:2305.08891, Algorithm 1):

    alpha_i ← (alpha_i - alpha_N) · alpha_1 / (alpha_1 - alpha_N)

alpha² of that knot is `NEXT_TO_NONE` instead of 0, as in diffusers' solvers, since log(alpha/sigma) must be finite;
it is a quarter of that of the knot before where this is less, so that the noise always rises.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from diffusion_distill.base.arrays import Array, namespace
from diffusion_distill.base.errors import choose, positive_int
from diffusion_distill.process.predictions import predicts_noise
from diffusion_distill.process.vp import Decaying

#: The least alpha² where alpha² is linear between knots, as in the published programs, which know no `zero_snr`.
LEAST_ALPHA2 = 1e-7
#: alpha² of the last knot with `zero_snr`.
NEXT_TO_NONE = 2.0**-24


def _cosine(steps: int, start: float, end: float) -> np.ndarray:
    alpha2 = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1 - alpha2[1:] / alpha2[:-1], 0.999)


def _scaled_linear(steps: int, start: float, end: float) -> np.ndarray:
    return np.linspace(start**0.5, end**0.5, steps) ** 2


#: (steps, beta_start, beta_end) -> betas [steps]
BETAS: dict[str, Callable[[int, float, float], np.ndarray]] = {
    "linear": lambda steps, start, end: np.linspace(start, end, steps),
    "scaled_linear": _scaled_linear,
    "quad": _scaled_linear,
    "sigmoid": lambda steps, start, end: start + (end - start) / (1 + np.exp(-np.linspace(-6, 6, steps))),
    "const": lambda steps, start, end: np.full(steps, end),
    "jsd": lambda steps, start, end: 1 / np.linspace(steps, 1, steps),
    "cosine": _cosine,
}


def without_last_signal(betas: np.ndarray) -> np.ndarray:
    """Betas [steps] rescaled so that the last knot has next to no signal, see the head of this file."""
    alpha = np.sqrt(np.cumprod(1 - betas))
    alpha2 = ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2
    alpha2[-1] = min(NEXT_TO_NONE, alpha2[-2] / 4)  # steep rules are below it one knot earlier
    return 1 - alpha2 / np.append(1.0, alpha2[:-1])


#: diffusers' names of rules -> ours.
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}


class Discrete(Decaying):
    """What processes of discrete betas share. Networks made for one know the times of its knots only.

    Attributes:
      steps: the number of betas, N.
      logsnr_max: of the knot at time 0. With inf, time 0 is zero noise, where weightings that contain the SNR are
        infinite: for comparisons and for sampling only. With None there is no such knot: the line between the first
        two betas' knots goes on below them, as in DPM-Solver, and levels end a little above time 0.
      logsnr_min: betas at the noisy end whose knots are below it are left out, and time 1 is the last knot that stays
        (DPM-Solver has -10.2); None keeps them all.
      between: what is linear between knots, 'log_alpha' or 'alpha2'; alpha² is then at least 1e-7 (DEIS), but with
        `zero_snr`, where it would be that of several knots.
    """

    steps: int
    logsnr_max: float | None
    logsnr_min: float | None = None
    between = "log_alpha"
    zero_snr = False

    @property
    def betas(self) -> np.ndarray:
        """All betas [steps], float64, also those that `logsnr_min` leaves out."""
        raise NotImplementedError

    @property
    def count(self) -> int:
        """The number of betas that are not left out: M of the times i/M of the knots."""
        return len(_knots(self).time) - 1

    @property
    def knots(self) -> np.ndarray:
        """The times between which the process is smooth, [count + 1], rising."""
        return _knots(self).time

    def rate(self, t: Array) -> Array:
        """The derivative of -log alpha at time t; at a knot (to rounding), that of the later times."""
        knots = _knots(self)
        k = np.clip(np.floor(np.multiply(t, self.count) + 1e-9).astype(int), 0, self.count - 1)
        if self.between == "log_alpha":
            return self.count * knots.rate[k]
        return -0.5 * (np.diff(knots.alpha2) / np.diff(knots.time))[k] / self._alpha2(t)

    def _decay(self, t: Array) -> Array:
        if self.between == "alpha2":
            return -0.5 * namespace(t).log(self._alpha2(t))
        knots, (k, since) = _knots(self), self._place(t)
        return _take(knots.decay, k, since) + since * _take(knots.rate, k, since)

    def _time(self, decay: Array) -> Array:
        xp, knots, dtype = namespace(decay), _knots(self), decay.dtype
        if self.between == "alpha2":
            return xp.interp(-xp.exp(-2 * decay), -knots.alpha2, knots.time)
        return xp.interp(decay, knots.decay.astype(dtype), knots.time.astype(dtype))

    def _place(self, t: Array) -> tuple[Array, Array]:
        """(the knot at or before time t, how far t is from it in units of a step)."""
        xp = namespace(t)
        at = xp.multiply(t, self.count)
        k = xp.clip(xp.floor(at), 0, self.count - 1)
        return k.astype(np.int32), at - k

    def _alpha2(self, t: Array) -> Array:
        xp = namespace(t)
        alpha2 = xp.interp(t, _knots(self).time, _knots(self).alpha2)
        return alpha2 if self.zero_snr else xp.maximum(alpha2, LEAST_ALPHA2)

    def _check_ends(self) -> None:
        """Raises ValueError unless the first beta's knot is between the two ends."""
        beta = float(self.betas[0])
        first = math.log((1 - beta) / beta) if beta < 1 else -math.inf
        if self.logsnr_max is not None and not self.logsnr_max > first:
            raise ValueError(f"logsnr_max must be above the logsnr {first:.6g} of the first step, got {self}.")
        if self.logsnr_min is not None and not self.logsnr_min < first:
            raise ValueError(f"logsnr_min must be below the logsnr {first:.6g} of the first step, got {self}.")


@dataclass(frozen=True)
class DiscreteBetas(Discrete):
    """A process of N betas by the name of their rule, as `DiscreteBetas("cosine", 4000)` of improved DDPM.

    Train with `Denoising(steps=N)`. For the attributes, see `Discrete`; beta_start and beta_end are not used by the
    rules 'cosine' and 'jsd'. Networks for `zero_snr` predict v or x: where there is no signal, eps says nothing of it.

    Raises:
      ValueError: an unknown rule or line, steps below 1 (with zero_snr below 2), betas not between 0 and 1, or the
        first beta's knot is not between logsnr_min and logsnr_max.
    """

    kind: str = "linear"
    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    logsnr_max: float | None = 20.0
    logsnr_min: float | None = None
    between: str = "log_alpha"
    zero_snr: bool = False

    def __post_init__(self) -> None:
        choose("rule of betas", self.kind, BETAS)
        choose("line between knots", self.between, {"log_alpha": None, "alpha2": None})
        positive_int("The number of betas", self.steps)
        if not (0 < self.beta_start < 1 and 0 < self.beta_end < 1):
            raise ValueError(f"beta_start and beta_end must be between 0 and 1, got {self}.")
        if self.zero_snr and self.steps < 2:
            raise ValueError(f"With zero_snr the last of two or more betas has no signal, got {self}.")
        if self.logsnr_max is None and self.steps < 2:
            raise ValueError(f"Without logsnr_max, time 0 is on the line through two betas' knots, got {self}.")
        self._check_ends()

    @property
    def betas(self) -> np.ndarray:
        """All betas [steps], float64, also those that `logsnr_min` leaves out."""
        betas = BETAS[self.kind](self.steps, self.beta_start, self.beta_end)
        return without_last_signal(betas) if self.zero_snr else betas

    def check_prediction(self, prediction: str) -> None:
        """Raises ValueError if a network's prediction, of `predictions.PREDICTIONS`, is of no use without signal."""
        if self.zero_snr and predicts_noise(prediction):
            raise ValueError(
                f"With zero SNR the noisiest step has no signal, of which a network that predicts {prediction!r} says "
                "nothing. Such networks predict 'v' or 'x': say so, or leave zero SNR out."
            )


@dataclass(frozen=True)
class LinearBetaDiscrete(Discrete):
    """The process of Ho et al.: N = `steps` betas from beta_start to beta_end, knots at the times i/N.

    Networks made for it know the times 1/N, 2/N, ... 1 only: train with `Denoising(steps=N)`.

    Attributes:
      logsnr_max: of the knot at time 0; see `Discrete`.

    Raises:
      ValueError: steps below 1, not 0 < beta_start <= beta_end < 1, or more noise at time 0 than at 1/N.
    """

    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    logsnr_max: float | None = 20.0

    def __post_init__(self) -> None:
        positive_int("The number of betas", self.steps)
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"A linear beta needs 0 < beta_start <= beta_end < 1, got {self}.")
        self._check_ends()

    @property
    def betas(self) -> np.ndarray:
        """The betas [steps], float64."""
        return BETAS["linear"](self.steps, self.beta_start, self.beta_end)


@dataclass(frozen=True)
class LinearAlphaDiscrete(LinearBetaDiscrete):
    """`LinearBetaDiscrete` with alpha² linear between its knots, as the published iPNDM and DEIS programs assume."""

    between = "alpha2"


class _Knots(NamedTuple):
    """Tables on the host, float64."""

    time: np.ndarray  # i/M for i = 0 .. M
    decay: np.ndarray
    rate: np.ndarray  # growth of the decay from knot i to i + 1
    alpha2: np.ndarray


@lru_cache(maxsize=16)
def _knots(process: Discrete) -> _Knots:
    # Half of the spacing of float64 below 1 stands for the noise that a beta of 1 (jsd's last) takes away.
    rate = -0.5 * np.log1p(-np.minimum(process.betas, 1 - 2**-53))
    at_zero = rate[0] - rate[1] if process.logsnr_max is None else 0.5 * math.log1p(math.exp(-process.logsnr_max))
    rate[0] -= at_zero
    decay = np.cumsum([at_zero, *rate])
    if process.logsnr_min is not None:
        decay = decay[decay <= 0.5 * np.logaddexp(0, -process.logsnr_min)]
    return _Knots(np.arange(len(decay)) / (len(decay) - 1), decay, rate[: len(decay) - 1], np.exp(-2 * decay))


def _take(table: np.ndarray, index: Array, like: Array) -> Array:
    """The table's entries in the precision of `like`, as a NumPy or JAX array like it."""
    return namespace(like).asarray(table, like.dtype)[index]
