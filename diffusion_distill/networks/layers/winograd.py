"""3x3 convolutions on a CPU, with two thirds of the multiplications (Winograd 1980; Lavin & Gray, arXiv:1509.09308).

Two neighbouring pixels of a row read four pixels d of each row around them, through three places g of a row of the
kernel. F(2, 3) of Lavin & Gray makes them from four products in place of six,

    two pixels = A^T [(G g) * (B^T d)]

summed over the input channels and the three rows. The four products, of all pairs of pixels, are convolutions of images
half as wide with kernels of 3x1, which XLA computes as fast as its matrix products. The gradient by the image is such a
convolution too. The gradient by the kernel is the same formula turned around, with the gradient g of the pixels,

    three places of a row of the kernel = G^T [(A g) * (B^T d)]

summed over the pairs and the images. XLA's convolutions are slow at that with AVX2, so these are matrix products.

A convolution took 0.70 of the time on images of 16x16 and 32x32, 0.78 on 8x8 (jaxlib 0.10.2, one core with AVX-512); a
gradient by the kernel 0.4 to 0.8 (two cores with AVX2, both at work). Their numbers err by less than 1e-6 of the
largest. On smaller images, and with few channels, there is nothing to gain. A row of an odd number of pixels gets one
more, which is thrown away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial, reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

#: From how many pixels of an image, and channels in and out, it is faster.
FEWEST_PIXELS, FEWEST_CHANNELS = 64, 64
#: How many pixels a gradient by the kernel takes at a time, or one image: a core's cache holds what it makes of them.
PIXELS_AT_ONCE = 512
#: Height and width of the kernel.
SIZE = 3

#: The matrices of F(2, 3), A^T [2, 4] and B^T [4, 4] transposed already.
A_T = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], np.float32)
B_T = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float32)
G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)


def is_faster(x: Array, kernel: Array) -> bool:
    """Whether `convolution` is meant for x [batch, h, w, in] and a kernel on this machine."""
    size, (height, width) = kernel.shape[:2], x.shape[1:3]
    known = isinstance(height, int) and isinstance(width, int)  # in an export with symbolic shapes they may not be
    large = known and height * width >= FEWEST_PIXELS and min(kernel.shape[2:]) >= FEWEST_CHANNELS
    fits = size == (SIZE, SIZE) and x.dtype == jnp.float32
    return jax.default_backend() == "cpu" and large and fits


def plain(x: Array, kernel: Array) -> Array:
    """[batch, h, w, in] * [3, 3, in, out] -> [batch, h, w, out], zeros around the image."""
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def by_four_products(x: Array, kernel: Array) -> Array:
    """`plain`, by the formula of this file."""
    pairs = zip(_of_pixels(x), _of_places(kernel), strict=True)
    products = [_down_the_rows(d, g) for d, g in pairs]
    batch, height, width, _ = x.shape
    pixels = (batch, height, width + width % 2, kernel.shape[-1])
    return jnp.stack(_combined(A_T, products), axis=3).reshape(pixels)[:, :, :width]


def _down_the_rows(x: Array, kernel: Array) -> Array:
    """[batch, h, w, in] * [3, in, out] -> [batch, h, w, out], zeros above and below."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel[:, None], (1, 1), [(1, 1), (0, 0)], dimension_numbers=numbers)


def _of_pixels(x: Array) -> list[Array]:
    """B^T d of every pair of pixels: four of [batch, h, ceil(w / 2), in]."""
    batch, height, width, channels = x.shape
    odd = width % 2
    # Stored before it is read: XLA would compute x again, norm and swish, for each of the slices.
    padded = jnp.pad(lax.optimization_barrier(x), ((0, 0), (0, 0), (1, 1 + odd), (0, 0)))
    end = (batch, height, width + odd - 1, channels)
    d = [lax.slice(padded, (0, 0, k, 0), (*end[:2], end[2] + k, channels), (1, 1, 2, 1)) for k in range(4)]
    return _combined(B_T, d)


def _of_places(kernel: Array) -> list[Array]:
    """G g of every row of the kernel: four of [3, in, out]."""
    return _combined(G, [kernel[:, k] for k in range(SIZE)])


def _combined(matrix: np.ndarray, arrays: Sequence[Array]) -> list[Array]:
    """The products of a small constant matrix with a vector of arrays, without its zeros."""
    return [_sum([(c, a) for c, a in zip(row.tolist(), arrays, strict=True) if c]) for row in matrix]


def _sum(terms: list[tuple[float, Array]]) -> Array:
    return reduce(add, [a if c == 1 else c * a for c, a in terms])


# ---------------------------------------------------------------- the gradient by the kernel


