"""Moving averages of parameters.

    average += d_k·(value - average)        d_k = weight of value number k = 1, 2, ...

    rule        weight
    corrected   d_k = (1 - mu) / (1 - mu^k)            bias-corrected (arXiv:2303.04248, A.7)
    plain       d_1 = 1, then d_k = 1 - mu             BTD's program
    window      d_k = 1 / (1 + (k - 1) mod n)          BTD's 'aa': the mean since the last start of a window of n
    ramped      d_k = 1 - min(mu, 0.5^(20/(k - 1)))    EDM's program: a half-life of at most a twentieth of the past

A rule is a plain function of k. The loop evaluates it on the host in float64 and passes its value to the compiled step,
so that phases with different rules and momenta share one program.

With the corrected rule, average_k = (1 - mu)/(1 - mu^k)·sum_j mu^(k-j)·value_j. Every rule has d_1 = 1: the first
update copies the value, and the initial parameters never count. Momentum 0 is a plain copy. A window is as long as the
memory of its momentum, n = 1 / (1 - mu). An update that is skipped leaves the averages as they are, and is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.errors import choose
from diffusion_distill.base.typing import Params
from diffusion_distill.methods.phases import Phase

#: The weight d_k of value number k >= 1.
Rule = Callable[[int], float]
#: The longest half-life of a ramped average, as a part of the updates made.
RAMP = 0.05


def corrected(momentum: float, k: int) -> float:
    """(1 - mu) / (1 - mu^k), without cancellation for momenta close to 1."""
    if momentum == 0:
        return 1.0
    return math.expm1(math.log(momentum)) / math.expm1(k * math.log(momentum))


def plain(momentum: float, k: int) -> float:
    """1, then 1 - mu."""
    return 1.0 if k == 1 else 1 - momentum


def window(momentum: float, k: int) -> float:
    """1 over the place of value k in its window of 1 / (1 - mu) values."""
    return 1 / (1 + (k - 1) % round(1 / (1 - momentum)))


def ramped(momentum: float, k: int) -> float:
    """1 - mu with a smaller mu at first, whose half-life is `RAMP` of the updates made before."""
    return 1 - min(momentum, 0.5 ** (1 / (RAMP * (k - 1)))) if k > 1 else 1.0


RULES: dict[str, Callable[[float, int], float]] = {
    "corrected": corrected,
    "plain": plain,
    "window": window,
    "ramped": ramped,
}


def rule(kind: str, momentum: float) -> Rule:
    """A rule by its name in `RULES`, for a momentum.

    Raises:
      ValueError: an unknown name, or a momentum outside [0, 1).
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"An EMA momentum must be in [0, 1), got {momentum!r}.")
    return partial(choose("averaging", kind, RULES), momentum)


class Averaging:
    """The weights of the averages in a phase, by update.

    The averages have counted their values since the last phase up to this one that began them anew; the count is known
    here without asking the device.
    """

    def __init__(self, phases: Sequence[Phase], number: int, momenta: Mapping[str, float]):
        """For phase `number` of a run; momenta are those of the method's own averages."""
        phase, begins = phases[number], list(accumulate((phase.updates for phase in phases), initial=0))
        anew = [k for k in range(1, number + 1) if phases[k].restart]
        eval_anew = anew + [k for k in range(1, number + 1) if phases[k].reset_average]
        self._since = {name: begins[max(anew, default=0)] for name in momenta}
        self._since["eval"] = begins[max(eval_anew, default=0)]
        self._rules = {name: rule("corrected", momentum) for name, momentum in momenta.items()}
        self._rules["eval"] = rule(phase.averaging, phase.momentum)

    def at(self, done: int) -> dict[str, np.float32]:
        """Each average's weight in the update that follows `done` updates of the run."""
        return {name: np.float32(weight(done + 1 - self._since[name])) for name, weight in self._rules.items()}


class Average(struct.PyTreeNode):
    """An average and the number of values in it."""

    params: Params
    count: Array  # int32 scalar


def init(params: Params) -> Average:
    """An empty average; the first update copies the value, until then it holds `params`."""
    return Average(jax.tree.map(jnp.copy, params), jnp.zeros((), jnp.int32))


def reset(average: Average) -> Average:
    """Forgets what was averaged at the next update, keeping the parameters until then."""
    return average.replace(count=jnp.zeros((), jnp.int32))


def update(average: Average, value: Params, weight: Array) -> Average:
    """Adds one value to the average.

    Args:
      weight: d_k, a scalar in (0, 1]. An empty average copies the value whatever the weight: the update that should
        have given it its first value may have been skipped.
    """
    copied = (weight == 1) | (average.count == 0)
    moved = jax.tree.map(lambda a, v: jnp.where(copied, v, a + weight * (v - a)), average.params, value)
    return Average(moved, average.count + 1)
