"""Initial values of kernels and biases, by the name of a rule and the role of a layer.

Parameters are float32. The default rule, `lecun`, is that of the progressive distillation program (Salimans & Ho,
arXiv:2202.00512); the others are those of EDM's two networks (Karras et al., arXiv:2206.00364).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer, lecun_normal, normal, zeros

from diffusion_distill.base.errors import choose

#: What a layer is for, where its initial values depend on it: 'last' ends a branch or the network.
Role = Literal["layer", "last", "qkv", "label", "augment"]


def initial(rule: str, inputs: int, outputs: int, role: Role = "layer") -> dict[str, Initializer]:
    """kernel_init and bias_init of a layer, by the name of a rule.

        lecun     kernel normal, variance 1 / inputs, the last one zero; bias zero   (Salimans & Ho 2022)
        uniform   kernel and bias uniform in ±1 / sqrt(inputs); last and augment zero, label standard normal
                  (EDM's DhariwalUNet, Karras et al. 2022)
        xavier    kernel uniform in ±sqrt(6 / (inputs + outputs)), the last one times 1e-5, q, k, v times
                  sqrt(0.2); bias zero   (EDM's SongUNet)

    Args:
      rule: a key of `INIT_RULES`.
      inputs, outputs: numbers that a result depends on and that an input reaches; of a convolution, channels
        times the kernel's places.
      role: what the layer is for.

    Raises:
      ValueError: unknown rule.
    """
    return choose("init_rule", rule, INIT_RULES)(inputs, outputs, role)


def _lecun(inputs: int, outputs: int, role: Role) -> dict[str, Initializer]:
    return {"kernel_init": zeros if role == "last" else lecun_normal(), "bias_init": zeros}


def _uniform(inputs: int, outputs: int, role: Role) -> dict[str, Initializer]:
    rule = {"last": zeros, "augment": zeros, "label": normal(1.0)}.get(role) or _within(inputs**-0.5)
    return {"kernel_init": rule, "bias_init": rule}


def _xavier(inputs: int, outputs: int, role: Role) -> dict[str, Initializer]:
    gain = {"last": 1e-5, "qkv": 0.2**0.5}.get(role, 1.0)
    return {"kernel_init": _within(gain * (6 / (inputs + outputs)) ** 0.5), "bias_init": zeros}


def _within(limit: float) -> Initializer:
    return lambda key, shape, dtype=jnp.float32, out_sharding=None: jax.random.uniform(key, shape, dtype, -limit, limit)


INIT_RULES: dict[str, Callable[[int, int, Role], dict[str, Initializer]]] = {
    "lecun": _lecun,
    "uniform": _uniform,
    "xavier": _xavier,
}
