"""The engine that runs every solver table: on the device, on the host in float64, and sample by sample.

One row is the same everywhere (rows.py). `walk` runs rows one after the other, compiled or not; the scan runs them
inside one program.

Randomness is addressed per sample: sample i takes its noise from fold_in(key, i), the start from stream
0 of that key and row k from stream k + 1. A sample is therefore the same, bit for bit in its noise, in a
batch of 1 or 64, on 1 or 8 devices.

Registers are combined by element-wise multiply-adds rather than a dot product, whose operands
accelerators round by default. On accelerators the rows run in a lax.scan; on CPU in a host loop over one
compiled row, because XLA's CPU loops run convolutions more slowly than straight code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion_distill.base.arrays import Array
from diffusion_distill.base.errors import positive_int
from diffusion_distill.base.typing import Cond, Data, Key
from diffusion_distill.denoisers.denoise import Denoise, as_denoise
from diffusion_distill.solvers.rows import Registers, advance, begin, walk
from diffusion_distill.solvers.table import Table


def sample_keys(key: Key, indices: Array) -> Key:
    """One key per sample, [batch], from the sample's own number."""
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.asarray(indices, jnp.uint32))


@partial(jax.jit, static_argnames="shape")
def noise(keys: Key, stream: Array, shape: tuple[int, ...]) -> Data:
    """Unit Gaussian noise [batch, *shape] of a stream (0: start, k + 1: row k) for keys [batch]."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, stream), shape, jnp.float32))(keys)


def sample(
    key: Key,
    denoise: Denoise,
    table: Table,
    shape: tuple[int, ...],
    cond: Cond | None = None,
    *,
    first: int = 0,
    states: bool | Sequence[int] = False,
) -> Data:
    """Draws samples with a solver.

    Args:
      key: seed of the whole set of samples.
      denoise: maps (z, level, cond) to x_hat; wrap it in `Clipped` to clip x_hat to [-1, 1].
      table: the solver on its grid.
      shape: (batch, *shape of one sample).
      cond: [batch] int32, for conditional models.
      first: number of the first sample; samples first .. first + batch - 1 are drawn.
      states: also return what the network saw in each row, or in some rows.

    Returns:
      Samples of `shape`; with states, see `integrate`.
    """
    batch = positive_int("The number of samples", shape[0])
    keys = sample_keys(key, np.arange(first, first + batch))
    start = noise(keys, 0, shape[1:])
    rows = None if table.deterministic else keys
    return integrate(denoise, table, start, cond, row_noise=rows, states=states)


class PlacedTable(NamedTuple):
    """A table where it is used, for those who run it more than once; see `place`.

    Attributes:
      table: plain, in float32, on the host.
      rows: the same, padded, on the devices that count its rows themselves; None where the rows are a scan.
      first: the number of the first row there, 0.
    """

    table: Table
    rows: Table | None = None
    first: Array | None = None


def place(table: Table, mesh: Mesh | None = None) -> PlacedTable:
    """A table on every device of a mesh, or on JAX's default device.

    Six numbers sent for each row, to each of two devices, took a hundredth of the time of a small network; the whole
    table sent for each batch took half of that.
    """
    table = jax.tree.map(lambda a: np.asarray(a, np.float32), table.plain())
    if jax.default_backend() != "cpu":
        return PlacedTable(table)
    numbers = _padded(table), np.int32(0)
    if mesh is None:
        return PlacedTable(table, *jax.tree.map(jnp.asarray, numbers))
    return PlacedTable(table, *jax.device_put(numbers, NamedSharding(mesh, PartitionSpec())))


def integrate(
    denoise: Denoise,
    table: Table | PlacedTable,
    start: Data,
    cond: Cond | None = None,
    *,
    row_noise: Key | Data | None = None,
    states: bool | Sequence[int] = False,
) -> Data:
    """Runs a table from given unit noise.

    Args:
      denoise, table, cond: as in `sample`.
      start: unit noise [batch, *shape].
      row_noise: per-sample keys [batch], or the noise itself [nfe, batch, *shape]; None for none.
      states: True for what the network saw in every row, and the result; or the numbers of some of these states, from
        0, the start, to nfe, the result. Only they are kept.

    Returns:
      The result [batch, *shape]; with states, [states, batch, ...], all nfe + 1 of them for True.
    """
    nfe = (table.table if isinstance(table, PlacedTable) else table).nfe
    wanted = range(nfe + 1) if states is True else list(states or ())
    if any(not 0 <= k <= nfe for k in wanted):
        raise ValueError(f"The states of {nfe} rows are 0 to {nfe}, got {list(wanted)}.")
    last, kept = trajectory(denoise, table, start, cond, row_noise=row_noise, states=wanted)[:2]
    return last if states is False else kept


class Trajectory(NamedTuple):
    """The result of `trajectory`.

    Attributes:
      result: y after the last row, [batch, ...].
      states: what the network saw in the rows asked for, nfe for the result, [asked, batch, ...].
      outputs: x_hat of the rows asked for, [asked, batch, ...].
    """

    result: Data
    states: Data
    outputs: Data


def trajectory(
    denoise: Denoise,
    table: Table | PlacedTable,
    start: Data,
    cond: Cond | None = None,
    *,
    row_noise: Key | Data | None = None,
    states: Sequence[int] = (),
    outputs: Sequence[int] = (),
) -> Trajectory:
    """`integrate` that also returns outputs of the network; states and outputs are numbers of rows."""
    placed = table if isinstance(table, PlacedTable) else place(table, _mesh_of(start))
    table = placed.table
    if row_noise is not None and not _are_keys(row_noise) and row_noise.shape != (table.nfe, *start.shape):
        raise ValueError(f"Recorded noise must be {(table.nfe, *start.shape)}: one per row; got {row_noise.shape}.")
    rest = as_denoise(denoise), begin(table, start), cond, row_noise, tuple(states), tuple(outputs)
    return _scan_loop(table, *rest) if placed.rows is None else _host_loop(placed, *rest)


def run_host(
    table: Table,
    denoise: Denoise,
    start: Data,
    cond: Cond | None = None,
    *,
    row_noise: Data | None = None,
    states: bool = False,
) -> np.ndarray:
    """`integrate` on the host in float64.

    Args:
      denoise: maps NumPy arrays (z, level, cond) to x_hat.
      start: unit noise [batch, ...].
      row_noise: unit noise of each row, [nfe, batch, ...]; needed if the table draws noise.
      states: also return what the network saw in each row.

    Returns:
      [batch, ...]; with states, [nfe + 1, batch, ...], the last being the result.

    Raises:
      ValueError: the table draws noise and there is none, or not one per row.
    """
    start = np.asarray(start, np.float64)
    given = None if row_noise is None else row_noise.shape
    if not (given is None and table.deterministic) and given != (table.nfe, *start.shape):
        raise ValueError(f"row_noise must be {(table.nfe, *start.shape)}: one per row; got {given}.")
    seen, result = [], table.init * start
    rows = walk(partial(advance, denoise, cond), table, begin(table, start), _each(row_noise, table.nfe))
    for registers, y, _ in rows:
        result = registers[0]
        if states:
            seen.append(y)
    return np.stack([*seen, result]) if states else result


# --- the two ways to run all rows


def _device_row(
    denoise: Denoise, cond: Cond | None, row: Table, registers: Registers, fresh: Key | Data | None, k: Array
) -> tuple[Registers, Data, Data]:
    """`advance` with noise from the samples' keys, if it is not recorded."""
    if fresh is not None and _are_keys(fresh):
        fresh = noise(fresh, k + 1, registers[0].shape[1:])
    return advance(denoise, cond, row, registers, fresh)


