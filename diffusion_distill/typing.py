"""Types shared by all modules: shapes, and the protocols of parts that can be replaced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax

from diffusion_distill.arrays import Array
from diffusion_distill.levels import Level

Image = Array  # [batch, height, width, channels], float32 in [-1, 1] when clean
Labels = Array  # [batch] int32
Key = jax.Array  # a typed PRNG key
Params = Any  # a tree of float32 arrays
Batch = Mapping[str, Array]  # {"image": [batch, h, w, c], "label": [batch]}


class Denoise(Protocol):
    """Estimates the clean image from a noisy one. Must be a JAX tree, so that jit sees its parameters."""

    def __call__(self, z: Image, level: Level, labels: Labels | None = None) -> Image:
        """z [batch, h, w, c] at level ([batch] each) -> x_hat of the same shape."""
        ...


class RawDenoise(Denoise, Protocol):
    """A denoiser that also gives the network's output before it becomes x_hat, on which losses are computed."""

    prediction: Any
    sigma_data: Any

    def raw(self, z: Image, level: Level, labels: Labels | None = None) -> Array:
        """The network's own output: x, eps, v, or [x, eps] on the channel axis."""
        ...
