"""The gradient of a convolution by its kernel, on a CPU.

XLA computes it as a convolution whose kernel is as large as the image, at half of the speed of its matrix products. As
matrix products it is a row of the kernel at a time: with x padded by zeros above and below, and the gradients g of a
row's places side by side, each shifted against the image by its place,

    dK[i, j] = sum over images and pixels p of  x[p + (i, 0)] g[p - (0, j)]^T

one product gives the three places of row i. The backward pass of a 3x3 convolution of 16x16 or 32x32 images took 0.78
to 0.92 of the time (jaxlib 0.10.2, AVX2, one core). On smaller images, and with few channels, there is nothing to gain.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

#: From how many pixels of an image, and channels in and out, the products are faster.
FEWEST_PIXELS, FEWEST_CHANNELS = 256, 32
#: Height and width of the kernel.
SIZE = 3


def is_faster(x: Array, kernel: Array) -> bool:
    """Whether `convolution` is meant for x [batch, h, w, in] and a kernel on this machine."""
    size, pixels = kernel.shape[:2], x.shape[1] * x.shape[2]
    large = pixels >= FEWEST_PIXELS and min(kernel.shape[2:]) >= FEWEST_CHANNELS
    return jax.default_backend() == "cpu" and size == (SIZE, SIZE) and large and x.dtype == jnp.float32


def plain(x: Array, kernel: Array) -> Array:
    """[batch, h, w, in] * [3, 3, in, out] -> [batch, h, w, out], zeros around the image."""
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@jax.custom_jvp
def convolution(x: Array, kernel: Array) -> Array:
    """`plain`, with the gradient of this file."""
    return plain(x, kernel)


def _derivative(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    out = plain(x, kernel)
    change = jnp.zeros_like(out)
    if not isinstance(x_dot, SymbolicZero):
        change += plain(x_dot, kernel)
    if not isinstance(kernel_dot, SymbolicZero):
        # In shard_map a zero like x makes the tangent vary as x does, which operations of JAX's own do unasked.
        change += _plain.bind(x, kernel_dot + lax.full_like(x, 0, shape=()))
    return out, change


convolution.defjvp(_derivative, symbolic_zeros=True)


def _input_gradient(g: Array, x: Any, kernel: Array) -> Array:
    """The gradient [batch, h, w, in] by x, from the gradient g [batch, h, w, out] of the output."""
    [gradient] = jax.linear_transpose(lambda x: plain(x, kernel), x.aval)(g)
    return gradient


# `plain` as an operation of its own, whose transpose by the kernel is this file's; everything else is that of `plain`.
_plain = Primitive("convolution_of_a_kernel_tangent")
_plain.def_impl(plain)
_plain.def_abstract_eval(lambda x, kernel: x.update(shape=(*x.shape[:-1], kernel.shape[-1])))
mlir.register_lowering(_plain, mlir.lower_fun(plain, multiple_results=False))
batching.primitive_batchers[_plain] = lambda arrays, axes: (jax.vmap(plain, axes)(*arrays), 0)
ad.defbilinear(_plain, _input_gradient, lambda g, x, kernel: kernel_gradient(x, g))


def kernel_gradient(x: Array, g: Array) -> Array:
    """The gradient [3, 3, in, out] by the kernel, from x and the gradient g [batch, h, w, out] of the output."""
    # A program that is compiled here for another machine keeps XLA's form.
    return lax.platform_dependent(x, g, cpu=by_products, default=by_convolution)


def by_products(x: Array, g: Array) -> Array:
    """`kernel_gradient` as three matrix products."""
    height, width, half = *x.shape[1:3], SIZE // 2
    padded = jnp.pad(x, ((0, 0), (half, half), (0, 0), (0, 0)))
    around = jnp.pad(g, ((0, 0), (0, 0), (half, half), (0, 0)))
    beside = jnp.concatenate([around[:, :, SIZE - 1 - j : SIZE - 1 - j + width] for j in range(SIZE)], axis=-1)
    rows = [jnp.einsum("bhwc,bhwd->cd", padded[:, i : i + height], beside) for i in range(SIZE)]
    return jnp.stack([row.reshape(x.shape[-1], SIZE, -1).swapaxes(0, 1) for row in rows])


def by_convolution(x: Array, g: Array) -> Array:
    """`kernel_gradient` as XLA has it."""
    return lax.conv_general_dilated(x, g, (1, 1), 2 * [(1, 1)], dimension_numbers=("CHWN", "IHWO", "HWNC"))
