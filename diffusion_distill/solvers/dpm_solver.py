"""DPM-Solver, arXiv:2206.00927, and DPM-Solver++, arXiv:2211.01095: exponential integrators in the half log-SNR L.

With L = log(alpha/sigma) the flow is linear in z once the output D is given, and both solvers are one formula:

                 D        H (z's own factor)   T (D's factor)   g (step)
    DPM-Solver   eps      alpha                sigma            h = L_t - L_s
    ++           x_hat    sigma                alpha            -h

    order 1      z_t = (H_t/H_s)·z_s - T_t·(e^g - 1)·D_s                                             (this is DDIM)
    order 2      ... - c·T_t·D1
    order 3      ... - T_t·psi_2·D1 - T_t·psi_3·D2,       psi_2 = (e^g - 1)/g - 1,  psi_3 = psi_2/g - 1/2

D1 and D2 are divided differences of outputs: at nodes s_1, s_2 inside the step (singlestep), at fractions r_1, r_2 of
it, or at the levels before (multistep). c is (e^g - 1)/2 ('dpmsolver') or psi_2 ('taylor'). A table of singlestep has a
grid with the nodes in it, one level per evaluation, so NFE is the number of steps of the grid; `order_plan` says which
of them belong together. The step to zero noise is always of order 1, which gives x_hat.

Of multistep's third order D2 has the published weight, half of a Taylor expansion's, which makes it an order 2 method.

D-DPM-Solver, arXiv:2309.16421 Eq. 29 to 32: the first output of a step is moved by its difference from the last output
of the previous step, and the step's other outputs by their difference terms within the step. A multistep solver has one
output per step, so each output is moved by its difference from the previous one, as in D-DDIM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from diffusion_distill.base.errors import choose, positive_int
from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.solvers.ddim import along_difference, before
from diffusion_distill.solvers.forms import Form, Y, estimate, move, register
from diffusion_distill.solvers.kinds import start_scale
from diffusion_distill.solvers.table import Direction, Table, build

START, LAST = register("start"), register("last")
FIRST, SECOND = register("first"), register("second")  # outputs at the start of a step and at its first node
KINDS = ("dpmsolver", "taylor")


def tabulate(
    grid: Level,
    order: int = 2,
    *,
    output: str,
    method: str = "multistep",
    kind: str = "dpmsolver",
    plan: Sequence[int] | None = None,
    lower_order_final: bool | None = None,
) -> Table:
    """The table of DPM-Solver (output 'eps') or DPM-Solver++ ('x_hat') on a grid [nfe + 1].

    Args:
      order: 1 (DDIM), 2 or 3.
      output: 'eps' or 'x_hat', whose differences are taken.
      method: 'multistep', or 'singlestep' with its nodes among the levels of the grid.
      kind: 'dpmsolver' or 'taylor': how differences enter.
      plan: of singlestep, the orders of its steps, which sum to nfe; `order_plan` by default.
      lower_order_final: of multistep: the last steps are of lower order; by default if there are fewer than 10.

    Raises:
      ValueError: unknown settings, a plan that does not fit the grid, or a grid that does not decrease.
    """
    _check_order(order)
    make = choose("method of DPM-Solver", method, METHODS)
    if kind not in KINDS:
        raise ValueError(f"The kind of DPM-Solver must be one of {KINDS}, got {kind!r}.")
    grid = grids.check(grid)
    return make(grid, output, kind, order, plan, lower_order_final)


dpm_solver = partial(tabulate, output="eps")
dpm_solver_pp = partial(tabulate, output="x_hat")


def order_plan(nfe: int, order: int) -> list[int]:
    """The orders of singlestep's steps for a number of evaluations: mostly `order`, with lower ones at the end.

    Source: arXiv:2206.00927, section 3.4 and its code; 3 steps of order 3 for 9 evaluations are [3, 3, 2, 1].
    """
    nfe, order = positive_int("The number of evaluations", nfe), _check_order(order)
    if order == 3:
        tail = {0: [2, 1], 1: [1], 2: [2]}[nfe % 3]
        return [3] * ((nfe - sum(tail)) // 3) + tail
    return [order] * (nfe // order) + [1] * (nfe % order)


def _check_order(order: int) -> int:
    if isinstance(order, bool | float) or order not in (1, 2, 3):
        raise ValueError(f"DPM-Solver has the orders 1, 2 and 3, got order={order!r}.")
    return order


class Step(NamedTuple):
    """The formula of both solvers from level s to level t."""

    s: Level
    t: Level
    output: str

    @property
    def h(self) -> float:
        """The step in half log-SNR."""
        return float(self.t.logsnr - self.s.logsnr) / 2

    @property
    def g(self) -> float:
        """h, or -h for x_hat."""
        return self.h if self.output == "eps" else -self.h

    @property
    def weight(self) -> float:
        """T at the level reached."""
        return float(self.t.sigma if self.output == "eps" else self.t.alpha)

    def coefficient(self, kind: str) -> float:
        """That of D1 in order 2, with its sign."""
        return -self.weight * (0.5 * math.expm1(self.g) if kind == "dpmsolver" else self.psi_2)

    @property
    def psi_2(self) -> float:
        """(e^g - 1)/g - 1."""
        return math.expm1(self.g) / self.g - 1

    @property
    def psi_3(self) -> float:
        """psi_2/g - 1/2."""
        return self.psi_2 / self.g - 0.5

    def first_order(self, estimate: Form, y: Form = Y) -> Form:
        """DDIM."""
        return move(self.s, self.t, self.output, estimate, y)


# --------------------------------------------------------------------------------------------- singlestep


def _singlestep(
    grid: Level, output: str, kind: str, order: int, plan: Sequence[int] | None, lower_order_final: bool | None
) -> Table:
    if lower_order_final is not None:
        raise ValueError(f"lower_order_final is for method='multistep', got {lower_order_final}. Use a plan instead.")
    nfe, clean = len(grid.sigma) - 1, not grid.sigma[-1]
    if plan is None:
        plan = [*order_plan(nfe - 1, order), 1] if clean and nfe > 1 else order_plan(nfe, order)
    if sum(plan) != nfe or not set(plan) <= {1, 2, 3} or (clean and plan[-1] != 1):
        raise ValueError(
            f"The plan {list(plan)} must be of orders 1 to 3 that sum to the grid's {nfe} steps, "
            "with order 1 for a step to zero noise."
        )
    init, rows, directions, begin = start_scale(grid.at(0)), [], [], 0
    for each in plan:
        levels = [grid.at(begin + i) for i in range(each + 1)]
        previous = before(begin, output, LAST, init)
        for made in STAGES[each](levels, output, kind, previous):
            rows.append(made[0])
            directions.append(made[1])
        begin += each
    registers = ("y", "start", "first", "second", "last")[: 2 + max(plan)] if max(plan) > 1 else ("y",)
    registers = tuple(dict.fromkeys((*registers, "last")))
    told = grid.at(slice(None, -1))
    return build(told, rows, registers=registers, init=init, directions=directions, path=grid)


Row = tuple[dict[str, Form], list[Direction]]


def _order_1(levels: list[Level], output: str, kind: str, previous: Form | None) -> list[Row]:
    s, t = levels
    newest = estimate(output, s)
    row = {"y": move(s, t, output, newest), "last": newest}
    return [(row, along_difference(s, t, output, newest, previous, absorbed=False))]


def _order_2(levels: list[Level], output: str, kind: str, previous: Form | None) -> list[Row]:
    s, s1, t = levels
    whole, r1 = Step(s, t, output), Step(s, s1, output).h / Step(s, t, output).h
    begin = _begin(s, s1, output, previous)
    newest = estimate(output, s1)
    factor = whole.coefficient(kind) / r1
    final = {"y": whole.first_order(FIRST, START) + factor * (newest - FIRST), "last": newest}
    return [begin, (final, [Direction(newest - FIRST, factor, absorbed=False)])]


def _order_3(levels: list[Level], output: str, kind: str, previous: Form | None) -> list[Row]:
    s, s1, s2, t = levels
    whole, middle = Step(s, t, output), Step(s, s2, output)
    r1, r2 = (Step(s, node, output).h / whole.h for node in (s1, s2))
    begin = _begin(s, s1, output, previous)
    newest, factor = estimate(output, s1), -middle.weight * middle.psi_2 * r2 / r1
    second = {"y": middle.first_order(FIRST, START) + factor * (newest - FIRST), "second": newest}
    at_second = [Direction(newest - FIRST, factor, absorbed=False)]
    newest, plain = estimate(output, s2), whole.first_order(FIRST, START)
    along = -whole.weight * whole.psi_2 / r2
    if kind == "dpmsolver":
        final = plain + along * (newest - FIRST)
    else:
        slopes = (SECOND - FIRST) / r1, (newest - FIRST) / r2
        d1, d2 = (r2 * slopes[0] - r1 * slopes[1]) / (r2 - r1), 2 * (slopes[1] - slopes[0]) / (r2 - r1)
        final = plain - whole.weight * (whole.psi_2 * d1 + whole.psi_3 * d2)
    at_third = [Direction(newest - SECOND, along, absorbed=False)]
    return [begin, (second, at_second), ({"y": final, "last": newest}, at_third)]


def _begin(s: Level, s1: Level, output: str, previous: Form | None) -> Row:
    """The first evaluation of a step of two or three: to the first node."""
    newest = estimate(output, s)
    row = {"start": Y, "first": newest, "y": move(s, s1, output, newest)}
    return row, along_difference(s, s1, output, newest, previous, absorbed=False)


STAGES: dict[int, Callable[[list[Level], str, str, Form | None], list[Row]]] = {1: _order_1, 2: _order_2, 3: _order_3}


# ---------------------------------------------------------------------------------------------- multistep


def step_order(k: int, order: int, steps: int, lower_order_final: bool) -> int:
    """The order of multistep's step number k: it rises while outputs are few, and may fall at the end."""
    return min(order, steps - k) if lower_order_final and k >= order - 1 else min(k + 1, order)


