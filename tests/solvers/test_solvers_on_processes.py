"""Every solver on every process: its order, its start, and where D-ODE's fits lead, on data whose flow is known.

The processes are VP, VE, rectified flow, from t < 1 and from t = 1, where there is no signal, and one of no kind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import toys

from diffusion_distill.process.flow import RectifiedFlow
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import Process
from diffusion_distill.process.ve import VE
from diffusion_distill.process.vp import Cosine, IDDPMCosine, LinearBeta
from diffusion_distill.solvers import SOLVERS, Table, dode, steps_for, tabulate
from diffusion_distill.solvers.engine import run_host
from diffusion_distill.solvers.pairing import nested

pytestmark = pytest.mark.fast


@dataclass(frozen=True)
class Odd:
    """alpha = 1 - t², sigma = 2t: alpha² + sigma² is (1 + t²)², and sigma/alpha is the tangent of twice an angle."""

    def level(self, t: Any) -> Level:
        return Level(1 - t**2, 2 * t)

    def time(self, level: Level) -> Any:
        return np.tan(np.arctan2(level.sigma, level.alpha) / 2)


class Case(NamedTuple):
    """A process, and the times between which its flow is followed."""

    process: Process
    start: float
    end: float


CASES: dict[str, Case] = {
    "cosine": Case(Cosine(), 0.75, 0.1),
    "linear beta": Case(LinearBeta(), 0.6, 0.05),
    "iDDPM cosine": Case(IDDPMCosine(), 0.75, 0.1),
    "VE": Case(VE(1.0), 3.0, 0.1),
    "rectified flow": Case(RectifiedFlow(), 0.8, 0.1),
    "shifted flow": Case(RectifiedFlow(shift=3.0), 0.5, 0.1),
    "rectified flow from pure noise": Case(RectifiedFlow(), 1.0, 0.1),
    "odd": Case(Odd(), 0.7, 0.05),
    "odd from pure noise": Case(Odd(), 1.0, 0.05),
}
#: Solvers with their orders; None for one that draws noise. Multistep solvers begin with a step of first order, which
#: leaves order 2 where the flow is curved from the start on; test_solver_families.py has their own orders.
ORDERS: dict[str, int | None] = {
    "ddim": 1,
    "euler": 1,
    **{f"ddim-{variant}": 1 for variant in ("sep", "all", "2", "la")},
    "ancestral": None,
    "heun": 2,
    "midpoint": 2,
    "rk4": 4,
    "two_stage": 2,
    "two_stage trial=log": 2,
    "ablation": 2,
    "ipndm": 2,
    "deis": 2,
    "deis process=null": 2,
    "dpm_solver": 2,
    "dpm_solver++": 2,
    "dpm_solver++ method=singlestep": 2,
    "unipc": 2,
}
every_case = pytest.mark.parametrize("case", CASES)
START = np.random.default_rng(0).standard_normal((3, 5))
DATA: dict[str, Any] = {"Gaussian": toys.Gaussian(0.2, 0.4), "mixture": toys.Mixture()}


def grid_of(case: str, steps: int) -> Level:
    process, start, end = CASES[case]
    return process.level(np.linspace(start, end, steps + 1))


def table_of(solver: str, case: str, steps: int) -> Table:
    return tabulate(solver, grid_of(case, steps), CASES[case].process)


def denoise(data: Any) -> Any:
    return lambda z, level, cond=None: data.raw((), z, level, None, None)


@lru_cache
def truth(data: str, case: str, scale: float) -> np.ndarray:
    return DATA[data].flow(scale * START, grid_of(case, 1).at(0), grid_of(case, 1).at(-1))


def error(data: str, case: str, table: Table) -> float:
    end = run_host(table, denoise(DATA[data]), START)
    return float(np.sqrt(np.mean((end - truth(data, case, float(table.init))) ** 2)))


def test_every_solver_is_tried() -> None:
    assert {solver.split()[0] for solver in ORDERS} == set(SOLVERS)


@every_case
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("solver", [solver for solver, order in ORDERS.items() if order])
def test_order(solver: str, data: str, case: str) -> None:
    """Half the step, 2**order of the error. One step of first order, from pure noise, leaves no more than order 2."""
    order = ORDERS[solver] or 0
    expected = min(order, 2) if case.endswith("pure noise") else order
    steps = 20 if order > 2 else 64 if expected == 2 else 32
    errors = [error(data, case, table_of(solver, case, n).plain()) for n in (steps, 2 * steps)]
    assert math.log2(errors[0] / errors[1]) > expected - 0.3, errors
    assert errors[1] < 0.05


@every_case
@pytest.mark.parametrize("solver", ORDERS)
def test_the_network_is_asked_at_levels_of_the_process_and_the_table_ends_at_the_grids(solver: str, case: str) -> None:
    """Also between the levels of the grid."""
    table, process, grid = table_of(solver, case, 6), CASES[case].process, grid_of(case, 6)
    own = process.level(process.time(table.level))
    np.testing.assert_allclose(np.stack(own), np.stack(table.level), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose([part[0] for part in table.level], grid.at(0), rtol=1e-12, atol=1e-15)
    if table.directions is not None:
        np.testing.assert_allclose([part[-1] for part in table.directions.reached], grid.at(-1), rtol=1e-12)


@pytest.mark.parametrize("case", ["rectified flow from pure noise", "odd from pure noise"])
@pytest.mark.parametrize("solver", ORDERS)
def test_from_pure_noise_the_first_step_is_ddims(solver: str, case: str) -> None:
    grid, seen = grid_of(case, 4), []
    x_hat = lambda z, level, cond=None: seen.append(z) or np.full_like(z, 0.7)  # noqa: E731
    table = table_of(solver, case, 4)
    run_host(table, x_hat, START, row_noise=np.zeros((table.nfe, *START.shape)))
    there = grid.sigma[1] * table.init / grid.sigma[0] * START + grid.alpha[1] * 0.7
    np.testing.assert_allclose(seen[1], there, rtol=1e-12)
    alone = table_of(solver, case, 1)
    assert (alone.nfe, alone.init) == (1, table.init)
    end = run_host(alone, x_hat, START, row_noise=0 * START[None])
    np.testing.assert_allclose(
        end, grid.sigma[-1] * table.init / grid.sigma[0] * START + grid.alpha[-1] * 0.7, rtol=1e-12
    )
    assert steps_for(solver, table.nfe, clean=False, pure=True) == 4


@every_case
@pytest.mark.parametrize("solver", ["ddim", "ddim-2", "ipndm", "deis", "dpm_solver", "dpm_solver++", "unipc", "heun"])
def test_fits_come_nearer_the_flow_than_their_base(solver: str, case: str) -> None:
    """From other noise than they were fitted on."""
    data, process = toys.Mixture(), CASES[case].process
    student = table_of(solver, case, 4)
    teacher = nested(student, process, 10, lambda grid: tabulate(solver, grid, process))
    noise = np.random.default_rng(1).standard_normal((400, 1))
    found = dode.fit_host(denoise(data), student, teacher, noise)
    errors = [error("mixture", case, table) for table in (student.distilled(found.lambdas), student.plain())]
    assert errors[0] < errors[1], errors
