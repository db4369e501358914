"""Fixtures of EDM's samplers and grids (folder edm): samplers.npz, grids.npz.

The network of samplers.npz is the README's, exact for a mixture of two Gaussians. Tables run in float64 by
`run_host` at the README's 1e-9 (1e-6 for the schedules vp and ve), and by the engine in float32 at its 1e-5 (1e-3
for ve), relative to the largest state. The published levels of iDDPM's discretization come from a float32 step: they
are compared at the README's 1e-3, and these samplers start from the recorded ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from flax import struct

from diffusion_distill.base.arrays import namespace
from diffusion_distill.process import edm_grids
from diffusion_distill.process.levels import Level
from diffusion_distill.solvers import Table, ablation, engine, heun, two_stage
from diffusion_distill.solvers.engine import run_host
from diffusion_distill.solvers.general.ablation import TimeSchedule, time_schedule
from golden_checks.common import FLOAT64, Fixture, Kind, Mode, Rule, exact, relative

#: schedule -> (float64, float32), README.
STATE = {"linear": (1e-9, 1e-5), "vp": (1e-6, 1e-5), "ve": (1e-6, 1e-3)}
GRID, IDDPM, IDDPM_FLOAT32 = relative(1e-12), relative(1e-3), relative(1e-4)
#: The program's names -> the package's.
CHURN = {"S_churn": "s_churn", "S_min": "s_min", "S_max": "s_max", "S_noise": "s_noise"}


# ------------------------------------------------------------------------------------------------- checks


def check_samplers(fixture: Fixture, mode: Mode) -> None:
    latents, known = mode.array(fixture.input("latents")), known_levels(fixture)
    network = Mixture(*(mode.array(fixture.input(f"gmm_{name}")) for name in ("weights", "means", "stds")))
    for name, meta in fixture.meta["cases"].items():
        with fixture.attempt(name, mode):
            check_case(fixture, mode, case_of(fixture, name, meta, known), network, latents)


def check_case(fixture: Fixture, mode: Mode, case: Case, network: Mixture, latents: Any) -> None:
    """Tables, final states and all states of one sampler."""
    if mode is FLOAT64:
        check_tables(fixture, case)
    draw = partial(state, case, mode, network, latents)
    rule = state_rule(case, mode, fixture.meta["cases"][case.name])
    fixture.compare(f"{case.name}.x_final", draw(case.steps), mode, rule)
    if f"{case.name}.x_steps" in fixture:
        states = [np.asarray(draw(steps)) for steps in range(case.steps + 1)]
        fixture.compare(f"{case.name}.x_steps", np.stack(states), mode, rule)


def check_tables(fixture: Fixture, case: Case) -> None:
    """What is made on the host before anything is sampled."""
    table, own, bound = case.table(case.steps), case.own_grid.sigma[:-1], STATE[case.schedule][0]
    told = table.level.sigma / table.level.alpha
    times = [case.schedule_of_times.time(sigma) for sigma in case.grid.sigma]
    begins = [case.schedule_of_times.time(sigma) for sigma in told[:: case.stages]]

    def compare(key: str, got: Any, rule: Rule) -> None:
        fixture.compare(f"{case.name}.{key}", got, FLOAT64, rule._replace(text=f"{rule.text} (the states')"))

    compare("sigma_steps", own, IDDPM if case.discretization == "iddpm" else relative(1e-9))
    compare("t_steps", times, relative(bound))
    compare("eval_sigmas", told, relative(bound))
    compare("t_hat", begins, relative(bound))
    fixture.report(f"{case.name} nfe", abs(table.nfe - fixture.meta["cases"][case.name]["nfe"]), FLOAT64, exact())


def check_grids(fixture: Fixture, mode: Mode) -> None:
    compare = partial(fixture.compare, mode=mode)
    for match in fixture.matches("sigma.abl_(.*)_n([0-9]+)"):
        sigma = edm_grids.discretized(match[1], int(match[2])).sigma[:-1]
        compare(match[0], sigma, rule=IDDPM if match[1] == "iddpm" else GRID)
    for match in fixture.matches("t.edm_(.*)_n([0-9]+)"):
        sigma, schedule = edm_grids.edm(int(match[2])).sigma, time_schedule(match[1])
        rule = rounded_rule(sigma) if match[1] == "vp" else GRID
        compare(match[0], [schedule.time(s) for s in sigma], rule=rule)
    compare("iddpm_u_float64", edm_grids.iddpm_sigmas(), rule=GRID)
    compare("iddpm_u_ablation", edm_grids.iddpm_sigmas(), rule=IDDPM)
    compare("iddpm_u_float32_buffer", edm_grids.iddpm_sigmas(dtype=np.float32), rule=IDDPM_FLOAT32)
    if "round.sigma" in fixture:
        known, unclear = fixture.input("iddpm_u_float32_buffer"), fixture.input("round.ambiguous")
        index = edm_grids.nearest(fixture.input("round.sigma"), known.astype(np.float64))
        for key, got in (("round.index", index), ("round.value", known[index])):
            compare(key, np.where(unclear, fixture.arrays[key], got), rule=exact())
    if "vp.t" in fixture:
        sigma = fixture.input("vp.sigma_float64")
        level = edm_grids.VP_BETA.level(fixture.input("vp.t"))
        compare("vp.sigma_float64", level.sigma / level.alpha, rule=rounded_rule(sigma))
        times = edm_grids.VP_BETA.time(Level(np.ones_like(sigma), sigma))
        compare("vp.sigma_inv_float64", times, rule=rounded_rule(sigma))


# ------------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True)
class Case:
    """A run of a sampler in the package's words.

    Attributes:
      make: makes its table, given a grid and churn.
      own_grid: the package's grid; `grid` is sampled on.
      stages: evaluations per step but the last.
    """

    name: str
    discretization: str
    schedule: str
    schedule_of_times: TimeSchedule
    own_grid: Level
    grid: Level
    make: Callable[..., Table]
    churn: dict[str, Any]
    stages: int
    noises: np.ndarray | None

    @property
    def steps(self) -> int:
        """All of them."""
        return len(self.grid.sigma) - 1

    def table(self, steps: int) -> Table:
        """The table of the first steps; the whole run's churn per step."""
        churn = self.churn | {"s_churn": self.churn.get("s_churn", 0.0) * steps / self.steps}
        return self.make(self.grid.at(slice(None, steps + 1)), **churn)


