"""UniPC, arXiv:2302.04867: a multistep predictor, and a corrector that costs no evaluation.

In the terms of dpm_solver.py, with r_i the distances of past levels in units of the step, D_i the differences of their
outputs from the newest, D_0, divided by r_i, and B = g ('bh1') or e^g - 1 ('bh2'),

    predict    z_t = (H_t/H_s)·z_s - T_t·(e^g - 1)·D_0 - T_t·B·sum_i a_i·D_i
    correct    the same, with the output at the predicted z_t among the D_i, at r = 1

where the a_i solve an equation for each D_i, n = 1, 2, ..., so that the terms of these orders come out right:

    sum_i a_i·r_i^(n-1) = n!·phi_{n+1}(g)·g/B,   phi_1(g) = (e^g - 1)/g,   phi_{n+1}(g) = (phi_n(g) - 1/n!)/g

A single a_1 is 1/2, as published, to which that of the equation tends for small g.

The output at a predicted state serves the next step too, so each row corrects where it stands and predicts the next
state; the corrected state is a memory. The last state is predicted only.
"""

from __future__ import annotations

import math

import numpy as np

from diffusion_distill.base.errors import positive_int
from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.solvers.ddim import along_difference, before
from diffusion_distill.solvers.dpm_solver import Step, step_order
from diffusion_distill.solvers.forms import Form, Y, estimate, register
from diffusion_distill.solvers.kinds import own_output, start_scale
from diffusion_distill.solvers.table import Table, build

STATE, LAST = register("state"), register("last")
VARIANTS = ("bh1", "bh2")


def unipc(
    grid: Level,
    order: int = 3,
    *,
    variant: str = "bh2",
    output: str = "x_hat",
    lower_order_final: bool = True,
    correct_final: bool = False,
) -> Table:
    """The table of UniPC on a grid [steps + 1]; NFE = steps, one more with `correct_final`.

    Args:
      order: of the predictor, at least 1; the corrector raises it by one.
      variant: 'bh1' or 'bh2'.
      output: 'x_hat' or 'eps', the outputs that are combined.
      lower_order_final: the last steps are of lower order.
      correct_final: the last state, which must not be at zero noise, is corrected too. (The published program does so
        in runs of fewer steps than its order.)

    Raises:
      ValueError: unknown settings, a grid that does not decrease, or no noise at the end to be corrected at.
    """
    order = positive_int("The order of UniPC", order)
    if variant not in VARIANTS:
        raise ValueError(f"The variant of UniPC must be one of {VARIANTS}, got {variant!r}.")
    grid = grids.check(grid)
    if correct_final and not grid.sigma[-1]:
        raise ValueError("The state at zero noise cannot be corrected: leave out correct_final.")
    output, steps, init = own_output(grid, output), len(grid.sigma) - 1, start_scale(grid.at(0))
    memories = ["last", *(f"last_{j}" for j in range(2, order + 1))]  # outputs of 1, 2, ... steps ago
    older = list(map(register, memories))

    def update(k: int, start: Form, outputs: list[Form], reached: Form | None = None) -> Form:
        past = [grid.at(k - j) for j in range(step_order(k, order, steps, lower_order_final))]
        return _update(Step(past[0], grid.at(k + 1), output), start, outputs, past, variant, reached)

    rows, directions = [], []
    for k in range(steps + correct_final):
        s = grid.at(k)
        newest = estimate(output, s)
        corrected = update(k - 1, STATE, older, newest) if k else Y
        kept = dict(zip(memories, [newest, *older[:-1]], strict=True))
        predicted = update(k, corrected, [newest, *older]) if k < steps else corrected
        rows.append({"y": predicted, "state": corrected, **kept})
        previous = before(k, output, LAST, init)
        along = along_difference(s, grid.at(k + 1), output, newest, previous, absorbed=False) if k < steps else []
        directions.append(along)
    path = [*range(steps + 1), steps][: len(rows) + 1]
    return build(
        grid.at(path[:-1]),
        rows,
        registers=("y", "state", *memories),
        init=init,
        directions=directions,
        path=grid.at(path),
    )


def _update(
    step: Step, start: Form, outputs: list[Form], levels: list[Level], variant: str, reached: Form | None = None
) -> Form:
    """A step from `start` with outputs at levels, both newest first; `reached`, the output at its end, corrects it."""
    y = step.first_order(outputs[0], start)
    if step.t.sigma == 0:
        return y
    ratios = [Step(levels[0], level, step.output).h / step.h for level in levels[1:]]
    slopes = [(old - outputs[0]) / r for old, r in zip(outputs[1:], ratios, strict=False)]
    if reached is not None:
        ratios, slopes = [*ratios, 1.0], [*slopes, reached - outputs[0]]
    if not slopes:
        return y
    scale = step.g if variant == "bh1" else math.expm1(step.g)
    for a, slope in zip(_weights(ratios, step.g, scale), slopes, strict=True):
        y = y - step.weight * scale * a * slope
    return y


def _weights(ratios: list[float], g: float, scale: float) -> np.ndarray:
    """The a_i; a single one is 1/2, to which the exact one tends, as published."""
    if len(ratios) == 1:
        return np.array([0.5])
    count, psi, right = len(ratios), math.expm1(g) / g - 1, []
    for n in range(1, count + 1):
        right.append(psi * math.factorial(n) / scale)
        psi = psi / g - 1 / math.factorial(n + 1)
    return np.linalg.solve(np.vander(ratios, count, increasing=True).T, right)
