"""Fixtures of fitted D-ODE solvers (folder solvers): dode_noise.npz, dode_edm.npz, dode_ablations.npz.

The denoiser is the exact one of mixture.npz. Students are fitted on the host in float64 and by the engine in float32,
with the published pairing of states (`published`) unless a fixture says matched. Lambdas are compared in both
conventions. Tolerances are the README's: lambda 1e-7·max(1, |lambda|) (D-EDM 1e-6) and 2e-2, samples 1e-7 and 5e-3 of
the largest. Two float32 lambdas are less determined than that: one whose direction is so short that an error of lambda
moves the state by less than half of the samples' tolerance is compared by that; and of several nearly parallel
directions in a row (variant 'all'), each is compared with the row's largest lambda.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from diffusion_distill.denoisers.clipping import Thresholded
from diffusion_distill.process import edm_grids, grids
from diffusion_distill.process.grids import ddim_indices, make_grid, singlestep
from diffusion_distill.process.levels import Level
from diffusion_distill.process.processes import LinearBetaDiscrete
from diffusion_distill.process.vp_discrete import LinearAlphaDiscrete
from diffusion_distill.solvers import SOLVERS, Table, ddim, deis, dode, dpm_solver, dpm_solver_pp, engine, heun, ipndm
from diffusion_distill.solvers.dpm_solver import order_plan
from diffusion_distill.solvers.engine import run_host
from diffusion_distill.solvers.least_squares import Fit
from diffusion_distill.solvers.pairing import Teacher, nested, published
from golden_checks.common import FLOAT64, Fixture, Kind, Mode, Rule, absolute, of_each, of_largest, relative
from golden_checks.solvers_common import mixture

BETAS = LinearBetaDiscrete(logsnr_max=float("inf"))
#: As iPNDM and DEIS read the same betas.
ALPHAS = LinearAlphaDiscrete(logsnr_max=float("inf"))
GRID = of_each(1e-10)
#: The published fit rounds each lambda to float32 while it walks.
ROUNDED = of_each(1e-5)._replace(text="·max(1, |ref|) (float32 lambdas in the published fit)")


@dataclass(frozen=True)
class Case:
    """One fit: prefix of its keys, and the two tables."""

    prefix: str
    student: Table
    teacher: Teacher

    def key(self, name: str) -> str:
        """The key of one of its arrays."""
        return f"{self.prefix}/{name}"


def lambda_rule(mode: Mode, edm: bool = False) -> Rule:
    return of_each((1e-6 if edm else 1e-7) if mode is FLOAT64 else 2e-2)


def moving_rule(fixture: Fixture, case: Case, published: bool) -> Rule:
    """The float32 rule, with slack where a lambda hardly moves the state; how far it does is measured in float64."""
    start = fixture.arrays["fit_latents" if "fit_latents" in fixture else "fit_x_T"]
    fit = dode.fit_host(mixture(fixture, FLOAT64), case.student, case.teacher, start)
    lambdas, moved = lambdas_of(fit, case.student, published), np.sqrt(np.maximum(fit.plain**2 - fit.fitted**2, 0))
    slack = 2.5e-3 / 2e-2 * np.divide(np.abs(lambdas), moved, out=np.zeros_like(moved), where=moved > 0)
    return Rule(
        2e-2, "·max(1, |ref|), or moves the state by 2.5e-3", lambda ref: np.maximum(np.maximum(1, abs(ref)), slack)
    )


def state_rule(mode: Mode, edm: bool = False) -> Rule:
    return of_largest((1e-6 if edm else 1e-7) if mode is FLOAT64 else 5e-3)


def fitted(case: Case, mode: Mode, denoise: Any, start: Any) -> Fit:
    """The case's student, fitted in one precision."""
    return (dode.fit_host if mode is FLOAT64 else dode.fit)(denoise, case.student, case.teacher, start)


def walked(table: Table, mode: Mode, denoise: Any, start: Any) -> np.ndarray:
    """Everything the network sees, and the result."""
    if mode is FLOAT64:
        return run_host(table.plain(), denoise, start, states=True)
    return np.asarray(engine.integrate(denoise, table, start, states=True))


def lambdas_of(fit: Fit, student: Table, published: bool) -> np.ndarray:
    """[rows] of one direction per row."""
    lambdas = np.asarray(fit.lambdas, np.float64)
    return (lambdas * student.directions.published if published else lambdas)[:, 0]  # type: ignore[union-attr]


