"""The U-Net of progressive distillation (Salimans & Ho 2022, appendix; the skeleton is Ho et al. 2020).

    emb = dense1(swish(dense0(sinusoid(time)))) [+ class_emb(one_hot(label))]
    down   per level: num_res_blocks x {residual, attention?}, every output kept; then downsample, kept too
    middle residual, attention, residual
    up     per level: (num_res_blocks + 1) x {join the kept one, residual, attention?}; then upsample
    out    norm, swish, conv

Level i is ch * ch_mult[i] channels wide, at 2^-i of the image's size. Parameter names and shapes are those of
the published checkpoints: `down_0.block_1/conv1/kernel`, `mid.attn_1/q/kernel`, `up_2.upsample/...`, ... (the
dots belong to the names). What other published networks do differently has one place each: `_embed`
(features, label table), `_heads`, `_resample`, and `GroupNorm`, `ResidualBlock`, `Attention` in `layers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import zeros

from diffusion_distill import errors
from diffusion_distill.networks.layers import (
    Attention,
    Conv,
    GroupNorm,
    ResidualBlock,
    sinusoidal_features,
    upsample,
)

Array = jax.Array
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
NORM_GROUPS = 32


class UNet(nn.Module):
    """U-Net on images, a number per image (the time) and, if num_classes > 1, a label per image.

    Args:
        ch: width of the first level's unit; ch * ch_mult[i] must be a multiple of 32 on every level.
        emb_ch: width of the time embedding.
        out_ch: channels of the output.
        ch_mult: width of each level in units of ch, finest level first.
        num_res_blocks: residual blocks per level on the way down (one more on the way up).
        attn_resolutions: heights at which attention follows each block; the middle always has one.
        num_heads, head_dim: exactly one of the two: the number of heads, or the channels of each.
        dropout: rate in [0, 1) inside the residual blocks, applied only if `train`.
        resblock_resample: resample in a residual block (2x2 mean, nearest) instead of a 3x3 convolution.
        num_classes: 1 means unconditional: no `class_emb`, labels are ignored.
        dtype: "float32" or "bfloat16", what convolutions and products are computed in. Parameters, embedding,
            norm statistics, softmax, the last convolution and the output are float32.

    Raises:
        ValueError: at construction, for settings that contradict each other.
    """

    ch: int
    emb_ch: int
    out_ch: int
    ch_mult: Sequence[int]
    num_res_blocks: int
    attn_resolutions: Sequence[int]
    num_heads: int | None = None
    head_dim: int | None = None
    dropout: float = 0.0
    resblock_resample: bool = False
    num_classes: int = 1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        # Tuples, so that a network built from a list (a config, JSON) is hashable and compares equal.
        object.__setattr__(self, "ch_mult", tuple(self.ch_mult))
        object.__setattr__(self, "attn_resolutions", tuple(self.attn_resolutions))
        super().__post_init__()
        _check_settings(self)

    @nn.compact
    def __call__(self, x: Array, time: Array, labels: Array | None = None, train: bool = False) -> Array:
        """Evaluate the network.

        Args:
            x: [batch, height, width, channels]; height and width divisible by 2^(levels - 1).
            time: [batch] float32, the number whose sinusoid is embedded (BTD: 1000 * f(logsnr)).
            labels: [batch] int32 in [0, num_classes), required if num_classes > 1. A label outside the range
                is no error: its one-hot vector is zero.
            train: apply dropout; needs the "dropout" random stream if the rate is positive.

        Returns:
            [batch, height, width, out_ch] float32.

        Raises:
            ValueError, TypeError: while tracing, for shapes or dtypes other than these.
        """
        _check_inputs(self, x, time, labels)
        emb = self._embed(time, labels)
        h = Conv(self.ch, dtype=self.dtype, name="conv_in")(x)
        kept = [h]

        for level, mult in enumerate(self.ch_mult):
            for block in range(self.num_res_blocks):
                h = self._residual(f"down_{level}.block_{block}", h, emb, train, features=self.ch * mult)
                h = self._attention(f"down_{level}.attn_{block}", h)
                kept.append(h)
            if level < len(self.ch_mult) - 1:
                h = self._resample(f"down_{level}.downsample", "down", h, emb, train)
                kept.append(h)

        h = self._residual("mid.block_1", h, emb, train, features=h.shape[-1])
        h = self._attention("mid.attn_1", h, always=True)
        h = self._residual("mid.block_2", h, emb, train, features=h.shape[-1])

        for level, mult in reversed(list(enumerate(self.ch_mult))):
            for block in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, kept.pop()], axis=-1)
                h = self._residual(f"up_{level}.block_{block}", h, emb, train, features=self.ch * mult)
                h = self._attention(f"up_{level}.attn_{block}", h)
            if level > 0:
                h = self._resample(f"up_{level}.upsample", "up", h, emb, train)

        h = nn.swish(GroupNorm(name="norm_out")(h))
        return Conv(self.out_ch, kernel_init=zeros, name="conv_out")(h)

    # Below, what is between the blocks; each returns an image, or the embedding.

    def _embed(self, time: Array, labels: Array | None) -> Array:
        """[batch, emb_ch] float32; every residual block applies swish to it before its own projection."""
        features = sinusoidal_features(time, self.ch)
        emb = nn.Dense(self.emb_ch, name="dense1")(nn.swish(nn.Dense(self.emb_ch, name="dense0")(features)))
        if self.num_classes > 1:
            emb += nn.Dense(self.emb_ch, name="class_emb")(jax.nn.one_hot(labels, self.num_classes, dtype=jnp.float32))
        return emb

    def _residual(self, name: str, h: Array, emb: Array, train: bool, features: int) -> Array:
        return ResidualBlock(features, dropout=self.dropout, dtype=self.dtype, name=name)(h, emb, train)

    def _attention(self, name: str, h: Array, always: bool = False) -> Array:
        if not (always or h.shape[1] in self.attn_resolutions):
            return h
        return Attention(self._heads(h.shape[-1]), dtype=self.dtype, name=name)(h)

    def _heads(self, channels: int) -> int:
        """Number of heads of an attention `channels` wide."""
        given = {"num_heads": self.num_heads, "head_dim": self.head_dim}
        name, size = next((name, size) for name, size in given.items() if size is not None)
        if size < 1 or channels % size:
            raise ValueError(f"{name}={size} must divide the {channels} channels of each level with attention.")
        return size if name == "num_heads" else channels // size

    def _resample(self, name: str, direction: Literal["down", "up"], h: Array, emb: Array, train: bool) -> Array:
        features = h.shape[-1]
        if self.resblock_resample:
            block = ResidualBlock(features, dropout=self.dropout, resample=direction, dtype=self.dtype, name=name)
            return block(h, emb, train)
        if direction == "down":
            return Conv(features, stride=2, dtype=self.dtype, name=name)(h)
        return Conv(features, dtype=self.dtype, name=name)(upsample(h))


def _check_settings(net: UNet) -> None:
    """Raise ValueError where the settings of `net` contradict each other."""
    errors.choose("dtype", net.dtype, DTYPES)
    for name in ("ch", "emb_ch", "out_ch", "num_res_blocks", "num_classes"):
        errors.positive_int(name, getattr(net, name))
    if not net.ch_mult:
        raise ValueError("ch_mult is empty; give one factor per level, e.g. (1, 2).")
    widths = [net.ch] + [net.ch * mult for mult in net.ch_mult]
    if any(width < 1 or width % NORM_GROUPS for width in widths):
        raise ValueError(
            f"Widths {widths} (ch={net.ch}, then ch * ch_mult, ch_mult={net.ch_mult}) must all be multiples "
            f"of {NORM_GROUPS}, the number of groups of the norm; choose ch accordingly."
        )
    if (net.num_heads is None) == (net.head_dim is None):
        raise ValueError(f"num_heads={net.num_heads} and head_dim={net.head_dim}; give exactly one of the two.")
    net._heads(widths[-1])  # the middle always has attention; other levels are known once an image is
    if not 0 <= net.dropout < 1:
        raise ValueError(f"dropout is {net.dropout}; it must be in [0, 1).")


def _check_inputs(net: UNet, x: Array, time: Array, labels: Array | None) -> None:
    """Raise ValueError or TypeError where the arguments of a call do not fit `net` or each other."""
    if x.ndim != 4:
        raise ValueError(f"x has shape {x.shape}; it must be [batch, height, width, channels].")
    batch, height, width, _ = x.shape
    factor = 2 ** (len(net.ch_mult) - 1)
    if height % factor or width % factor:
        raise ValueError(
            f"Images of {height}x{width} cannot be halved {len(net.ch_mult) - 1} times: height and width "
            f"must be multiples of {factor}. Use fewer levels (ch_mult) or other images."
        )
    if time.shape != (batch,):
        raise ValueError(f"time has shape {time.shape}; it must be [batch] = ({batch},), one number per image.")
    if net.num_classes == 1:
        return
    if labels is None:
        raise ValueError(f"labels are missing; a network with num_classes={net.num_classes} needs int32 [batch].")
    if labels.dtype != jnp.int32:
        raise TypeError(f"labels have dtype {labels.dtype}; they must be int32. Use labels.astype('int32').")
    if labels.shape != (batch,):
        raise ValueError(f"labels have shape {labels.shape}; they must be [batch] = ({batch},).")