def known_levels(fixture: Fixture) -> np.ndarray | None:
    """The levels to which some cases round."""
    return fixture.input("iddpm_u_float32").astype(np.float64) if "iddpm_u_float32" in fixture else None


def case_of(fixture: Fixture, name: str, meta: dict[str, Any], known: np.ndarray | None) -> Case:
    """Reads a case's meta; what it does not say is as in EDM.md."""
    given = {"num_steps": 18, "discretization": "edm", "schedule": "linear", "epsilon_s": 1e-3} | meta["kwargs"]
    discretization, schedule, epsilon_s = (given.pop(key) for key in ("discretization", "schedule", "epsilon_s"))
    steps, low, high, rho = (given.pop(key, None) for key in ("num_steps", "sigma_min", "sigma_max", "rho"))
    churn: dict[str, Any] = {ours: float(given.pop(theirs)) for theirs, ours in CHURN.items() if theirs in given}
    within = float(meta["net_sigma_min"]), float(meta["net_sigma_max"])
    sigma_range = edm_grids.sigma_range(discretization, low, high, within=within, epsilon_s=epsilon_s)
    options = {"epsilon_s": epsilon_s} if rho is None else {"epsilon_s": epsilon_s, "rho": rho}
    grid = edm_grids.discretized(discretization, steps, *sigma_range, **options)
    if meta["round_sigma"] != "identity":
        churn["known"] = known
        grid = edm_grids.rounded(grid, known)
    names: dict[str, Any] = {"schedule": schedule, "scaling": "none"}
    if schedule == "vp":
        names |= {"epsilon_s": epsilon_s, "sigma_range": sigma_range}
    noises = f"{name}.noises"
    return Case(
        name,
        discretization,
        schedule,
        time_schedule(schedule, sigma_range, epsilon_s),
        own_grid=grid,
        grid=edm_grids.exploding(fixture.arrays[f"{name}.sigma_steps"]) if discretization == "iddpm" else grid,
        make=partial(edm_sampler if meta["sampler"] == "edm_sampler" else partial(ablation, **names), **given),
        churn=churn,
        stages=1 if given.get("solver") == "euler" else 2,
        noises=fixture.input(noises) if noises in fixture else None,
    )


