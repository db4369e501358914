"""The solvers by name, and how many steps each makes of a number of evaluations.

A new solver is one file with one function `grid -> Table` and one line here (docs/solvers.md shows it). A function with
an argument `schedule` is given the model's, if time means something in it.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from diffusion_distill.diffusion.schedules import Schedule
from diffusion_distill.errors import choose, positive_int
from diffusion_distill.levels import Level
from diffusion_distill.solvers.ablation import ablation
from diffusion_distill.solvers.ancestral import ancestral
from diffusion_distill.solvers.ddim import ddim
from diffusion_distill.solvers.ddim_variants import ddim_all, ddim_lookahead, ddim_sep, ddim_two
from diffusion_distill.solvers.deis import deis
from diffusion_distill.solvers.dpm_solver import dpm_solver, dpm_solver_pp
from diffusion_distill.solvers.heun import heun
from diffusion_distill.solvers.ipndm import ipndm
from diffusion_distill.solvers.runge_kutta import midpoint, rk4
from diffusion_distill.solvers.table import Table
from diffusion_distill.solvers.unipc import unipc

SOLVERS: dict[str, Callable[..., Table]] = {
    "ddim": ddim,
    "euler": ddim,
    "ancestral": ancestral,
    "heun": heun,
    "midpoint": midpoint,
    "rk4": rk4,
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


def spelled(name: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of a solver written as 'deis order=3': ('deis', {'order': 3}).

    Raises:
      ValueError: an unknown solver, or a part that is not option=value.
    """
    solver, *parts = name.split() or [""]
    choose("solver", solver, SOLVERS)
    options: dict[str, Any] = {}
    for part in parts:
        key, found, value = part.partition("=")
        if not found:
            raise ValueError(f"Options of a solver are written option=value, got {part!r} in {name!r}.")
        try:
            options[key] = json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
        except json.JSONDecodeError:
            options[key] = value
    return solver, options


def tabulate(solver: str, grid: Level, schedule: Schedule | None = None, **options: Any) -> Table:
    """The table of a solver by name on a grid [steps + 1], with its directions if it has some.

    Args:
      solver: a name of `SOLVERS`, perhaps with options: 'dpm_solver++ order=3 method=singlestep'.
      schedule: the model's; solvers that integrate in time take it if it is VP (for alpha = 1 time is sigma).
      options: of the solver, more of them.

    Raises:
      ValueError: an unknown solver, or what the solver refuses.
      TypeError: an option the solver does not have.
    """
    solver, written = spelled(solver)
    make, options = SOLVERS[solver], {**written, **options}
    known = inspect.signature(make).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()) and (wrong := set(options) - set(known)):
        allowed = ", ".join(name for name in known if name != "grid")
        raise TypeError(f"The solver {solver!r} has no option {', '.join(sorted(wrong))}. Known: {allowed or 'none'}.")
    if schedule is not None and "schedule" in known and grid.alpha[0] < 1:
        options = {"schedule": schedule, **options}
    return make(grid, **options)


def steps_for(solver: str, nfe: int, clean: bool = True, **options: Any) -> int:
    """The steps of a solver with at most `nfe` evaluations, the last of them to zero noise if `clean`.

    Raises:
      ValueError: an unknown solver, or one that needs more evaluations for one step.
    """
    for steps in range(positive_int("nfe", nfe), 0, -1):
        level = np.arange(steps, -1, -1.0) if clean else np.arange(steps + 1, 0, -1.0)
        if tabulate(solver, Level(np.ones(steps + 1), level), **options).nfe <= nfe:
            return steps
    raise ValueError(f"The solver {solver!r} takes no step with {nfe} evaluations.")
