"""Fixtures of the base solvers (folder solvers): mixture, schedules, base_*, reference_convergence, order_smooth.

The network is the README's, exact for a mixture of Gaussians (solvers_common.py). Tables run in float64 by `run_host`
at the README's 1e-8, and by the engine in float32 at its 2e-3, relative to the largest number of a run if above 1.
Runs of fewer than 10 evaluations blow up: there float32 may also differ by 5 times what rounding start and network to
float32 changes in float64. Errors and orders of convergence are float64 only. A run is called in a file by its key
without "final/" or "full/"; `*_run` turn that name and the number of evaluations or sigmas into the package's words.

Left out: the originals' line through the first two knots of the betas, extended to times before the first (our
schedule goes to zero noise there); the toolbox's ipndm_v from the third step on, where its weights are wrong (DODE.md,
section 5).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion_distill.base.arrays import enable_x64
from diffusion_distill.denoisers.clipping import Clipped, Thresholded
from diffusion_distill.process import edm_grids
from diffusion_distill.process.grids import ddim_indices, make_grid, refine, singlestep, spaced_times
from diffusion_distill.process.levels import Level, from_logsnr
from diffusion_distill.process.predictions import eps_from_x
from diffusion_distill.process.processes import (
    IDDPMCosine,
    LinearBeta,
    LinearBetaDiscrete,
    Process,
)
from diffusion_distill.process.vp_discrete import LinearAlphaDiscrete
from diffusion_distill.solvers import Table, ddim, deis, engine, heun, ipndm, two_stage, unipc
from diffusion_distill.solvers.dpm_solver import order_plan, tabulate
from diffusion_distill.solvers.engine import run_host
from golden_checks.common import FLOAT64, Fixture, Kind, Mode, Rule, absolute, of_each, relative
from golden_checks.solvers_common import Mixture, mixture

#: The published schedules, which go on to zero noise at time 0. iPNDM and DEIS have their own between the knots.
DISCRETE, ALPHA = LinearBetaDiscrete(logsnr_max=math.inf), LinearAlphaDiscrete(logsnr_max=math.inf)
LINEAR, COSINE = LinearBeta(t_min=0.0), IDDPMCosine(t_min=0.0, t_max=1.0)
PROCESSES: dict[str, Process] = {"discrete": DISCRETE, "linear": LINEAR, "cosine": COSINE}
FIRST_KNOT = 1 / DISCRETE.steps
T_0 = 1e-3  # where continuous samplers stop
ENDS = {family: {"start": 1.0, "end": T_0} for family in PROCESSES} | {
    "cosine": {"start": IDDPMCosine().t_max, "end": T_0}
}
#: The programs' names of spacings -> the package's.
SKIPS = {"time_uniform": "time", "time_quadratic": "quadratic", "logSNR": "logsnr"}
DEIS_GRIDS = {"t1": "time", "t2": "quadratic", "log1": "logsnr", "rho7": "rho"}
EDM_GRIDS = {"polynomial": "edm", "logsnr": "ve", "time_uniform": "vp"}
SIGMA_RANGE = 0.002, 80.0
#: (float64, float32), README.
STATE, SCHEDULE = (1e-8, 2e-3), (1e-10, 2e-5)
#: Runs of fewer evaluations blow up; there float32 may differ by so many times what rounding the network changes.
ORDINARY_NFE, MAGNIFIED = 10, 5.0
COEFFICIENT = of_each(1e-9)
#: Of errors: what 1e-8 in a state may change, and more where they are large. Of orders: README.
ERRORS, ORDERS = Rule(1e-5, "·(|ref| + 1e-3)", lambda ref: np.abs(ref) + 1e-3), absolute(0.3)
REFERENCE, REFERENCE_STEPS = 1e-5, 200  # of UniPC between two recorded levels


# ------------------------------------------------------------------------------------------------- checks


def check_mixture(fixture: Fixture, mode: Mode) -> None:
    network, probe = mixture(fixture, mode), mode.array(fixture.input("probe_x"))
    index = fixture.input("vp_t_input")
    level, bound = Level(fixture.input("vp_alpha"), fixture.input("vp_sigma")), SCHEDULE[mode is not FLOAT64]
    made = DISCRETE.level(mode.array((index + 1) / DISCRETE.steps))
    for key, got in zip(("vp_alpha", "vp_sigma"), made, strict=True):
        compare_where(fixture, key, got, index >= 0, mode, relative(bound), BEFORE)
    rule = of_each_run(bound)
    x_hats = [network(probe, constant(level.at(k), probe, mode)) for k in range(len(index))]
    eps = [eps_from_x(probe, x, constant(level.at(k), probe, mode)) for k, x in enumerate(x_hats)]
    fixture.compare("vp_x0", stack(x_hats), mode, rule)
    fixture.compare("vp_eps", stack(eps), mode, rule if mode is FLOAT64 else eps_rule(bound, level))
    exploding = [Level(np.float64(1), sigma) for sigma in fixture.input("edm_sigma")]
    denoised = [network(probe, constant(level, probe, mode)) for level in exploding]
    fixture.compare("edm_denoised", stack(denoised), mode, rule)


def check_schedules(fixture: Fixture, mode: Mode) -> None:
    bound = SCHEDULE[mode is not FLOAT64]
    for family in [family for family in PROCESSES if f"{family}/t" in fixture]:
        check_functions(fixture, mode, family, bound)
    if mode is FLOAT64:
        alpha2 = DISCRETE.level(DISCRETE.knots).alpha ** 2
        fixture.compare("alphas_cumprod", alpha2[1:], mode, of_each(bound))
        fixture.compare("betas", 1 - alpha2[1:] / alpha2[:-1], mode, of_each(bound))
        check_grids(fixture, of_each(bound))


def check_functions(fixture: Fixture, mode: Mode, family: str, bound: float) -> None:
    """A schedule at probes, and its inverse."""
    schedule, times = PROCESSES[family], fixture.input(f"{family}/t")
    level = schedule.level(mode.array(times))
    known = times >= FIRST_KNOT if family == "discrete" else np.full(times.shape, True)

    def compare(key: str, got: Any, rule: Rule, where: np.ndarray) -> None:
        compare_where(fixture, f"{family}/{key}", got, where, mode, rule, BEFORE)

    compare("alpha", level.alpha, relative(bound), known)
    compare("sigma", level.sigma, relative(bound), known)
    compare("log_alpha", np.log(np.asarray(level.alpha)), of_each(bound), known)
    compare("lambda", level.logsnr / 2, of_each(bound), known)
    if f"{family}/lam_probe" in fixture:
        probe = fixture.input(f"{family}/lam_probe")
        first = schedule.level(np.float64(FIRST_KNOT)).logsnr / 2
        known = probe <= first if family == "discrete" else np.full(probe.shape, True)
        compare("inverse_lambda", schedule.time(from_logsnr(mode.array(2 * probe))), of_each(bound), known)


def check_grids(fixture: Fixture, rule: Rule) -> None:
    """All grids."""
    compare = partial(fixture.compare, mode=FLOAT64, rule=rule)
    for match in fixture.matches(r"(\w+)/grid/(\w+)/(\d+)"):
        compare(match[0], spaced_times(PROCESSES[match[1]], int(match[3]), SKIPS[match[2]], **ENDS[match[1]]))
    for match in fixture.matches(r"((\w+)/ss(\d)/(\w+)/(\d+))/outer"):
        schedule, plan = PROCESSES[match[2]], order_plan(int(match[5]), int(match[3]))
        grid = singlestep(schedule, plan, SKIPS[match[4]], **ENDS[match[2]])
        compare(match[0], schedule.time(grid.at(np.cumsum([0, *plan]))))
        fixture.equal(f"{match[1]}/orders", plan)
    for match in fixture.matches(r"ddim/(\w+)/(\d+)"):
        fixture.equal(match[0], ddim_indices(match[1], int(match[2]), DISCRETE.steps)[::-1])
    for match in fixture.matches(r"deis_discrete/t/(\d+)"):
        compare(match[0], discrete_times(int(match[1])) * DISCRETE.steps - 1)
    for match in fixture.matches(r"deis_linear/(\w+)/(\d+)"):
        compare(match[0], spaced_times(LINEAR, int(match[2]), DEIS_GRIDS[match[1]], **ENDS["linear"]))
    for match in fixture.matches(r"edm/rho7/(\d+)"):
        compare(match[0], edm_grids.discretized("edm", int(match[1]), *SIGMA_RANGE).sigma)


def check_adams(fixture: Fixture, mode: Mode) -> None:
    check_runs(fixture, mode, "x_T", adams_run)
    if mode is not FLOAT64:
        return
    for match in fixture.matches(r"full/ddim/(\w+)/(\d+)/seq"):
        fixture.equal(match[0], ddim_indices(match[1], int(match[2]), DISCRETE.steps)[::-1])
    for match in fixture.matches(r"coef/((\w+)/\w+/\w+)/(\d+)/ts"):
        check_coefficients(fixture, match[0].removesuffix("/ts"), match[2], match[1], int(match[3]))


def check_coefficients(fixture: Fixture, key: str, family: str, name: str, steps: int) -> None:
    """The factors of z and of the outputs in each step of a DEIS table, newest first."""
    for which, quadrature in (("eps_coef", "left"), ("eps_coef_exact", "exact")):
        run = adams_run(name, steps, quadrature)
        of_z, of_eps = factors(run)
        fixture.compare(f"{key}/{which}", of_eps, FLOAT64, COEFFICIENT)
    fixture.compare(f"{key}/x_coef", of_z, FLOAT64, COEFFICIENT)
    times = discrete_times(steps) * DISCRETE.steps - 1 if family == "discrete" else LINEAR.time(run.grid)
    fixture.compare(f"{key}/ts", times, FLOAT64, of_each(SCHEDULE[0]))


def check_dpm(fixture: Fixture, mode: Mode) -> None:
    start, end = float(fixture.meta["t_T"]), float(fixture.meta["t_0"])
    check_runs(fixture, mode, "x_T", partial(dpm_run, family_of(fixture), start, end))


def check_edm(fixture: Fixture, mode: Mode) -> None:
    check_runs(fixture, mode, "latents", edm_run)


def check_convergence(fixture: Fixture, mode: Mode) -> None:
    """Errors of the solvers against the recorded accurate solutions, and those against our own accurate run."""
    network, start = mixture(fixture, mode), mode.array(fixture.input("x_T"))
    check_references(fixture, network, start)
    for match in fixture.matches(r"err/(\w+)/(.*)"):
        family, name = match[1], match[2]
        if name.startswith("ipndm_v/"):
            continue
        ends = ends_of(fixture, family)
        runs = [convergence_run(family, name, steps, *ends) for steps in step_counts(fixture, name)]
        end = fixture.input(f"ref/{family}" if f"ref/{family}" in fixture else f"ref/{family}/x")
        end = end if end.shape == start.shape else end[-1]
        finals = np.array([result(run, network, start, mode) for run in runs])
        errors = np.sqrt(np.mean((finals - end) ** 2, axis=tuple(range(1, finals.ndim))))
        counts = np.array(step_counts(fixture, name))
        fixture.compare(match[0], errors, mode, ERRORS)
        fixture.compare(
            f"local_{match[0].replace('err', 'order', 1)}",
            np.log(errors[:-1] / errors[1:]) / np.log(counts[1:] / counts[:-1]),
            mode,
            ORDERS,
        )


def check_references(fixture: Fixture, network: Mixture, start: np.ndarray) -> None:
    """Recorded accurate solutions against steps of UniPC that are so short that they are as good."""
    for match in fixture.matches(r"ref/(\w+)(/x)?"):
        family, places = match[1], "sigma" if match[1] == "edm" else "t"
        first, end = ends_of(fixture, family)
        at = fixture.input(f"ref/{family}/{places}") if match[2] else np.array([end])
        if family == "edm":
            levels = edm_grids.exploding([first, *at]).at(slice(None, -1))
        else:
            levels = PROCESSES[family].level(np.array([first, *at]))
        seen = run_host(unipc(between(levels, REFERENCE_STEPS)).plain(), network, start, states=True)
        got = seen[REFERENCE_STEPS::REFERENCE_STEPS]
        fixture.compare(match[0], got if match[2] else got[0], FLOAT64, of_each_run(REFERENCE))


def ends_of(fixture: Fixture, family: str) -> tuple[float, float]:
    """(first, last) time of a reference solution, of noise levels for EDM: as the file says, else the usual ones."""
    if family == "edm":
        return SIGMA_RANGE[1], SIGMA_RANGE[0]
    start, times = f"ref/{family}/t_T", f"ref/{family}/t"
    first = float(fixture.input(start)) if start in fixture else ENDS[family]["start"]
    return first, float(fixture.input(times)[-1]) if times in fixture else ENDS[family]["end"]


# -------------------------------------------------------------------------------------------------- runs


class Run(NamedTuple):
    """A recorded run in the package's words.

    Attributes:
      grid: its levels, [nfe + 1] but for heun's.
      argument: maps the levels the network is told to the program's argument for them.
      kept: the states that the program keeps, by row.
      threshold: of x_hat: 'static', 'dynamic' or none.
      clean: the level at which a last evaluation gives the result, if any.
      agrees: how many rows agree with a program that has an error.
    """

    table: Table
    grid: Level
    argument: Callable[[Level], Any]
    kept: Sequence[int]
    threshold: str = ""
    clean: Level | None = None
    agrees: float = math.inf


THRESHOLDS: dict[str, Callable[[Any], Any]] = {"": lambda x: x, "static": Clipped, "dynamic": Thresholded}


def check_runs(fixture: Fixture, mode: Mode, start_key: str, make: Callable[[str, int], Run]) -> None:
    """All results and all states, of the runs that `make` gives for a name and a count."""
    network, start = mixture(fixture, mode), mode.array(fixture.input(start_key))
    exact = mixture(fixture, FLOAT64), fixture.input(start_key)
    counts = fixture.meta.get("valid_nfes") or fixture.meta["valid_num_steps"]
    for key in [key for key in counts if key in fixture]:
        with fixture.attempt(key, mode):
            runs = [make(key.removeprefix("final/"), count) for count in counts[key]]
            finals = stack([result(run, network, start, mode) for run in runs])
            known = np.array([run.table.nfe <= run.agrees for run in runs])
            magnified = None if mode is FLOAT64 else [rounding(partial(result, run), run, *exact).max() for run in runs]
            compare_where(fixture, key, finals, known, mode, run_rule(mode, magnified), DEVIATES)
    for key in {match[1]: None for match in fixture.matches(r"(full/.*/\d+)/\w+")}:
        name, count = key.removeprefix("full/").rsplit("/", 1)
        with fixture.attempt(key, mode):
            check_states(fixture, mode, key, make(name, int(count)), (network, start), exact)


def check_states(
    fixture: Fixture, mode: Mode, key: str, run: Run, given: tuple[Mixture, Any], exact: tuple[Mixture, np.ndarray]
) -> None:
    """Every state, and every call of the network with its output."""
    rows = range(run.table.nfe)

    def compare(what: str, of: Callable[..., np.ndarray], at: Sequence[int]) -> None:
        if f"{key}/{what}" not in fixture:
            return
        got, known = of(run, *given, mode)[list(at)], np.array(at) <= run.agrees
        magnified = None if mode is FLOAT64 else rounding(partial(of, run), run, *exact)[list(at)]
        compare_where(fixture, f"{key}/{what}", got, known, mode, run_rule(mode, magnified), DEVIATES)

    compare("states", states, run.kept)
    compare("eval_x", states, rows)
    compare("eval_eps", noise_estimates, rows)
    compare("eval_denoised", estimates, rows)
    compare("x0_preds", estimates, rows)
    if mode is FLOAT64:
        for what in ("eval_t", "eval_sigma"):
            fixture.compare(f"{key}/{what}", run.argument(run.table.level), mode, of_each(SCHEDULE[0]))


def result(run: Run, network: Any, start: Any, mode: Mode) -> np.ndarray:
    """Where a run ends."""
    denoise, table = THRESHOLDS[run.threshold](network), run.table.plain()
    got = run_host(table, denoise, start) if mode is FLOAT64 else engine.integrate(denoise, table, start)
    return np.asarray(got if run.clean is None else denoise(got, constant(run.clean, start, mode)))


def states(run: Run, network: Any, start: Any, mode: Mode) -> np.ndarray:
    """What the network sees in each row, and the result, [nfe + 1, batch, ...]."""
    denoise, table = THRESHOLDS[run.threshold](network), run.table.plain()
    if mode is FLOAT64:
        return run_host(table, denoise, start, states=True)
    return np.asarray(engine.integrate(denoise, table, start, states=True))


def estimates(run: Run, network: Any, start: Any, mode: Mode) -> np.ndarray:
    """The network's own x_hat in each row, not thresholded, [nfe, batch, ...]."""
    seen = states(run, network, start, mode)
    levels = [constant(run.table.level.at(k), start, mode) for k in range(run.table.nfe)]
    return stack([network(mode.array(z), level) for z, level in zip(seen, levels, strict=False)])


