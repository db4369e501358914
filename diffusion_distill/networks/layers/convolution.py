"""Convolution of images [batch, height, width, channels] with a bias."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax

from diffusion_distill.networks.layers import winograd
from diffusion_distill.networks.layers.initial import Role, initial
from diffusion_distill.networks.layers.resampling import filter_down, filter_padding, filter_parameter, filter_up


def convolution(x: Array, kernel: Array, stride: int = 1, padding: int | tuple[int, int] | None = None) -> Array:
    """[batch, h, w, in] * [kh, kw, in, out] -> [batch, ceil(h / stride), ceil(w / stride), out].

    Padding is with zeros, XLA's SAME: at stride 2 and even sizes none before, one after, as in BTD and DDPM;
    or `padding` of them: on each side, or (before, after).
    """
    if stride == 1 and padding is None and winograd.is_faster(x, kernel):
        return winograd.convolution(x, kernel)
    pads = "SAME" if padding is None else [padding if isinstance(padding, tuple) else (padding, padding)] * 2
    return lax.conv_general_dilated(x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"))


class Conv(nn.Module):
    """Convolution with bias; parameters kernel [size, size, in, features], bias [features]; see `convolution`."""

    features: int
    size: int = 3
    stride: int = 1
    padding: int | tuple[int, int] | None = None
    init_rule: str = "lecun"
    role: Role = "layer"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x, kernel, bias = _conv_parameters(self, x)
        return convolution(x, kernel, self.stride, self.padding) + bias


def _conv_parameters(conv: Conv | FusedConv, x: Array) -> tuple[Array, Array, Array]:
    """x, kernel and bias [1, 1, 1, features] of a convolution, in its dtype."""
    shape = (conv.size, conv.size, x.shape[-1], conv.features)
    places = conv.size**2
    rules = initial(conv.init_rule, places * x.shape[-1], places * conv.features, conv.role)
    kernel = conv.param("kernel", rules["kernel_init"], shape, jnp.float32)
    bias = conv.param("bias", rules["bias_init"], (conv.features,), jnp.float32)
    x, kernel, bias = (a.astype(conv.dtype) for a in (x, kernel, bias))
    return x, kernel, bias[None, None, None]


class FusedConv(nn.Module):
    """A convolution on the finer of two images: before halving, or after doubling, with a filter.

    Inside the image the result is that of the other order; at its border the zeros lie elsewhere: padding of
    the filter and of the kernel are given at once, where the image is finer.
    """

    features: int
    direction: Literal["down", "up"]
    taps: Sequence[float]
    size: int = 3
    init_rule: str = "lecun"
    role: Role = "layer"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x, kernel, bias = _conv_parameters(self, x)
        filter, half = filter_parameter(self, self.taps), self.size // 2
        pad = filter_padding(filter.shape[0])
        if self.direction == "down":
            return filter_down(convolution(x, kernel, padding=half + pad), filter, padding=0) + bias
        x = filter_up(x, filter, padding=max(pad - half, 0))
        return convolution(x, kernel, padding=max(half - pad, 0)) + bias
