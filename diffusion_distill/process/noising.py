"""The Gaussian process itself: noising, the deterministic step, the posterior.

    q(z | x)         = N(alpha·x, sigma²)
    DDIM step t -> s: z_s = r·z_t + d·x_hat,   r = sigma_s / sigma_t,   d = alpha_s - alpha_t·r
    q(z_s | z_t, x)  = N(k·(alpha_s/alpha_t)·z_t + (1 - k)·alpha_s·x, (1 - k)·sigma_s²),   k = snr_t / snr_s

The DDIM step (arXiv:2010.02502 Eq. 12 with eta = 0) holds for VP and VE alike; in z/sigma it is a
translation. The reverse variance is interpolated between the posterior's (gamma = 0) and sigma_t² in place
of sigma_s² (gamma = 1) on a log scale, arXiv:2202.00512 section 3.
"""

from __future__ import annotations

from typing import NamedTuple

from diffusion_distill.base.arrays import Array, log1mexp, namespace
from diffusion_distill.base.typing import Data
from diffusion_distill.process.levels import Level


class Gaussian(NamedTuple):
    """A diagonal Gaussian."""

    mean: Array
    logvar: Array

    @property
    def var(self) -> Array:
        """Variance."""
        return namespace(self.logvar).exp(self.logvar)

    @property
    def std(self) -> Array:
        """Standard deviation."""
        return namespace(self.logvar).exp(0.5 * self.logvar)


def diffuse(x: Data, eps: Data, level: Level) -> Data:
    """z = alpha·x + sigma·eps."""
    alpha, sigma = level.expand(x)
    return alpha * x + sigma * eps


def marginal(x: Data, level: Level) -> Gaussian:
    """q(z | x) at a level."""
    alpha, sigma = level.expand(x)
    return Gaussian(alpha * x, 2 * namespace(sigma).log(sigma))


def step_coefficients(level_t: Level, level_s: Level) -> tuple[Array, Array]:
    """(r, d) of the DDIM step from level t to level s; a step to zero noise is (0, 1)."""
    r = level_s.sigma / level_t.sigma
    return r, level_s.alpha - level_t.alpha * r


def ddim_step(z: Data, x_hat: Data, level_t: Level, level_s: Level) -> Data:
    """Moves z from level t to level s along the estimate x_hat."""
    r, d = step_coefficients(level_t.expand(z), level_s.expand(z))
    return r * z + d * x_hat


def posterior_coefficients(level_t: Level, level_s: Level, gamma: Array = 0.0) -> tuple[Array, Array, Array]:
    """(factor of z_t, factor of x, log-variance) of the reverse step from level t to level s.

    gamma in [0, 1] chooses the variance: 0 the posterior's own ('small'), 1 'large'.
    """
    xp = namespace(*level_t, *level_s)
    difference = level_s.logsnr - level_t.logsnr
    ratio, rest = xp.exp(-difference), -xp.expm1(-difference)
    log_sigma = (1 - gamma) * xp.log(level_s.sigma) + gamma * xp.log(level_t.sigma)
    return ratio * level_s.alpha / level_t.alpha, rest * level_s.alpha, log1mexp(difference) + 2 * log_sigma


def posterior(
    z: Data, x: Data, level_t: Level, level_s: Level, gamma: float = 0.0, x_logvar: Array | None = None
) -> Gaussian:
    """q(z_s | z_t = z, x), or with x_logvar the same where x has that log-variance."""
    xp = namespace(z, x)
    level_t, level_s = level_t.expand(z), level_s.expand(z)
    from_z, from_x, logvar = posterior_coefficients(level_t, level_s, gamma)
    if x_logvar is not None:
        logvar = xp.logaddexp(logvar, 2 * xp.log(from_x) + x_logvar)
    return Gaussian(from_z * z + from_x * x, logvar)