def check_fit(fixture: Fixture, mode: Mode, case: Case, denoise: Any, starts: tuple[Any, Any], edm: bool) -> None:
    """The lambdas of a case, and what its student draws with them."""
    compare, key = partial(fixture.compare, mode=mode), case.key
    fit = fitted(case, mode, denoise, starts[0])
    for name, convention in (("lambda", True), ("lambda_paper", False)):
        rule = lambda_rule(mode, edm) if mode is FLOAT64 else moving_rule(fixture, case, convention)
        compare(key(name), lambdas_of(fit, case.student, convention), rule=rule)
    compare(key("fit_final_first8"), fit.result[:8], rule=state_rule(mode, edm))
    distilled = case.student.distilled(fit.lambdas)
    compare(key("fresh_final"), walked(distilled, mode, denoise, starts[1])[-1], rule=state_rule(mode, edm))
    check_walks(fixture, mode, case, distilled, denoise, starts, edm)


def check_walks(
    fixture: Fixture, mode: Mode, case: Case, distilled: Table, denoise: Any, starts: tuple[Any, Any], edm: bool
) -> None:
    """Every state of the cases that are stored whole."""
    names = ("fit_states", "fit_eval_x", "targets", "targets_without_last", "fit_eval_eps", "fit_denoised")
    if not any(case.key(name) in fixture and fixture.arrays[case.key(name)].size for name in names):
        return
    compare, key, rule = partial(fixture.compare, mode=mode), case.key, state_rule(mode, edm)
    states = walked(distilled, mode, denoise, starts[0])
    outputs = [
        denoise(z, broadcast(level, z), None) for z, level in zip(states[:-1], levels_of(distilled), strict=True)
    ]
    compare(key("fit_states"), states if len(states) == rows_of(fixture, key("fit_states")) else states[:-1], rule=rule)
    compare(key("fit_eval_x"), states[:-1], rule=rule)
    for name in ("fit_denoised", "fit_eval_denoised"):
        compare(key(name), np.stack(outputs), rule=rule)
    if key("fit_eval_eps") in fixture:
        pairs = zip(states[:-1], outputs, levels_of(distilled), strict=True)
        eps = np.stack([(z - level.alpha * x_hat) / level.sigma for z, x_hat, level in pairs])
        compare(key("fit_eval_eps"), eps, rule=rule)
    fresh = walked(distilled, mode, denoise, starts[1])
    compare(key("fresh_states"), fresh, rule=rule)
    compare(key("fresh_eval_x"), fresh[:-1], rule=rule)
    targets = walked(case.teacher.table, mode, denoise, starts[0])
    chosen = targets[[0, *case.teacher.targets]]
    compare(key("targets"), chosen if len(chosen) == rows_of(fixture, key("targets")) else chosen[1:], rule=rule)
    compare(key("targets_without_last"), chosen[1:-1], rule=rule)
    compare(key("target_last_first8"), chosen[-1][:8], rule=rule)


def rows_of(fixture: Fixture, key: str) -> int:
    return len(fixture.arrays[key]) if key in fixture else -1


def levels_of(table: Table) -> list[Level]:
    return [table.level.at(k) for k in range(table.nfe)]


def broadcast(level: Level, like: Any) -> Level:
    return Level(*(np.full(len(like), a, np.asarray(like).dtype) for a in level))


# --------------------------------------------------------------------------------------- noise prediction


def by_index(index: np.ndarray, schedule: LinearBetaDiscrete = BETAS) -> Level:
    """Levels of indices into the betas, also between them; index -1 at the end is clean."""
    if index[-1] >= 0:
        return schedule.level((index + 1) / schedule.steps)
    return grids.clean_end(Level(*(np.append(a, 0) for a in schedule.level((index[:-1] + 1) / schedule.steps))))


def adams(make: Callable[..., Table], index: np.ndarray) -> Table:
    """iPNDM or DEIS as published: the network is told one index less."""
    return make(by_index(index, ALPHAS), told=BETAS.level(index[:-1] / BETAS.steps))


def noise_case(fixture: Fixture, prefix: str, solver: str, nfe: int, scale: int) -> Case:
    """A fit of dode_noise.npz."""
    key = lambda name: f"{prefix}/{name}"  # noqa: E731
    student_grid, teacher_grid = fixture.input(key("student_grid")), fixture.input(key("teacher_grid"))
    if solver == "d_ddim":
        student, teacher = (ddim(by_index(index)) for index in (student_grid, teacher_grid))
    elif solver.startswith("d_dpmsolver"):
        plan = order_plan(nfe, int(solver[-1]))
        student = dpm_solver(singlestep(BETAS, plan), int(solver[-1]), method="singlestep", plan=plan)
        teacher = ddim(by_index(teacher_grid))
    else:
        make = ipndm
        if solver.startswith("d_deis"):
            make = partial(deis, order=int(solver[-1]) + 1, process=ALPHAS, quadrature="left")
        student, teacher = (adams(make, index) for index in (student_grid, teacher_grid))
    return Case(prefix, student, published(student, teacher))


