"""A solver is a table: one row per network evaluation, everything between evaluations is linear.

There are R named registers of image shape: the first, y, is where the network is evaluated, the others
are memories. All start as init·noise. Row k does

    y ← y + noise_k · fresh noise,    x_hat = denoise(y, level_k),    registers ← W_k · (registers, x_hat)

with W_k [R, R + 1] (a general linear method; Butcher 2006). The number of rows is the number of
network evaluations (NFE), by construction. The result is y after the last row.

Tables are built in float64 on the host and are plain arguments of the compiled engine: another grid or
another solver of the same shape runs without recompiling.

A row is written as linear forms in register names, for example Euler's

    {"y": {"y": r, "x_hat": d}}

where a register that is not mentioned keeps its value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from diffusion_distill.arrays import Array
from diffusion_distill.levels import Level
from diffusion_distill.typing import Denoise, Image, Labels

Form = Mapping[str, float]  # a linear form in the registers and x_hat


class Table(NamedTuple):
    """A solver on a grid, ready to run: NFE rows over R registers.

    Attributes:
      init: scale of the starting noise, scalar.
      level: the level the network is told in each row, [rows].
      noise: factor of the fresh noise added to y before each evaluation, [rows].
      weights: W, [rows, R, R + 1]; the last column multiplies x_hat.
    """

    init: Array
    level: Level
    noise: Array
    weights: Array

    @property
    def nfe(self) -> int:
        """Number of network evaluations."""
        return self.weights.shape[0]

    @property
    def deterministic(self) -> bool:
        """Whether no row adds noise."""
        return not np.any(np.asarray(self.noise))


def build(
    level: Level,
    rows: Sequence[Mapping[str, Form]],
    *,
    registers: Sequence[str] = ("y",),
    noise: Array | None = None,
    init: float = 1.0,
) -> Table:
    """Assembles a table from linear forms.

    Args:
      level: level of each evaluation, [rows].
      rows: for each row, the new value of each register that changes, as a linear form.
      registers: their names, the evaluated one first.
      noise: factor of the noise added before each evaluation, [rows]; none by default.
      init: scale of the starting noise.

    Raises:
      ValueError: a form names an unknown register, or lengths disagree.
    """
    columns = {name: j for j, name in enumerate((*registers, "x_hat"))}
    weights = np.zeros((len(rows), len(registers), len(columns)))
    weights[:, np.arange(len(registers)), np.arange(len(registers))] = 1.0
    for k, row in enumerate(rows):
        for target, form in row.items():
            if target not in registers or not set(form) <= set(columns):
                raise ValueError(f"Row {k} sets {target!r} from {sorted(form)}; registers: {sorted(columns)}.")
            weights[k, columns[target]] = 0.0
            for name, factor in form.items():
                weights[k, columns[target], columns[name]] = factor
    if np.shape(level.sigma) != (len(rows),):
        raise ValueError(f"A table of {len(rows)} rows needs as many levels, got {np.shape(level.sigma)}.")
    return Table(np.float64(init), level, np.zeros(len(rows)) if noise is None else np.asarray(noise), weights)


def start_scale(level: Level) -> float:
    """What unit noise is multiplied by where sampling starts: 1 for VP levels, as published, and sigma for VE."""
    return 1.0 if level.alpha < 1 else float(level.sigma)


def rescaled(table: Table, alpha: Array) -> Table:
    """The same solver for z = alpha·y, given a table for y at levels alpha = 1.

    Only the evaluated register is scaled; memories keep what they hold for y.

    Args:
      alpha: signal scale of each evaluation and of the result, [rows + 1].
    """
    alpha = np.asarray(alpha, np.float64)
    told, after, weights = alpha[:-1], alpha[1:], table.weights.copy()
    weights[:, :, 0] /= told[:, None]
    weights[:, 0, :] *= after[:, None]
    return Table(table.init * told[0], Level(told, told * table.level.sigma), told * table.noise, weights)


def run_host(
    table: Table,
    denoise: Denoise,
    start: Image,
    labels: Labels | None = None,
    *,
    row_noise: Image | None = None,
    states: bool = False,
) -> np.ndarray:
    """Runs a table on the host in float64, row by row; `sampling.integrate` is the same on the device in float32.

    Args:
      denoise: maps NumPy arrays (z, level, labels) to x_hat.
      start: unit noise [batch, ...].
      row_noise: unit noise of each row, [nfe, batch, ...]; needed if the table draws noise.
      states: also return what the network saw in each row.

    Returns:
      [batch, ...]; with states, [nfe + 1, batch, ...], the last being the result.

    Raises:
      ValueError: the table draws noise and there is none, or not one per row.
    """
    start = np.asarray(start, np.float64)
    if row_noise is None and table.deterministic:
        row_noise = np.zeros((table.nfe, *[1] * start.ndim))
    elif row_noise is None or row_noise.shape != (table.nfe, *start.shape):
        given = None if row_noise is None else row_noise.shape
        raise ValueError(f"row_noise must be {(table.nfe, *start.shape)}: one per row; got {given}.")
    registers, seen = np.stack([table.init * start] * table.weights.shape[1]), []
    for k, weights in enumerate(table.weights):
        registers[0] += table.noise[k] * row_noise[k]
        seen.append(registers[0])
        level = Level(*(np.full(len(start), a[k]) for a in table.level))
        x_hat = np.asarray(denoise(registers[0], level, labels), np.float64)
        registers = np.tensordot(weights, np.stack([*registers, x_hat]), axes=1)
    return np.stack([*seen, registers[0]]) if states else registers[0]
