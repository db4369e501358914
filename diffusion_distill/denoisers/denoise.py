"""The one interface of solvers, losses and evaluations: a function from a noisy sample and its level to x_hat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.typing import Cond, Data
from diffusion_distill.process.levels import Level


class Denoise(Protocol):
    """Estimates the clean sample from a noisy one: a JAX tree, whose arrays jit sees, or a plain function."""

    def __call__(self, z: Data, level: Level, cond: Cond | None = None, /) -> Data:
        """z [batch, *shape] at level ([batch] each) -> x_hat of the same shape."""
        ...


class RawDenoise(Denoise, Protocol):
    """A denoiser that also gives the network's output before it becomes x_hat, on which losses are computed."""

    prediction: Any
    sigma_data: Any

    def raw(self, z: Data, level: Level, cond: Cond | None = None, /) -> Array:
        """The network's own output: x, eps, v, or [x, eps] on the channel axis."""
        ...


def as_denoise(denoise: Denoise | Callable[..., Data]) -> Denoise:
    """A denoiser as a JAX tree.

    Args:
      denoise: such a tree, which is returned as it is, or a plain function (z, level, cond) -> x_hat. jit treats
        everything that a function refers to as constant and compiles it once for each function.
    """
    import jax

    if callable(denoise) and jax.tree_util.all_leaves([denoise]):
        return jax.tree_util.Partial(denoise)
    return denoise
