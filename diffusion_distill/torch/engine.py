"""The engine of solver tables in PyTorch: one call of the network per row, on any device.

Coefficients stay numbers of float64 on the host; images are tensors. The state is kept in float32 (or float64) even
where the network computes in half precision: what a step changes is often smaller than the spacing of such numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch  # pyright: ignore[reportMissingImports]

from diffusion_distill.process.levels import Level
from diffusion_distill.solvers.rows import after, begin
from diffusion_distill.solvers.table import Table

#: (z [batch, ...], a level of two numbers) -> x_hat of the shape of z
Denoise = Callable[[torch.Tensor, Level], torch.Tensor]


def run(
    table: Table,
    denoise: Denoise,
    start: torch.Tensor,
    *,
    row_noise: torch.Tensor | None = None,
    states: bool = False,
) -> torch.Tensor:
    """Runs a table from given unit noise.

    Args:
      denoise: a `Denoiser`, or any function of tensors.
      start: unit noise [batch, ...]; its device is the one that everything is computed on.
      row_noise: unit noise of each row, [nfe, batch, ...]; needed if the table draws noise.
      states: also return what the network saw in each row.

    Returns:
      The result [batch, ...], float32 (float64 if `start` is); with states, [nfe + 1, batch, ...], the last being the
      result.

    Raises:
      ValueError: the table draws noise and there is none, or not one per row.
    """
    table, start = table.plain(), start.to(precise(start.dtype))
    if not (row_noise is None and table.deterministic) and (
        row_noise is None or row_noise.shape != (table.nfe, *start.shape)
    ):
        given = None if row_noise is None else tuple(row_noise.shape)
        raise ValueError(f"row_noise must be {(table.nfe, *start.shape)}: one per row; got {given}.")
    registers, seen = begin(table, start), []
    for k in range(table.nfe):
        row, y = table.row(k), registers[0]
        if row_noise is not None:
            y = y + row.noise * row_noise[k].to(y)
        seen.append(y) if states else None
        registers = after(row, (y, *registers[1:]), denoise(y, row.level).to(y.dtype))
    return torch.stack([*seen, registers[0]]) if states else registers[0]


def precise(dtype: torch.dtype) -> torch.dtype:
    """The precision in which a solver's state is kept, for images of a precision: at least float32."""
    return torch.promote_types(dtype, torch.float32)
