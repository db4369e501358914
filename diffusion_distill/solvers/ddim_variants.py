"""The variants of D-DDIM that arXiv:2309.16421 compares it with (Eq. 53 to 57 and its Tables 2 and 4).

D is the network's eps (VP) or x_hat (VE), D_T its first output; before that there is the noise only:

    sep         d = lambda_1·D_t + lambda_2·D_{t+1}
    all         d = sum_k lambda_k·D_k over all outputs so far
    two         d = D_t + lambda_1·(D_t - D_{t+1}) + lambda_2·(D_t - D_{t+2})
    lookahead   x_hat_t + lambda·(x_hat_t - x_hat_{t+1}) in place of x_hat, and eps_t as it is

lambda = 0 is DDIM here for all of them: of 'sep' and 'all', the paper's lambda_1 is one more than the one here. The
paper searches one lambda for all steps of 'lookahead', and one of D-DDIM, 'Fixed': see `solvers.search`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.solvers.forms import Form, estimate, move, move_coefficients, register
from diffusion_distill.solvers.kinds import own_output, start_scale
from diffusion_distill.solvers.table import Direction, Table, build


def ddim_variant(grid: Level, variant: str, output: str | None = None) -> Table:
    """The table of DDIM on a grid [steps + 1] with a variant's directions; NFE = steps.

    Args:
      variant: 'sep', 'all', 'two' or 'lookahead'.
      output: 'eps' or 'x_hat', what is combined; by default eps for VP, x_hat for other levels.

    Raises:
      ValueError: a grid that does not decrease, or an output that is unknown or not the variant's.
    """
    grid = grids.check(grid)
    if variant == "lookahead":
        if output == "eps":
            raise ValueError("LA-DDIM looks ahead in x_hat and keeps eps as it is: leave out output='eps'.")
        output = output or "x_hat"
    output, steps, init = own_output(grid, output), len(grid.sigma) - 1, start_scale(grid.at(0))
    memories = [f"last_{j}" for j in range(1, (steps if variant == "all" else 3))]
    older, rows, directions = list(map(register, memories)), [], []
    for k in range(steps):
        t, s = grid.at(k), grid.at(k + 1)
        newest = estimate(output, t)
        past = older[:k] if k or output == "x_hat" else [older[0] / init] if older else []
        factor = float(s.alpha) if variant == "lookahead" else move_coefficients(t, s, output)[1]
        rows.append({"y": move(t, s, output, newest), **dict(zip(memories, [newest, *older], strict=False))})
        directions.append([Direction(form, factor, absorbed=False) for form in DIFFERENCES[variant](newest, past)])
    told = grid.at(slice(None, -1))
    return build(told, rows, registers=("y", *memories), init=init, directions=directions, path=grid)


#: variant -> (newest output, those before, newest first) -> what lambdas multiply.
DIFFERENCES: dict[str, Callable[[Form, list[Form]], list[Form]]] = {
    "sep": lambda newest, past: [newest, *past[:1]],
    "all": lambda newest, past: [newest, *past],
    "two": lambda newest, past: [newest - old for old in past[:2]],
    "lookahead": lambda newest, past: [newest - old for old in past[:1]],
}

ddim_sep = partial(ddim_variant, variant="sep")
ddim_all = partial(ddim_variant, variant="all")
ddim_two = partial(ddim_variant, variant="two")
ddim_lookahead = partial(ddim_variant, variant="lookahead")
