"""One row of a solver's table, whatever the arrays are: NumPy's in float64, JAX's or PyTorch's.

The engines (engine.py, torch/engine.py), single steps (steps.py), distillation targets (methods/targets.py) and D-ODE
fits (dode.py, torch/fitting.py) all run it. Coefficients are of the whole batch or of each sample. Registers are
combined by element-wise multiply-adds rather than a dot product, whose operands accelerators round by default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from diffusion_distill.base import interrupts
from diffusion_distill.base.arrays import Array, expand, namespace, settled
from diffusion_distill.base.typing import Cond, Data
from diffusion_distill.denoisers.denoise import Denoise
from diffusion_distill.process.levels import Level
from diffusion_distill.solvers.table import Table

Registers = tuple[Data, ...]


def begin(table: Table, start: Data) -> Registers:
    """The registers at the start, of unit noise [batch, ...]."""
    return (table.init * start,) * table.weights.shape[1]


def advance(
    denoise: Denoise, cond: Cond | None, row: Table, registers: Registers, fresh: Data | None = None
) -> tuple[Registers, Data, Data]:
    """One row of a table, with its call of the network.

    NumPy arrays stay on the host, in their own precision; JAX's stay on the device.

    Args:
      row: of a table, see `Table.row`; its numbers are scalars or, for each sample, [batch].
      registers: images [batch, ...], y first.
      fresh: unit noise of the row, [batch, ...]; None for a row without noise.

    Returns:
      (the registers after the row, what the network saw, its output x_hat).
    """
    y, x_hat = look(denoise, cond, row, registers, fresh)
    return after(row, (y, *registers[1:]), x_hat), y, x_hat


def look(
    denoise: Denoise, cond: Cond | None, row: Table, registers: Registers, fresh: Data | None = None
) -> tuple[Data, Data]:
    """A row's call of the network: (what it sees, its output x_hat); arguments as in `advance`."""
    y = registers[0] if fresh is None else registers[0] + row.noise * fresh
    xp = namespace(y)
    x_hat = denoise(y, Level(*(xp.broadcast_to(a, y.shape[:1]) for a in row.level)), cond)
    return y, np.asarray(x_hat, y.dtype) if xp is np else x_hat


def after(row: Table, registers: Registers, x_hat: Data) -> Registers:
    """The registers after a row's call: the only place where a solver's arithmetic happens.

    Args:
      registers: what the network saw, [batch, ...], and the memories.
    """
    return tuple(combine(weights, (*registers, x_hat)) for weights in row.weights)


def combine(weights: Array, operands: Sequence[Data]) -> Data:
    """A linear form in images [batch, ...], by multiply-adds; weights are scalars or [batch]."""
    return sum(expand(w, v) * v for w, v in zip(weights, operands, strict=True))  # type: ignore[return-value]


def walk(step: Callable[..., tuple], table: Table, registers: Registers, *each: Sequence) -> Iterator[tuple]:
    """Runs a table's rows one after the other on the host, and yields what `step` gives.

    Args:
      step: (row, registers, what is of this row) -> (registers after it, anything else): `advance`, perhaps compiled.
      each: what else differs from row to row, [rows].

    Raises:
      Interrupted: the program was asked to stop.
    """
    for k in range(table.nfe):
        registers, *found = settled(step(table.row(k), registers, *(values[k] for values in each)))
        yield registers, *found
        interrupts.check()
