"""Types shared by all modules: names for shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from diffusion_distill.base.arrays import Array

if TYPE_CHECKING:
    import jax

Data = Array  # [batch, *shape], float32; images are [batch, height, width, channels]
Cond = Any  # a tree of arrays [batch, ...] that the network is conditioned on, or None
Labels = Array  # [batch] int32
Key: TypeAlias = "jax.Array"  # a typed PRNG key
Params = Any  # a tree of float32 arrays
Batch = Mapping[str, Any]  # {"x": [batch, *shape], "cond": a tree of arrays [batch, ...]}
