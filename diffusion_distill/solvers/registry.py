"""The solvers by name, and how many steps each makes of a number of evaluations.

A new solver is one file with one function `grid -> Table` and one line here (docs/solvers.md shows it). The function's
other parameters are the solver's options (options.py). One that has the parameter `process` is given the model's there.

Every solver has the option `ending` too: how a step to zero noise ends. 'published' is the solver's own way; some
extrapolate there, so that the sample is not an output of the network. With 'x_hat' it is the network's last x_hat.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from diffusion_distill.base.errors import choose, positive_int
from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Process
from diffusion_distill.solvers.ancestral import ancestral
from diffusion_distill.solvers.ddim import ddim
from diffusion_distill.solvers.ddim_variants import ddim_all, ddim_lookahead, ddim_sep, ddim_two
from diffusion_distill.solvers.deis import deis
from diffusion_distill.solvers.dpm_solver import dpm_solver, dpm_solver_pp
from diffusion_distill.solvers.general.ablation import ablation
from diffusion_distill.solvers.general.runge_kutta import midpoint, rk4
from diffusion_distill.solvers.general.two_stage import two_stage
from diffusion_distill.solvers.heun import heun
from diffusion_distill.solvers.ipndm import ipndm
from diffusion_distill.solvers.kinds import is_ve
from diffusion_distill.solvers.options import check, known, parse
from diffusion_distill.solvers.pure_noise import from_pure_noise
from diffusion_distill.solvers.table import Table
from diffusion_distill.solvers.unipc import unipc

SOLVERS: dict[str, Callable[..., Table]] = {
    "ddim": ddim,
    "euler": ddim,
    "ancestral": ancestral,
    "heun": heun,
    "midpoint": midpoint,
    "rk4": rk4,
    "two_stage": two_stage,
    "ablation": ablation,
    "ipndm": ipndm,
    "deis": deis,
    "dpm_solver": dpm_solver,
    "dpm_solver++": dpm_solver_pp,
    "unipc": unipc,
    "ddim-sep": ddim_sep,
    "ddim-all": ddim_all,
    "ddim-2": ddim_two,
    "ddim-la": ddim_lookahead,
}
#: The solver when nobody says otherwise.
DEFAULT_SOLVER = "ddim"
#: Solvers that integrate in the process's time; in sigma where alpha = 1 (VE), unless a process is asked for.
IN_TIME = {"deis"}
#: Options that all solvers have, and the values of `ending`.
COMMON = {"ending": inspect.Parameter("ending", inspect.Parameter.KEYWORD_ONLY, default="published", annotation=str)}
ENDINGS = {"published": lambda table: table, "x_hat": Table.ended_in_x_hat}


def spelled(name: str, /, **options: Any) -> tuple[str, dict[str, Any]]:
    """The name and the options of a solver written as 'deis order=3': ('deis', {'order': 3}).

    Args:
      options: further ones.

    Raises:
      ValueError: an unknown solver, a part that is not option=value, or an option that is given twice.
      TypeError: an option that the solver does not have, or a value of another type than it takes.
    """
    solver, written = parse(name) if isinstance(name, str) else (name, {})
    choose("solver", solver, SOLVERS)
    if twice := sorted(set(written) & set(options)):
        raise ValueError(
            f"The option {twice[0]!r} is given behind the name, in {name!r}, and by keyword. Leave one out."
        )
    options = {**written, **options}
    check(solver, {**options_of(solver), **COMMON}, options)
    return solver, options


def options_of(solver: str) -> dict[str, inspect.Parameter]:
    """A solver's own options. The process is one where it is a choice (`IN_TIME`), not where it has to be known."""
    found = known(SOLVERS[solver])
    return {name: option for name, option in found.items() if name != "process" or solver in IN_TIME}


def tabulate(solver: str, grid: Level, process: Process | None = None, /, **options: Any) -> Table:
    """The table of a solver by name on a grid [steps + 1], with its directions if it has some.

    The first three are given by place, because a solver may have options of these names. Where a grid begins without
    signal (alpha = 0, as rectified flows do), its first step is DDIM's, and the solver goes on from there.

    Args:
      solver: a name of `SOLVERS`, perhaps with options: 'dpm_solver++ order=3 method=singlestep'.
      process: the model's, for the solvers that need it: for levels between those of the grid, or for its time.
      options: of the solver, more of them.

    Raises:
      ValueError, TypeError: what `spelled` or the solver refuses.
    """
    solver, options = spelled(solver, **options)
    ending = options.pop("ending", "published")
    ended = choose("ending", ending, ENDINGS)
    if ending == "x_hat" and grid.sigma[-1] > 0:
        raise ValueError("ending='x_hat' is for a grid that ends at zero noise; this one ends before. Leave it out.")
    in_sigma = solver in IN_TIME and is_ve(grid)
    if process is not None and "process" in known(SOLVERS[solver]) and not in_sigma:
        options = {"process": process, **options}
    make = partial(SOLVERS[solver], **options)
    return ended(make(grid) if grid.alpha[0] > 0 else from_pure_noise(grids.check(grid), make))


def steps_for(solver: str, nfe: int, /, clean: bool = True, pure: bool = False, **options: Any) -> int:
    """The most steps of a solver with at most `nfe` evaluations.

    Args:
      clean: the last step is to zero noise.
      pure: the first step is from a level without signal.

    Raises:
      ValueError, TypeError: what `spelled` refuses, or a solver that needs more evaluations for one step.
    """
    for steps in range(positive_int("nfe", nfe), 0, -1):
        level = np.arange(steps, -1, -1.0) if clean else np.arange(steps + 1, 0, -1.0)
        grid = Level(np.append(0.0 if pure else 1.0, np.ones(steps)), level)
        if tabulate(solver, grid, **options).nfe <= nfe:
            return steps
    raise ValueError(f"The solver {solver!r} takes no step with {nfe} evaluations.")
