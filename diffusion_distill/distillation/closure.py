"""Closure targets: several solver steps of a teacher as one step of a student, exactly, in float32.

A DDIM step translates z/sigma by (q_s - q_t)·x_hat, q = alpha/sigma. A chain of steps through the times
t_0 > t_1 > ... > t_n with estimates x_hat_0 .. x_hat_{n-1} therefore lands where a single step with

    target = sum_j w_j·x_hat_j,    w_j = (q_{j+1} - q_j) / (q_n - q_0),    sum w_j = 1

lands. For two steps t -> m -> s, with cross(t, s) = sigma_t·alpha_s - alpha_t·sigma_s,

    w_1 = cross(t, m)·sigma_s / (cross(t, s)·sigma_m)         w_2 = cross(m, s)·sigma_t / (cross(t, s)·sigma_m)

This is BTD's target (both estimates from the teacher; arXiv:2202.00512 Algorithm 2 solves the same
equation by inverting the step) and TRACT's (second estimate from the self-teacher; arXiv:2303.04248
Eq. 8). A step to zero noise is w = (0, 1), an empty second step (m = s) is w = (1, 0): both set, not computed
from 0/0. The published invert-and-divide form loses up to 2e-3 in float32; this one errs by 1e-7.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distill.arrays import Array, expand, stratified
from diffusion_distill.diffusion import forward, parameterization
from diffusion_distill.diffusion.schedules import Schedule
from diffusion_distill.distillation import regression
from diffusion_distill.levels import Level
from diffusion_distill.typing import Batch, Denoise, Image, Key, Labels, RawDenoise


class Rows(NamedTuple):
    """The training triples t -> m -> s of a phase: arrays [rows] from a float64 host table.

    Attributes:
      t, m: levels where the first and the second estimate are taken.
      r, d: coefficients of the teacher's step z_m = r·z_t + d·x_hat.
      first, second: weights of the two estimates in the target.
      count: number of real rows; the rest is padding so that phases share one compiled step.
    """

    t: Level
    m: Level
    r: Array
    d: Array
    first: Array
    second: Array
    count: Array

    def at(self, index: Array) -> Rows:
        """The rows of a batch of indices."""
        return Rows(*jax.tree.map(lambda a: a[index], tuple(self[:-1])), count=self.count)


def chain_weights(schedule: Schedule, times: np.ndarray, steps: int = 1) -> np.ndarray:
    """Weights [n, ...] of the estimates along a chain of times [n + 1, ...] (float64, host).

    Times must not increase; equal times at the end are steps of weight zero.

    Args:
      steps: the times are given in units of 1/steps. Differences of whole numbers are exact, those of
        rounded quotients i/steps are not, and err most on the finest grids.
    """
    times = np.asarray(times, np.float64)
    sigma = schedule.level(times / steps).sigma
    at_end = times == times[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        from_start = np.where(at_end[:-1], 0.0, sigma[0] / sigma[:-1])
        to_end = np.where(at_end[1:], 1.0, sigma[-1] / sigma[1:])
    each, whole = schedule.cross(times[:-1], times[1:], steps), schedule.cross(times[0], times[-1], steps)
    return each / whole * from_start * to_end


def make_rows(schedule: Schedule, steps: int, t: np.ndarray, m: np.ndarray, s: np.ndarray, clean_end: bool) -> Rows:
    """The table of triples of times t/steps > m/steps >= s/steps, whole numbers [rows] each.

    Args:
      clean_end: treat s = 0 as exactly zero noise (BTD's rule), whatever sigma the schedule keeps there.
    """
    first, second = chain_weights(schedule, np.stack([t, m, s]), steps)
    if clean_end:
        ends = (s == 0) & (m > s)
        first, second = np.where(ends, 0.0, first), np.where(ends, 1.0, second)
    level_t, level_m = schedule.level(t / steps), schedule.level(m / steps)
    r, d = forward.step_coefficients(level_t, level_m)
    return Rows(level_t, level_m, r, d, first, second, np.int32(len(t)))


def pad(tables: Sequence[Rows], unit: int = 1024) -> list[Rows]:
    """Repeats the last row of each table until all have the same number of rows; counts stay.

    That number is a multiple of `unit`, so that the phases of most runs share one compiled step.
    """
    longest = -(-max(len(table.r) for table in tables) // unit) * unit

    def lengthen(a: np.ndarray) -> np.ndarray:
        return a if np.ndim(a) == 0 else np.pad(a, (0, longest - len(a)), mode="edge")

    return [jax.tree.map(lengthen, table) for table in tables]


def target(rows: Rows, z: Image, first: Denoise, second: Denoise, labels: Labels | None = None) -> Image:
    """The x that takes z at t to where the two chained steps lead, for gathered rows [batch].

    No gradient flows through it.
    """
    x_first = first(z, rows.t, labels)
    z_m = expand(rows.r, z) * z + expand(rows.d, z) * x_first
    x_second = second(z_m, rows.m, labels)
    return jax.lax.stop_gradient(weighted_mean((rows.first, rows.second), (x_first, x_second)))


def weighted_mean(weights: Sequence[Array], estimates: Sequence[Image]) -> Image:
    """sum_j w_j·x_hat_j for weights [n, batch] (or [n]) that add to 1 and estimates [n, batch, ...]."""
    return sum(expand(w, x_hat) * x_hat for w, x_hat in zip(weights, estimates, strict=True))


def losses_at(
    rows: Rows,
    x: Image,
    eps: Image,
    student: RawDenoise,
    first: Denoise,
    second: Denoise,
    labels: Labels | None = None,
    *,
    weight: str,
    reduction: str,
) -> Array:
    """Per-image losses [batch] for gathered rows, clean images x and noise eps."""
    z = forward.diffuse(x, eps, rows.t)
    x_target = target(rows, z, first, second, labels)
    eps_target = parameterization.eps_from_x(z, x_target, rows.t)
    return regression.losses(student, z, rows.t, x_target, eps_target, labels, weight=weight, reduction=reduction)


def draw(table: Rows, batch: Batch, key: Key) -> tuple[Array, Image]:
    """Row indices [batch], uniform and stratified, and unit noise for a batch, from two streams of a key."""
    x = batch["image"]
    times, noise = jax.random.split(key)
    index = jnp.floor(stratified(times, x.shape[0]) * table.count).astype(jnp.int32)
    return index, jax.random.normal(noise, x.shape)
