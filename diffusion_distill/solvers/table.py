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