def check_noise(fixture: Fixture, mode: Mode) -> None:
    denoise = mixture(fixture, mode)
    starts = mode.array(fixture.input("fit_x_T")), mode.array(fixture.input("fresh_x_T"))
    for found in fixture.matches("((d_[a-z]+[0-9]*)/N([0-9]+)_C([0-9]+))/lambda"):
        solver, nfe, scale = found[2], int(found[3]), int(found[4])
        with fixture.attempt(found[1], mode):
            case = noise_case(fixture, found[1], solver, nfe, scale)
            if mode is FLOAT64:
                check_noise_tables(fixture, case, solver, nfe, scale)
            check_fit(fixture, mode, case, denoise, starts, edm=False)


def check_noise_tables(fixture: Fixture, case: Case, solver: str, nfe: int, scale: int) -> None:
    """Grids, pairings and coefficients, made on the host."""
    compare, key = partial(fixture.compare, mode=FLOAT64), case.key
    directions = case.student.directions
    fixture.equal(key("target_teacher_index"), case.teacher.targets)
    steps = min(BETAS.steps, scale * nfe)
    told = np.asarray(case.student.level.sigma / case.student.level.alpha)
    times = BETAS.time(Level(np.ones_like(told), told)) * BETAS.steps - 1
    compare(key("fit_eval_t"), times, rule=of_each(1e-8))
    fixture.compare(key("lambda_published_f32"), fixture.arrays[key("lambda")], FLOAT64, ROUNDED)
    if solver == "d_ddim" or solver.startswith("d_dpm"):
        compare(key("teacher_grid"), [*ddim_indices("uniform_torch", steps), -1], rule=absolute(0))
    else:
        for name, count in (("student_grid", nfe), ("teacher_grid", steps)):
            compare(key(name), np.linspace(BETAS.steps - 1, 0, count + 1), rule=GRID)
    if solver == "d_ddim":
        compare(key("student_grid"), [*ddim_indices("uniform_torch", nfe), -1], rule=absolute(0))
    if solver.startswith("d_dpm"):
        plan = order_plan(nfe, int(solver[-1]))
        fixture.equal(key("orders"), plan)
        outer = singlestep(BETAS, plan).at(np.cumsum([0, *plan]))
        compare(key("student_grid"), BETAS.time(outer), rule=GRID)
    for name in ("eps_coef", "eps_coef_ddim"):
        compare(key(name), directions.published[:, 0], rule=relative(1e-9))  # type: ignore[union-attr]
    if key("ab_eps_coef") in fixture:
        compare(key("ab_eps_coef"), eps_coefficients(case.student), rule=relative(1e-9))


def eps_coefficients(table: Table) -> np.ndarray:
    """What the step's y takes of each eps, newest first, [rows, order]."""
    y = table.weights[:, 0]
    newest = -y[:, -1] * table.level.sigma / table.level.alpha  # x_hat enters as part of eps only
    return np.column_stack([newest, y[:, 1:-2]])


# ------------------------------------------------------------------------------------------------------ EDM


