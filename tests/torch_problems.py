"""What both sides compute, JAX here and PyTorch elsewhere: solvers, levels, and a model in closed form."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffusion_distill.base.arrays import expand, namespace
from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import VE, DiscreteBetas, RectifiedFlow
from diffusion_distill.solvers import SOLVERS, Table, tabulate

PROCESSES = {"discrete": DiscreteBetas(), "ve": VE(), "flow": RectifiedFlow(3.0)}
STEPS = 5
#: All solvers that draw no noise, and further ones by their options.
OPTIONS = (
    *("deis order=2", "dpm_solver order=3 method=singlestep", "dpm_solver++ order=3 method=singlestep"),
    *("dpm_solver++ order=3", "unipc order=3", "two_stage alpha=0.5 trial=log", "heun keep_slope=true"),
)
CASES = [f"{name}|{process}" for name in (*SOLVERS, *OPTIONS) if name != "ancestral" for process in PROCESSES]
#: The same draws of unit noise, [batch, channels, height, width].
START = np.random.default_rng(0).standard_normal((3, 2, 4, 4))


def whole_table(case: str) -> Table:
    """The table of a case 'solver|process', with its directions."""
    solver, name = case.split("|")
    process = PROCESSES[name]
    return tabulate(solver, grid_of(name), process)


def lambdas_of(case: str) -> np.ndarray | None:
    """Some lambdas; None where there are none."""
    directions = whole_table(case).directions
    if directions is None:
        return None
    shape = directions.weights.shape[:2]
    return 0.1 * np.sin(1.0 + np.arange(np.prod(shape)).reshape(shape))


def table_of(case: str, fitted: bool = False) -> Table:
    """The plain table of a case, or the one with its lambdas."""
    table, lambdas = whole_table(case), lambdas_of(case)
    return table.plain() if lambdas is None or not fitted else table.distilled(lambdas)


def denoise(z: Any, level: Level, cond: Any = None) -> Any:
    """x_hat of data near -1 and 1: smooth, and not linear in z."""
    level = Level(*map(np.float64, level)) if np.ndim(level.sigma) == 0 else level
    steep = level.alpha / (level.sigma**2 + 0.05 * level.alpha**2)
    return namespace(z).tanh(expand(steep, z) * z)


#: Solvers that both sides fit, with the scales of their teachers.
FITS = (("heun", 4), ("ipndm", 3), ("dpm_solver++", 2), ("ddim", 10))


def grid_of(name: str) -> Level:
    """The grid of a process that all cases have; it ends at zero noise."""
    return grids.clean_end(grids.make_grid(PROCESSES[name], STEPS))