def _multistep(
    grid: Level, output: str, kind: str, order: int, plan: Sequence[int] | None, lower_order_final: bool | None
) -> Table:
    if plan is not None:
        raise ValueError(f"A plan of orders is for method='singlestep', got plan={list(plan)}.")
    steps, init = len(grid.sigma) - 1, start_scale(grid.at(0))
    lower = steps < 10 if lower_order_final is None else lower_order_final
    memories = [f"last_{j}" for j in range(2, order)]
    older = [LAST, *map(register, memories)]  # outputs of 1, 2 steps ago
    rows, directions = [], []
    for k in range(steps):
        here = step_order(k, order, steps, lower)
        s, t = grid.at(k), grid.at(k + 1)
        newest = estimate(output, s)
        outputs, levels = [newest, *older][:here], [grid.at(k - j) for j in range(here)]
        y = move(s, t, output, newest)
        if t.sigma > 0:
            y = y + _differences(Step(s, t, output), outputs, levels, kind)
        kept = dict(zip(["last", *memories], [newest, *older[:-1]], strict=True))
        rows.append({"y": y, **kept})
        directions.append(along_difference(s, t, output, newest, before(k, output, LAST, init), absorbed=False))
    return build(
        grid.at(slice(None, -1)),
        rows,
        registers=("y", "last", *memories),
        init=init,
        directions=directions,
        path=grid,
    )


def _differences(step: Step, outputs: list[Form], levels: list[Level], kind: str) -> Form:
    """The terms that past outputs, newest first, add to the first-order step."""
    if len(outputs) == 1:
        return Form()
    ratios = [Step(old, new, step.output).h / step.h for new, old in pairwise(levels)]
    slopes = [(new - old) / r for (new, old), r in zip(pairwise(outputs), ratios, strict=True)]
    if len(outputs) == 2:
        return step.coefficient(kind) * slopes[0]
    change = (slopes[0] - slopes[1]) / (ratios[0] + ratios[1])
    d1 = slopes[0] + ratios[0] * change
    return -step.weight * (step.psi_2 * d1 + step.psi_3 * change)


METHODS: dict[str, Callable[..., Table]] = {"singlestep": _singlestep, "multistep": _multistep}
