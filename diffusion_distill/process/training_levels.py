"""Noise levels for training a teacher: functions from uniform numbers u in [0, 1) to levels.

uniform      u is the process's time                                          BTD (arXiv:2202.00512)
lognormal    sigma = exp(-1.2 + 1.2·Phi^-1(u))                                 EDM (arXiv:2206.00364, Table 1)
vp           sigma(t) of the VP process, t = 1 + u·(1e-5 - 1)                 EDM's VP loss
loguniform   sigma = 0.02·(100 / 0.02)^u                                       EDM's VE loss
logit_normal the process's time is sigmoid(Phi^-1(u))                          SD3 (arXiv:2403.03206 section 3.1)

Phi^-1 turns uniform numbers into normal ones. 'uniform' and 'logit_normal' give levels of the process, the others
levels with alpha = 1.
"""

from __future__ import annotations

import math

import jax
from jax.scipy.special import ndtri

from diffusion_distill.base.arrays import Array, namespace
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Process

P_MEAN, P_STD = -1.2, 1.2
VP_BETA_D, VP_BETA_MIN, VP_T_MIN = 19.9, 0.1, 1e-5
VE_SIGMA_MIN, VE_SIGMA_MAX = 0.02, 100.0


def uniform(process: Process, u: Array) -> Level:
    """The process's level at time u."""
    return process.level(u)


def logit_normal(process: Process, u: Array, mean: float = 0.0, std: float = 1.0) -> Level:
    """The logit of the process's time is normal: more of the middle than of the ends."""
    return process.level(jax.nn.sigmoid(mean + std * ndtri(u)))


def lognormal(process: Process, u: Array) -> Level:
    """log sigma is normal."""
    return from_normal(ndtri(u))


def from_normal(normal: Array, mean: float = P_MEAN, std: float = P_STD) -> Level:
    """The level of a normal number in `lognormal`."""
    return _sigma(namespace(normal).exp(mean + std * normal))


def vp(
    process: Process,
    u: Array,
    beta_d: float = VP_BETA_D,
    beta_min: float = VP_BETA_MIN,
    t_min: float = VP_T_MIN,
) -> Level:
    """sigma(t) = sqrt(exp(beta_d·t²/2 + beta_min·t) - 1) at uniform times t in (t_min, 1]."""
    xp, t = namespace(u), 1 + u * (t_min - 1)
    return _sigma(xp.sqrt(xp.expm1((0.5 * beta_d * t + beta_min) * t)))


def loguniform(process: Process, u: Array, sigma_min: float = VE_SIGMA_MIN, sigma_max: float = VE_SIGMA_MAX) -> Level:
    """log sigma is uniform."""
    return _sigma(sigma_min * namespace(u).exp(u * math.log(sigma_max / sigma_min)))


def _sigma(sigma: Array) -> Level:
    return Level(namespace(sigma).ones_like(sigma), sigma)


NOISE_LEVELS = {
    "uniform": uniform,
    "lognormal": lognormal,
    "vp": vp,
    "loguniform": loguniform,
    "logit_normal": logit_normal,
}