@jax.jit
def _jitted_row(
    denoise: Denoise, cond: Cond | None, table: Table, carry: tuple[Array, Registers], fresh: Key | Data | None
) -> tuple[tuple[Array, Registers], Data, Data]:
    """Row number k of a table, for (k, registers); gives (k + 1, the registers after it), y and x_hat."""
    k, registers = carry
    registers, y, x_hat = _device_row(denoise, cond, table.row(k), registers, fresh, k)
    return (k + 1, registers), y, x_hat


def _host_loop(placed, denoise, registers, cond, row_noise, states, outputs):
    table, rows, first = placed
    step = lambda row, carry, fresh: _jitted_row(denoise, cond, rows, carry, fresh)  # noqa: E731
    seen, found, like = {}, {}, registers[0]
    steps = walk(step, table, (first, registers), _each(row_noise, table.nfe))
    for k, ((_, after), y, x_hat) in enumerate(steps):
        if k in states:
            seen[k] = y
        if k in outputs:
            found[k] = x_hat
        like = after[0]
    seen[table.nfe] = like
    return Trajectory(like, _stack([seen[k] for k in states], like), _stack([found[k] for k in outputs], like))


def _padded(table: Table, unit: int = 1024) -> Table:
    """With more rows, never run, up to a multiple of `unit`: one program runs any number of steps."""
    more = -table.nfe % unit
    lengthen = lambda a: np.pad(a, ((0, more), *((0, 0),) * (a.ndim - 1))) if a.ndim else a  # noqa: E731
    return jax.tree.map(lengthen, table)


