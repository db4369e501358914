"""The grids that EDM compares (arXiv:2206.00364, Table 1): levels alpha = 1 of earlier samplers, for comparisons.

Their sigmas run from sigma_max to sigma_min, with f = i/(n - 1) for i = 0 .. n - 1, and then are exactly 0:

    edm     (sigma_max^(1/rho) + f·(sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, the rule `grids.karras`
    vp      s(1 + f·(epsilon_s - 1)), s(t) = sigma/alpha of the linear-beta process through (epsilon_s, sigma_min)
            and (1, sigma_max)
    ve      sigma_max·(sigma_min / sigma_max)^f
    iddpm   the entry round(f·(count - 1)) of iDDPM's `count` levels within [sigma_min, sigma_max]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from diffusion_distill.base.arrays import Array, namespace
from diffusion_distill.base.errors import choose, positive_int
from diffusion_distill.process.grids import make_grid
from diffusion_distill.process.levels import Level
from diffusion_distill.process.ve import VE
from diffusion_distill.process.vp import LinearBeta

#: Linear beta of the VP process, and the sigmas (least, greatest) of the others, where nobody says otherwise.
VP_BETA = LinearBeta(beta_min=0.1, beta_max=20.0, t_min=0.0)
RANGES = {"ve": (0.02, 100.0), "iddpm": (0.002, 81.0), "edm": (0.002, 80.0)}


def edm(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Level:
    """EDM's own grid (Eq. 5): [steps + 1] levels alpha = 1, the last exactly 0."""
    return make_grid(VE(sigma_max, sigma_min), steps, "karras", rho=rho)


def discretized(
    name: str,
    steps: int,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    *,
    within: tuple[float, float] = (0.0, math.inf),
    rho: float = 7.0,
    epsilon_s: float = 1e-3,
) -> Level:
    """One of `DISCRETIZATIONS` by name: [steps + 1] levels alpha = 1, the last exactly 0.

    Args:
      steps: at least 2.
      sigma_min, sigma_max, within: as in `sigma_range`.
      rho: of 'edm'.
      epsilon_s: of 'vp', the time of sigma_min.

    Raises:
      ValueError: unknown name, fewer than 2 steps, or an empty range.
    """
    make = choose("discretization", name, DISCRETIZATIONS)
    if positive_int("The number of steps", steps) < 2:
        raise ValueError(f"A grid from sigma_max to sigma_min needs at least 2 steps, got {steps}.")
    low, high = sigma_range(name, sigma_min, sigma_max, within=within, epsilon_s=epsilon_s)
    return exploding(make(steps, low, high, rho, epsilon_s))


def exploding(sigmas: Array) -> Level:
    """The grid [steps + 1] of given sigmas [steps], decreasing, and then exactly 0; alpha = 1."""
    sigma = np.append(np.asarray(sigmas, np.float64), 0.0)
    return Level(np.ones_like(sigma), sigma)


def sigma_range(
    name: str,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    *,
    within: tuple[float, float] = (0.0, math.inf),
    epsilon_s: float = 1e-3,
) -> tuple[float, float]:
    """(sigma_min, sigma_max) of a discretization, with its defaults for None, clamped to the network's own range."""
    choose("discretization", name, DISCRETIZATIONS)
    default = RANGES.get(name) or tuple(_ratio(VP_BETA.level(t)) for t in (epsilon_s, 1.0))
    low = max(default[0] if sigma_min is None else sigma_min, within[0])
    high = min(default[1] if sigma_max is None else sigma_max, within[1])
    if not 0 < low < high < math.inf:
        raise ValueError(f"Need 0 < sigma_min < sigma_max, both finite; got {low:.6g} and {high:.6g}.")
    return float(low), float(high)


@dataclass(frozen=True)
class FittedBeta(LinearBeta):
    """A linear beta made by `fitted_beta`: beta_min may be just below 0, where sigma is real from epsilon_s on."""

    t_min: float = 0.0

    def __post_init__(self) -> None:
        pass  # LinearBeta's check of the betas does not apply

    def _time(self, decay: Array) -> Array:
        xp = namespace(decay)
        return xp.where(decay == 0, 0.0, super()._time(xp.where(decay == 0, 1.0, decay)))  # 0/0 where beta_min < 0

    def beta(self, t: Array) -> Array:
        """beta at time t."""
        return self.beta_min + (self.beta_max - self.beta_min) * t


