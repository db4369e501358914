"""The variances of the ancestral steps of N discrete betas, and those that networks learn.

With abar_i the product of (1 - beta_j) over j <= i, and abar of -1 equal to 1,

    posterior_variance            (1 - abar_(i-1)) / (1 - abar_i)·beta_i          arXiv:2006.11239 Eq. 7
    posterior_log_variance        its logarithm; its first element, log 0, is replaced by the second
    log_variance_fixed_small      its logarithm, where it is at least 1e-20
    log_variance_fixed_large      log beta_i
    learned_log_variance          f·(fixed large) + (1 - f)·(posterior)           arXiv:2102.09672 Eq. 15

where f = (v + 1)/2 for the output v of a network that predicts 'eps_var'. A step between two levels of any process has
the same two variances, `noising.posterior_coefficients` with gamma 0 and 1, and f in place of gamma.
"""

from __future__ import annotations

import numpy as np

from diffusion_distill.base.arrays import Array, expand, namespace
from diffusion_distill.base.typing import Data


def posterior_variance(betas: np.ndarray) -> np.ndarray:
    """The variance [N] of q(z_(i-1) | z_i, x), 0 for i = 0. Betas are `Discrete.betas`, [N]."""
    with np.errstate(divide="ignore"):  # a last beta of 1
        noise = -np.expm1(np.cumsum(np.log1p(-betas)))
    return betas * np.append(0.0, noise[:-1]) / noise


def posterior_log_variance(betas: np.ndarray) -> np.ndarray:
    """The logarithm [N] of the posterior's variance, whose first element is that of the second."""
    variance = posterior_variance(betas)
    variance[:1] = variance[1:2]
    return np.log(variance)


def log_variance_fixed_small(betas: np.ndarray, least: float = 1e-20) -> np.ndarray:
    """The logarithm [N] of the posterior's variance, of which the first is `least`."""
    return np.log(np.maximum(posterior_variance(betas), least))


def log_variance_fixed_large(betas: np.ndarray) -> np.ndarray:
    """The logarithm [N] of the betas, the upper bound of the reverse variance."""
    return np.log(betas)


def learned_log_variance(v: Data, index: Array, betas: np.ndarray) -> Data:
    """The log-variance of the step from z_i to z_(i-1) that a network tells.

    Args:
      v: the second output of an 'eps_var' network, [batch, ...], as `predictions.split` gives it.
      index: i, [batch], whole numbers from 0.
    """
    xp = namespace(v)
    large, small = (
        expand(xp.asarray(table, v.dtype)[index], v)
        for table in (log_variance_fixed_large(betas), posterior_log_variance(betas))
    )
    f = (v + 1) / 2
    return f * large + (1 - f) * small