def noise_estimates(run: Run, network: Any, start: Any, mode: Mode) -> np.ndarray:
    """The same as eps."""
    x_hats, told = estimates(run, network, start, mode), run.table.level
    level = Level(*(part.astype(x_hats.dtype)[:, None] for part in told)).expand(x_hats)
    return eps_from_x(states(run, network, start, mode)[:-1], x_hats, level)


def rounding(of: Callable[..., np.ndarray], run: Run, network: Mixture, start: np.ndarray) -> np.ndarray:
    """By how much rounding start and network to float32 changes a run of few steps, for each of the first axis."""
    if run.table.nfe >= ORDINARY_NFE:
        return np.zeros(run.table.nfe + 1)
    exact, rough = of(network, start, FLOAT64), of(Rounded(network), float32(start), FLOAT64)
    return np.abs(rough - exact).max(axis=tuple(range(1, exact.ndim)))


class Rounded(NamedTuple):
    """A network in float32, of which nothing but its input and output is rounded."""

    network: Mixture

    def __call__(self, z: np.ndarray, level: Level, labels: Any = None) -> np.ndarray:
        return float32(self.network(float32(z), level))


def float32(values: np.ndarray) -> np.ndarray:
    """Rounded to float32."""
    return values.astype(np.float32).astype(np.float64)


