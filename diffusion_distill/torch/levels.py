"""Which levels to spend N steps on: those that lose least, from one trajectory of the model.

    chosen = choose_levels(pipeline, 10, prompt=prompts)
    chosen.timesteps                                  a list for any pipeline's or scheduler's timesteps=
    chosen.sigmas                                     a list for sigmas=

The model walks once through many candidates with DDIM. From each candidate z_i, with the x_hat_i seen there, one step
of DDIM to each later candidate j costs no call of the network. What it loses is its distance from the trajectory,

    cost_ij = ‖ step(z_i, x_hat_i; i → j) - z_j ‖ / norm(alpha_j, sigma_j)

a root mean square in units in which a sample of unit variance stays of its size. Dynamic programming finds the N steps
from the first candidate to the last with the least sum. This is the idea of GITS (arXiv:2405.17326). The sum of `power`
1 takes errors as adding up; a higher one avoids single bad steps.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from diffusion_distill.base.errors import positive_int
from diffusion_distill.process import grids
from diffusion_distill.process.levels import Level
from diffusion_distill.process.noising import ddim_step
from diffusion_distill.solvers import Table
from diffusion_distill.torch import spacing
from diffusion_distill.torch.fitting import WalkingScheduler, scheduler_of, walk

#: Steps of the trajectory among whose levels is chosen, where nobody says otherwise.
CANDIDATES = 50


class Levels(NamedTuple):
    """Levels for a number of steps.

    Attributes:
      timesteps: what the network is told at the beginning of each step, [steps].
      sigmas: sigma/alpha there, of a flow sigma before the scheduler's shift; and at the end, [steps + 1].
      grid: the levels for `DistilledODEScheduler(grid=...)`.
      cost: the sum that they have, and that of equal steps through the candidates.
    """

    timesteps: list[float]
    sigmas: list[float]
    grid: dict[str, list[float]]
    cost: tuple[float, float]


def choose_levels(
    model: Any,
    steps: int,
    *,
    candidates: int = CANDIDATES,
    power: float = 1.0,
    scheduler: Any = None,
    start: torch.Tensor | None = None,
    progress: bool = True,
    **call: Any,
) -> Levels:
    """Chooses the levels of a pipeline's steps, with `candidates` calls of one batch.

    Args:
      model, scheduler, start, progress, call: as in `fit`.
      steps: at most as many as candidates.
      candidates: steps of the trajectory, in the scheduler's own spacing (trailing for models of betas).
      power: of the costs in the sum.

    Raises:
      ValueError: more steps than candidates, a power that is not positive, a walk that was left before its end, or what
        `fit` refuses of a model.
    """
    if not 0 < power < math.inf:
        raise ValueError(f"power must be a positive number, got {power!r}.")
    if positive_int("steps", steps) > positive_int("candidates", candidates):
        raise ValueError(f"{steps} steps cannot be chosen among {candidates} candidates. Take more candidates.")
    own = scheduler_of(model, scheduler)
    how: dict[str, Any] = {"solver": "ddim", "timestep_spacing": "trailing", "fitted": None, "grid": None}
    keeping = KeepingScheduler.from_config(own.config, **how)
    walk(model, keeping, candidates, start, progress, **call)
    if len(keeping.outputs) < (rows := len(keeping.levels().sigma) - 1):
        raise ValueError(f"The walk was left after {len(keeping.outputs)} of {rows} steps.")
    costs = pairwise_costs(keeping.levels(), keeping.states, keeping.outputs) ** power
    path = cheapest_path(costs, steps)
    equal = np.round(np.linspace(0, candidates, steps + 1)).astype(int)
    grid = keeping.levels().at(np.array(path))
    told, sigmas = keeping.convention.told(grid.at(slice(0, -1))), keeping.given(grid)
    whole = keeping.timesteps.dtype == torch.int64
    sums = tuple(float(costs[one[:-1], one[1:]].sum()) for one in (np.array(path), equal))
    timesteps = np.round(told).astype(int).tolist() if whole else told.tolist()
    return Levels(timesteps, sigmas.tolist(), grids.to_numbers(grid) or {}, sums)  # type: ignore[arg-type]


class KeepingScheduler(WalkingScheduler):
    """A scheduler that keeps what the network sees in each row, and its x_hat, on the host."""

    states: list[torch.Tensor]
    outputs: list[torch.Tensor]

    def levels(self) -> Level:
        """The candidates, [steps + 1]."""
        return self._grid

    def given(self, grid: Level) -> np.ndarray:
        """The sigmas of levels as `sigmas=` takes them: of a flow before its shift."""
        sigmas = self.convention.sigmas(grid)
        return spacing.unshifted(self.config, sigmas, self._mu) if self.config.family == "flow" else sigmas

    def _use(self, grid: Level, device: Any) -> None:
        super()._use(grid, device)
        self.states, self.outputs = [], []

    def _advance(self, row: Table, registers: tuple, x_hat: torch.Tensor) -> tuple:
        self.states.append(registers[0].cpu())
        self.outputs.append(x_hat.cpu())
        found = super()._advance(row, registers, x_hat)
        if len(self.states) == self._table.nfe:
            self.states.append(found[0].cpu())
        return found


def pairwise_costs(grid: Level, states: list[torch.Tensor], outputs: list[torch.Tensor]) -> np.ndarray:
    """What a step of DDIM from each level of a trajectory to each later one loses, [n + 1, n + 1]; inf to earlier ones.

    Args:
      grid: [n + 1].
      states: of the trajectory, n + 1 times [batch, ...].
      outputs: x_hat of the first n.
    """
    costs = np.full((len(states), len(states)), np.inf)
    for i, x_hat in enumerate(outputs):
        for j in range(i + 1, len(states)):
            lost = ddim_step(states[i], x_hat, grid.at(i), grid.at(j)) - states[j]
            costs[i, j] = float(lost.square().mean().sqrt()) / np.hypot(grid.alpha[j], grid.sigma[j])
    return costs


def cheapest_path(costs: np.ndarray, steps: int) -> list[int]:
    """The numbers [steps + 1] from 0 to n with the least sum of costs [n + 1, n + 1] of their steps."""
    best, before = costs[0].copy(), []
    for _ in range(steps - 1):
        through = best[:, None] + costs
        before.append(through.argmin(axis=0))
        best = through.min(axis=0)
    path = [len(costs) - 1]
    for places in reversed(before):
        path.append(int(places[path[-1]]))
    return [0, *reversed(path)]
