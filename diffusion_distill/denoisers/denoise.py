"""The one interface of solvers, losses and evaluations: a function from a noisy image and its level to x_hat."""

from __future__ import annotations

from typing import Any, Protocol

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.typing import Cond, Image
from diffusion_distill.process.levels import Level


class Denoise(Protocol):
    """Estimates the clean image from a noisy one. Must be a JAX tree, so that jit sees its parameters."""

    def __call__(self, z: Image, level: Level, cond: Cond | None = None, /) -> Image:
        """z [batch, h, w, c] at level ([batch] each) -> x_hat of the same shape."""
        ...


class RawDenoise(Denoise, Protocol):
    """A denoiser that also gives the network's output before it becomes x_hat, on which losses are computed."""

    prediction: Any
    sigma_data: Any

    def raw(self, z: Image, level: Level, cond: Cond | None = None, /) -> Array:
        """The network's own output: x, eps, v, or [x, eps] on the channel axis."""
        ...
