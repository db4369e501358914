"""InceptionV3 as FID uses it: the network of 2015-12-05, for inference.

    x [n, 299, 299, 3] -> five convolutions and two max pools -> Mixed_5b..5d, 6a..6e, 7a..7c -> mean -> 1008 logits

Every convolution is followed by a batch norm with stored statistics and a ReLU:

    y = max(0, conv(x, weight·f) + beta - mean·f)        f = gamma / sqrt(var + 1e-3)

Szegedy et al. (arXiv:1512.00567); what differs from torchvision's network, and changes the numbers: average pools
count no padding, the pool branch of Mixed_7c is a max pool, there is no auxiliary head, and 1008 logits. Parameters
have the names of pytorch-fid's state dict (Mixed_5b/branch1x1/conv/weight, .../bn/running_mean, fc/bias) and Flax's
order of axes: kernels (kh, kw, in, out), fc/weight (2048, 1008).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn.initializers import lecun_normal, ones, zeros

from diffusion_distill.base.errors import choose
from diffusion_distill.networks.layers import winograd

Array = jax.Array

SIZE = 299  # of the input
LOGITS = 1008
SPATIAL = 7  # channels of Mixed_6d.branch1x1 that sFID looks at
EPSILON = 1e-3
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Outputs(NamedTuple):
    """The network's outputs for n images, float32.

    Attributes:
      pool3: [n, 2048], the features of FID.
      spatial: [n, 2023], those of sFID (Nash et al., arXiv:2103.03841): the first 7 channels of Mixed_6d.branch1x1,
        in the order height, width, channels.
      logits, logits_unbiased: [n, 1008] with and without the bias; the Inception Score is taken without.
      block0, block1, block2: [n, 64], [n, 192], [n, 768], means over pixels after the first max pool, the second, and
        Mixed_6e: pytorch-fid's features of these widths.
    """

    pool3: Array
    spatial: Array
    logits: Array
    logits_unbiased: Array
    block0: Array
    block1: Array
    block2: Array


class Conv(NamedTuple):
    """A convolution of a block: name, channels, kernel (height, width) and stride; stride 2 goes without padding."""

    name: str
    features: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1


#: A step is a convolution, convolutions side by side, or the name of a pool; a branch is steps one after another.
Step = Conv | tuple[Conv, ...] | str
Branch = tuple[Step, ...]


def _chain(name: str, *convs: tuple) -> Branch:
    """Convolutions called name_1, name_2, ..."""
    return tuple(Conv(f"{name}_{i}", *conv) for i, conv in enumerate(convs, 1))


def _fives(pool: int) -> tuple[Branch, ...]:
    """Mixed_5b to 5d, at 35x35."""
    return (
        (Conv("branch1x1", 64),),
        _chain("branch5x5", (48,), (64, (5, 5))),
        _chain("branch3x3dbl", (64,), (96, (3, 3)), (96, (3, 3))),
        ("average", Conv("branch_pool", pool)),
    )


def _sixes(inner: int) -> tuple[Branch, ...]:
    """Mixed_6b to 6e, at 17x17."""
    row, column = (inner, (1, 7)), (inner, (7, 1))
    return (
        (Conv("branch1x1", 192),),
        _chain("branch7x7", (inner,), row, (192, (7, 1))),
        _chain("branch7x7dbl", (inner,), column, row, column, (192, (1, 7))),
        ("average", Conv("branch_pool", 192)),
    )


def _sevens(pool: str) -> tuple[Branch, ...]:
    """Mixed_7b and 7c, at 8x8; the pool is the difference between the two."""

    def fork(name: str) -> tuple[Conv, ...]:
        return Conv(f"{name}a", 384, (1, 3)), Conv(f"{name}b", 384, (3, 1))

    return (
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), fork("branch3x3_2")),
        (*_chain("branch3x3dbl", (448,), (384, (3, 3))), fork("branch3x3dbl_3")),
        (pool, Conv("branch_pool", 192)),
    )


#: The blocks in their order; a block's output has its branches side by side.
BLOCKS: dict[str, tuple[Branch, ...]] = {
    "Mixed_5b": _fives(32),
    "Mixed_5c": _fives(64),
    "Mixed_5d": _fives(64),
    "Mixed_6a": (
        (Conv("branch3x3", 384, (3, 3), 2),),
        _chain("branch3x3dbl", (64,), (96, (3, 3)), (96, (3, 3), 2)),
        ("halve",),
    ),
    "Mixed_6b": _sixes(128),
    "Mixed_6c": _sixes(160),
    "Mixed_6d": _sixes(160),
    "Mixed_6e": _sixes(192),
    "Mixed_7a": (
        _chain("branch3x3", (192,), (320, (3, 3), 2)),
        _chain("branch7x7x3", (192,), (192, (1, 7)), (192, (7, 1)), (192, (3, 3), 2)),
        ("halve",),
    ),
    "Mixed_7b": _sevens("average"),
    "Mixed_7c": _sevens("max"),
}


class InceptionV3(nn.Module):
    """The network; it has no training mode.

    Attributes:
      dtype: 'float32' (convolutions at the highest precision) or 'bfloat16', of everything up to pool3.

    Raises:
      ValueError: another dtype, or images of another shape.
    """

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Array) -> Outputs:
        """Images [n, 299, 299, 3] as one of the rules of `features.RULES` gives them."""
        dtype = choose("dtype of InceptionV3", self.dtype, DTYPES)
        if x.ndim != 4 or x.shape[1:] != (SIZE, SIZE, 3):
            raise ValueError(f"InceptionV3 takes images [n, {SIZE}, {SIZE}, 3], got {x.shape}. Resize them first.")

        def conv(name: str, features: int, size: int, stride: int = 1, padding: str = "VALID") -> ConvNorm:
            return ConvNorm(features, (size, size), stride, padding, name=name)

        x = conv("Conv2d_1a_3x3", 32, 3, 2)(x.astype(dtype))
        x = conv("Conv2d_2a_3x3", 32, 3)(x)
        block0 = x = max_pool(conv("Conv2d_2b_3x3", 64, 3, padding="SAME")(x))
        x = conv("Conv2d_3b_1x1", 80, 1)(x)
        block1 = x = max_pool(conv("Conv2d_4a_3x3", 192, 3)(x))
        maps = {}
        for name, branches in BLOCKS.items():
            maps[name] = x = Mixed(branches, name=name)(x)
        pool3 = _pixel_mean(x)
        unbiased, bias = Linear(LOGITS, name="fc")(pool3)
        spatial = maps["Mixed_6d"][..., :SPATIAL]  # branch1x1 comes first
        return Outputs(
            pool3,
            spatial.reshape(len(spatial), -1).astype(jnp.float32),
            unbiased + bias[None],
            unbiased,
            *map(_pixel_mean, (block0, block1, maps["Mixed_6e"])),
        )


class Mixed(nn.Module):
    """Branches side by side."""

    branches: tuple[Branch, ...]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[n, h, w, in] -> [n, h', w', out]."""
        return jnp.concatenate([self.branch(x, steps) for steps in self.branches], axis=-1)

    def branch(self, x: Array, steps: Branch) -> Array:
        """One branch's output."""
        for step in steps:
            if isinstance(step, str):
                x = POOLS[step](x)
            else:
                convs = (step,) if isinstance(step, Conv) else step
                x = jnp.concatenate([_of(conv)(x) for conv in convs], axis=-1)
        return x