def fitted_beta(sigma_min: float, sigma_max: float, epsilon_s: float = 1e-3) -> FittedBeta:
    """The linear-beta process whose sigma/alpha is sigma_min at time epsilon_s and sigma_max at time 1.

    Raises:
      ValueError: not 0 < sigma_min < sigma_max, or epsilon_s outside (0, 1).
    """
    if not (0 < sigma_min < sigma_max and 0 < epsilon_s < 1):
        raise ValueError(
            f"Need 0 < sigma_min < sigma_max and 0 < epsilon_s < 1, got {sigma_min:.6g}, {sigma_max:.6g}, {epsilon_s}."
        )
    low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    slope = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
    beta_min = high - slope / 2
    return FittedBeta(beta_min, beta_min + slope)


def iddpm_sigmas(steps: int = 1000, c_1: float = 0.001, c_2: float = 0.008, dtype: type = np.float64) -> np.ndarray:
    """iDDPM's noise levels as EDM tabulates them, [steps + 1], decreasing, the last 0 (arXiv:2206.00364, Table 1).

    With abar(j) = sin²((pi/2)·j / (steps·(c_2 + 1))) and u_steps = 0, backwards,

        u_{j-1} = sqrt((u_j² + 1) / max(abar(j-1) / abar(j), c_1) - 1)

    Args:
      dtype: float32 gives the published networks' levels up to rounding, which grows to 5e-4 of the exact ones.
    """
    steps = positive_int("The number of levels", steps)
    angle = np.arange(steps + 1).astype(dtype) * dtype(0.5 * np.pi) / dtype(steps) / dtype(c_2 + 1)
    abar = np.sin(angle) ** 2
    u = np.zeros(steps + 1, dtype)
    for j in range(steps, 0, -1):
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / max(abar[j - 1] / abar[j], dtype(c_1)) - 1)
    return u


def nearest(sigma: Array, known: Array) -> Array:
    """The index of the level of `known` [count] nearest to each sigma [...]; the first of two equally near."""
    distance = abs(sigma[..., None] - known.reshape((1,) * np.ndim(sigma) + (-1,)))
    return namespace(distance).argmin(distance, axis=-1)


def rounded(grid: Level, known: Array) -> Level:
    """A grid of levels alpha = 1 whose sigmas are replaced by the nearest of `known`; exactly 0 stays.

    Networks trained on discrete levels (iDDPM) are sampled on such grids.
    """
    sigma = np.asarray(grid.sigma, np.float64)
    known = np.asarray(known, np.float64)
    return Level(grid.alpha, np.where(sigma == 0, 0.0, known[nearest(sigma, known)]))


def _ratio(level: Level) -> float:
    return float(level.sigma / level.alpha)


def _edm(steps: int, low: float, high: float, rho: float, epsilon_s: float) -> np.ndarray:
    return edm(steps, low, high, rho).sigma[:-1]


def _vp(steps: int, low: float, high: float, rho: float, epsilon_s: float) -> np.ndarray:
    level = fitted_beta(low, high, epsilon_s).level(1 + np.arange(steps) / (steps - 1) * (epsilon_s - 1))
    return level.sigma / level.alpha


def _ve(steps: int, low: float, high: float, rho: float, epsilon_s: float) -> np.ndarray:
    return high * (low / high) ** (np.arange(steps) / (steps - 1))


def _iddpm(steps: int, low: float, high: float, rho: float, epsilon_s: float) -> np.ndarray:
    u = iddpm_sigmas()
    u = u[(u >= low) & (u <= high)]
    return u[np.round(np.arange(steps) / (steps - 1) * (len(u) - 1)).astype(np.int64)]


#: name -> (steps, sigma_min, sigma_max, rho, epsilon_s) -> sigmas [steps]
DISCRETIZATIONS: dict[str, Callable[[int, float, float, float, float], np.ndarray]] = {
    "edm": _edm,
    "vp": _vp,
    "ve": _ve,
    "iddpm": _iddpm,
}