def edm_sampler(grid: Level, alpha: float = 1.0, **churn: Any) -> Table:
    """The program's sampler, of which Heun's method is the case alpha = 1."""
    return heun(grid, **churn) if alpha == 1 else two_stage(grid, alpha, **churn)


def state(case: Case, mode: Mode, network: Mixture, latents: Any, steps: int) -> Any:
    """The state before step number `steps`: churn, if any, comes with the step."""
    if not steps:
        return case.make(case.grid.at(slice(None, 2))).init * latents
    table, row_noise = case.table(steps), None
    if case.noises is not None:
        row_noise = np.zeros((table.nfe, *latents.shape))
        row_noise[:: case.stages] = case.noises[:steps]
    if mode is FLOAT64:
        return run_host(table, network, latents, row_noise=row_noise)
    return engine.integrate(network, table, latents, row_noise=None if row_noise is None else mode.array(row_noise))


class Mixture(struct.PyTreeNode):
    """The README's network: the mean of the images of which z is a noisy one, for two Gaussians."""

    weights: Any
    means: Any
    stds: Any

    def __call__(self, z: Any, level: Level, labels: Any = None) -> Any:
        xp, (alpha, sigma) = namespace(z), level.expand(z)
        x, s = (z / alpha)[:, None], (sigma / alpha)[:, None]
        std = self.stds.reshape(1, -1, *[1] * (z.ndim - 1))
        variance = std**2 + s**2
        distance = ((x - self.means) ** 2).sum(axis=tuple(range(2, x.ndim)), keepdims=True)
        log_share = (
            xp.log(self.weights).reshape(std.shape) - z[0].size / 2 * xp.log(variance) - distance / (2 * variance)
        )
        share = xp.exp(log_share - log_share.max(axis=1, keepdims=True))
        share = share / share.sum(axis=1, keepdims=True)
        return (share * (std**2 * x + s**2 * self.means) / variance).sum(axis=1)


def state_rule(case: Case, mode: Mode, meta: dict[str, Any]) -> Rule:
    """The README's; in float32 at least five times the recorded deviation of the program with a float32 network.

    That alone is above the README's 1e-5 where steps are so long that the network's rounding is multiplied by hundreds.
    """
    bound, scale = STATE[case.schedule][mode is not FLOAT64], max(1.0, float(meta["x_steps_absmax"]))
    deviation = 0.0 if mode is FLOAT64 else 5 * float(meta.get("abs_dev_with_float32_denoiser", 0.0))
    if deviation <= bound * scale:
        return Rule(bound, "·max(1, x_steps_absmax)", lambda ref: scale)
    return Rule(deviation, " absolute (5·abs_dev_with_float32_denoiser)", lambda ref: 1.0)


def rounded_rule(sigma: np.ndarray) -> Rule:
    """The README's 1e-12, and what the recorded numbers lose in rounding 1 + sigma² to float64."""
    lost = np.divide(2.0**-53, sigma**2, out=np.zeros_like(sigma), where=sigma > 0)
    text = "·(1 + 1.1e-4/sigma²)·|ref| (the recorded numbers rounded 1 + sigma²)"
    return Rule(GRID.bound, text, lambda ref: np.abs(ref) * (1 + lost / GRID.bound))


# -------------------------------------------------------------------------------------------- what there is


def _is_samplers(fixture: Fixture) -> bool:
    return "gmm_weights" in fixture and "cases" in fixture.meta


def _is_grids(fixture: Fixture) -> bool:
    return bool(fixture.matches("sigma.abl_.*") or fixture.matches("iddpm_u_float64"))


KINDS = [
    Kind("edm samplers", _is_samplers, check_samplers),
    Kind("edm grids", _is_grids, check_grids, modes=(FLOAT64,)),
]