def check_edm(fixture: Fixture, mode: Mode) -> None:
    denoise = mixture(fixture, mode)
    starts = mode.array(fixture.input("fit_latents")), mode.array(fixture.input("fresh_latents"))
    for found in fixture.matches("(d_ddim/n([0-9]+)_C([0-9]+)|d_edm/nfe([0-9]+)_C([0-9]+))/lambda"):
        steps, scale = (int(found[2]), int(found[3])) if found[2] else (int(found[4]) // 2 + 1, int(found[5]))
        student = ddim(edm_grids.edm(steps)) if found[2] else heun(edm_grids.edm(steps), keep_slope=True)
        teacher = ddim(edm_grids.edm(scale * student.nfe))
        case = Case(found[1], student, published(student, teacher))
        if mode is FLOAT64:
            sigma = student.level.sigma
            fixture.compare(case.key("student_sigma"), [*sigma, 0], FLOAT64, GRID)
            fixture.compare(case.key("student_eval_sigma"), sigma, FLOAT64, GRID)
            fixture.compare(case.key("teacher_sigma"), [*teacher.level.sigma, 0], FLOAT64, GRID)
        check_fit(fixture, mode, case, denoise, starts, edm=not found[2])


# ------------------------------------------------------------------------------------------------ ablations

#: Directories of dode_ablations.npz -> (solver, how much more the paper's first lambda is than ours).
VARIANTS = {"sep": ("ddim-sep", 1), "all": ("ddim-all", 1), "two": ("ddim-2", 0), "d_ddim": ("ddim", 0)}


def check_ablations(fixture: Fixture, mode: Mode) -> None:
    denoise = mixture(fixture, mode)
    starts = mode.array(fixture.input("fit_x_T")), mode.array(fixture.input("fresh_x_T"))
    compare = partial(fixture.compare, mode=mode)
    for found in fixture.matches("([a-z_0-9]+)/N([0-9]+)_C([0-9]+)/lambda(_paper)?"):
        name, nfe, scale, prefix = found[1], int(found[2]), int(found[3]), found[0].rsplit("/", 1)[0]
        if name in VARIANTS:
            solver, more = VARIANTS[name]
            student = SOLVERS[solver](by_index(np.append(ddim_indices("uniform_torch", nfe), -1)))
            check_variant(fixture, mode, Case(prefix, student, discrete_teacher(student, scale)), more, denoise, starts)
        elif name == "d_ddim_matched":
            check_matched(fixture, mode, prefix, nfe, scale, denoise, starts)
        else:
            order = int(re.sub("[^0-9]", "", name))
            plan = order_plan(nfe, order)
            student = dpm_solver_pp(singlestep(BETAS, plan), order, method="singlestep", plan=plan)
            case = Case(prefix, student, discrete_teacher(student, scale))
            check_fit(fixture, mode, case, denoise, starts, edm=False)
    for found in fixture.matches("(fixed|la_ddim)/N([0-9]+)_lam([0-9.]+)/fresh_final"):
        grid = by_index(np.append(ddim_indices("uniform_torch", int(found[2])), -1))
        student = SOLVERS["ddim" if found[1] == "fixed" else "ddim-la"](grid)
        table = student.distilled(np.full((student.nfe, 1), float(found[3])))
        compare(found[0], walked(table, mode, denoise, starts[1])[-1], rule=state_rule(mode))
    for found in fixture.matches("threshold/dynamic_q([0-9.]+)_max([0-9.]+)"):
        x = mode.array(fixture.input("threshold/x0"))
        thresholded = Thresholded(
            jax.tree_util.Partial(lambda z, level, labels=None: z), float(found[1]), float(found[2])
        )
        compare(found[0], thresholded(x, Level(1.0, 0.0)), rule=of_each(1e-10 if mode is FLOAT64 else 2e-5))


def discrete_teacher(student: Table, scale: int) -> Teacher:
    """DDIM on the betas' own indices, paired as published."""
    steps = min(BETAS.steps, scale * student.nfe)
    return published(student, ddim(by_index(np.append(ddim_indices("uniform_torch", steps), -1))))


def check_variant(fixture: Fixture, mode: Mode, case: Case, more: int, denoise: Any, starts: tuple[Any, Any]) -> None:
    """One of the paper's variants: several lambdas per row, in the paper's convention; NaN where there is none."""
    fit, key = fitted(case, mode, denoise, starts[0]), case.key("lambda")
    found = np.array(fit.lambdas, np.float64)
    found[:, 0] += more
    found = np.where(np.isnan(fixture.arrays[key]), np.nan, found)
    rule = lambda_rule(mode)
    if mode is not FLOAT64:
        largest = lambda ref: np.maximum(1, np.nanmax(np.abs(ref), axis=1, keepdims=True))  # noqa: E731
        rule = Rule(rule.bound, "·max(1, the row's largest)", largest)
    fixture.compare(key, found, mode, rule)
    fixture.compare(case.key("fit_final_first8"), fit.result[:8], mode, state_rule(mode))
    fresh = walked(case.student.distilled(fit.lambdas), mode, denoise, starts[1])[-1]
    fixture.compare(case.key("fresh_final"), fresh, mode, state_rule(mode))


def check_matched(
    fixture: Fixture, mode: Mode, prefix: str, nfe: int, scale: int, denoise: Any, starts: tuple[Any, Any]
) -> None:
    """D-DDIM with nested grids of times from 1 to 1e-3: the package's own pairing."""
    student = ddim(make_grid(BETAS, nfe, end=1e-3))
    case = Case(prefix, student, nested(student, BETAS, scale, ddim))
    check_fit(fixture, mode, case, denoise, starts, edm=False)
    for name, table in (("plain_ddim_fresh_final", student), ("teacher_fresh_final", case.teacher.table)):
        fixture.compare(case.key(name), walked(table, mode, denoise, starts[1])[-1], mode, state_rule(mode))


# -------------------------------------------------------------------------------------------- what there is


def not_stored(fixture: Fixture) -> list[tuple[list[str], str]]:
    """Arrays of length zero."""
    return [([key for key, value in fixture.arrays.items() if not value.size], "not stored for this number of steps")]


KINDS = [
    Kind("dode ablations", lambda f: bool(f.matches("(sep|all|fixed|la_ddim|threshold)/.*")), check_ablations),
    Kind("dode noise", lambda f: "fit_x_T" in f and bool(f.matches("d_.*/lambda")), check_noise, not_stored),
    Kind("dode edm", lambda f: "fit_latents" in f, check_edm),
]
