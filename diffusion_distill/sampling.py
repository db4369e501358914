"""The engine that runs every solver table.

Randomness is addressed per sample: sample i takes its noise from fold_in(key, i), the start from stream
0 of that key and row k from stream k + 1. A sample is therefore the same, bit for bit in its noise, in a
batch of 1 or 64, on 1 or 8 devices.

Registers are combined by element-wise multiply-adds rather than a dot product, whose operands
accelerators round by default. On accelerators the rows run in a lax.scan; on CPU in a host loop over one
compiled row, because XLA's CPU loops run convolutions more slowly than straight code.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distill import interrupts
from diffusion_distill.arrays import Array
from diffusion_distill.errors import positive_int
from diffusion_distill.levels import Level
from diffusion_distill.solvers.table import Table
from diffusion_distill.typing import Denoise, Image, Key, Labels


def sample_keys(key: Key, indices: Array) -> Key:
    """One key per sample, [batch], from the sample's own number."""
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.asarray(indices, jnp.uint32))


def noise(keys: Key, stream: Array, shape: tuple[int, ...]) -> Image:
    """Unit Gaussian noise [batch, *shape] of a stream (0: start, k + 1: row k) for keys [batch]."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, stream), shape))(keys)


def sample(
    key: Key,
    denoise: Denoise,
    table: Table,
    shape: tuple[int, ...],
    labels: Labels | None = None,
    *,
    first: int = 0,
    states: bool = False,
) -> Image:
    """Draws samples with a solver.

    Args:
      key: seed of the whole set of samples.
      denoise: maps (z, level, labels) to x_hat; wrap it in `Clipped` to clip x_hat to [-1, 1].
      table: the solver on its grid.
      shape: [batch, height, width, channels].
      labels: [batch] int32, for conditional models.
      first: number of the first sample; samples first .. first + batch - 1 are drawn.
      states: also return what the network saw in each row.

    Returns:
      Samples of `shape`; with states, [nfe + 1, *shape], the last being the samples.
    """
    batch = positive_int("The number of samples", shape[0])
    keys = sample_keys(key, np.arange(first, first + batch))
    start = noise(keys, 0, shape[1:])
    rows = None if table.deterministic else keys
    return integrate(denoise, table, start, labels, row_noise=rows, states=states)


def integrate(
    denoise: Denoise,
    table: Table,
    start: Image,
    labels: Labels | None = None,
    *,
    row_noise: Key | Image | None = None,
    states: bool = False,
) -> Image:
    """Runs a table from given unit noise.

    Args:
      denoise, table, labels, states: as in `sample`.
      start: unit noise [batch, height, width, channels].
      row_noise: per-sample keys [batch], or the noise itself [nfe, batch, h, w, c]; None for none.
    """
    table = jax.tree.map(lambda a: np.asarray(a, np.float32), table)
    if row_noise is not None and not _are_keys(row_noise) and row_noise.shape != (table.nfe, *start.shape):
        raise ValueError(f"Recorded noise must be {(table.nfe, *start.shape)}: one per row; got {row_noise.shape}.")
    registers = (table.init * start,) * table.weights.shape[1]
    loop = _host_loop if jax.default_backend() == "cpu" else _scan_loop
    return loop(denoise, table, registers, labels, row_noise, states)


def _row(denoise: Denoise, row: Table, registers: tuple, labels: Labels | None, fresh: Array, k: Array) -> tuple:
    """One row: (registers after it, the state the network saw)."""
    y = registers[0]
    if fresh is not None:
        drawn = noise(fresh, k + 1, y.shape[1:]) if _are_keys(fresh) else fresh
        y = y + row.noise * drawn
    level = Level(*(jnp.broadcast_to(a, y.shape[:1]) for a in row.level))
    operands = (y, *registers[1:], denoise(y, level, labels))
    combine = lambda weights: sum(w * v for w, v in zip(weights, operands, strict=True))  # noqa: E731
    return tuple(combine(weights) for weights in row.weights), y


_jitted_row = jax.jit(_row)


def _host_loop(denoise, table, registers, labels, row_noise, states):
    seen = []
    for k in range(table.nfe):
        row = jax.tree.map(lambda a: a[k] if a.ndim else a, table)
        registers, y = _jitted_row(denoise, row, registers, labels, _noise_of_row(row_noise, k), np.int32(k))
        seen.append(y)
        interrupts.check()
    return jnp.stack([*seen, registers[0]]) if states else registers[0]


@partial(jax.jit, static_argnames="states")
def _scan_loop(denoise, table, registers, labels, row_noise, states):
    def body(registers, k):
        row = jax.tree.map(lambda a: a[k] if a.ndim else a, table)
        registers, y = _row(denoise, row, registers, labels, _noise_of_row(row_noise, k), k)
        return registers, y if states else None

    registers, seen = jax.lax.scan(body, registers, jnp.arange(table.nfe))
    return jnp.concatenate([jnp.asarray(seen), registers[0][None]]) if states else registers[0]


def _noise_of_row(row_noise, k):
    """Keys serve every row; recorded noise [nfe, batch, ...] has one entry per row."""
    return row_noise if row_noise is None or _are_keys(row_noise) else row_noise[k]


def _are_keys(row_noise: Key | Image) -> bool:
    return jnp.issubdtype(row_noise.dtype, jax.dtypes.prng_key)
