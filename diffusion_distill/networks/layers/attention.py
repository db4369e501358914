"""Self-attention over all positions of an image (Ho et al. 2020)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from diffusion_distill.networks.layers.initial import initial
from diffusion_distill.networks.layers.norm import GroupNorm, NormSettings
from diffusion_distill.networks.layers.residual import residual_stream


def attend(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k^T / sqrt(head_dim)) v, each [batch, positions, heads, head_dim]; the softmax is float32.

    k is divided by the root, and rounded to its own dtype, before the product: as in EDM, and with fewer numbers to
    divide than the logits.
    """
    k = (k.astype(jnp.float32) / k.shape[-1] ** 0.5).astype(k.dtype)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


class Attention(nn.Module):
    """x + projection(attention(norm(x))) over all positions, row by row; the projection is zero at first.

    The sum is multiplied by skip_scale.
    """

    num_heads: int
    skip_scale: float = 1.0
    norm: NormSettings = NormSettings()
    init_rule: str = "lecun"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[batch, height, width, channels] -> the same shape; num_heads divides channels."""
        x = residual_stream(x)
        batch, height, width, channels = x.shape
        heads = (self.num_heads, channels // self.num_heads)
        h = GroupNorm(*self.norm, name="norm")(x).reshape(batch, height * width, channels)
        rules = initial(self.init_rule, channels, 3 * channels, "qkv")
        q, k, v = (nn.DenseGeneral(heads, dtype=self.dtype, name=name, **rules)(h) for name in ("q", "k", "v"))  # type: ignore[arg-type]
        rules = initial(self.init_rule, channels, channels, "last")
        h = nn.DenseGeneral(channels, axis=(-2, -1), dtype=self.dtype, name="proj_out", **rules)(attend(q, k, v))  # type: ignore[arg-type]
        return self.skip_scale * (x + h.reshape(x.shape))
