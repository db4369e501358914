"""Likelihood: the terms of the variational bound, and of 8-bit images given a Gaussian.

    KL(p || q)      = (exp(l) - 1 - l + (mean_p - mean_q)²·exp(-logvar_q)) / 2,   l = logvar_p - logvar_q
    P(x | mean, s)  = Phi((x + 1/255 - mean)/s) - Phi((x - 1/255 - mean)/s)       arXiv:2006.11239 Eq. 13

with x on the 256 levels -1, -1 + 2/255, ... 1, and the bins of -1 and 1 open to infinity. In float32 the two Phi
are the same number in the upper tail and zero in the lower one. Here the bin is reflected into the lower tail and
the difference is taken of logarithms, log P = log Phi(b) + log(1 - exp(log Phi(a) - log Phi(b))).
"""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from diffusion_distill.base.arrays import Array, image_mean, log1mexp, namespace
from diffusion_distill.base.typing import Data
from diffusion_distill.process.levels import Level
from diffusion_distill.process.noising import Gaussian, posterior

#: Half the distance of two grey levels.
HALF_BIN = 1 / 255


def gaussian_kl(p: Gaussian, q: Gaussian) -> Array:
    """KL(p || q) of diagonal Gaussians, elementwise, in nats."""
    xp = namespace(p.mean, q.mean)
    difference = p.logvar - q.logvar
    return 0.5 * (xp.exp(difference) - 1 - difference + (p.mean - q.mean) ** 2 * xp.exp(-q.logvar))


def posterior_kl_bits(z: Data, x: Data, x_hat: Data, level_t: Level, level_s: Level, gamma: float = 1.0) -> Array:
    """KL(q(z_s | z_t, x) || p(z_s | z_t)) in bits per pixel value, [batch]: one term of the bound.

    The model p uses x_hat in place of x and the variance chosen by gamma.
    """
    true, model = posterior(z, x, level_t, level_s), posterior(z, x_hat, level_t, level_s, gamma)
    return image_mean(gaussian_kl(true, model)) / math.log(2)


def discretized_gaussian_log_likelihood(x: Data, mean: Array, log_scale: Array, least: float = 1e-12) -> Array:
    """log P of 8-bit images x in [-1, 1] under N(mean, exp(log_scale)²), elementwise, in nats.

    Args:
      log_scale: above -40.
      least: smaller probabilities count as this one, as in the published programs; 0 counts them as they are.
    """
    scale = jnp.exp(log_scale)
    half, off = HALF_BIN / scale, (x - mean) / scale
    near, far = log_ndtr(half - jnp.abs(off)), log_ndtr(-half - jnp.abs(off))
    open_bin = log_ndtr(half - jnp.sign(x) * off)
    log_p = jnp.where(jnp.abs(x) > 1 - HALF_BIN, open_bin, near + log1mexp(near - far))
    return jnp.maximum(log_p, math.log(least) if least else -jnp.inf)