@cache
def adams_run(name: str, steps: int, quadrature: str = "left") -> Run:
    """ddim/RULE, or FAMILY/SOLVER/GRID and for the discrete family whether the network is called one index lower."""
    family, *parts = name.split("/")
    if family == "ddim":
        grid = DISCRETE.level(np.append(ddim_indices(parts[0], steps, DISCRETE.steps) + 1, 0) / DISCRETE.steps)
        return Run(ddim(grid), grid, index_of, range(steps + 1))
    solver, spacing, *shift = parts
    if family == "discrete":
        times, lower = discrete_times(steps), int(shift[0].removeprefix("shift")) if shift else 0
        schedule, grid, argument = ALPHA, ALPHA.level(times), index_of
        told = DISCRETE.level(times[:-1] - lower * FIRST_KNOT)
    else:
        schedule, grid, argument = LINEAR, make_grid(LINEAR, steps, DEIS_GRIDS[spacing], end=T_0), LINEAR.time
        told = None
    if solver == "ipndm":
        table = ipndm(grid, told=told)
    else:
        kind, order = solver.split("_ab")
        in_time = schedule if kind == "t" else None
        table = deis(grid, int(order) + 1, process=in_time, quadrature=quadrature, told=told)
    return Run(table, grid, argument, range(steps + 1))


