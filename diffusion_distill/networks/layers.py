"""Layers shared by the networks: time features, norm, convolution, attention, residual block, resampling.

Images are [batch, height, width, channels]; an embedding of the time is [batch, emb_ch] float32.

    GroupNorm      y = (x - mean_g) / sqrt(var_g + eps) * scale + shift     (Wu & He 2018, eq. 7)
    FiLM           h = GroupNorm(x) * (1 + scale(emb)) + shift(emb)         (Dhariwal & Nichol 2021, AdaGN)
    attention      softmax(q k^T / sqrt(head_dim)) v over all positions     (Ho et al. 2020)

Parameters are float32, with the names, shapes and initial values of the progressive distillation program
(Salimans & Ho 2022). `dtype` is what convolutions and matrix products are computed in; norm statistics and
softmax stay float32.
"""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn.initializers import Initializer, lecun_normal, ones, zeros

Array = jax.Array
Resample = Literal["none", "down", "up"]


# ---------------------------------------------------------------- functions


def sinusoidal_features(time: Array, width: int, *, max_period: float = 10_000.0, shift: float = 1.0) -> Array:
    """Sines, then cosines, of `time` at width // 2 frequencies falling from 1 to 1 / max_period.

    Frequency k of half = width // 2 is max_period^(-k / (half - shift)); an odd width ends with a zero.
    Salimans & Ho (2022) after Ho et al. (2020).

    Args:
        time: [batch], any real numbers (of size 1000 in the published networks).
        width: number of features, at least 4.
        max_period: ratio of the highest to the lowest frequency.
        shift: 1 spaces the frequencies so that both ends are reached, 0 leaves out the lowest.

    Returns:
        [batch, width] float32, whatever the compute dtype of the network.
    """
    half = width // 2
    # Rounded once from float64: angles reach 1000 rad, where a float32 exponential would cost 3e-4 rad.
    frequencies = (max_period ** (-np.arange(half) / (half - shift))).astype(np.float32)
    angles = time.astype(jnp.float32)[:, None] * frequencies[None]
    features = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return jnp.pad(features, ((0, 0), (0, width % 2)))


def group_norm(x: Array, scale: Array, shift: Array, *, num_groups: int = 32, epsilon: float = 1e-6) -> Array:
    """Normalise x over height, width and the channels of a group, then scale and shift each channel.

    Written as one multiply-add per element, (x - mean) * factor + shift, where factor, [batch, channels], is
    rsqrt(var + epsilon) * scale: on a CPU a small U-Net's forward pass takes a fifth less time than when
    normalising first. The variance is taken around the mean (two passes): E[x^2] - E[x]^2 loses its digits
    when the mean dominates.

    Args:
        x: [batch, height, width, channels], any float dtype; the arithmetic is float32.
        scale, shift: [channels], or [batch, channels] where an embedding modulates them.
        num_groups: divides channels.
        epsilon: added to the variance.

    Returns:
        [batch, height, width, channels] float32.
    """
    x = x.astype(jnp.float32)
    # The derivative of a variance by its own centre is zero: stopping it there spares a reduction backwards.
    mean = _group_mean(x, num_groups)
    variance = _group_mean(jnp.square(x - _over_pixels(lax.stop_gradient(mean))), num_groups)
    scale, shift = (jnp.broadcast_to(a, mean.shape) for a in (scale, shift))
    factor = lax.rsqrt(variance + epsilon) * scale
    return (x - _over_pixels(mean)) * _over_pixels(factor) + _over_pixels(shift)