def _mesh_of(images: Data) -> Any:
    """The mesh over which images are spread, if there is one."""
    there = isinstance(images, jax.Array) and not isinstance(images, Tracer)
    return where.mesh if there and isinstance(where := images.sharding, NamedSharding) else None


@partial(jax.jit, static_argnames=("states", "outputs"))
def _scan_loop(table, denoise, registers, cond, row_noise, states, outputs):
    places = [_places(wanted, table.nfe) for wanted in (states, outputs)]

    def body(carry, k):
        registers, *kept = carry
        fresh = row_noise if row_noise is None or _are_keys(row_noise) else row_noise[k]
        registers, *new = _device_row(denoise, cond, table.row(k), registers, fresh, k)
        kept = [
            _put(images, jnp.asarray(place)[k], value) for images, place, value in zip(kept, places, new, strict=True)
        ]
        return (registers, *kept), None

    like = registers[0]
    empty = [jnp.zeros((len(set(wanted)), *like.shape), like.dtype) for wanted in (states, outputs)]
    (registers, seen, found), _ = jax.lax.scan(body, (registers, *empty), jnp.arange(table.nfe))
    seen = _put(seen, places[0][table.nfe], registers[0])
    chosen = [
        np.array([place[k] for k in wanted], int) for wanted, place in zip((states, outputs), places, strict=True)
    ]
    return Trajectory(registers[0], seen[chosen[0]], found[chosen[1]])


def _places(wanted: tuple[int, ...], nfe: int) -> np.ndarray:
    """The place where each row's image is kept, [nfe + 1]; beyond the end for rows that are not kept."""
    places = np.full(nfe + 1, len(set(wanted)))
    places[sorted(set(wanted))] = np.arange(len(set(wanted)))
    return places


def _put(kept: Data, place: Array, value: Data) -> Data:
    return kept.at[place].set(value, mode="drop") if len(kept) else kept


def _stack(values: list[Data], like: Data) -> Data:
    return jnp.stack(values) if values else np.zeros((0, *like.shape), like.dtype)


def _each(row_noise: Key | Data | None, rows: int) -> Any:
    """The noise of each row: keys serve every row, recorded noise [rows, batch, ...] has one entry per row."""
    return [row_noise] * rows if row_noise is None or _are_keys(row_noise) else row_noise


def _are_keys(row_noise: Key | Data) -> bool:
    return jnp.issubdtype(row_noise.dtype, jax.dtypes.prng_key)