@cache
def dpm_run(family: str, start: float, end: float, name: str, nfe: int) -> Run:
    """SOLVER/METHODorder/KIND/SKIP/VARIANT; KIND is dpmsolver where the name has none."""
    solver, method, *kind, skip, variant = name.split("/")
    method, order = method[:-1], int(method[-1])
    schedule, spacing, among = PROCESSES[family], SKIPS[skip], {"start": start, "end": end}
    output, form = "eps" if solver == "dpmsolver" else "x_hat", (kind or ["dpmsolver"])[0]
    options: dict[str, Any] = {"output": output, "kind": form}
    if method == "multistep":
        grid, kept = make_grid(schedule, nfe, spacing, **among), range(nfe + 1)
        options["lower_order_final"] = False if variant == "nolof" else None
    else:
        plan = order_plan(nfe, order) if method == "singlestep" else [order] * (nfe // order)
        if method == "singlestep":
            grid = singlestep(schedule, plan, spacing, **among)
        else:
            grid = refine(schedule, make_grid(schedule, len(plan), spacing, **among), plan, spacing)
        options |= {"method": "singlestep", "plan": plan}
        kept = [int(k) for k in np.cumsum(plan)]
    return Run(
        tabulate(grid, order, **options),
        grid,
        index_of if family == "discrete" else schedule.time,
        kept,
        threshold={"dynthr": "dynamic", "static": "static"}.get(variant, ""),
        clean=grid.at(-1) if variant == "dtz" else None,
    )


@cache
def edm_run(name: str, count: int) -> Run:
    """SOLVER/GRID of the toolbox, or edm_SOLVER_zero, which goes on to zero noise; `count` levels above it."""
    solver, *spacing = name.removeprefix("vesolvers/").split("/")
    grid = edm_grids.discretized(EDM_GRIDS[spacing[0] if spacing else "polynomial"], count, *SIGMA_RANGE)
    if not solver.endswith("_zero"):
        grid = grid.at(slice(None, -1))
    table = edm_table(solver.removeprefix("edm_").removesuffix("_zero"), grid)
    whole = range(table.nfe + 1)
    if table.nfe > len(grid.sigma) - 1:  # two evaluations per step
        whole = [min(k, table.nfe) for k in range(0, table.nfe + 2, 2)]
    return Run(
        table,
        grid,
        lambda level: level.sigma / level.alpha,
        whole,
        threshold="dynamic" if solver.endswith("_thr1") else "",
        agrees=2 if solver == "ipndm_v" else math.inf,
    )


def edm_table(solver: str, grid: Level) -> Table:
    """The toolbox's solvers by name."""
    if match := re.fullmatch(r"dpmpp_?(\d)m(_thr\d)?", solver):
        return tabulate(grid, int(match[1]), output="x_hat", lower_order_final=True)
    if match := re.fullmatch(r"unipc(\d)_(bh\d)(_thr\d)?", solver):
        return unipc(grid, int(match[1]), variant=match[2], correct_final=len(grid.sigma) - 1 < int(match[1]))
    if match := re.fullmatch(r"deis_(tab|rhoab)(\d)", solver):
        schedule = edm_grids.fitted_beta(*SIGMA_RANGE) if match[1] == "tab" else None
        return deis(grid, int(match[2]), process=schedule, quadrature="ends" if schedule else "exact")
    return EDM_SOLVERS[solver](grid)


EDM_SOLVERS: dict[str, Callable[[Level], Table]] = {
    "ddim": ddim,
    "euler": ddim,
    "heun": heun,
    "dpm_2": partial(two_stage, alpha=0.5, trial="log"),
    "ipndm": ipndm,
    "ipndm_v": partial(deis, order=4),  # what it should be
}


def convergence_run(family: str, name: str, steps: int, start: float, end: float) -> Run:
    """The runs of the files on convergence, which are named otherwise."""
    if family == "edm":
        return edm_run(f"{name.split('/')[0]}/polynomial", steps + 1)
    if match := re.fullmatch(r"deis_tab(\d)/t_quadratic", name):
        return adams_run(f"linear/t_ab{match[1]}/t2", steps)
    if name == "ipndm/t_uniform":
        return adams_run("linear/ipndm/t1", steps)
    return dpm_run(family, start, end, f"{name}/plain", steps)


# ------------------------------------------------------------------------------------------------- parts


BEFORE = "times before the first knot, where the program extends its schedule otherwise"
DEVIATES = "the program's weights are wrong, DODE.md section 5"


def compare_where(fixture: Fixture, key: str, got: Any, known: np.ndarray, mode: Mode, rule: Rule, why: str) -> None:
    """Compares the entries of the first axis that the package has; leaves the array out if there are none."""
    if key not in fixture:
        return
    if not known.any():
        fixture.skip([key], why)
        return
    got, reference = np.asarray(got), fixture.arrays[key]
    if got.shape == reference.shape and not known.all():
        got = np.where(known.reshape(-1, *[1] * (got.ndim - 1)), got, reference)
        rule = rule._replace(text=f"{rule.text} ({len(known) - known.sum()} of {len(known)} left out: {why})")
    fixture.compare(key, got, mode, rule)


def of_each_run(bound: float) -> Rule:
    """Relative to the largest number of each entry of the first axis, but not below 1."""

    def scale(ref: np.ndarray) -> np.ndarray:
        return np.maximum(1, np.max(np.abs(ref), axis=tuple(range(1, ref.ndim)), keepdims=True))

    return Rule(bound, "·max(1, max|ref of the run|)", scale)


def eps_rule(bound: float, level: Level) -> Rule:
    """The same, and what eps = (z - alpha·x_hat) / sigma of rounded numbers loses at levels [count, ...]."""
    lost = 8 * np.finfo(np.float32).eps / 2 * level.alpha / level.sigma
    rule = of_each_run(bound)

    def scale(ref: np.ndarray) -> np.ndarray:
        return rule.scale(ref) + lost.reshape(-1, *[1] * (ref.ndim - 1)) / bound

    return Rule(bound, f"{rule.text} + 8 units in the last place·alpha/sigma", scale)


def run_rule(mode: Mode, magnified: Any = None) -> Rule:
    """The README's; in float32 at least some times what a run of few steps makes of rounding, [count]."""
    rule = of_each_run(STATE[mode is not FLOAT64])
    if magnified is None:
        return rule
    least = MAGNIFIED * np.asarray(magnified) / rule.bound
    text = rule.text if not least.any() else f"{rule.text}, or {MAGNIFIED:g} times the effect of rounding"

    def scale(ref: np.ndarray) -> np.ndarray:
        return np.maximum(rule.scale(ref), least.reshape(-1, *[1] * (ref.ndim - 1)))

    return Rule(rule.bound, text, scale)


def index_of(level: Level) -> np.ndarray:
    """The index of the betas by which a discrete model knows a level."""
    return DISCRETE.time(level) * DISCRETE.steps - 1


def discrete_times(steps: int) -> np.ndarray:
    """From the last index to the first, in equal steps, to the last bit as the program made them.

    Where a step begins at an index or just beside it, the sums of DEIS depend on that bit.
    """
    with enable_x64(True):
        return (np.asarray(jnp.linspace(DISCRETE.steps - 1, 0, steps + 1)) + 1) / DISCRETE.steps


def factors(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Those of z, [steps], and of the outputs eps, newest first, [steps, order], in the steps of an Adams table."""
    (alpha, sigma), of = run.table.level, run.table.weights[:, 0]
    newest = -of[:, -1] * sigma / alpha
    return of[:, 0] - newest / sigma, np.column_stack([newest, of[:, 1:-2]])


def family_of(fixture: Fixture) -> str:
    """Whose times a file of DPM-Solver has: the cosine schedule ends early, the discrete network is told indices."""
    if float(fixture.meta["t_T"]) < 1:
        return "cosine"
    told = fixture.matches(r"full/.*/eval_t")
    if not told:
        named = [family for family in PROCESSES if family in fixture.path.stem]
        if len(named) != 1:
            raise ValueError("Nothing in this file tells its schedule: it has no eval_t, and its name does not either.")
        return named[0]
    return "discrete" if np.max(fixture.arrays[told[0][0]]) > 1 else "linear"


def constant(level: Level, like: Any, mode: Mode) -> Level:
    """One level for a whole batch."""
    return Level(*(mode.array(np.full(len(like), a)) for a in level))


def between(levels: Level, parts: int) -> Level:
    """A grid through some levels with so many steps between two, equal in log-SNR."""
    count = len(levels.sigma)
    logsnr = np.interp(np.arange((count - 1) * parts + 1) / parts, np.arange(count), levels.logsnr)
    return from_logsnr(logsnr) if levels.alpha[0] < 1 else Level(np.ones_like(logsnr), np.exp(-logsnr / 2))


def step_counts(fixture: Fixture, name: str) -> list[int]:
    """At which the error of a solver was recorded."""
    return fixture.meta["deis_tab_steps" if name.startswith("deis_tab") else "steps"]


def stack(arrays: Any) -> np.ndarray:
    return np.stack([np.asarray(a) for a in arrays])


# -------------------------------------------------------------------------------------------- what there is


def _is_mixture(fixture: Fixture) -> bool:
    return "probe_x" in fixture and "means" in fixture


def _is_schedules(fixture: Fixture) -> bool:
    return "alphas_cumprod" in fixture and "betas" in fixture


def _is_adams(fixture: Fixture) -> bool:
    return "x_T" in fixture and bool(fixture.matches("final/(ddim|discrete|linear)/.*"))


def _is_dpm(fixture: Fixture) -> bool:
    return "x_T" in fixture and bool(fixture.matches(r"final/dpmsolver(\+\+)?/.*"))


def _is_edm(fixture: Fixture) -> bool:
    return "latents" in fixture and "valid_num_steps" in fixture.meta


def _is_convergence(fixture: Fixture) -> bool:
    return bool(fixture.matches("err/.*") and fixture.matches("ref/.*"))


def _wrong_solver(fixture: Fixture) -> list[tuple[list[str], str]]:
    return [([match[0] for match in fixture.matches(r"(err|local_order)/edm/ipndm_v/.*")], DEVIATES)]


KINDS = [
    Kind("solvers' mixture", _is_mixture, check_mixture),
    Kind("solvers' schedules", _is_schedules, check_schedules),
    Kind("ddim, ipndm, deis", _is_adams, check_adams),
    Kind("dpm-solver", _is_dpm, check_dpm),
    Kind("edm's solvers", _is_edm, check_edm),
    Kind("convergence", _is_convergence, check_convergence, _wrong_solver, modes=(FLOAT64,)),
]
