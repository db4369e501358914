"""ADM's classifier of noisy images (Dhariwal & Nichol, arXiv:2105.05233, section 4), for classifier guidance.

The way down and the middle of a U-Net, then norm, swish and one vector of all positions:

    adaptive    their mean, and a matrix product
    attention   the answer of one attention to the mean of the positions, put before them (as in CLIP)
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from diffusion_distill.base import errors
from diffusion_distill.networks.inputs import check_images
from diffusion_distill.networks.layers import GroupNorm, attend, initial
from diffusion_distill.networks.unet import UNet

POOLS = ("adaptive", "attention")


class NoisyClassifier(UNet):
    """Logits of noisy images, a number per image (the time) given.

    Args:
      out_ch: the number of classes.
      pool: see above; 'attention' holds for one size of images.
      pool_head_dim: channels of a head of that attention.

    The other settings are those of `UNet`; it takes no labels.
    """

    pool: str = "attention"
    pool_head_dim: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        errors.choose("pool", self.pool, dict.fromkeys(POOLS))
        width = self.widths[-1]
        if self.pool == "attention" and (self.pool_head_dim < 1 or width % self.pool_head_dim):
            raise ValueError(f"pool_head_dim={self.pool_head_dim} must divide the {width} channels of the last level.")

    @nn.compact
    def __call__(self, x: Array, time: Array, train: bool = False) -> Array:  # type: ignore[override]
        """[batch, height, width, channels] and [batch] -> [batch, out_ch] float32."""
        check_images(x, time, len(self.ch_mult))
        emb = self._embed(time, None, None)
        h, _ = self._down(x, emb, train)
        h = GroupNorm(*self._norm, name="norm_out").swish(self._middle(h, emb, train))
        positions = h.reshape(len(h), -1, h.shape[-1])
        if self.pool == "adaptive":
            return self._dense("pool_conv", positions.mean(axis=1), self.out_ch, "last")
        heads = h.shape[-1] // self.pool_head_dim
        return AttentionPool(heads, self.out_ch, self.init_rule, name="pool_attention")(positions)


class AttentionPool(nn.Module):
    """[batch, positions, channels] -> [batch, features]: the attention of the mean of the positions to all of them."""

    num_heads: int
    features: int
    init_rule: str = "lecun"

    @nn.compact
    def __call__(self, positions: Array) -> Array:
        _, count, channels = positions.shape
        tokens = jnp.concatenate([positions.mean(axis=1, keepdims=True), positions], axis=1)
        where = self.param(
            "positional_embedding", nn.initializers.normal(channels**-0.5), (count + 1, channels), jnp.float32
        )
        tokens = tokens + where[None]
        heads = (self.num_heads, channels // self.num_heads)
        rules: Any = initial(self.init_rule, channels, 3 * channels, "qkv")
        q, k, v = (nn.DenseGeneral(heads, name=name, **rules)(tokens) for name in ("q", "k", "v"))
        rules = initial(self.init_rule, channels, self.features, "last")
        return nn.DenseGeneral(self.features, axis=(-2, -1), name="proj_out", **rules)(attend(q[:, :1], k, v)[:, 0])
