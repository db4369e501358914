"""Moving averages of parameters: how much the new value weighs, d_k, at update number k = 1, 2, ...

    average += d_k·(value - average)

corrected   d_k = (1 - mu) / (1 - mu^k)            bias-corrected (arXiv:2303.04248, A.7)
plain       d_1 = 1, then d_k = 1 - mu             BTD's program
window      d_k = 1 / (1 + (k - 1) mod n)          BTD's 'aa': the mean since the last start of a window of n
ramped      d_k = 1 - min(mu, 0.5^(20/(k - 1)))    EDM's program: a half-life of at most a twentieth of the past

Corrected, average_k = (1 - mu)/(1 - mu^k)·sum_j mu^(k-j)·value_j: the first update copies the value and the
initial parameters never count. d_k is evaluated as expm1(log mu) / expm1(k·log mu) with log mu from float64;
1 - mu^k in float32 would err by up to 1e-3 for the momenta in use. Momentum 0 is a plain copy. A window is
as long as the memory of its momentum, n = 1 / (1 - mu).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.typing import Params
from diffusion_distill.methods.phases import AVERAGING

#: The longest half-life of a ramped average, as a part of the updates made.
RAMP = 0.05


class Average(struct.PyTreeNode):
    """An average and the number of values in it; losing the count would undo the bias correction."""

    params: Params
    count: Array  # int32 scalar


class Rule(NamedTuple):
    """The rule of an average as scalars, so that phases with different rules and momenta share one compiled step."""

    kind: Array  # int32: place in AVERAGING
    log_mu: Array  # log momentum, -inf for momentum 0
    window: Array  # int32: values in a window


def rule(kind: str, momentum: float) -> Rule:
    """A rule by name, with log mu from float64.

    Raises:
      ValueError: momentum outside [0, 1), or a kind that is not one of `AVERAGING`.
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"An EMA momentum must be in [0, 1), got {momentum!r}.")
    log_mu = math.log(momentum) if momentum else -math.inf
    return Rule(np.int32(AVERAGING.index(kind)), np.float64(log_mu), np.int32(round(1 / (1 - momentum))))


def init(params: Params) -> Average:
    """An empty average; the first update copies the value, until then it holds `params`."""
    return Average(jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))


def reset(average: Average) -> Average:
    """Forgets what was averaged at the next update, keeping the parameters until then."""
    return average.replace(count=jnp.zeros((), jnp.int32))


def weight(rule: Rule, count: Array) -> Array:
    """d_k of value number k = count >= 1."""
    number = jnp.asarray(count).astype(jnp.result_type(rule.log_mu))  # no mixed types: JAX may be told to refuse them
    corrected = jnp.expm1(rule.log_mu) / jnp.expm1(number * rule.log_mu)
    plain = jnp.where(count == 1, 1.0, -jnp.expm1(rule.log_mu))
    window = 1 / (1 + (count - 1) % rule.window).astype(plain.dtype)
    ramped = -jnp.expm1(jnp.minimum(rule.log_mu, -math.log(2) / (RAMP * (number - 1))))
    return jnp.select([rule.kind == k for k in range(len(AVERAGING))], [corrected, plain, window, ramped])


def update(average: Average, value: Params, rule: Rule) -> Average:
    """Adds one value to the average."""
    count = average.count + 1
    d = weight(rule, count)
    return Average(jax.tree.map(lambda a, v: jnp.where(d < 1, a + d * (v - a), v), average.params, value), count)