def _of(conv: Conv) -> ConvNorm:
    padding = "SAME" if conv.stride == 1 else "VALID"
    return ConvNorm(conv.features, conv.size, conv.stride, padding, name=conv.name)


class ConvNorm(nn.Module):
    """Convolution, batch norm, ReLU, in the dtype of x."""

    features: int
    size: tuple[int, int]
    stride: int = 1
    padding: str = "VALID"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[n, h, w, in] -> [n, h', w', features]."""
        weight = Kernel((*self.size, x.shape[-1], self.features), name="conv")()
        factor, shift = Norm(self.features, name="bn")()
        cpu, others = (partial(form, self.stride, self.padding) for form in (_on_cpu, _folded))
        return lax.platform_dependent(x, weight, factor, shift, cpu=cpu, default=others)


def _folded(stride: int, padding: str, x: Array, kernel: Array, factor: Array, shift: Array) -> Array:
    """max(0, conv(x, kernel * factor) + shift), which a GPU takes in one go."""
    kernel = (kernel * factor[None, None, None]).astype(x.dtype)
    return nn.relu(_conv(stride, padding, x, kernel) + shift[None, None, None].astype(x.dtype))


def _on_cpu(stride: int, padding: str, x: Array, kernel: Array, factor: Array, shift: Array) -> Array:
    """The same in the order that a CPU is faster with (jaxlib 0.10.2, AVX2, two cores).

    To multiply all kernels took a tenth of the time of eight images; their results are multiplied in passing. And
    without padding a larger kernel at stride 1 has a quarter of its speed with padding: of four images the layer
    Conv2d_4a_3x3 took 202 ms, and 45 ms if the border is computed too and thrown away.
    """
    if padding == "VALID" and stride == 1:
        (rows, columns), (height, width) = kernel.shape[:2], x.shape[1:3]
        x = _same(x, kernel.astype(x.dtype))
        x = x[:, rows // 2 : height - rows // 2, columns // 2 : width - columns // 2]
    elif stride == 1:
        x = _same(x, kernel.astype(x.dtype))
    else:
        x = _conv(stride, padding, x, kernel.astype(x.dtype))
    return nn.relu(x * factor[None, None, None].astype(x.dtype) + shift[None, None, None].astype(x.dtype))


def _same(x: Array, kernel: Array) -> Array:
    """`_conv` on a CPU at stride 1 with padding."""
    return winograd.by_four_products(x, kernel) if winograd.is_faster(x, kernel) else _conv(1, "SAME", x, kernel)


def _conv(stride: int, padding: str, x: Array, kernel: Array) -> Array:
    """[n, h, w, in] * [kh, kw, in, out] -> [n, h', w', out]."""
    form, precision = ("NHWC", "HWIO", "NHWC"), lax.Precision.HIGHEST
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=form, precision=precision)


class Kernel(nn.Module):
    """The parameter `weight` of a shape."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> Array:
        """float32 of the shape."""
        return self.param("weight", lecun_normal(), self.shape, jnp.float32)


