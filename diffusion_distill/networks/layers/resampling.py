"""Halving and doubling images, with 2x2 means and equal pixels or with a filter (Song et al. 2021, after Zhang 2019).

    up     out[2 i + j - p] += 2 f[j] x[i]       per axis, with taps f that sum to 1
    down   out[i] = sum_j f[j] x[2 i + j - p]

A filter is a parameter without a gradient, because a published checkpoint may set it: it is read, averaged, stored and
exported like the other parameters, and training without weight decay leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

Resample = Literal["none", "down", "up"]


def downsample(x: Array) -> Array:
    """2x2 mean: [batch, h, w, c] -> [batch, h / 2, w / 2, c]; h and w are even."""
    batch, height, width, channels = x.shape
    return jnp.mean(x.reshape(batch, height // 2, 2, width // 2, 2, channels), axis=(2, 4))


def upsample(x: Array) -> Array:
    """Every pixel becomes 2x2 equal ones: [batch, h, w, c] -> [batch, 2 h, 2 w, c]."""
    batch, height, width, channels = x.shape
    blocks = jnp.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return blocks.reshape(batch, 2 * height, 2 * width, channels)


def filter_of(taps: Sequence[float]) -> np.ndarray:
    """[k, k] float32: the outer product of k taps with themselves, with sum 1."""
    line = np.asarray(taps, np.float64)
    return (np.outer(line, line) / line.sum() ** 2).astype(np.float32)


def filter_padding(size: int) -> int:
    """The p of a filter of `size` taps: up, an even filter doubles the image, an odd one gives 2 h - 1."""
    return (size - 1) // 2


def filter_down(x: Array, filter: Array, padding: int | None = None) -> Array:
    """out[i] = sum_j f[j] x[2 i + j - p] on both axes; zeros outside.

    Sums of shifted images: XLA makes one loop of them, where its grouped convolution is slow on a CPU.

    Args:
      x: [batch, h, w, c].
      filter: [k, k], any values.
      padding: p; `filter_padding(k)` if None.

    Returns:
      [batch, h', w', c] with h' = (h + 2 p - k) // 2 + 1.
    """
    size, filter = filter.shape[0], filter.astype(x.dtype)
    pad = filter_padding(size) if padding is None else padding
    height, width = ((n + 2 * pad - size) // 2 + 1 for n in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    taps = [(j, k) for j in range(size) for k in range(size)]
    return _sum([filter[j, k] * x[:, j : j + 2 * height - 1 : 2, k : k + 2 * width - 1 : 2] for j, k in taps])


def filter_up(x: Array, filter: Array, padding: int | None = None) -> Array:
    """out[2 i + j - p] += 2 f[j] x[i] on both axes: pixels spread over twice the size, none renormalised.

    Each of the four parities of an output's place is a sum of shifted images of its own.

    Args:
      x: [batch, h, w, c].
      filter: [k, k], any values.
      padding: p; `filter_padding(k)` if None.

    Returns:
      [batch, h', w', c] with h' = 2 h - 2 + k - 2 p.
    """
    size, filter = filter.shape[0], 4 * filter.astype(x.dtype)
    pad = filter_padding(size) if padding is None else padding
    batch, *sizes, channels = x.shape
    height, width = (2 * n - 2 + size - 2 * pad for n in sizes)
    rows, columns = (height + 1) // 2, (width + 1) // 2
    # (tap j, shift s) by parity: output 2 m + parity receives f[j] x[m + s].
    shifts = [[(j, (r + pad - j) // 2) for j in range(size) if (r + pad - j) % 2 == 0] for r in (0, 1)]
    every = [shift for phase in shifts for _, shift in phase]
    low, high = max(0, -min(every)), max(0, max(every) + max(rows - sizes[0], columns - sizes[1]))
    x = jnp.pad(x, ((0, 0), (low, high), (low, high), (0, 0)))

    def phase(row: int, column: int) -> Array:
        starts = [(j, k, low + y, low + z) for j, y in shifts[row] for k, z in shifts[column]]
        terms = [filter[j, k] * x[:, y : y + rows, z : z + columns] for j, k, y, z in starts]
        return _sum(terms) if terms else jnp.zeros((batch, rows, columns, channels), x.dtype)

    grid = jnp.stack([jnp.stack([phase(row, 0), phase(row, 1)], axis=3) for row in (0, 1)], axis=2)
    return grid.reshape(batch, 2 * rows, 2 * columns, channels)[:, :height, :width]


def _sum(terms: Sequence[Array]) -> Array:
    total, *others = terms
    for term in others:
        total = total + term
    return total


RESAMPLE = {"none": lambda x: x, "down": downsample, "up": upsample}


class Resampling(nn.Module):
    """Halves or doubles an image with a filter, [k, k], that starts as the outer product of its taps."""

    direction: Literal["down", "up"]
    taps: Sequence[float]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return {"down": filter_down, "up": filter_up}[self.direction](x, filter_parameter(self, self.taps))


def filter_parameter(module: nn.Module, taps: Sequence[float]) -> Array:
    """The filter [k, k] of a module, which starts as the outer product of its taps and has no gradient."""
    return lax.stop_gradient(module.param("filter", lambda key: jnp.asarray(filter_of(taps))))
