"""Bias-corrected exponential moving averages of parameters (arXiv:2303.04248, A.7).

Update number k = 1, 2, ... moves the average by

    average += d_k·(value - average),   d_k = (1 - mu) / (1 - mu^k)

so that average_k = (1 - mu)/(1 - mu^k)·sum_j mu^(k-j)·value_j: the first update copies the value and the
initial parameters never count. d_k is evaluated as expm1(log mu) / expm1(k·log mu) with log mu from float64;
1 - mu^k in float32 would err by up to 1e-3 for the momenta in use. Momentum 0 is a plain copy.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import struct

from diffusion_distill.arrays import Array
from diffusion_distill.typing import Params


class Average(struct.PyTreeNode):
    """An average and the number of values in it; losing the count would undo the bias correction."""

    params: Params
    count: Array  # int32 scalar


def init(params: Params) -> Average:
    """An empty average; the first update copies the value, until then it holds `params`."""
    return Average(jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))


def reset(average: Average) -> Average:
    """Forgets what was averaged at the next update, keeping the parameters until then."""
    return average.replace(count=jnp.zeros((), jnp.int32))


def log_momentum(momentum: float) -> float:
    """log mu in float64; -inf for momentum 0.

    Raises:
      ValueError: momentum outside [0, 1).
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"An EMA momentum must be in [0, 1), got {momentum!r}.")
    return math.log(momentum) if momentum else -math.inf


def decay(log_mu: Array, count: Array) -> Array:
    """d_k for update number k = count >= 1 of an average with log-momentum log_mu < 0."""
    return jnp.expm1(log_mu) / jnp.expm1(count * log_mu)


def update(average: Average, value: Params, log_mu: Array) -> Average:
    """Adds one value to the average."""
    count = average.count + 1
    d = decay(log_mu, count)
    return Average(jax.tree.map(lambda a, v: jnp.where(d < 1, a + d * (v - a), v), average.params, value), count)