class Norm(nn.Module):
    """A batch norm with stored statistics as (factor, shift), [features] each."""

    features: int

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        """y = x·factor + shift."""
        rules = {"weight": ones, "bias": zeros, "running_mean": zeros, "running_var": ones}
        gamma, beta, mean, var = (self.param(k, init, (self.features,), jnp.float32) for k, init in rules.items())
        factor = gamma / jnp.sqrt(var + EPSILON)
        return factor, beta - mean * factor


class Linear(nn.Module):
    """Logits without their bias, and the bias."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """[n, in] -> [n, features], [features]."""
        weight = self.param("weight", lecun_normal(), (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", zeros, (self.features,), jnp.float32)
        return jnp.matmul(x, weight, precision=lax.Precision.HIGHEST), bias


# ---------------------------------------------------------------- pools


def max_pool(x: Array, stride: int = 2, padding: str = "VALID") -> Array:
    """The largest of 3x3 pixels: [n, h, w, c] -> [n, (h - 3) // 2 + 1, (w - 3) // 2 + 1, c] at stride 2, VALID."""
    return _pool(x, -jnp.inf, lax.max, stride, padding)


def average_pool(x: Array) -> Array:
    """The mean of those of 3x3 pixels that are inside the image: [n, h, w, c] of the same shape."""
    total = _pool(x.astype(jnp.float32), 0.0, lax.add, 1, "SAME")
    rows, columns = (np.convolve(np.ones(n), np.ones(3), "same") for n in x.shape[1:3])
    share = (1 / np.outer(rows, columns)).astype(np.float32)
    return (total * share[None, :, :, None]).astype(x.dtype)


def _pool(x: Array, start: float, operation: Callable[[Array, Array], Array], stride: int, padding: str) -> Array:
    """3x3 pixels joined: of rows, then of columns, which takes a third of the time of both at once on a CPU."""
    x = lax.reduce_window(x, start, operation, (1, 3, 1, 1), (1, stride, 1, 1), padding)
    return lax.reduce_window(x, start, operation, (1, 1, 3, 1), (1, 1, stride, 1), padding)


POOLS = {"average": average_pool, "max": lambda x: max_pool(x, 1, "SAME"), "halve": max_pool}


def _pixel_mean(x: Array) -> Array:
    return jnp.mean(x.astype(jnp.float32), axis=(1, 2))
