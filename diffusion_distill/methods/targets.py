"""Closure targets: several solver steps of a teacher as one step of a student, exactly, in float32.

A DDIM step translates z/sigma by (q_s - q_t)·x_hat, q = alpha/sigma. A chain of steps through the times
t_0 > t_1 > ... > t_n with estimates x_hat_0 .. x_hat_{n-1} therefore lands where a single step with

    target = sum_j w_j·x_hat_j,    w_j = (q_{j+1} - q_j) / (q_n - q_0),    sum w_j = 1

lands. For two steps t -> m -> s,

    w_1 = (q_m - q_t) / (q_s - q_t)         w_2 = (q_s - q_m) / (q_s - q_t)

This is BTD's target (both estimates from the teacher; arXiv:2202.00512 Algorithm 2 solves the same
equation by inverting the step) and TRACT's (second estimate from the self-teacher; arXiv:2303.04248
Eq. 8). A step to zero noise is w = (0, 1), an empty second step (m = s) is w = (1, 0): both set, not computed
from 0/0. The weights come from differences in float64 on the host, good to 1e-12. The published invert-and-divide form
loses up to 2e-3 in float32; this one errs by 1e-7.

A step in several stages, such as Heun's, is such a step too: any single-step solver ends at

    z_m = r·z_t + d·sum_j e_j·x_hat_j,    sum e_j = 1

and the sum takes the place of the estimate. For Heun and alpha = 1, e = (1 - w, w) with w = sigma_t / (2·sigma_m),
above 1 (an extrapolation) for long steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distill.base.arrays import Array, expand, namespace
from diffusion_distill.base.typing import Batch, Cond, Data, Key
from diffusion_distill.denoisers.denoise import Denoise, RawDenoise
from diffusion_distill.methods import loss
from diffusion_distill.methods.draws import draw
from diffusion_distill.process import noising, predictions
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Process
from diffusion_distill.solvers import Table, tabulate
from diffusion_distill.solvers.rows import advance, begin, combine
from diffusion_distill.solvers.rows import walk as walk_rows


class Stages(NamedTuple):
    """A step of several network calls: its solver's table in every row.

    Attributes:
      level: the level that the network is given in each stage, [rows, stages].
      weights: of the registers and x_hat after each stage, [rows, stages, R, R + 1].
      mix: weights of the stages' estimates in the step's, [rows, stages].
    """

    level: Level
    weights: Array
    mix: Array


class Rows(NamedTuple):
    """The training triples t -> m -> s of a phase: arrays [rows] from a float64 host table.

    Attributes:
      t, m: levels where the first and the second estimate are taken.
      r, d: coefficients of the teacher's step z_m = r·z_t + d·x_hat.
      first, second: weights of the two estimates in the target.
      stages, second_stages: of the two estimates, where a solver other than DDIM takes the steps.
      count: number of real rows; the rest is padding so that phases share one compiled step.
    """

    t: Level
    m: Level
    r: Array
    d: Array
    first: Array
    second: Array
    stages: Stages | None
    second_stages: Stages | None
    count: Array

    def at(self, index: Array) -> Rows:
        """The rows of a batch of indices."""
        return Rows(*jax.tree.map(lambda a: a[index], tuple(self[:-1])), count=self.count)


def chain_weights(levels: Level) -> np.ndarray:
    """Weights [n, ...] of the estimates along a chain of levels [n + 1, ...] (float64, host).

    The noise must not increase; equal levels at the end are steps of weight zero. The first level may be pure noise.
    """
    alpha, sigma = (np.asarray(a, np.float64) for a in levels)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = alpha / sigma
        weights = np.diff(q, axis=0) / (q[-1] - q[0])
    reaches_zero_noise = (sigma[1:] == 0) & (sigma[:-1] > 0)
    return np.where(sigma[-1] == 0, reaches_zero_noise, weights)


def make_rows(
    grid: Level,
    t: np.ndarray,
    m: np.ndarray,
    s: np.ndarray,
    *,
    clean_end: bool = False,
    solver: str = "ddim",
    second_solver: str = "ddim",
    process: Process | None = None,
) -> Rows:
    """The table of the steps t -> m -> s between levels of a grid.

    Args:
      grid: [steps + 1], the noisiest level first.
      t, m, s: whole numbers [rows], places in the grid, t < m <= s.
      clean_end: treat the last level as exactly zero noise (BTD's rule), whatever sigma the grid has there.
      solver, second_solver: what takes the step t -> m, and m -> s.
      process: of the grid, for solvers that evaluate at levels in between.

    Raises:
      ValueError: unknown solver, or one that draws noise or needs more than two levels.
    """
    level_t, level_m, level_s = (grid.at(np.asarray(k)) for k in (t, m, s))
    first, second = chain_weights(Level(*(np.stack(part) for part in zip(level_t, level_m, level_s, strict=True))))
    if clean_end:
        ends = (s == len(grid.sigma) - 1) & (m < s)
        first, second = np.where(ends, 0.0, first), np.where(ends, 1.0, second)
    stages = make_stages(solver, level_t, level_m, process)
    second_stages = make_stages(second_solver, level_m, level_s, process)
    # Where m is zero noise the second estimate has weight 0, but is evaluated: at a level where the network is finite.
    level_m = Level(*(np.where(level_m.sigma == 0, at_t, at_m) for at_t, at_m in zip(level_t, level_m, strict=True)))
    r, d = noising.step_coefficients(level_t, level_m)
    return Rows(level_t, level_m, r, d, first, second, stages, second_stages, np.int32(len(t)))


def make_stages(solver: str, start: Level, end: Level, process: Process | None = None) -> Stages | None:
    """The tables of a solver's steps between levels [rows] each; None for DDIM, whose estimate is the network's.

    Steps with fewer stages than others (to zero noise, or from a level to itself) are filled up with stages of
    weight zero.
    """
    if solver == "ddim":
        return None
    pairs = np.stack([np.stack(start), np.stack(end)], axis=-1)  # [alpha and sigma, rows, from and to]
    still = pairs[0, :, 0] * pairs[1, :, 1] == pairs[0, :, 1] * pairs[1, :, 0]
    tables = [
        None if rests else tabulate(solver, Level(*pairs[:, k]), process).plain() for k, rests in enumerate(still)
    ]
    moving = [table for table in tables if table is not None]
    if not all(table.deterministic for table in moving):
        raise ValueError(f"The solver {solver!r} draws noise; a teacher's step must be deterministic.")
    shape = max(table.nfe for table in moving), max(table.weights.shape[1] for table in moving)
    rows = [_stages_of(table, Level(*pairs[:, k, 0]), *shape) for k, table in enumerate(tables)]
    return jax.tree.map(lambda *parts: np.stack(parts), *rows)


def _stages_of(table: Table | None, start: Level, count: int, registers: int) -> Stages:
    """One row of `Stages`: the table's rows, then stages that change nothing."""
    used = 0 if table is None else table.nfe
    idle = start if start.sigma > 0 else Level(np.float64(1), np.float64(1))  # a level where the network is finite
    alpha, sigma = (np.full(count, a) for a in idle)
    weights = np.tile(np.eye(registers, registers + 1), (count, 1, 1))
    mix = np.zeros(count)
    if table is not None:
        own = [*range(table.weights.shape[1]), -1]  # its registers, perhaps fewer, and x_hat
        alpha[:used], sigma[:used] = table.level
        weights[np.ix_(range(used), own[:-1], own)] = table.weights
        mix[:used] = _mix(table)
    return Stages(Level(alpha, sigma), weights, mix)


def _mix(table: Table) -> np.ndarray:
    """Weights [nfe] of the estimates in the one estimate with which a DDIM step ends at the same place."""
    # Each register as a linear form in the start and the estimates.
    forms = np.zeros((table.weights.shape[1], 1 + table.nfe))
    forms[:, 0] = 1
    for j, weights in enumerate(table.weights):
        forms = weights[:, :-1] @ forms
        forms[:, 1 + j] += weights[:, -1]
    return forms[0, 1:] / forms[0, 1:].sum()


def pad(tables: Sequence[Rows], unit: int = 1024) -> list[Rows]:
    """Repeats the last row of each table until all have the same number of rows; counts stay.

    That number is a multiple of `unit`, so that the phases of most runs share one compiled step.
    """
    longest = -(-max(len(table.r) for table in tables) // unit) * unit

    def lengthen(a: np.ndarray) -> np.ndarray:
        return a if np.ndim(a) == 0 else np.concatenate([a, np.repeat(a[-1:], longest - len(a), axis=0)])

    return [jax.tree.map(lengthen, table) for table in tables]


def target(rows: Rows, z: Data, first: Denoise, second: Denoise, cond: Cond | None = None) -> Data:
    """The x that takes z at t to where the two chained steps lead, for gathered rows [batch].

    No gradient flows through it.
    """
    x_first = estimate(rows.stages, z, rows.t, first, cond)
    z_m = expand(rows.r, z) * z + expand(rows.d, z) * x_first
    x_second = estimate(rows.second_stages, z_m, rows.m, second, cond)
    return jax.lax.stop_gradient(weighted_mean((rows.first, rows.second), (x_first, x_second)))


def estimate(stages: Stages | None, z: Data, level: Level, denoise: Denoise, cond: Cond | None = None) -> Data:
    """The x_hat whose DDIM step ends at the same point as the step in stages [batch]; one call without stages."""
    if stages is None:
        return denoise(z, level, cond)
    return weighted_mean(namespace(z).moveaxis(stages.mix, 0, -1), walk(stages, z, denoise, cond)[1])


def walk(stages: Stages, z: Data, denoise: Denoise, cond: Cond | None = None) -> tuple[list[Data], list[Data]]:
    """The network's input and its output x_hat in each stage."""
    level, weights = jax.tree.map(lambda a: namespace(z).moveaxis(a, 0, -1), (stages.level, stages.weights))
    table = Table(np.float32(1), level, np.zeros(len(weights), np.float32), weights)
    _, seen, x_hats = zip(*walk_rows(partial(advance, denoise, cond), table, begin(table, z)), strict=True)
    return list(seen), list(x_hats)


def weighted_mean(weights: Sequence[Array], estimates: Sequence[Data]) -> Data:
    """sum_j w_j·x_hat_j for weights [n, batch] (or [n]) that add to 1 and estimates [n, batch, ...]."""
    return combine(weights, estimates)


def losses_at(
    rows: Rows,
    x: Data,
    eps: Data,
    student: RawDenoise,
    first: Denoise,
    second: Denoise,
    cond: Cond | None = None,
    *,
    weight: str,
    reduction: str,
) -> Array:
    """Per-image losses [batch] for gathered rows, clean images x and noise eps."""
    z = noising.diffuse(x, eps, rows.t)
    x_target = target(rows, z, first, second, cond)
    eps_target = predictions.eps_from_x(z, x_target, rows.t)
    return loss.losses(student, z, rows.t, x_target, eps_target, cond, weight=weight, reduction=reduction)


def draw_rows(table: Rows, batch: Batch, key: Key) -> tuple[Array, Data]:
    """Row indices [batch], uniform and stratified, and unit noise for a batch, see `draws.draw`."""
    u, noise = draw(batch, key)
    return jnp.floor(u * jnp.asarray(table.count, jnp.float32)).astype(jnp.int32), noise
