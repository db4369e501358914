"""Helpers that let one formula serve the host (NumPy, float64) and the device (JAX or PyTorch, float32).

Neither JAX nor PyTorch is imported here: whoever has an array of one has imported it, and a program that uses one does
not need the other.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import jax

Array = Any  # of NumPy, JAX or PyTorch; formulas below floor 2 accept the first two, and what says so the third
#: (library, its arrays, the functions that NumPy has too)
LIBRARIES = (("jax", "Array", "numpy"), ("torch", "Tensor", ""))


def namespace(*values: Array) -> ModuleType:
    """jax.numpy if any value is an array of JAX or is traced by it, torch if any is a tensor, else numpy."""
    for library, kind, functions in LIBRARIES:
        loaded = sys.modules.get(library)
        if loaded is not None and any(isinstance(value, getattr(loaded, kind)) for value in values):
            return getattr(loaded, functions) if functions else loaded
    return np


def enable_x64(on: bool) -> AbstractContextManager[None]:
    """`with enable_x64(True):` lets JAX compute in float64; jax 0.7 keeps this function among the experimental ones."""
    import jax
    import jax.experimental

    holder: Any = jax if hasattr(jax, "enable_x64") else jax.experimental
    return holder.enable_x64(on)


def expand(per_sample: Array, like: Array) -> Array:
    """Appends axes to a scalar or [batch] array so that it broadcasts against `like` [batch, ...]."""
    missing = np.ndim(like) - np.ndim(per_sample)
    return per_sample.reshape(np.shape(per_sample) + (1,) * missing) if np.ndim(per_sample) else per_sample


def settled(values: Any) -> Any:
    """A tree of arrays as it is, but complete where several CPU devices compute it.

    They share the threads of one pool and wait for each other in it. Calls in flight at the same time can take all of
    its threads, so that none of them ends, and XLA aborts the program after some time.
    """
    jax = sys.modules.get("jax")
    if jax is None:
        return values
    first: Any = next(iter(jax.tree.leaves(values)), None)
    if isinstance(first, jax.Array) and not isinstance(first, jax.core.Tracer):
        devices = first.devices()
        if len(devices) > 1 and next(iter(devices)).platform == "cpu":
            return jax.block_until_ready(values)
    return values


def image_mean(values: Array) -> Array:
    """Mean over all axes but the first: [batch, ...] -> [batch]."""
    return values.mean(axis=tuple(range(1, values.ndim)))


def image_sum(values: Array) -> Array:
    """Sum over all axes but the first: [batch, ...] -> [batch]."""
    return values.sum(axis=tuple(range(1, values.ndim)))


def to_byte_range(images: Array) -> Array:
    """Maps images in [-1, 1] to grey levels in [0, 255] without rounding: 127.5 (x + 1), clipped."""
    return namespace(images).clip(127.5 * (images + 1), 0, 255)


def stratified(key: jax.Array, count: int) -> Array:
    """Draws `count` uniform numbers in [0, 1), the i-th of them in [i / count, (i + 1) / count).

    At a random place of the batch each number is distributed like an independent draw, but together they cover the
    range evenly, which lowers the variance of a loss averaged over times (Kingma et al., arXiv:2107.00630, I.1).
    """
    import jax
    import jax.numpy as jnp

    below_one = 1 - 2.0**-24
    return jnp.minimum(
        (jnp.arange(count, dtype=jnp.float32) + jax.random.uniform(key, (count,), jnp.float32)) / count, below_one
    )


def log1mexp(x: Array) -> Array:
    """log(1 - exp(-x)) for x > 0, accurate for small and for large x."""
    xp = namespace(x)
    return xp.where(x < 0.6931472, xp.log(-xp.expm1(-x)), xp.log1p(-xp.exp(-x)))