def kernel_gradient(g: Array, x: Array) -> Array:
    """The gradient [3, 3, in, out] by the kernel, from that by the pixels, g [batch, h, w, out].

    A few images at a time. Each device adds up its own, and XLA then adds what the devices have.
    """
    batch, height, width, channels = x.shape
    shares = math.gcd(batch, jax.device_count())
    fitting = range(1, max(1, PIXELS_AT_ONCE // (height * width)) + 1)
    together = max(n for n in fitting if batch // shares % n == 0)

    def of_share(g: Array, x: Array) -> Array:
        # Zeros like x, for shard_map as below.
        begin = lax.full_like(x, 0, shape=(SIZE, SIZE, channels, g.shape[-1]))
        return lax.scan(lambda total, images: (total + _of_images(*images), None), begin, (g, x))[0]

    split = lambda a: a.reshape(shares, batch // shares // together, together, *a.shape[1:])  # noqa: E731
    return jax.vmap(of_share)(split(g), split(x)).sum(0)


def _of_images(g: Array, x: Array) -> Array:
    """`kernel_gradient`, in four matrix products."""
    g = jnp.pad(g, ((0, 0), (0, 0), (0, g.shape[2] % 2), (0, 0)))
    pairs = zip(_of_pixels(x), _combined(A_T.T, [g[:, :, ::2], g[:, :, 1::2]]), strict=True)
    return jnp.stack(_combined(G.T, [_over_the_rows(d, g) for d, g in pairs]), axis=1)


def _over_the_rows(d: Array, g: Array) -> Array:
    """The gradient [3, in, out] by the kernel of `_down_the_rows`, for d [batch, h, w, in] and g [batch, h, w, out]."""
    (height, channels), outputs = (d.shape[1], d.shape[-1]), g.shape[-1]
    # Transposed in memory: XLA's matrix products are twice as fast if they read both sides in order.
    d = lax.optimization_barrier(jnp.pad(d.transpose(3, 0, 1, 2), ((0, 0), (0, 0), (1, 1), (0, 0))))
    rows = jnp.concatenate([d[:, :, k : k + height].reshape(channels, -1) for k in range(SIZE)])
    rows, g = lax.optimization_barrier((rows, g))
    return (rows @ g.reshape(-1, outputs)).reshape(SIZE, channels, outputs)


# ---------------------------------------------------------------- as an operation of JAX


def _for_platform(x: Array, kernel: Array) -> Array:
    # A program that is compiled here for another machine keeps XLA's form.
    return lax.platform_dependent(x, kernel, cpu=by_four_products, default=plain)


@jax.custom_jvp
def convolution(x: Array, kernel: Array) -> Array:
    """`plain`, on a CPU as in this file, with its gradients."""
    return _for_platform(x, kernel)


def _derivative(primals: tuple[Array, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    out = convolution(x, kernel)
    change = jnp.zeros_like(out)
    # In shard_map zeros like both make each vary as the other does, which operations of JAX's own do unasked.
    varying = lax.full_like(x, 0, shape=()) + lax.full_like(kernel, 0, shape=())
    if not isinstance(x_dot, SymbolicZero):
        change += _bilinear.bind(x_dot + varying, kernel + varying)
    if not isinstance(kernel_dot, SymbolicZero):
        change += _bilinear.bind(x + varying, kernel_dot + varying)
    return out, change


convolution.defjvp(_derivative, symbolic_zeros=True)


def _input_gradient(g: Array, x: Any, kernel: Array) -> Array:
    """The gradient [batch, h, w, in] by x: the convolution of g [batch, h, w, out] with the kernel turned around."""
    return _bilinear.bind(g, kernel[::-1, ::-1].swapaxes(2, 3))


def _kernel_gradient(g: Array, x: Array, kernel: Any) -> Array:
    """The gradient [3, 3, in, out] by the kernel; plainly for a batch of a size that is not known yet."""
    return _kernel_gradient_for_platform(g, x) if isinstance(x.shape[0], int) else _plain_kernel_gradient(g, x)


def _plain_kernel_gradient(g: Array, x: Array) -> Array:
    kernel = lax.full_like(x, 0, shape=(SIZE, SIZE, x.shape[-1], g.shape[-1]))
    [gradient] = jax.linear_transpose(partial(plain, x), kernel)(g)
    return gradient


@partial(jax.jit, inline=True)  # compiled once, also for gradients that are taken step by step
def _kernel_gradient_for_platform(g: Array, x: Array) -> Array:
    return lax.platform_dependent(g, x, cpu=kernel_gradient, default=_plain_kernel_gradient)


def _batched(arrays: Sequence[Array], axes: Sequence[int | None]) -> tuple[Array, int]:
    """Images of one kernel are a larger batch, which keeps this file's gradients; kernels each are mapped over."""
    (x, kernel), (axis, kernel_axis) = arrays, axes
    if axis is None or kernel_axis is not None:
        return jax.vmap(_for_platform, axes)(*arrays), 0
    x = jnp.moveaxis(x, axis, 0)
    out = _bilinear.bind(x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), kernel)
    return out.reshape(*x.shape[:-1], out.shape[-1]), 0


# The convolution as an operation of its own, whose transposes are this file's.
_bilinear = Primitive("convolution_of_a_tangent")
_bilinear.def_impl(jax.jit(_for_platform))
_bilinear.def_abstract_eval(lambda x, kernel: x.update(shape=(*x.shape[:-1], kernel.shape[-1])))
mlir.register_lowering(_bilinear, mlir.lower_fun(_for_platform, multiple_results=False))
batching.primitive_batchers[_bilinear] = _batched
ad.defbilinear(_bilinear, _input_gradient, _kernel_gradient)