def _group_mean(x: Array, num_groups: int) -> Array:
    """Mean over pixels and the channels of a group, repeated for each channel: [batch, channels]."""
    batch, height, width, channels = x.shape
    per_channel = jnp.sum(x.reshape(batch, height * width, channels), axis=1)  # pixels first: channels are contiguous
    per_group = jnp.mean(per_channel.reshape(batch, num_groups, -1), axis=-1) / (height * width)
    return jnp.repeat(per_group, channels // num_groups, axis=-1)


def _over_pixels(per_channel: Array) -> Array:
    return per_channel[:, None, None, :]


def convolution(x: Array, kernel: Array, stride: int = 1) -> Array:
    """[batch, h, w, in] * [kh, kw, in, out] -> [batch, ceil(h / stride), ceil(w / stride), out].

    Padding is with zeros, XLA's SAME: at stride 2 and even sizes none before, one after, as in BTD and DDPM.
    """
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def downsample(x: Array) -> Array:
    """2x2 mean: [batch, h, w, c] -> [batch, h / 2, w / 2, c]; h and w are even."""
    batch, height, width, channels = x.shape
    return jnp.mean(x.reshape(batch, height // 2, 2, width // 2, 2, channels), axis=(2, 4))


def upsample(x: Array) -> Array:
    """Every pixel becomes 2x2 equal ones: [batch, h, w, c] -> [batch, 2 h, 2 w, c]."""
    batch, height, width, channels = x.shape
    blocks = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return blocks.reshape(batch, 2 * height, 2 * width, channels)


def residual_stream(x: Array) -> Array:
    """The identity; x, and backwards the gradient arriving at x, are stored before anything uses them.

    A block's input feeds its shortcut and its branch, so its gradient is a sum that runs through all later
    blocks. XLA on CPU repeats that sum, from the end of the network on, in every operation that reads it: a
    CIFAR network's gradient took 1.8 times as long.
    """
    return lax.optimization_barrier(x)


RESAMPLE = {"none": lambda x: x, "down": downsample, "up": upsample}


def attend(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k^T / sqrt(head_dim)) v, each [batch, positions, heads, head_dim]; the softmax is float32."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits / q.shape[-1] ** 0.5, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


# ---------------------------------------------------------------- modules


class Conv(nn.Module):
    """Convolution with bias; parameters kernel [size, size, in, features], bias [features]."""

    features: int
    size: int = 3
    stride: int = 1
    kernel_init: Initializer = lecun_normal()
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", zeros, (self.features,), jnp.float32)
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        return convolution(x, kernel, self.stride) + bias[None, None, None]


class GroupNorm(nn.Module):
    """Group norm with learned scale and bias [channels], optionally modulated by an embedding (FiLM).

    Called with `film` = (scale, shift), each [batch, channels], it returns norm(x) * (1 + scale) + shift,
    folded into the same multiply-add per element.
    """

    num_groups: int = 32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Array, film: tuple[Array, Array] | None = None) -> Array:
        scale = self.param("scale", ones, (x.shape[-1],), jnp.float32)
        shift = self.param("bias", zeros, (x.shape[-1],), jnp.float32)
        if film is not None:
            film_scale, film_shift = (f.astype(jnp.float32) for f in film)
            scale, shift = scale[None] * (1 + film_scale), shift[None] * (1 + film_scale) + film_shift
        return group_norm(x, scale, shift, num_groups=self.num_groups, epsilon=self.epsilon)


class ResidualBlock(nn.Module):
    """norm, swish, [resample], conv; FiLM norm, swish, dropout, conv (zero at first); plus the shortcut.

    Both branches are resampled, without a convolution of their own. The shortcut is a matrix product where
    the number of channels changes, the identity elsewhere. Salimans & Ho (2022), after BigGAN's block.
    """

    features: int
    dropout: float = 0.0
    resample: Resample = "none"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array, emb: Array, train: bool) -> Array:
        """x [batch, height, width, in], emb [batch, emb_ch] -> [batch, height', width', features]."""
        x = residual_stream(x)
        resample = RESAMPLE[self.resample]
        h = nn.swish(GroupNorm(name="norm1")(x))
        h = Conv(self.features, dtype=self.dtype, name="conv1")(resample(h))
        film = nn.Dense(2 * self.features, dtype=self.dtype, name="temb_proj")(nn.swish(emb))
        scale, shift = jnp.split(film, 2, axis=-1)
        h = nn.swish(GroupNorm(name="norm2")(h, film=(scale, shift)))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = Conv(self.features, kernel_init=zeros, dtype=self.dtype, name="conv2")(h)
        shortcut = resample(x)
        if x.shape[-1] != self.features:
            shortcut = nn.Dense(self.features, dtype=self.dtype, name="nin_shortcut")(shortcut)
        return shortcut + h


class Attention(nn.Module):
    """x + projection(attention(norm(x))) over all positions, row by row; the projection is zero at first."""

    num_heads: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[batch, height, width, channels] -> the same shape; num_heads divides channels."""
        x = residual_stream(x)
        batch, height, width, channels = x.shape
        heads = (self.num_heads, channels // self.num_heads)
        h = GroupNorm(name="norm")(x).reshape(batch, height * width, channels)
        q, k, v = (nn.DenseGeneral(heads, dtype=self.dtype, name=name)(h) for name in ("q", "k", "v"))
        h = nn.DenseGeneral(channels, axis=(-2, -1), kernel_init=zeros, dtype=self.dtype, name="proj_out")(
            attend(q, k, v)
        )
        return x + h.reshape(x.shape)
